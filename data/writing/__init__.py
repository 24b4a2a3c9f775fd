"""Creating a cache, writing its shards, and what was fitted before."""
