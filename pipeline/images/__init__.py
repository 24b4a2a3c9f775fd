"""Image sources, decoding and cropping."""
