"""`repa cache info --json`: which keys there are, and what they hold."""

from __future__ import annotations

import io
import json
from typing import TYPE_CHECKING, Any

from repa.commands.cache.info import info
from repa.data.format.columns import ColumnSpec
from repa.data.format.layout import shard_file
from repa.data.format.opening import open_manifest
from repa.data.testing import SYNTHETIC_COLUMNS, synthetic_cache
from rich.console import Console

if TYPE_CHECKING:
    from pathlib import Path

# what a program may rely on; a key that goes or changes its meaning is another DOCUMENT_VERSION
KEYS = {
    "version",
    "path",
    "remote",
    "bytes",
    "complete",
    "num_shards",
    "valid_rows",
    "invalid",
    "num_rows",
    "views",
    "shard_rows",
    "resolution",
    "crop",
    "exif_orientation",
    "source_kind",
    "source_fingerprint",
    "keys_sha256",
    "class_names",
    "format_version",
    "columns",
    "sources",
}
COLUMN_KEYS = {
    "source",
    "dtype",
    "shape",
    "compressor",
    "shards_committed",
    "bytes",
    "bytes_per_image",
    "ratio",
    "read_speed",
}
SOURCE_KEYS = {
    "shards_committed",
    "model",
    "weights_sha256",
    "random_weights",
    "input_size",
    "mean",
    "std",
    "compute_dtype",
    "batch_size",
    "grid",
    "libraries",
    "notes",
}


def document(cache: Path) -> dict[str, Any]:
    output = io.StringIO()
    info(cache=cache, as_json=True, console=Console(file=output, width=20))
    found: dict[str, Any] = json.loads(output.getvalue())
    return found


def test_every_key_and_what_it_holds(tmp_path: Path) -> None:
    columns = {**SYNTHETIC_COLUMNS, "demo/cls": ColumnSpec(shape=(512,), dtype="float16", compressor="zstd")}
    cache = tmp_path / "cache"
    reasons = {3: "truncated", 9: "[bold]not\x1b[31m an image"}
    synthetic_cache(cache, num_rows=20, columns=columns, invalid=reasons, random_weights=True)
    manifest = open_manifest(cache)
    found = document(cache)
    assert found.keys() >= KEYS
    assert (found["version"], found["path"], found["remote"]) == (1, str(cache), False)
    assert (found["num_rows"], found["valid_rows"], found["num_shards"]) == (20, 18, 3)
    assert found["complete"] is True
    assert found["bytes"] == sum(file.stat().st_size for file in cache.rglob("*") if file.is_file())
    assert found["class_names"] == list(manifest.class_names)
    assert found["invalid"] == [
        {"row": row, "key": f"images/{row:06d}.png", "reason": reason} for row, reason in reasons.items()
    ]
    assert found["columns"].keys() == columns.keys()
    for name, spec in columns.items():
        column = found["columns"][name]
        assert column.keys() >= COLUMN_KEYS
        stored = sum(shard_file(cache, name, spec, shard).stat().st_size for shard in range(3))
        assert (column["shape"], column["dtype"]) == (list(spec.shape), spec.dtype)
        assert (column["bytes"], column["bytes_per_image"]) == (stored, spec.row_bytes)
        assert column["ratio"] == 18 * spec.row_bytes / stored
        assert column["shards_committed"] == 3
        assert column["source"] in found["sources"]
        assert (column["read_speed"] is not None) == (spec.compressor is not None)
    speed = found["columns"]["demo/cls"]["read_speed"]
    assert speed.keys() == {"rows", "stored_bytes_per_second", "plain_bytes_per_second"}
    assert speed["rows"] == 18
    assert speed["stored_bytes_per_second"] > 0
    for name, provenance in manifest.sources.items():
        assert found["sources"][name].keys() >= SOURCE_KEYS
        assert found["sources"][name]["weights_sha256"] == provenance.weights_sha256
        assert found["sources"][name]["notes"] == provenance.notes
        assert found["sources"][name]["random_weights"] is True


def test_a_cache_that_is_not_complete(tmp_path: Path) -> None:
    synthetic_cache(tmp_path, num_rows=20)
    (tmp_path / "commits" / "demo" / "1.json").unlink()
    found = document(tmp_path)
    assert found["complete"] is False
    assert found["sources"]["demo"]["shards_committed"] == 2
    assert found["sources"]["sd-vae"]["shards_committed"] == 3
    assert found["columns"]["demo/patch"]["bytes"] > 0
