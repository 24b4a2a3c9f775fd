"""WebDataset tars of images as a source: rows, labels, offsets, and caches equal to those of a folder."""

from __future__ import annotations

import io
import json
import os
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from repa.data.errors import RepaError
from repa.data.format.opening import open_manifest, read_keys
from repa.data.testing import folder_contents
from repa.pipeline.images.base import ImageSource, UndecodableImage
from repa.pipeline.images.names import cache_for
from repa.pipeline.images.open import open_source
from repa.pipeline.images.tars import TarImages
from repa.pipeline.images.workers import decode_row, decode_rows
from store_on_disk import data_of_a_cache

ROOT = Path(__file__).resolve().parents[3]

Files = dict[str, bytes]


def png(shade: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), (shade, 255 - shade, 7)).save(stream, "PNG")
    return stream.getvalue()


def write_tar(path: Path, files: Files) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def samples(*numbers: int) -> Files:
    """Key ``s<n>`` with label n mod 3."""
    files = {}
    for number in numbers:
        files[f"s{number}.png"] = png(number)
        files[f"s{number}.cls"] = str(number % 3).encode()
    return files


@pytest.fixture
def tars(tmp_path: Path) -> str:
    write_tar(tmp_path / "t-0.tar", samples(9, 2, 5))
    write_tar(tmp_path / "t-1.tar", samples(4, 1))
    return str(tmp_path / "t-{0..1}.tar")


def test_rows_are_in_the_order_of_the_tars(tars: str) -> None:
    source: ImageSource = open_source(tars)
    assert source.kind == "tars"
    assert source.name == tars
    assert list(source.keys) == ["s9", "s2", "s5", "s4", "s1"]
    assert source.labels.tolist() == [0, 2, 2, 1, 1]
    assert source.labels.dtype == np.int32
    assert source.class_names == ("0", "1", "2")
    assert [source.load(row).getpixel((0, 0))[0] for row in (4, 0, 2, 1, 3)] == [1, 9, 5, 2, 4]
    assert [source.load(row).mode for row in range(5)] == ["RGB"] * 5


def test_it_travels_to_other_processes(tars: str) -> None:
    source = TarImages(tars)
    source.load(0)
    copy = pickle.loads(pickle.dumps(source))
    assert copy.keys == source.keys
    assert copy.load(3).tobytes() == source.load(3).tobytes()
    with decode_rows(source, [4, 0, 3], 8, workers=1) as decoded:
        found = dict(decoded)
    assert list(found) == [4, 0, 3]
    assert all(np.array_equal(found[row], decode_row(source, row, 8)) for row in found)


def test_limit_takes_evenly_and_keeps_the_classes(tars: str) -> None:
    source = TarImages(tars, limit=2)
    assert list(source.keys) == ["s9", "s5"]
    assert source.class_names == ("0", "1", "2")
    assert source.load(1).getpixel((0, 0))[0] == 5
    assert TarImages(tars, limit=9).fingerprint == TarImages(tars).fingerprint != source.fingerprint


def test_the_fingerprint_is_of_names_labels_and_sizes_not_of_the_cuts(tmp_path: Path, tars: str) -> None:
    before = TarImages(tars).fingerprint
    whole = write_tar(tmp_path / "whole.tar", {**samples(9, 2, 5), **samples(4, 1)})
    assert TarImages(str(whole)).fingerprint == before
    files = {**samples(9, 2, 5), **samples(4, 1)}
    for change in ({"s4.cls": b"2"}, {"s4.png": png(4) + b"\0"}):
        write_tar(whole, {**files, **change})
        assert TarImages(str(whole)).fingerprint != before
    renamed = {name.replace("s4", "s6"): content for name, content in files.items()}
    assert TarImages(str(write_tar(whole, renamed))).fingerprint != before


def test_labels_from_json_and_other_members(tmp_path: Path) -> None:
    files = {
        "__repa__/x.json": b"{}",
        "a/1.json": json.dumps({"caption": "no label here"}).encode(),
        "a/1.jpg": png(1),
        "a/1.cls": b" 1\n",
        "a/2.JPG": png(2),
        "a/2.json": json.dumps({"label": 0, "cls": 7}).encode(),
        "a/2.mask.png": png(7),
        "b/1.json": b"2",
        "b/1.webp": png(3),
        "b/3.txt": b"no image",
        "README": b"?",
    }
    source = TarImages(str(write_tar(tmp_path / "x.tar", files)))
    assert list(source.keys) == ["a/1", "a/2", "b/1"]
    assert source.labels.tolist() == [1, 0, 2]
    assert [source.load(row).getpixel((0, 0))[0] for row in range(3)] == [1, 2, 3]
    assert [path.partition(":")[2] for path, _ in source.skipped] == ["__repa__/x.json", "README", "b/3"]


