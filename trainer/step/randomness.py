"""Randomness as a function of seed, rank and step, never of what was drawn before.

So no generator's state is in a checkpoint, and a resumed run draws what the undisturbed one would have drawn.
"""

from __future__ import annotations

import hashlib

import torch


def derived_seed(*key: int | str) -> int:
    """Derive a seed in [0, 2⁶³) from a key by SHA-256 of its parts."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator_for(*key: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """Make a generator on a device, seeded by a key, for example ``(seed, "step", rank, step)``."""
    return torch.Generator(device).manual_seed(derived_seed(*key))
