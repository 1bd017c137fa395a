"""Many tasks of one frozen model in one batch: requests go in, events come out, a step at a time."""
