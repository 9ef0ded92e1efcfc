"""Training: arguments, objectives, the one loop, checkpoints, curves."""
