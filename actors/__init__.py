"""Who does it: Ray shells that build adapters, forward calls, and nothing else."""
