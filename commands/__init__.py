"""The commands of `repa`, each of which joins pipeline, trainer and data for one job."""
