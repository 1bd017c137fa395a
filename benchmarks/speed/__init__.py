"""What the speed benchmarks have in common: cases, sides in processes of their own, comparison, facts."""
