"""Looking after a cache: verify, repair, merge, and what it holds."""
