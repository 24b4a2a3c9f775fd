"""A small cache of a column in every compression, and ways to look into it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from repa.data.format.columns import MOMENTS, ColumnSpec
from repa.data.format.manifest import FORMAT_VERSION, Manifest
from repa.data.reading.reader import CacheReader
from repa.data.testing import synthetic_cache
from shard_files_read import read_index

if TYPE_CHECKING:
    from pathlib import Path

COLUMNS = {
    MOMENTS: ColumnSpec(shape=(8, 4, 4), dtype="float32"),
    **{
        f"{codec}-{dtype}/patch": ColumnSpec(shape=(16, 32), dtype=dtype, compressor=codec)
        for codec in ("zstd", "blosc", "pcodec")
        for dtype in ("float16", "float32", "int8")
        if (codec, dtype) != ("pcodec", "int8")
    },
    "plain/patch": ColumnSpec(shape=(16, 32), dtype="float16"),
}
COMPRESSED = [name for name, spec in COLUMNS.items() if spec.compressor]
ROWS = 11
SHARD_ROWS = 4
VIEWS = ("original", "mirrored")
INVALID = {2: "cut off"}


def write(path: Path, format_version: int = FORMAT_VERSION) -> Manifest:
    return synthetic_cache(
        path,
        num_rows=ROWS,
        columns=COLUMNS,
        shard_rows=SHARD_ROWS,
        views=VIEWS,
        invalid=INVALID,
        format_version=format_version,
    )


def index_of(file: Path) -> np.ndarray[Any, Any]:
    with file.open("rb") as opened:
        return read_index(opened.fileno(), str(file), SHARD_ROWS, len(VIEWS))


def read_one(reader: CacheReader, name: str, row: int) -> np.ndarray[Any, Any]:
    out = np.zeros((1, *COLUMNS[name].shape), COLUMNS[name].numpy_dtype)
    reader.read_rows(np.array([row]), [name], {name: out})
    return out[0]
