"""Banks as safetensors files, whole or factored.

A file holds ``vectors`` float16 ``[N, D]``, or ``coefficients`` float16 ``[N, d]`` with ``basis`` ``[D, d]``,
``mean`` ``[D]`` and ``singular_values`` ``[d]`` in float32; ``rows`` int64 ``[N]`` where not every row of the
cache is in it; and in its metadata, as ``repa_bank``, what it is of.
"""

from __future__ import annotations

import os
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ...data.edge import parse_json, printable
from ...data.errors import RepaError
from ...data.format.canonical import canonical_json
from ...data.storage.files import create_file, make_folder, os_errors, partial_path, publish
from .bank import (
    FLAG,
    VERSION,
    BankSaid,
    FactoredBank,
    Factors,
    StoredBank,
    WholeBank,
    factor,
    measured_error,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray

_METADATA = "repa_bank"
_REMEDY = "build it again with `repa bank build`"
_CHUNK = 65_536


def read_whole(bank: StoredBank, progress: Callable[[int], None]) -> NDArray[np.float16]:
    """Return all vectors of a bank, float16 ``[N, D]``.

    Args:
        bank: of a cache.
        progress: called with the number of rows that have been read since the last call.

    Raises:
        RepaError: a row cannot be read, or has a number that float16 cannot hold.
    """
    values = np.empty((len(bank), bank.width), np.float16)
    for first in range(0, len(bank), _CHUNK):
        positions = torch.arange(first, min(first + _CHUNK, len(bank)))
        with np.errstate(over="ignore"):
            part = bank.vectors(positions).numpy().astype(np.float16)
        if not (finite := np.isfinite(part).all(axis=1)).all():
            row = int(bank.rows[first + int(np.flatnonzero(~finite)[0])])
            raise RepaError(
                f"row {row} of {bank.name} has numbers that are not finite in float16",
                "look at the cache with `repa cache verify`, or take another --encoder",
                field=bank.said.column,
            )
        values[first : first + len(part)] = part
        progress(len(part))
    return values


def write_bank(path: Path, bank: StoredBank, values: NDArray[np.float16], rank: int | None) -> StoredBank:
    """Write a file of a bank, whole or not at all.

    Args:
        path: the file; one that is there is replaced.
        bank: whose rows the values are.
        values: all of its vectors.
        rank: d of the factored form; None writes the vectors.

    Returns:
        The bank that is written.

    Raises:
        RepaError: the disk refuses.
    """
    arrays: dict[str, NDArray[Any]]
    written: StoredBank
    if rank is None:
        arrays = {"vectors": values}
        written = WholeBank(bank.said, bank.rows, str(path), values)
    else:
        factors = stored_factors(factor(values, rank))
        arrays = {name: np.ascontiguousarray(value) for name, value in vars(factors).items()}
        said = replace(bank.said, factored=measured_error(values, factors))
        written = FactoredBank(said, bank.rows, str(path), factors)
    if len(bank.rows) and not np.array_equal(bank.rows, np.arange(len(bank.rows))):
        arrays["rows"] = bank.rows
    metadata = {_METADATA: canonical_json(asdict(written.said)).decode()}
    with os_errors("write", path):
        make_folder(path.parent)
        partial = partial_path(path)
        try:
            # made anew first, so that a link that stands there is not followed
            os.close(create_file(partial))
            try:
                save_file(arrays, partial, metadata=metadata)
            except SafetensorError as error:
                raise RepaError(
                    f"cannot write {path} ({printable(error)})", "make room on the disk", field="--out"
                ) from None
            descriptor = os.open(partial, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            publish(partial, path, path.parent)
        finally:
            partial.unlink(missing_ok=True)
    return written


def stored_factors(exact: Factors) -> Factors:
    """Return factors rounded as a file stores them."""
    return Factors(
        mean=exact.mean.astype(np.float32),
        basis=exact.basis.astype(np.float32),
        singular_values=exact.singular_values.astype(np.float32),
        coefficients=exact.coefficients.astype(np.float16),
    )


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
    return FactoredBank(said, rows, str(path), Factors(**arrays))


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
