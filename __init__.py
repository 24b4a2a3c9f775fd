"""Encode an image set once, then train every representation-alignment method from the cache."""

__version__ = "0.1.0"
