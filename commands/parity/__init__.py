"""`repa parity`, losses from a cache beside those of its teachers called live."""
