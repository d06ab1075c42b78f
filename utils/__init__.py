"""What every room needs and that knows of no config: processes, checkpoints, counting, seeds, plots."""
