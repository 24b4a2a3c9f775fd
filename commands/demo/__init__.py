"""`repa demo`."""
