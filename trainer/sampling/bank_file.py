"""Banks as safetensors files, whole or factored.

A file holds ``vectors`` float16 ``[N, D]``, or ``coefficients`` float16 ``[N, d]`` with ``basis`` ``[D, d]``,
``mean`` ``[D]`` and ``singular_values`` ``[d]`` in float32; ``rows`` int64 ``[N]`` where not every row of the
cache is in it; and in its metadata, as ``repa_bank``, what it is of.
"""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from ...data.edge import parse_json, printable
from ...data.errors import RepaError
from ...data.format.canonical import canonical_json
from ...data.storage.files import create_file, make_folder, os_errors, partial_path, publish
from .bank import FLAG, VERSION, BankSaid, FactoredBank, WholeBank
from .bank_factors import Basis, basis_of, coefficients_of
from .streamed_tensors import StreamedTensor, write_tensors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from numpy.typing import NDArray

    from .bank import CacheBank, StoredBank

_METADATA = "repa_bank"
_REMEDY = "build it again with `repa bank build`"
SLAB_ROWS = 8_192
"""Vectors that are in memory at a time; of 768 channels they are 25 MB in float32."""


def rows_read(bank: CacheBank, rank: int | None) -> int:
    """Return how many rows `write_bank` reads, each once and to factor them once more."""
    return len(bank) * (1 if rank is None else 2)


def _slabs(bank: CacheBank, progress: Callable[[int], None]) -> Iterator[NDArray[np.float32]]:
    """Yield all vectors of a bank in order, float32 ``[n, D]`` of some rows at a time.

    Raises:
        RepaError: a row cannot be read, or has a number that float16 cannot hold.
    """
    for first in range(0, len(bank), SLAB_ROWS):
        part = bank.vectors(torch.arange(first, min(first + SLAB_ROWS, len(bank)))).numpy()
        with np.errstate(over="ignore"):
            rounded = part.astype(np.float16)
        if not (finite := np.isfinite(rounded).all(axis=1)).all():
            row = int(bank.rows[first + int(np.flatnonzero(~finite)[0])])
            raise RepaError(
                f"row {row} of {bank.name} has numbers that are not finite in float16",
                "look at the cache with `repa cache verify`, or take another --encoder",
                field=bank.said.column,
            )
        yield part
        progress(len(part))


def write_bank(path: Path, bank: CacheBank, rank: int | None, progress: Callable[[int], None]) -> StoredBank:
    """Write a file of a bank, whole or not at all, holding `SLAB_ROWS` vectors at a time.

    Args:
        path: the file; one that is there is replaced.
        bank: of a cache.
        rank: d of the factored form; None writes the vectors.
        progress: called with the number of rows that have been read since the last call, see `rows_read`.

    Returns:
        The bank that is written.

    Raises:
        RepaError: a row cannot be read or has a number that float16 cannot hold, or the disk refuses.
    """
    tensors: list[StreamedTensor] = []
    if rank is None:
        said = replace(bank.said, rounded=not bank.in_float16)
        halves = (slab.astype(np.float16) for slab in _slabs(bank, progress))
        tensors.append(StreamedTensor("vectors", "float16", (len(bank), bank.width), halves))
    else:
        read = partial(_slabs, bank, progress)
        exact = basis_of(read, rank)
        coefficients, error = coefficients_of(read, exact)
        said = replace(bank.said, factored=error)
        arrays = {**vars(exact.stored()), "coefficients": coefficients}
        tensors += (StreamedTensor.of(name, array) for name, array in arrays.items())
    if not np.array_equal(bank.rows, np.arange(len(bank.rows))):
        tensors.append(StreamedTensor.of("rows", bank.rows))
    with os_errors("write", path):
        make_folder(path.parent)
        unfinished = partial_path(path)
        try:
            with open(create_file(unfinished), "wb") as file:
                write_tensors(file, tensors, {_METADATA: canonical_json(said.document()).decode()})
                file.flush()
                os.fsync(file.fileno())
            publish(unfinished, path, path.parent)
        finally:
            unfinished.unlink(missing_ok=True)
    return read_bank(path)


def read_bank(path: Path) -> StoredBank:
    """Open a file of a bank. Its rows are read as they are asked for.

    Raises:
        RepaError: there is none, or it is damaged or of another version.
    """
    with os_errors("read", path), path.open("rb"):
        pass
    try:
        # torch's tensors are memory-mapped, numpy's are copies
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name).numpy() for name in file.keys()}  # noqa: SIM118 - no mapping
    # of dtypes that NumPy does not have
    except (SafetensorError, TypeError) as error:
        raise RepaError(f"{path} is no bank ({printable(error)})", _REMEDY, field=FLAG) from None
    if _METADATA not in metadata:
        raise RepaError(f"{path} does not say that it is a bank", _REMEDY, field=FLAG)
    said = parse_json(
        BankSaid, metadata[_METADATA].encode(), where=str(path), remedy=_REMEDY, error=RepaError
    )
    if said.version != VERSION:
        raise RepaError(
            f"{path} is of version {said.version}, this repa reads {VERSION}", _REMEDY, field=FLAG
        )
    rows = arrays.pop("rows", None)
    wanted = _shapes(arrays, said)
    found = {name: (value.shape, value.dtype.name) for name, value in arrays.items()}
    if found != wanted or not _are_rows(rows, said.count):
        raise RepaError(f"{path} does not hold the arrays of such a bank", _REMEDY, field=FLAG)
    rows = np.arange(said.count) if rows is None else rows
    if said.factored is None:
        return WholeBank(said, rows, str(path), arrays["vectors"])
    coefficients = arrays.pop("coefficients")
    return FactoredBank(said, rows, str(path), Basis(**arrays), coefficients)


def _shapes(arrays: dict[str, NDArray[Any]], said: BankSaid) -> dict[str, tuple[tuple[int, ...], str]]:
    """Return the shapes and dtypes that a bank's arrays have, of as many channels as there are."""
    if said.factored is None:
        width = arrays["vectors"].shape[-1] if "vectors" in arrays and arrays["vectors"].ndim else 0
        return {"vectors": ((said.count, width), "float16")}
    width, rank = arrays["mean"].size if "mean" in arrays else 0, said.factored.rank
    return {
        "mean": ((width,), "float32"),
        "basis": ((width, rank), "float32"),
        "singular_values": ((rank,), "float32"),
        "coefficients": ((said.count, rank), "float16"),
    }


def _are_rows(rows: NDArray[Any] | None, count: int) -> bool:
    if rows is None:
        return True
    fits = rows.dtype == np.int64 and rows.shape == (count,)
    return fits and bool((rows[:1] >= 0).all() and (np.diff(rows) > 0).all())
