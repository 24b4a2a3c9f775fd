"""The rules that image sources share, for limits, fingerprints and names of classes."""

from __future__ import annotations

import hashlib
import os
from typing import TYPE_CHECKING, Any

import numpy as np

from ...data.errors import RepaError
from ...data.storage.files import os_errors
from ...data.units import counted

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from numpy.typing import NDArray

# ImageNet-21k has 21,841; a label beyond is an identity, or damage, and names for all would fill the memory
MAX_CLASSES = 1 << 20


def spaced(count: int, limit: int | None) -> NDArray[np.int64]:
    """Choose which of ``count`` images a limit takes.

    They are number floor(i·count/limit), evenly spaced, or None for all.
    """
    if limit is None or limit >= count:
        return np.arange(count, dtype=np.int64)
    return np.arange(limit, dtype=np.int64) * count // limit


def fingerprint_of(names: Iterable[str], labels: NDArray[np.int32], sizes: Iterable[int]) -> str:
    """Compute ``sha256:…`` over one line ``name⇥label⇥bytes`` for each image."""
    digest = hashlib.sha256()
    for name, label, size in zip(names, labels.tolist(), sizes, strict=True):
        digest.update(f"{name}\t{label}\t{size}\n".encode())
    return f"sha256:{digest.hexdigest()}"


def numbered_classes(labels: NDArray[np.integer[Any]], *, where: str) -> tuple[str, ...]:
    """Name classes that only have numbers ``0`` to ``K-1``, K one more than the largest label.

    Raises:
        RepaError: a label too large to count classes.
    """
    largest = int(labels.max())
    if largest >= MAX_CLASSES:
        raise RepaError(
            f"{where} has the label {largest}, which is no number of a class counted from 0 "
            f"(at most {MAX_CLASSES - 1})",
            "write the labels as such numbers",
        )
    return tuple(map(str, range(largest + 1)))


def check_key(key: str, where: str) -> None:
    """Refuse a key that keys.txt cannot hold.

    Raises:
        RepaError: names the key and where it is.
    """
    if key and key.isascii() and key.isprintable():
        return
    if not key or "\n" in key or "\r" in key:
        what = "holds a line break" if key else "is empty"
        raise RepaError(f"the name {key!r} in {where} {what}, which keys.txt cannot hold", "rename it")
    try:
        key.encode()
    except UnicodeEncodeError:
        raise RepaError(f"the name {os.fsencode(key)!r} in {where} is not UTF-8", "rename it") from None


def class_names_of(labels: NDArray[np.integer[Any]], file: Path | None, *, where: str) -> tuple[str, ...]:
    """Return the names of the classes that labels count.

    Args:
        labels: ``[N]``, from 0.
        file: has a name in each line; None names them ``0`` to ``K-1``, K one more than the largest.
        where: the images' name, for the errors.

    Raises:
        RepaError: the file cannot be read, has a blank line or too few of them; without a file, a label too
            large to count classes.
    """
    if file is None:
        return numbered_classes(labels, where=where)
    largest = int(labels.max())
    with os_errors("read", file):
        try:
            names = tuple(file.read_text(encoding="utf-8").splitlines())
        except UnicodeDecodeError:
            raise RepaError(
                f"--class-names {file} is not UTF-8",
                "give a text file, a name a line",
                field="--class-names",
            ) from None
    if largest >= len(names):
        raise RepaError(
            f"--class-names {file} names {counted(len(names), 'class')}, {where} has labels up to {largest}",
            "give a name for each, the first line for class 0",
            field="--class-names",
        )
    blank = next((number for number, name in enumerate(names, 1) if not name.strip()), None)
    if blank is not None:
        raise RepaError(
            f"--class-names {file} has no name in line {blank}",
            "give one for each class",
            field="--class-names",
        )
    return names
