"""What a disk and a cache give, measured here."""
