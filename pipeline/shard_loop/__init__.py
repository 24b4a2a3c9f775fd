"""The shard loop: one device's share of a cache, its processes, its writer."""