def test_class_names_from_a_file(tmp_path: Path, tars: str) -> None:
    names = tmp_path / "names.txt"
    names.write_text("Schleie\nGoldfisch\nhai, weißer\nnobody\n", encoding="utf-8")
    source = open_source(tars, class_names=names)
    assert source.class_names == ("Schleie", "Goldfisch", "hai, weißer", "nobody")
    assert source.fingerprint == open_source(tars).fingerprint
    names.write_text("a\nb\n")
    with pytest.raises(RepaError, match=r"names 2 classes, .* has labels up to 2"):
        open_source(tars, class_names=names)
    names.write_text("a\n\nc\n")
    with pytest.raises(RepaError, match="no name in line 2"):
        open_source(tars, class_names=names)
    with pytest.raises(RepaError, match=r"cannot read .*none\.txt"):
        open_source(tars, class_names=tmp_path / "none.txt")
    with pytest.raises(RepaError) as caught:
        open_source("demo", class_names=names)
    assert caught.value.field == "--class-names"


@pytest.mark.parametrize(
    ("files", "what"),
    [
        ({"a.png": png(1)}, "no label beside them, first sample a .*; add a member a.cls"),
        ({"a.png": png(1), "a.json": b'{"x": 1}'}, "no label beside them, first sample a"),
        ({"a.png": png(1), "a.cls": b"tench"}, "sample a in .* has the label 'tench'"),
        ({"a.png": png(1), "a.cls": b"-1"}, "has the label '-1'"),
        ({"a.png": png(1), "a.json": b'{"label": 1.5}'}, "has the label .*json"),
        ({"a.png": png(1), "a.json": b"{"}, "has the label"),
        ({"a.png": png(1), "a.json": b"[" * 200_000}, "has the label .*json"),
        (
            {"a.png": png(1), "a.cls": b"2000000000"},
            "has the label 2000000000, which is no number of a class",
        ),
        (
            {"a.png": png(1), "b.png": png(2), "a.cls": b"0", "b.cls": b"0"},
            "no label beside them, first sample a .*--sort",
        ),
        ({"a.1.png": png(1), "a.1.cls": b"0"}, "has no images .* from the first dot"),
        ({"a.png": png(1), "a.jpg": png(1), "a.cls": b"0"}, "two images, .png and .jpg"),
        ({**samples(1, 2), "s1.jpg": png(1), "s1.txt": b"", "s1.json": b"1"}, "key s1 comes twice"),
        ({"a\nb.png": png(1), "a\nb.cls": b"0"}, "line break"),
        ({"a\udcff.png": png(1), "a\udcff.cls": b"0"}, "not UTF-8"),
        ({"a.txt": b"1"}, "has no images"),
    ],
)
def test_what_is_no_set_of_images_is_one_line(tmp_path: Path, files: Files, what: str) -> None:
    path = write_tar(tmp_path / "bad.tar", files)
    with pytest.raises(RepaError, match=what) as caught:
        open_source(str(path))
    assert "bad.tar" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_key_in_two_tars_a_cut_tar_and_a_pipe_are_one_line(tmp_path: Path, tars: str) -> None:
    write_tar(tmp_path / "t-2.tar", samples(7, 5))
    with pytest.raises(RepaError, match=r"key s5 comes twice, the second time in .*t-2\.tar"):
        open_source(str(tmp_path / "t-*.tar"))
    whole = (tmp_path / "t-1.tar").read_bytes()
    (tmp_path / "t-1.tar").write_bytes(whole[:1700])
    with pytest.raises(RepaError, match=r"t-1\.tar was cut off"):
        open_source(tars)
    (tmp_path / "t-1.tar").unlink()
    with pytest.raises(RepaError) as caught:
        open_source(tars)
    assert str(caught.value) == (
        f"{tars} names 2 tars, of which 1 tar cannot be found, first {tmp_path}/t-1.tar; fetch what is "
        "missing, or name only tars that are there"
    )
    with pytest.raises(RepaError) as caught:
        open_source(str(tmp_path / "t-1.tar"))
    assert str(caught.value) == f"tar {tmp_path}/t-1.tar is missing; look at its name, or fetch it"
    with pytest.raises(RepaError, match="fetch it to a disk"):
        open_source("pipe:cat x.tar")


