"""What the network learns to predict, along which path, at which times."""
