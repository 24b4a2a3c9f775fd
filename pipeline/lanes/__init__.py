"""Where batches are computed, with bytes that do not depend on cores."""
