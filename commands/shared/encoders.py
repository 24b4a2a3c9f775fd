"""Which teachers and weights the flags of a command name."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ...data.errors import RepaError

if TYPE_CHECKING:
    from collections.abc import Sequence


DEFAULT_ENCODER = "dinov2-b"


def parse_weights(pairs: Sequence[str], *, flag: str = "--weights") -> dict[str, Path]:
    """Parse texts ``NAME=FILE`` into encoder → file of its weights.

    Args:
        pairs: the texts.
        flag: the flag that gave them, for errors.

    Raises:
        RepaError: not of that form, or a name twice.
    """
    weights: dict[str, Path] = {}
    for pair in pairs:
        name, sign, file = pair.partition("=")
        if not (name and sign and file):
            raise RepaError(
                f"{flag} {pair!r} is not NAME=FILE",
                f"write for example {flag} {DEFAULT_ENCODER}=dinov2_vitb14_pretrain.pth",
                field=flag,
            )
        if name in weights:
            raise RepaError(f"{flag} names {name} twice", "give one file for each encoder", field=flag)
        weights[name] = Path(file)
    return weights
