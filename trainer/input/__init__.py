"""Batches for the training step from the cache, from tars, or with a live teacher."""
