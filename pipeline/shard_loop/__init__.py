"""The shard loop of one device, with its processes and its writer."""
