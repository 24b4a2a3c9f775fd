"""A source is what it holds, not where it lies: moved, renamed and copied, it goes on with its cache."""

from __future__ import annotations

import io
import shutil
import tarfile
import zipfile
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image
from repa.commands.preprocess import PreprocessFlags, preprocess
from repa.data.errors import CacheError
from repa.data.format.opening import open_manifest
from repa.pipeline.demo import VAE_FOLDER
from repa.pipeline.replay.images import images_of
from rich.console import Console

if TYPE_CHECKING:
    from pathlib import Path

SIDE = 16


def add(data: str, cache: Path, encoders: list[str], **changes: Any) -> str:
    """`repa preprocess` by small models, one of them a teacher or none."""
    output = io.StringIO()
    flags: dict[str, Any] = {"vae": "demo", "resolution": SIDE, "batch_size": 4, "shard_rows": 4, **changes}
    preprocess(
        PreprocessFlags(data=data, cache=cache, encoders=encoders, **flags),
        console=Console(file=output, width=200),
    )
    return output.getvalue()


def picture(number: int) -> bytes:
    stream = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def classes(root: Path) -> str:
    for number in range(6):
        (root / "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
        (root / "ab"[number % 2] / f"{number}.png").write_bytes(picture(number))
    return str(root)


def flat(root: Path) -> str:
    root.mkdir(parents=True)
    for number in range(6):
        (root / f"{number}.png").write_bytes(picture(number))
    return str(root)


def packed(root: Path) -> str:
    root.mkdir(parents=True)
    with zipfile.ZipFile(root / "set.zip", "w") as archive:
        for number in range(6):
            archive.writestr(f"{'ab'[number % 2]}/{number}.png", picture(number))
    return str(root / "set.zip")


def tars(root: Path) -> str:
    root.mkdir(parents=True)
    for part in range(2):
        with tarfile.open(root / f"{part}.tar", "w") as tar:
            for number in range(3 * part, 3 * part + 3):
                for ending, content in (("png", picture(number)), ("cls", b"%d" % (number % 2))):
                    member = tarfile.TarInfo(f"{number}.{ending}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return str(root / "{0..1}.tar")


def hub(root: Path) -> str:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    rows = {
        "image": [{"bytes": picture(number), "path": None} for number in range(6)],
        "label": [0, 1] * 3,
    }
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(root))
    return f"hf:{root}"


@pytest.mark.parametrize("make", [classes, flat, packed, tars, hub])
def test_a_moved_source_gets_another_teacher(tmp_path: Path, make: Any) -> None:
    data, cache = make(tmp_path / "here" / "pictures"), tmp_path / "cache"
    add(data, cache, ["none"])
    before = open_manifest(cache)
    moved = tmp_path / "elsewhere" / "deeper" / "images2"
    moved.parent.mkdir(parents=True)
    shutil.move(tmp_path / "here" / "pictures", moved)
    there = data.replace(str(tmp_path / "here" / "pictures"), str(moved))
    add(there, cache, ["demo"])
    after = open_manifest(cache)
    assert after.class_names == before.class_names
    assert set(after.sources) == {"sd-vae", "demo"}
    assert len(images_of(after, there, cache)) == 6


def test_labels_by_folders_and_none_are_found_again(tmp_path: Path) -> None:
    data, cache = classes(tmp_path / "pictures"), tmp_path / "cache"
    add(data, cache, ["none"], labels="none")
    assert images_of(open_manifest(cache), data, cache).labels.tolist() == [0] * 6
    with pytest.raises(CacheError):
        add(data, cache, ["demo"])
    add(data, cache, ["demo"], labels="none")
    (tmp_path / "pictures" / "dataset.json").write_text('{"labels": null}')
    add(data, tmp_path / "second", ["none"], labels="folders")
    again = images_of(open_manifest(tmp_path / "second"), data, tmp_path / "second")
    assert again.labels.tolist() == [0, 0, 0, 1, 1, 1]


def test_changed_images_of_the_same_names_are_another_source(tmp_path: Path) -> None:
    data, cache = flat(tmp_path / "pictures"), tmp_path / "cache"
    add(data, cache, ["none"])
    (tmp_path / "pictures" / "3.png").write_bytes(picture(3) + b"\0")
    with pytest.raises(CacheError):
        add(data, cache, ["demo"])


def test_a_moved_autoencoder_goes_on_with_its_rows(tmp_path: Path) -> None:
    data, cache = flat(tmp_path / "pictures"), tmp_path / "cache"
    shutil.copytree(VAE_FOLDER, tmp_path / "here" / "vae")
    add(data, cache, ["none"], vae=str(tmp_path / "here" / "vae"))
    sorted((cache / "commits" / "sd-vae").glob("*.json"))[-1].unlink()
    shutil.move(tmp_path / "here", tmp_path / "there")
    add(data, cache, ["none"], vae=str(tmp_path / "there" / "vae"))
    assert "complete" in add(data, cache, ["none"], vae=str(tmp_path / "there" / "vae"))
