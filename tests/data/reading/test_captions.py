"""Captions: each once in the cache, one drawn an image and step, and bound to their images."""

from __future__ import annotations

import shutil
from collections import Counter
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
import zarr
from repa.data.errors import CacheError, RepaError
from repa.data.format.captions import captions_path, number_captions, read_captions, read_table
from repa.data.format.columns import MOMENTS, ColumnSpec
from repa.data.format.opening import open_manifest
from repa.data.reading.loader import CacheLoader
from repa.data.reading.reader import CacheReader
from repa.data.testing import SYNTHETIC_TEXT, expected_row, synthetic_cache, synthetic_captions
from repa.data.upkeep.verify import verify_cache
from repa.data.writing.captions import ensure_captions

if TYPE_CHECKING:
    from pathlib import Path

TEXT = "demo-text/states"
SPEC = SYNTHETIC_TEXT[TEXT]
COUNT = 24


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("captions") / "cache"
    synthetic_cache(path, num_rows=COUNT)
    synthetic_captions(path)
    return path


def loader(reader: CacheReader, **settings: int) -> CacheLoader:
    options = {"batch_size": 12, "seed": 3} | settings
    return CacheLoader(
        reader,
        rows=np.arange(COUNT),
        columns_at=lambda _: (MOMENTS, TEXT),
        **options,  # type: ignore[arg-type]
    )


def test_each_caption_is_there_once_and_the_empty_one_is_the_first() -> None:
    texts, table = number_captions([["b", "a"], [], ["a", "c", "b"]])
    assert texts == ["", "b", "a", "c"]
    assert table.tolist() == [[1, 2, -1], [0, -1, -1], [2, 3, 1]]


def test_captions_are_a_cache_and_any_zarr_reader_finds_those_of_an_image(written: Path) -> None:
    captions = read_captions(written)
    assert captions == ["", *(f"a thing of kind {kind}" for kind in range(5))]
    group = zarr.open_group(captions_path(written), mode="r")
    table = np.asarray(group["of-image"])
    assert table.dtype == np.int32
    for row in range(COUNT):
        mine = [captions[each] for each in table[row] if each >= 0]
        assert mine == [f"a thing of kind {(row + each) % 5}" for each in range(1 + row % 3)]
    np.testing.assert_array_equal(np.asarray(group[TEXT])[2, 0], expected_row(TEXT, 2, SPEC))


def test_batches_hold_a_caption_of_each_image(written: Path) -> None:
    reader = CacheReader(written, (MOMENTS, TEXT))
    table = np.asarray(zarr.open_group(captions_path(written), mode="r")["of-image"])
    drawn: Counter[tuple[int, int]] = Counter()
    for batch in loader(reader, last_image=12 * 200):
        assert batch.captions is not None
        for position, (row, caption) in enumerate(
            zip(batch.rows.tolist(), batch.captions.tolist(), strict=True)
        ):
            assert caption in table[row]
            drawn[row, caption] += 1
            expected = expected_row(TEXT, caption, SPEC)
            np.testing.assert_array_equal(batch.columns[TEXT][position].numpy(), expected)
            moments = expected_row(MOMENTS, row, reader.manifest.columns[MOMENTS])
            np.testing.assert_array_equal(batch.columns[MOMENTS][position].numpy(), moments)
    for row in range(COUNT):
        mine = [drawn[row, each] for each in table[row] if each >= 0]
        assert sum(mine) == 100
        # each as often as another: within five standard deviations
        fair = 100 / len(mine)
        assert max(abs(each - fair) for each in mine) <= 5 * np.sqrt(fair)


def test_the_draw_depends_neither_on_ranks_nor_on_where_a_run_was_resumed(written: Path) -> None:
    reader = CacheReader(written, (MOMENTS, TEXT))
    whole = [batch.captions for batch in loader(reader, last_image=12 * 6)]
    parts = [list(loader(reader, rank=rank, world=2, accumulate=3, last_image=12 * 6)) for rank in range(2)]
    for step, captions in enumerate(whole):
        mine = [parts[rank][3 * step + micro].captions for rank in range(2) for micro in range(3)]
        assert torch.equal(torch.cat(mine), captions)  # type: ignore[arg-type]
    later = [batch.captions for batch in loader(reader, images_seen=12 * 4, last_image=12 * 6)]
    assert all(torch.equal(a, b) for a, b in zip(later, whole[4:], strict=True))  # type: ignore[arg-type]
    other = [batch.captions for batch in loader(reader, seed=4, last_image=12 * 6)]
    assert any(not torch.equal(a, b) for a, b in zip(other, whole, strict=True))  # type: ignore[arg-type]


