"""Rows of a cache into memory, in an order that is a pure function."""
