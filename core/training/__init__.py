"""Training: one loop, exact resume, checkpoints that are whole or not there."""
