"""`repa bank`."""
