"""A run with its folder, checks and callbacks, from the first step or the last checkpoint."""
