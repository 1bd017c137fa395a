"""Looking at a prompt and at the run that made it: nearest words, plots, the report."""
