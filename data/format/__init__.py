"""What a cache is: its columns, its manifest, where each file lies, and what makes a shard exist."""
