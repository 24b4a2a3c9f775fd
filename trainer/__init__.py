"""Stage 2, which trains backbones by flow and method from a cache."""
