"""Tars in a bucket: read as those of a folder, only what is wanted; what is wrong is one line."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ports import free_port
from repa.data.errors import CacheError, RepaError
from repa.data.storage import object_file
from repa.data.storage.bucket import Bucket
from repa.data.tars.cache import TarCache
from repa.data.tars.export import export_cache, import_cache
from repa.data.tars.reader import open_tar
from repa.data.testing import synthetic_cache
from repa.data.upkeep.verify import verify_cache
from s3_server import lead_to, obstore, upload

MOMENTS, PATCH = "sd-vae/moments", "demo/patch"
TARS = "shard-{000000..000002}.tar"
URL = "s3://bucket/export"


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tars")
    synthetic_cache(folder / "cache", num_rows=22, shard_rows=8, invalid={4: "x"}, views=("a", "b"))
    export_cache(folder / "cache", folder / "out")
    return folder


@pytest.fixture(scope="module")
def remote(server: str, local: Path) -> str:
    upload(local / "out", URL)
    return URL


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """Every range that is read: name, first byte, length."""
    found: list[tuple[str, int, int]] = []
    read = Bucket.read_range

    def watched(self: Bucket, name: str, start: int, length: int) -> Any:
        found.append((name, start, length))
        return read(self, name, start, length)

    monkeypatch.setattr(Bucket, "read_range", watched)
    return found


def samples(pattern: str, columns: list[str]) -> list[tuple[int, int, dict[str, bytes]]]:
    cache = TarCache(pattern, columns)
    return [
        (row, label, {name: array.tobytes() for name, array in arrays.items()})
        for shard in range(3)
        for row, label, arrays in cache.samples(shard, lambda row: columns)
    ]


@pytest.mark.parametrize("piece", [1000, 4096, 1 << 22])
def test_samples_are_those_of_the_files(
    remote: str, local: Path, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_file, "PIECE", piece)
    columns = [MOMENTS, PATCH]
    found = samples(f"{remote}/{TARS}", columns)
    assert found == samples(f"{local}/out/{TARS}", columns)
    assert len(found) == 21


def test_each_byte_is_asked_for_once_and_skipped_ones_are_not(
    remote: str, local: Path, asked: list[tuple[str, int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_file, "PIECE", 512)
    monkeypatch.setattr(object_file, "AHEAD", 0)
    name = "shard-000001.tar"
    size = (local / "out" / name).stat().st_size
    with open_tar(f"{remote}/{name}") as reader:
        whole = {member.name: reader.read() for member in reader}
    assert sorted(start for _, start, _ in asked) == list(range(0, size, 512))
    read = len(asked)
    asked.clear()
    with open_tar(f"{remote}/{name}") as reader:
        assert [member.name for member in reader] == list(whole)
    # headers, and the ten kilobytes of zeros that tars end with
    assert len(asked) <= read / 2


def test_pieces_are_on_their_way_before_they_are_read(
    remote: str, asked: list[tuple[str, int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_file, "PIECE", 512)
    with object_file.open_object(f"{remote}/shard-000001.tar") as opened:
        assert len(opened.read(10)) == 10
    assert {start for _, start, _ in asked} <= {512 * number for number in range(1 + object_file.AHEAD)}
    assert len(asked) >= 1


def test_a_cache_comes_back_from_them(remote: str, local: Path, tmp_path: Path) -> None:
    import_cache(f"{remote}/{TARS}", tmp_path / "back")
    assert verify_cache(tmp_path / "back") == []
    for file in (local / "cache").rglob("*"):
        if file.is_file():
            assert (tmp_path / "back" / file.relative_to(local / "cache")).read_bytes() == file.read_bytes()


def test_what_is_wrong_is_one_line(
    remote: str, local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = "s3://bucket/wrong"
    shutil.copytree(local / "out", tmp_path / "wrong")
    store = upload(tmp_path / "wrong", url)
    data = (tmp_path / "wrong" / "shard-000001.tar").read_bytes()
    obstore.put(store, "shard-000001.tar", data[:12_345])
    with pytest.raises(
        RepaError, match=rf"^{url}/shard-000001\.tar was cut off: it ends at byte 12345, (in|after) images/0"
    ):
        samples(f"{url}/{TARS}", [PATCH])
    damaged = bytearray(data)
    damaged[data.index(b"demo.patch.npy", 9000) + 512 + 300] ^= 1
    obstore.put(store, "shard-000001.tar", bytes(damaged))
    with pytest.raises(CacheError, match=rf"row \d+ in {url}/shard-000001\.tar, sample images/0.*is damaged"):
        samples(f"{url}/{TARS}", [PATCH])
    obstore.delete(store, "shard-000001.tar")
    with pytest.raises(RepaError, match=rf"cannot read {url}/shard-000001\.tar: No such file"):
        samples(f"{url}/{TARS}", [PATCH])
    lead_to(monkeypatch, f"http://127.0.0.1:{free_port()}")
    with pytest.raises(
        RepaError, match=rf"cannot read {url}/shard-000000\.tar: .*the credentials$"
    ) as caught:
        TarCache(f"{url}/{TARS}", [PATCH])
    assert "\n" not in str(caught.value)


def test_batches_of_training_are_those_of_the_files(remote: str, local: Path) -> None:
    from repa.trainer.input.tar_stream import TarLoader

    batches = []
    for pattern in (f"{remote}/{TARS}", f"{local}/out/{TARS}"):
        loader = TarLoader(
            TarCache(pattern, [MOMENTS, PATCH]),
            batch_size=4,
            columns_at=lambda step: [MOMENTS, PATCH] if step < 5 else [MOMENTS],
            buffer=6,
        )
        batches.append([batch for _, batch in zip(range(12), loader, strict=False)])
        loader.close()
    for ours, theirs in zip(*batches, strict=True):
        assert ours.rows.tolist() == theirs.rows.tolist()
        assert ours.columns.keys() == theirs.columns.keys()
        for name, values in ours.columns.items():
            assert np.array_equal(values.numpy(), theirs.columns[name].numpy())
