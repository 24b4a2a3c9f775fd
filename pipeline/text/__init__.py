"""Text encoders, which make columns of captions as teachers make those of images."""
