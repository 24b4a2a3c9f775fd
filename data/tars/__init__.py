"""A cache as WebDataset tars, which are exported, imported and streamed."""
