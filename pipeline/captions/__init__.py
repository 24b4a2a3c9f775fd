"""Captions of images, from where they are written down to the columns of text encoders."""
