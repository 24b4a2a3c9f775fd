"""Bytes, seconds and counts, written for people."""

from __future__ import annotations


def counted(count: int, what: str, form: str = "") -> str:
    """Say a number of something, for example ``0 shards``, ``1 shard``, ``1,024 images``.

    Args:
        count: how many.
        what: the noun in the singular.
        form: format of the number, for example ``,``.
    """
    if count == 1:
        return f"1 {what}"
    return f"{count:{form}} {what}{'es' if what.endswith(('ch', 'ss')) else 's'}"


def human_bytes(count: float) -> str:
    """Say a number of bytes in decimal units with three digits, for example ``1.23 GB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB" if count < 999.5 else f"{count:.0f} TB"


def human_rate(rate: float, what: str = "images") -> str:
    """Say a rate a second, for example ``0.21 images/s``, ``35.6 images/s``, ``1204 images/s``."""
    digits = 2 if rate < 9.995 else 1 if rate < 999.5 else 0
    return f"{rate:.{digits}f} {what}/s"


def human_seconds(seconds: float) -> str:
    """Say a duration, for example ``8.2 s``, ``3 min 20 s``, ``2 h 5 min``."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"
