"""A simulated multi-surface log with known truth: see `WorldParameters` for the world, `simulate` for the files."""
