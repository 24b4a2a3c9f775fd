"""Text encoders by name."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Final

from ...data.errors import RepaError
from .facts import TEXT_ENCODERS

if TYPE_CHECKING:
    from .facts import TextFacts

FLAG: Final = "--text-encoder"


def find_text_encoder(name: str) -> TextFacts:
    """Return what is known of a text encoder without its weights.

    Args:
        name: what ``--text-encoder`` takes, which is also the name of its source in a cache.

    Raises:
        RepaError: there is none of that name.
    """
    if name not in TEXT_ENCODERS:
        near = difflib.get_close_matches(name, TEXT_ENCODERS, n=3)
        suggestion = f"did you mean {' or '.join(near)}? " if near else ""
        raise RepaError(
            f"text encoder {name!r} is unknown",
            f"{suggestion}give {FLAG} one of {', '.join(TEXT_ENCODERS)}",
            field=FLAG,
        )
    return TEXT_ENCODERS[name]
