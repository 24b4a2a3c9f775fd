"""The format of a cache, which is its columns, its manifest, its files, and what makes a shard exist."""
