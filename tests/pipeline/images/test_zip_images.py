"""Images in ZIP files: labels, damage, and what is no image."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from io import BytesIO
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from repa.data.errors import RepaError
from repa.pipeline.images.base import UndecodableImage
from repa.pipeline.images.names import cache_for
from repa.pipeline.images.open import open_source

if TYPE_CHECKING:
    from pathlib import Path


def png(shade: int) -> bytes:
    stream = BytesIO()
    Image.new("RGB", (8, 8), (shade, 0, 0)).save(stream, "PNG")
    return stream.getvalue()


def pack(path: Path, files: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> str:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return str(path)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_zip_of_dataset_tool(tmp_path: Path, method: int) -> None:
    names = ["00000/img00000001.png", "00000/img00000000.png"]
    files = {name: png(shade) for shade, name in enumerate(names)}
    labels = json.dumps({"labels": [[names[0], 3], [names[1], 1]]}).encode()
    source = open_source(pack(tmp_path / "x.zip", {**files, "dataset.json": labels}, method))
    assert (source.kind, list(source.keys), source.labels.tolist()) == ("zip", sorted(names), [1, 3])
    assert (source.class_names, source.skipped, source.remarks) == (("0", "1", "2", "3"), (), ())
    copy = pickle.loads(pickle.dumps(source))
    assert [copy.load(row).getpixel((0, 0))[0] for row in (0, 1)] == [1, 0]
    assert open_source(str(tmp_path / "x.zip"), labels="folders").class_names == ("00000",)
    # the same images in a folder are the same rows
    with zipfile.ZipFile(tmp_path / "x.zip") as archive:
        archive.extractall(tmp_path / "x")
    folder = open_source(str(tmp_path / "x"))
    assert (folder.fingerprint, folder.keys) == (source.fingerprint, source.keys)


def test_classes_are_folders_and_a_packed_folder_is_the_root(tmp_path: Path) -> None:
    flat = {"b/1.png": png(1), "a/2.png": png(2), "a/.x.png": b"", "__MACOSX/a/2.png": b"", "list.txt": b""}
    source = open_source(pack(tmp_path / "flat.zip", flat))
    assert (source.class_names, source.labels.tolist()) == (("a", "b"), [0, 1])
    assert len(source.skipped) == 3
    packed = open_source(pack(tmp_path / "packed.zip", {f"set/{name}": file for name, file in flat.items()}))
    assert (packed.class_names, packed.labels.tolist()) == (("a", "b"), [0, 1])
    assert list(packed.keys) == ["set/a/2.png", "set/b/1.png"]
    one = open_source(pack(tmp_path / "one.zip", {"set/1.png": png(1), "set/2.png": png(2)}))
    assert (one.class_names, one.labels.tolist()) == (("set",), [0, 0])
    loose = open_source(pack(tmp_path / "loose.zip", {"1.png": png(1), "2.png": png(2)}))
    assert (loose.class_names, loose.labels.tolist()) == (("images",), [0, 0])
    both = pack(tmp_path / "both.zip", {"1.png": png(1), "a/2.png": png(2)})
    with pytest.raises(RepaError) as caught:
        open_source(both)
    assert caught.value.field == "--labels"
    assert open_source(both, labels="none").labels.tolist() == [0, 0]
    assert cache_for(both, 64).name == "both-64"


def test_what_cannot_be_opened(tmp_path: Path) -> None:
    (tmp_path / "text.zip").write_bytes(b"no ZIP at all")
    os.mkfifo(tmp_path / "fifo.zip")
    with zipfile.ZipFile(tmp_path / "bz.zip", "w", zipfile.ZIP_BZIP2) as archive:
        archive.writestr("a/1.png", png(1))
    pack(tmp_path / "empty.zip", {"list.txt": b"x"})
    names = ("text.zip", "fifo.zip", "bz.zip", "empty.zip", "absent.zip")
    for place in (*(str(tmp_path / name) for name in names), "s3://bucket/x.zip"):
        with pytest.raises(RepaError) as caught:
            open_source(place)
        assert "\n" not in str(caught.value)


def test_damage_is_a_row_and_change_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "x.zip"
    source = open_source(pack(path, {"a/1.png": png(1), "a/2.png": png(2)}))
    stamp = path.stat()
    data = bytearray(path.read_bytes())
    data[data.index(png(1)) + 30] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    with pytest.raises(UndecodableImage):
        source.load(0)
    assert source.load(1).getpixel((0, 0)) == (2, 0, 0)
    path.write_bytes(data + b"x")
    with pytest.raises(RepaError):
        pickle.loads(pickle.dumps(source)).load(1)


def test_a_member_that_unpacks_to_more_than_it_says_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "x.zip"
    pack(path, {"a/1.png": bytes(1 << 20)}, zipfile.ZIP_DEFLATED)
    size = (1 << 20).to_bytes(4, "little")
    path.write_bytes(path.read_bytes().replace(size, (100).to_bytes(4, "little")))
    with pytest.raises(UndecodableImage):
        open_source(str(path)).load(0)
    path.write_bytes(path.read_bytes().replace((100).to_bytes(4, "little"), (1 << 31).to_bytes(4, "little")))
    with pytest.raises(UndecodableImage):
        open_source(str(path)).load(0)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_flipped_bytes_end_in_no_traceback(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "x.zip"
    pack(path, {"a/1.png": png(1), "b/2.png": png(2)}, zipfile.ZIP_DEFLATED)
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(raw)
    try:
        source = open_source(str(path))
        for row in range(len(source)):
            source.load(row)
    except (RepaError, UndecodableImage) as error:
        refusal = str(error)
        assert "\n" not in refusal
