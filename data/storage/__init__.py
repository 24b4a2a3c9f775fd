"""The storage of bytes in files and folders, in buckets, and past the page cache."""
