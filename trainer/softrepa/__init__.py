"""SoftREPA, which trains a few text tokens of a frozen text-to-image model to tell captions apart."""
