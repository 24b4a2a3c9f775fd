"""`repa cache …`."""
