"""The cache, as it is written, committed, read, ordered, streamed and verified."""
