"""Latents that other programs wrote, read from their layouts and written as a cache."""
