"""One training step, from draws over the forward pass to the terms of the loss."""
