"""Foreign checkpoints: one table per format, read both ways."""
