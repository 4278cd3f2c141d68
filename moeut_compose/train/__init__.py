"""Training: plan, loop, checkpoints and the run folder."""
