"""`repa bench`."""
