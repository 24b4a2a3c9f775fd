"""The errors a user can mend. The command line prints them as one line, without a traceback, and exits 1."""

from __future__ import annotations


class RepaError(Exception):
    """A mistake the user can mend: the message says what is wrong, where, and what to do."""


class CacheError(RepaError):
    """A cache that is missing, incomplete, of another kind, or in use by another writer."""


class CorruptRowError(CacheError):
    """Stored bytes that do not match their checksum.

    Attributes:
        row: index of the image in the cache.
        column: column whose bytes are wrong, for example ``dinov2-b/patch``.
        path: the shard file that holds them.
    """

    def __init__(self, *, row: int, column: str, path: str, reason: str) -> None:
        super().__init__(
            f"row {row} of {column} is corrupt ({reason}) in {path}; "
            "`repa cache verify` lists every bad row, `repa cache repair` encodes them again"
        )
        self.row = row
        self.column = column
        self.path = path
        self.reason = reason
