"""Where bytes lie: files and folders, open descriptors, buckets, and reads past the page cache."""
