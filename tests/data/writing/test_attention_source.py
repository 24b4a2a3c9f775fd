"""int8 columns with their scales, and attention targets as a source of their own."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import tensorstore
import torch
import zarr
from repa.data.errors import CacheError, CorruptRowError
from repa.data.format.columns import MOMENTS, ColumnSpec
from repa.data.format.int8 import dequantise
from repa.data.format.layout import shard_file
from repa.data.format.opening import open_manifest
from repa.data.format.survey import committed_shards
from repa.data.reading.loader import CacheLoader
from repa.data.reading.reader import CacheReader
from repa.data.testing import expected_row, synthetic_cache, synthetic_provenance
from repa.data.upkeep.info import cache_info
from repa.data.upkeep.verify import verify_cache
from repa.data.writing.store import ensure_source

if TYPE_CHECKING:
    from pathlib import Path

TOKENS = {
    MOMENTS: ColumnSpec(shape=(8, 4, 4), dtype="float32"),
    "demo/patch": ColumnSpec(shape=(4, 16), dtype="int8"),
    "demo/patch-scale": ColumnSpec(shape=(16,), dtype="float32"),
    "demo/cls": ColumnSpec(shape=(16,), dtype="float16"),
}
ATTENTION = {
    "demo/q": ColumnSpec(shape=(2, 3, 4, 8), dtype="int8"),
    "demo/q-scale": ColumnSpec(shape=(2, 3, 8), dtype="float32"),
    "demo/k": ColumnSpec(shape=(2, 3, 4, 8), dtype="int8"),
    "demo/k-scale": ColumnSpec(shape=(2, 3, 8), dtype="float32"),
}
ROWS = 21
VIEWS = ("original", "mirrored")
INVALID = {3: "cut off"}


def write(path: Path, columns: dict[str, ColumnSpec], **options: Any) -> None:
    synthetic_cache(path, num_rows=ROWS, columns=columns, views=VIEWS, invalid=INVALID, **options)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("attention") / "cache"
    write(path, {**TOKENS, **ATTENTION})
    return path


def test_any_zarr_reader_sees_the_same_numbers(cache: Path) -> None:
    group = zarr.open_group(str(cache), mode="r")
    for name, spec in {**TOKENS, **ATTENTION}.items():
        store = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(cache / name)}}
        for values in (group[name][:], tensorstore.open(store).result().read().result()):
            assert values.dtype == np.dtype(spec.dtype)
            for row in set(range(ROWS)) - set(INVALID):
                for view in range(2):
                    assert np.array_equal(values[row, view], expected_row(name, row, spec, view=view))
            assert not values[3].any()


def test_synthetic_int8_rows_span_their_range_and_scales_are_positive() -> None:
    spec = ColumnSpec(shape=(64, 64), dtype="int8")
    values = expected_row("demo/patch", 0, spec).astype(np.float64)
    assert 31 < values.std() < 33
    assert abs(values.mean()) < 2
    assert -128 < values.min() < -90
    scale = expected_row("demo/patch-scale", 0, ColumnSpec(shape=(4096,), dtype="float32"))
    assert 0.5 / 32 <= scale.min() < scale.max() < 1.5 / 32


def test_reader_and_loader_give_int8_and_scales(cache: Path) -> None:
    columns = [*TOKENS, *ATTENTION]
    with CacheReader(cache, columns) as reader:
        loader = CacheLoader(
            reader, rows=reader.valid_rows, batch_size=6, last_image=12, columns_at=lambda step: columns
        )
        batches = list(loader)
        views = set()
        for batch in batches:
            for position, row in enumerate(batch.rows.tolist()):
                stored = batch.columns["demo/q"][position]
                assert stored.dtype == torch.int8
                view = int(not np.array_equal(stored, expected_row("demo/q", row, ATTENTION["demo/q"])))
                views.add(view)
                for name, spec in {**TOKENS, **ATTENTION}.items():
                    expected = expected_row(name, row, spec, view=view)
                    assert np.array_equal(batch.columns[name][position].numpy(), expected), name
            decoded = dequantise(batch.columns["demo/q"], batch.columns["demo/q-scale"])
            assert decoded.shape == (6, 2, 3, 4, 8)
            assert 0.7 < float(decoded.std()) < 1.4
        loader.close()
    assert views == {0, 1}


def test_attention_added_beside_tokens_touches_none_of_their_files(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    write(path, TOKENS)

    def state() -> dict[Path, tuple[bytes, int, int]]:
        files = sorted(file for file in path.rglob("*") if file.is_file())
        return {file: (file.read_bytes(), file.stat().st_mtime_ns, file.stat().st_ino) for file in files}

    before = state()
    write(path, ATTENTION)
    after = state()
    manifest = path / "zarr.json"
    changed = {file for file in before if before[file] != after[file]}
    assert changed == {manifest, path / "zarr.json.copy"}
    added = {str(file.relative_to(path)) for file in after.keys() - before.keys()}
    shards = [f"demo/{kind}/c/{shard}/0/0/0/0/0" for kind in ("q", "k") for shard in range(3)]
    scales = [f"demo/{kind}-scale/c/{shard}/0/0/0/0" for kind in ("q", "k") for shard in range(3)]
    metadata = [f"demo/{kind}/zarr.json" for kind in ("q", "k", "q-scale", "k-scale")]
    commits = [f"commits/demo+attention/{name}" for name in (".lock", "0.json", "1.json", "2.json")]
    assert added == {*shards, *scales, *metadata, *commits}

    old, new = (json.loads(each[manifest][0])["attributes"]["repa"] for each in (before, after))
    for part in ("columns", "sources"):
        assert {name: new[part][name] for name in old[part]} == old[part]
    assert new["sources"].keys() - old["sources"].keys() == {"demo+attention"}
    assert verify_cache(path) == []
    # in one go or in two: the same cache
    write(tmp_path / "one", {**TOKENS, **ATTENTION})
    ours = {str(file.relative_to(path)): data for file, (data, _, _) in after.items()}
    theirs = {name: (tmp_path / "one" / name).read_bytes() for name in ours}
    assert ours == theirs


def test_attention_and_tokens_are_complete_each_for_itself(cache: Path, tmp_path: Path) -> None:
    path = shutil.copytree(cache, tmp_path / "cache")
    (path / "commits" / "demo+attention" / "1.json").unlink()
    manifest = open_manifest(path)
    assert committed_shards(path, manifest, "demo") == [0, 1, 2]
    assert committed_shards(path, manifest, "demo+attention") == [0, 2]
    CacheReader(path, ["demo/patch"]).close()
    with pytest.raises(CacheError, match=r"1 of the 3 shards of demo\+attention"):
        CacheReader(path, ["demo/patch", "demo/k"])
    sources = {source.name: source for source in cache_info(path).sources}
    assert [column.name for column in sources["demo+attention"].columns] == list(ATTENTION)
    assert sources["demo+attention"].shards_committed == 2
    assert sources["demo"].columns[0].bytes_per_image == 2 * 4 * 16
    findings = verify_cache(path, ["demo/q"])
    assert [(finding.source, finding.shard) for finding in findings] == [("demo+attention", 1)]


def test_damage_to_an_attention_column_is_booked_to_its_source(cache: Path, tmp_path: Path) -> None:
    path = shutil.copytree(cache, tmp_path / "cache")
    file = shard_file(path, "demo/k", ATTENTION["demo/k"], 1)
    data = bytearray(file.read_bytes())
    data[2 * (192 + 4) + 7] ^= 8  # row 9, view 0
    file.write_bytes(data)
    (path / "demo" / "q-scale" / "zarr.json").unlink()
    metadata, row = verify_cache(path)
    assert (metadata.source, metadata.column) == ("demo+attention", "demo/q-scale")
    assert (row.source, row.column, row.shard, row.row) == ("demo+attention", "demo/k", 1, 9)
    with CacheReader(path, ["demo/k"]) as reader:
        out = {"demo/k": np.empty((1, 2, 3, 4, 8), np.int8)}
        reader.read_rows(np.array([8]), ["demo/k"], out)
        with pytest.raises(CorruptRowError, match="row 9 of demo/k is corrupt"):
            reader.read_rows(np.array([9]), ["demo/k"], out)


def test_notes_of_a_synthetic_attention_source_are_those_of_a_real_one(tmp_path: Path) -> None:
    whole = {"demo/q": ColumnSpec(shape=(2, 3, 9, 16), dtype="float16")}
    provenance = synthetic_provenance("demo+attention", whole)
    assert provenance.grid == (3, 3)
    assert provenance.model == synthetic_provenance("demo", {}).model
    assert provenance.weights_sha256 == synthetic_provenance("demo", {}).weights_sha256
    assert provenance.notes == {
        "blocks": [1, 2],
        "logit_scale": 0.25,
        "head_width": 16,
        "rank": 16,
        "form": "exact",
        "keys": "as computed",
        "calibration": None,
        "fidelity": None,
    }
    given = {"demo+attention": {"blocks": [8, 10], "rank": 8, "form": "truncated"}}
    write(tmp_path / "cache", {**TOKENS, **ATTENTION}, notes=given)
    notes = open_manifest(tmp_path / "cache").sources["demo+attention"].notes
    assert (notes["blocks"], notes["rank"], notes["form"]) == ([8, 10], 8, "truncated")
    assert (notes["keys"], notes["head_width"]) == ("centred", 8)


def test_another_form_of_attention_is_refused_by_what_differs(cache: Path) -> None:
    provenance = synthetic_provenance("demo+attention", ATTENTION, notes={"rank": 4})
    with pytest.raises(CacheError, match=r"demo\+attention .*: notes\.rank is 8, not 4;"):
        ensure_source(cache, "demo+attention", provenance, ATTENTION)
    half = {**ATTENTION, "demo/k": ColumnSpec(shape=(2, 3, 4, 4), dtype="int8")}
    provenance = synthetic_provenance("demo+attention", ATTENTION)
    with pytest.raises(CacheError, match=r"columns\.demo/k is int8\[2, 3, 4, 8\], not int8\[2, 3, 4, 4\];"):
        ensure_source(cache, "demo+attention", provenance, half)
