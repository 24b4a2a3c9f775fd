"""A cache as WebDataset tars: exported, imported, streamed."""
