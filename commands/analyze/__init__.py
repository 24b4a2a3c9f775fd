"""`repa analyze` looks into caches and runs."""