def test_rows_can_be_read_by_number_of_caption(written: Path) -> None:
    reader = CacheReader(written, (TEXT,))
    out = {TEXT: np.empty((3, *SPEC.shape), SPEC.numpy_dtype)}
    reader.read_rows(np.array([2, 5, 2]), (TEXT,), out, captions=np.array([2, 0, 0]))
    table = np.asarray(zarr.open_group(captions_path(written), mode="r")["of-image"])
    rows = [table[2, 2], table[5, 0], table[2, 0]]
    np.testing.assert_array_equal(out[TEXT], np.stack([expected_row(TEXT, row, SPEC) for row in rows]))
    assert reader.bytes_read == {TEXT: 3 * SPEC.row_bytes}
    with pytest.raises(CacheError, match="image 0 has 1"):
        reader.read_rows(np.array([0]), (TEXT,), {TEXT: out[TEXT][:1]}, captions=np.array([1]))


def test_images_alone_are_read_as_before(written: Path) -> None:
    reader = CacheReader(written, (MOMENTS,))
    assert reader.captions is None
    assert reader.manifest == open_manifest(written)


def test_written_again_they_must_be_the_same(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    synthetic_cache(path, num_rows=3)
    captions = [["one"], ["two", "three"], []]
    where = ensure_captions(path, captions)
    before = {file: file.read_bytes() for file in where.rglob("*") if file.is_file()}
    # as a process that was killed before the table leaves it
    shutil.rmtree(where / "of-image")
    with pytest.raises(CacheError, match="is missing"):
        read_table(path, open_manifest(path), open_manifest(where))
    assert ensure_captions(path, captions) == where
    assert {file: file.read_bytes() for file in where.rglob("*") if file.is_file()} == before
    for other in ([["one"], ["two"], []], [["one"], ["three", "two"], []]):
        with pytest.raises(CacheError) as caught:
            ensure_captions(path, other)
        assert caught.value.field in ("--captions", "of-image")
    with pytest.raises(RepaError) as too_many:
        ensure_captions(tmp_path / "cache", [[str(each) for each in range(65)], [], []])
    assert too_many.value.field == "--captions"


def test_a_damaged_table_is_told(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    synthetic_cache(path, num_rows=COUNT)
    synthetic_captions(path)
    chunk = captions_path(path) / "of-image" / "c" / "0" / "0"
    sound = chunk.read_bytes()
    for at in (0, len(sound) // 2, len(sound) - 1):
        damaged = bytearray(sound)
        damaged[at] ^= 4
        chunk.write_bytes(damaged)
        with pytest.raises(CacheError, match="checksum"):
            CacheReader(path, (TEXT,))
    # the table of other captions, whole in itself
    other = tmp_path / "other"
    synthetic_cache(other, num_rows=COUNT)
    synthetic_captions(other, captions=[["a thing of kind 1"]] * COUNT)
    chunk.write_bytes((captions_path(other) / "of-image" / "c" / "0" / "0").read_bytes())
    with pytest.raises(CacheError) as caught:
        CacheReader(path, (TEXT,))
    assert caught.value.field == "of-image"


def test_missing_text_is_told_with_the_command_that_adds_it(written: Path) -> None:
    with pytest.raises(CacheError) as caught:
        CacheReader(written, ("clip-l-text/states",))
    assert "--text-encoder clip-l-text --captions FILE" in caught.value.remedy


def test_masks_are_bytes_and_int8_states_have_scales(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    columns = {
        "t5/states": ColumnSpec(shape=(6, 12), dtype="int8"),
        "t5/states-scale": ColumnSpec(shape=(12,), dtype="float32"),
        "t5/mask": ColumnSpec(shape=(6,), dtype="uint8"),
    }
    synthetic_cache(path, num_rows=4)
    synthetic_captions(path, columns=columns)
    reader = CacheReader(path, tuple(columns))
    out = {name: np.empty((1, *spec.shape), spec.numpy_dtype) for name, spec in columns.items()}
    reader.read_rows(np.array([3]), tuple(columns), out)
    row = read_captions(path).index("a thing of kind 3")
    for name, spec in columns.items():
        np.testing.assert_array_equal(out[name][0], expected_row(name, row, spec))


def test_every_byte_of_captions_is_checked_with_the_cache(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    synthetic_cache(path, num_rows=COUNT)
    synthetic_captions(path)
    assert verify_cache(path) == []
    where = captions_path(path)
    files = [file for file in where.rglob("*") if file.is_file() and file.stat().st_size]
    assert len(files) > 10
    for file in files:
        sound = file.read_bytes()
        file.write_bytes(sound[:-1] + bytes([sound[-1] ^ 4]))
        findings = verify_cache(path)
        assert findings, file
        assert all(str(finding.path).startswith(str(where)) for finding in findings)
        file.unlink()
        assert verify_cache(path), file
        file.write_bytes(sound)
    (where / "stray").write_bytes(b"x")
    [finding] = verify_cache(path)
    assert finding.path == where / "stray"
