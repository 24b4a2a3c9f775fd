"""Tars of images in a bucket: the rows, keys and cache of those in a folder, asking for what is needed."""

from __future__ import annotations

import io
import pickle
import tarfile
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from ports import free_port
from repa.data.errors import RepaError
from repa.data.storage import object_file
from repa.data.storage.bucket import Bucket
from repa.data.testing import folder_contents
from repa.pipeline.images.names import cache_for
from repa.pipeline.images.open import open_source
from repa.pipeline.images.tars import TarImages
from s3_server import empty, lead_to, obstore, s3_server, upload

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

TARS = "train-{0000..0002}.tar"
URL = "s3://bucket/images"
PADDING = 40_000  # bytes after an image: decoders do not look at them

Asked = list[tuple[str, int, int]]


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with s3_server() as address, pytest.MonkeyPatch.context() as patch:
        empty(address)
        lead_to(patch, address)
        yield address


def write_tars(pictures: Path, folder: Path) -> None:
    """Twelve pictures in three tars, each with its label, far enough apart to be passed over."""
    folder.mkdir()
    for number in range(3):
        with tarfile.open(folder / f"train-{number:04d}.tar", "w") as tar:
            for path in sorted((pictures / f"class{number}").iterdir()):
                for ending, content in (
                    ("cls", str(number).encode()),
                    ("png", path.read_bytes() + bytes(PADDING)),
                ):
                    info = tarfile.TarInfo(f"class{number}/{path.stem}.{ending}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))


@pytest.fixture
def local(pictures: Path, tmp_path: Path) -> Path:
    write_tars(pictures, tmp_path / "tars")
    return tmp_path / "tars"


@pytest.fixture
def remote(server: str, local: Path) -> str:
    upload(local, URL)
    return f"{URL}/{TARS}"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    """Every range that is read: name, first byte, length."""
    found: Asked = []
    read, read_same = Bucket.read_range, object_file.Objects.read_same

    def watched(self: Bucket, name: str, start: int, length: int) -> Any:
        found.append((name, start, length))
        return read(self, name, start, length)

    def watched_same(self: object_file.Objects, name: str, start: int, length: int, tag: str) -> Any:
        found.append((name, start, length))
        return read_same(self, name, start, length, tag)

    monkeypatch.setattr(Bucket, "read_range", watched)
    monkeypatch.setattr(object_file.Objects, "read_same", watched_same)
    return found


def test_rows_are_those_of_the_files(remote: str, local: Path) -> None:
    ours, theirs = open_source(remote), open_source(f"{local}/{TARS}")
    assert (ours.kind, ours.name, len(ours)) == ("tars", remote, 12)
    assert list(ours.keys) == list(theirs.keys)
    assert ours.keys[5] == "class1/1"
    assert ours.labels.tolist() == theirs.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert ours.class_names == theirs.class_names
    assert ours.fingerprint == theirs.fingerprint
    copy = pickle.loads(pickle.dumps(ours))
    for row in (11, 0, 5):
        assert np.array_equal(np.asarray(ours.load(row)), np.asarray(theirs.load(row)))
        assert np.array_equal(np.asarray(copy.load(row)), np.asarray(theirs.load(row)))
    assert list(open_source(remote, limit=3).keys) == ["class0/0", "class1/0", "class2/0"]
    assert cache_for(remote, 256) == cache_for(f"{local}/{TARS}", 256)


def test_headers_and_images_are_asked_for_and_nothing_else(remote: str, asked: Asked) -> None:
    source = open_source(remote)
    # a header beside the label's: one request a sample, two where a piece ends between them, one for the end
    assert 12 <= len(asked) <= 3 * (2 * 4 + 1)
    assert sum(length for _, _, length in asked) <= len(asked) * object_file.LITTLE < 12 * PADDING
    asked.clear()
    source.load(6)
    ((name, _, length),) = asked
    assert name == "train-0001.tar"
    assert PADDING < length < PADDING + 2000


def test_the_cache_is_that_of_the_files_and_goes_on_from_a_shard(
    remote: str, local: Path, tmp_path: Path, command: Callable[..., str], asked: Asked
) -> None:
    command(data=f"{local}/{TARS}", cache=tmp_path / "local")
    command(data=remote)
    cache = tmp_path / "cache"
    assert folder_contents(cache) == folder_contents(tmp_path / "local")
    for record in (cache / "commits").glob("*/1.json"):
        record.unlink()
    asked.clear()
    command(data=remote)
    assert [name for name, _, length in asked if length > PADDING] == ["train-0001.tar"] * 4
    assert folder_contents(cache) == folder_contents(tmp_path / "local")


def test_what_is_wrong_is_one_line(
    remote: str, local: Path, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = obstore.store.from_url(URL)
    source = TarImages(remote)
    whole = (local / "train-0001.tar").read_bytes()
    for changed in (whole[:-1] + b"\1", whole[: 60 * 1024]):
        obstore.put(store, "train-0001.tar", changed)
        for each in (source, pickle.loads(pickle.dumps(source))):
            with pytest.raises(RepaError) as caught:
                each.load(5)
            assert str(caught.value) == (
                f"image class1/1 cannot be read from {URL}/train-0001.tar, which has changed since it was "
                "indexed; run the same command again"
            )
    with pytest.raises(RepaError, match=rf"^{URL}/train-0001\.tar was cut off: it ends at byte 61440, in cl"):
        TarImages(remote)
    obstore.put(store, "train-0001.tar", (local / "train-0000.tar").read_bytes())
    with pytest.raises(RepaError) as caught:
        TarImages(remote)
    assert str(caught.value) == (
        f"key class0/0 comes twice, the second time in {URL}/train-0001.tar; keys name rows, so write the "
        "tars with one sample for each"
    )
    obstore.delete(store, "train-0001.tar")
    with pytest.raises(RepaError) as caught:
        TarImages(remote)
    assert str(caught.value) == (
        f"cannot read {URL}/train-0001.tar: No such file or directory; look at its name, or have it put there"
    )
    with pytest.raises(RepaError) as caught:
        TarImages("https://localhost/train-0000.tar")
    assert "by their offset" in caught.value.what
    assert "name it in a bucket" in caught.value.remedy
    lead_to(monkeypatch, f"http://127.0.0.1:{free_port()}")
    with pytest.raises(RepaError, match=rf"cannot read {URL}/train-000\d\.tar: .*credentials$") as caught:
        TarImages(remote)
    assert "\n" not in str(caught.value)
