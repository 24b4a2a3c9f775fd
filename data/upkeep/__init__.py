"""The upkeep of a cache, which is verified, repaired, merged, and looked into."""
