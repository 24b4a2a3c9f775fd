"""A run: its folder, its checks, its callbacks, from the first step or the last checkpoint."""
