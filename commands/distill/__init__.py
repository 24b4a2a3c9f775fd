"""`repa distill`."""
