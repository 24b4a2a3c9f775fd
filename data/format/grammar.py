"""The grammar of names that become paths, of sources and models, whoever wrote them down.

A name is letters, digits and ``. _ + -``, begins with a letter or a digit, holds no ``..`` and is at most 100
characters long, which makes it one component of a path on every file system. `layout` makes no path of
another.
"""

from __future__ import annotations

import re
from functools import lru_cache

from ..edge import shortened
from ..errors import CacheError

MOST_LETTERS = 100
RESERVED = frozenset(
    {
        "c",
        "calibration",
        "captions",
        "commits",
        "keys.txt",
        "label",
        "of-image",
        "valid",
        "zarr.json",
        "zarr.json.copy",
    }
)
"""What lies in a cache's folder beside its sources, and a chunk's folder in an array's."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")


@lru_cache(maxsize=1024)
def is_name(text: str) -> bool:
    """Return whether a text is of the grammar and free to name a source or a model."""
    return (
        len(text) <= MOST_LETTERS
        and _NAME.fullmatch(text) is not None
        and ".." not in text
        and text.lower() not in RESERVED
    )


def checked_name(text: str, what: str = "source") -> str:
    """Return a text that is a name.

    Args:
        text: the text.
        what: what it names, for the error.

    Raises:
        CacheError: it is not of the grammar.
    """
    if not is_name(text):
        raise CacheError(
            f"{what} {shortened(text)!r} has a name that no file may have",
            "a name is letters, digits, '.', '_', '+' and '-', at most "
            f"{MOST_LETTERS}, and begins with a letter or digit",
            field=what,
        )
    return text
