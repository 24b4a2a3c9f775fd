"""One training step: draws, forward pass, terms of the loss."""
