"""`repa evaluate`."""
