"""The JSON document of `repa cache info --json`, with all that it prints under stable keys."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from ...data.errors import RepaError

if TYPE_CHECKING:
    from ...data.upkeep.info import CacheInfo, ColumnInfo, SourceInfo

DOCUMENT_VERSION = 1
"""Goes up when a key is renamed, removed or means something else; keys may be added without."""


def info_document(found: CacheInfo) -> str:
    """Return the document of a cache, ASCII, with all that its manifest says of its sources.

    Random rows of compressed columns are read, to say how fast that goes.

    Args:
        found: the cache.

    Raises:
        CacheError: ``keys.txt`` is damaged, and there are rows to be named by it.
    """
    return json.dumps({"version": DOCUMENT_VERSION, **_values(found)}, indent=2)


def _values(found: CacheInfo) -> dict[str, Any]:
    manifest = found.manifest
    fixed = {name: value for name, value in manifest.to_json().items() if name not in {"columns", "sources"}}
    captions = (
        {}
        if found.captions is None
        else {"captions": {**_values(found.captions), "record": dict(found.captions_record)}}
    )
    return {
        "path": str(found.path),
        "remote": found.remote,
        "bytes": found.total_bytes,
        "complete": found.complete,
        "num_shards": found.num_shards,
        "valid_rows": found.valid_rows,
        "invalid": _invalid(found),
        **fixed,
        "columns": {
            column.name: _column(found, source, column)
            for source in found.sources
            for column in source.columns
        },
        "sources": {
            source.name: {
                "shards_committed": source.shards_committed,
                **manifest.to_json()["sources"][source.name],
            }
            for source in found.sources
        },
        **captions,
    }


def _invalid(found: CacheInfo) -> list[dict[str, Any]]:
    from ...data.format.opening import read_keys

    if not found.invalid:
        return []
    keys = read_keys(found.path, found.manifest)
    return [{"row": row, "key": keys[row], "reason": reason} for row, reason in found.invalid.items()]


def _column(found: CacheInfo, source: SourceInfo, column: ColumnInfo) -> dict[str, Any]:
    complete = source.shards_committed == found.num_shards
    return {
        "source": source.name,
        "dtype": column.dtype,
        "shape": list(column.shape),
        "compressor": column.compressor,
        "shards_committed": source.shards_committed,
        "bytes": column.file_bytes,
        "bytes_per_image": column.bytes_per_image,
        "ratio": column.ratio,
        "read_speed": _read_speed(found, column) if complete and column.compressor is not None else None,
    }


def _read_speed(found: CacheInfo, column: ColumnInfo) -> dict[str, Any] | None:
    """Measure bytes of data a second, of so many rows as they are stored and of the same uncompressed."""
    from ..measure.read_speed import measure_read_speed

    try:
        speed = measure_read_speed(found.path, column.name)
    except RepaError as error:
        return {"problem": str(error)}
    if speed is None:
        return None
    return {
        "rows": speed.rows,
        "stored_bytes_per_second": speed.stored,
        "plain_bytes_per_second": speed.plain,
    }