def test_a_broken_image_keeps_its_row(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", {**samples(1), "s2.png": b"junk", "s2.cls": b"0", **samples(3)})
    source = TarImages(str(path))
    with pytest.raises(UndecodableImage, match="not a JPEG"):
        source.load(1)
    assert source.load(2).getpixel((0, 0)) == (3, 252, 7)


@pytest.mark.parametrize("change", ["cut", "other samples", "same size"])
@pytest.mark.parametrize("opened", [False, True])
def test_a_tar_that_changed_since_it_was_indexed_stops(tmp_path: Path, change: str, opened: bool) -> None:
    """Other bytes at the old place would be a row of another image, or one wrongly called broken."""
    path = write_tar(tmp_path / "x.tar", samples(1, 2, 3))
    source = TarImages(str(path))
    if opened:
        assert source.load(2).getpixel((0, 0)) == (3, 252, 7)
    if change == "cut":
        path.write_bytes(path.read_bytes()[:3000])
    else:
        before = path.stat()
        write_tar(path, samples(6, 5, 4) if change == "same size" else samples(4, 5, 6, 7, 8, 9, 10, 11))
        assert (path.stat().st_size == before.st_size) is (change == "same size")
        # a file system may keep times to the second
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1_000_000_000))
    for each in (source, pickle.loads(pickle.dumps(source))):
        with pytest.raises(RepaError, match=r"image s3 .*x\.tar, which has changed since it was indexed"):
            each.load(2)


def test_names_of_caches() -> None:
    assert cache_for("shards/train-{0000..0146}.tar", 256).name == "train-256"
    assert cache_for("shards/{0000..0146}.tar", 256).name == "shards-256"
    assert cache_for("x/val.tar", 64).name == "val-64"
    assert cache_for("hf:ILSVRC/imagenet-1k:validation", 256).name == "ILSVRC-imagenet-1k-validation-256"


def pictures_in_tars(pictures: Path, folder: Path) -> str:
    """The pictures of a folder, in its order, in two tars; keys as the folder's but for the ending."""
    source = open_source(str(pictures))
    files: list[Files] = [{}, {}]
    for row, (key, label) in enumerate(zip(source.keys, source.labels, strict=True)):
        part = files[2 * row // len(source)]
        part[key] = (pictures / key).read_bytes()
        part[f"{key.rpartition('.')[0]}.cls"] = str(label).encode()
    for number, part in enumerate(files):
        write_tar(folder / f"p-{number}.tar", part)
    return str(folder / "p-{0..1}.tar")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_cache_of_tars_has_the_columns_of_the_folders(
    tmp_path: Path, pictures: Path, complete_cache: Path, command: Callable[..., str], workers: int
) -> None:
    pattern = pictures_in_tars(pictures, tmp_path)
    names = tmp_path / "names.txt"
    names.write_text("class0\nclass1\nclass2\n")
    printed = command(data=pattern, class_names=names, workers=workers)
    assert "12 in 3 classes" in printed
    made = data_of_a_cache(tmp_path / "cache")
    assert made == data_of_a_cache(complete_cache)
    assert any(isinstance(record, dict) for record in made.values())
    manifest = open_manifest(tmp_path / "cache")
    assert manifest.source_kind == "tars"
    assert manifest.class_names == ("class0", "class1", "class2")
    assert read_keys(tmp_path / "cache", manifest)[0] == "class0/0"


def test_a_run_goes_on_from_the_shard_it_was_stopped_at(
    tmp_path: Path, pictures: Path, command: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pattern = pictures_in_tars(pictures, tmp_path)
    command(data=pattern)
    whole = folder_contents(tmp_path / "cache")
    for record in (tmp_path / "cache" / "commits").glob("*/1.json"):
        record.unlink()
    read: list[int] = []
    load = TarImages.load

    def noted(self: Any, index: int, /) -> Any:
        read.append(index)
        return load(self, index)

    monkeypatch.setattr(TarImages, "load", noted)
    command(data=pattern)
    assert read == [4, 5, 6, 7]
    assert folder_contents(tmp_path / "cache") == whole


def test_real_photographs(shared: Path, tmp_path: Path) -> None:
    folder = shared / "imagenet-sample"
    paths = sorted(folder.glob("*/*"))[:24]
    for number in range(2):
        files: Files = {}
        for at, path in enumerate(paths[number * 12 : number * 12 + 12]):
            files[f"{path.stem}.jpg"] = path.read_bytes()
            files[f"{path.stem}.cls"] = str(number * 12 + at).encode()
        write_tar(tmp_path / f"train-{number:04d}.tar", files)
    source = TarImages(str(tmp_path / "train-{0000..0001}.tar"))
    assert list(source.keys) == [path.stem for path in paths]
    assert source.labels.tolist() == list(range(24))
    for row in (0, 11, 12, 23):
        with Image.open(paths[row]) as image:
            assert source.load(row).tobytes() == image.convert("RGB").tobytes()


def test_tars_without_labels_are_one_class_if_asked(tmp_path: Path) -> None:
    path = str(write_tar(tmp_path / "a.tar", {"a.png": png(1), "b.png": png(2), "b.cls": b"5"}))
    with pytest.raises(RepaError) as caught:
        open_source(path)
    assert caught.value.field == "--labels"
    source = open_source(path, labels="none")
    assert (source.labels.tolist(), source.class_names) == ([0, 0], ("images",))
