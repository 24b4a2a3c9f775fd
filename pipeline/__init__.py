"""Stage 1, which makes a cache from images, an autoencoder and teachers."""
