"""The errors a user can mend. The command line prints them as one line, without a traceback, and exits 1."""

from __future__ import annotations


class RepaError(Exception):
    """A mistake that the user can mend.

    Its text is ``what; remedy``. Nothing reads that text again: who needs a part of it takes the attribute.

    Args:
        what: what is wrong, and where (file, row, shard, flag).
        remedy: what to do about it.
        field: the flag, setting, column or key that it is about, as ``--limit`` or ``method.depth``; empty
            where it is about none.
    """

    def __init__(self, what: str, remedy: str = "", *, field: str = "") -> None:
        super().__init__(what, remedy)
        self.what = what
        self.remedy = remedy
        self.field = field

    def __str__(self) -> str:
        return f"{self.what}; {self.remedy}" if self.remedy else self.what

    @property
    def lines(self) -> tuple[str, ...]:
        """Lines in which it is shown, one but for an error that lists several problems."""
        return (str(self),)


class CacheError(RepaError):
    """A cache that is missing, incomplete, of another kind, or in use by another writer."""


class CorruptRowError(CacheError):
    """Stored bytes that do not match their checksum.

    Attributes:
        row: index of the image in the cache.
        column: column whose bytes are wrong, for example ``dinov2-b/patch``.
        path: the shard file that holds them.
        reason: what is wrong with them.
    """

    def __init__(self, *, row: int, column: str, path: str, reason: str) -> None:
        super().__init__(
            f"row {row} of {column} is corrupt ({reason}) in {path}",
            "`repa cache verify` lists every bad row, `repa cache repair` encodes them again",
            field=column,
        )
        self.row = row
        self.column = column
        self.path = path
        self.reason = reason

    def __reduce__(self) -> tuple[object, ...]:
        return _corrupt_row, (self.row, self.column, self.path, self.reason)


def _corrupt_row(row: int, column: str, path: str, reason: str) -> CorruptRowError:
    """Make the error again in another process, where its constructor takes keywords alone."""
    return CorruptRowError(row=row, column=column, path=path, reason=reason)
