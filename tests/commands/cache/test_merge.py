"""Parts of one image set, encoded apart and joined, are the cache of the whole, byte for byte."""

from __future__ import annotations

import io
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from repa.commands.cache.merge import merge
from repa.commands.preprocess import PreprocessFlags, preprocess
from repa.data.errors import CacheError, CorruptRowError, RepaError
from repa.data.format.columns import source_of
from repa.data.format.layout import shard_file
from repa.data.format.opening import open_manifest, read_keys
from repa.data.format.survey import committed_shards
from repa.data.reading.reader import CacheReader
from repa.data.testing import folder_contents
from repa.data.upkeep.verify import verify_cache
from rich.console import Console

SIDE = 16
SHARD_ROWS = 4


def draw(folder: Path, names: list[str], *, seed: int = 0) -> Path:
    generator = np.random.default_rng(seed)
    for name in sorted(names):
        pixels = generator.integers(0, 256, (SIDE, SIDE, 3), np.uint8)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / name)
    return folder


def encode(data: Path, cache: Path, **changes: Any) -> Path:
    settings: dict[str, Any] = {
        "data": str(data),
        "cache": cache,
        "encoders": ["demo"],
        "vae": "demo",
        "resolution": SIDE,
        "batch_size": 1,
        "shard_rows": SHARD_ROWS,
    }
    preprocess(PreprocessFlags(**{**settings, **changes}), console=Console(file=io.StringIO()))
    return cache


def join(*parts: Path, out: Path, **changes: Any) -> str:
    output = io.StringIO()
    merge(parts=parts, cache=out, console=Console(file=output, width=300), **changes)
    return output.getvalue()


def move(names: list[str], source: Path, target: Path) -> None:
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source / name, target / name)


NAMES = [f"class{label}/{number}.png" for label in range(3) for number in range(4)]
# neither whole classes nor whole shards
FIRST = ["class0/1.png", "class0/3.png", "class1/0.png", "class1/2.png", "class1/3.png"]
SECOND = [name for name in NAMES if name not in FIRST]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders whole, a and b of images, one of them broken, and the caches whole.cache, …"""
    folder = tmp_path_factory.mktemp("merge")
    draw(folder / "whole", NAMES)
    (folder / "whole" / "class1/2.png").write_bytes(b"no picture")
    move(FIRST, folder / "whole", folder / "a")
    move(SECOND, folder / "whole", folder / "b")
    for name in ("whole", "a", "b"):
        encode(folder / name, folder / f"{name}.cache")
    return folder


def test_the_parts_joined_are_the_whole_byte_for_byte(made: Path, tmp_path: Path) -> None:
    data = str(made / "whole")
    for order in (("a", "b"), ("b", "a")):
        out = tmp_path / "".join(order)
        said = join(*(made / f"{name}.cache" for name in order), out=out, data=data)
        assert folder_contents(out) == folder_contents(made / "whole.cache")
        assert "12 images of 2 caches" in said
    # it goes on like any other cache
    encode(made / "whole", tmp_path / "ab")
    assert folder_contents(tmp_path / "ab") == folder_contents(made / "whole.cache")


def test_without_the_images_all_but_the_fingerprint_is_the_same(made: Path, tmp_path: Path) -> None:
    said = join(made / "b.cache", made / "a.cache", out=tmp_path / "out")
    assert "its images were not looked at" in said
    here, there = folder_contents(tmp_path / "out"), folder_contents(made / "whole.cache")
    # which cache it is differs, and with it every record
    changed = {name for name in here if here[name] != there[name]}
    records = {f"commits/{source}/{shard}.json" for source in ("demo", "sd-vae") for shard in range(3)}
    assert changed == {"zarr.json", "zarr.json.copy", *records}
    assert here.keys() == there.keys()
    joined, whole = open_manifest(tmp_path / "out"), open_manifest(made / "whole.cache")
    assert joined.source_fingerprint.startswith("parts:")
    assert joined.keys_sha256 == whole.keys_sha256
    assert joined.class_names == whole.class_names
    assert verify_cache(tmp_path / "out") == []
    with pytest.raises(CacheError, match="source_fingerprint differs"):
        encode(made / "whole", tmp_path / "out")


def test_parts_that_measured_their_compute_dtype_each_on_its_own_images(made: Path, tmp_path: Path) -> None:
    parts = [encode(made / name, tmp_path / name, compute_dtype="bfloat16") for name in ("a", "b")]
    sources = [open_manifest(part).sources["demo"] for part in parts]
    assert sources[0].notes["deviation"] != sources[1].notes["deviation"]
    join(*parts, out=tmp_path / "out", data=str(made / "whole"))
    assert open_manifest(tmp_path / "out").sources["demo"] == sources[0]
    assert verify_cache(tmp_path / "out") == []


class Killed(BaseException):
    pass


def test_killed_at_any_moment_it_resumes(made: Path, tmp_path: Path) -> None:
    parts, data = (made / "a.cache", made / "b.cache"), str(made / "whole")
    whole = folder_contents(made / "whole.cache")
    replace, out = os.replace, tmp_path / "out"
    for steps in (0, 3, 6, 9, 5, 4):
        left = steps

        def mortal(*arguments: Any) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed
            replace(*arguments)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "replace", mortal)
            with pytest.raises(Killed):
                join(*parts, out=out, data=data)
    manifest = open_manifest(out)
    kept = {
        file: file.stat().st_mtime_ns
        for column, spec in manifest.columns.items()
        for shard in committed_shards(out, manifest, source_of(column))
        for file in [shard_file(out, column, spec, shard)]
    }
    assert kept
    join(*parts, out=out, data=data)
    assert folder_contents(out) == whole
    assert all(path.stat().st_mtime_ns == when for path, when in kept.items())


def test_a_damaged_row_is_named(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "a.cache", tmp_path / "a")
    manifest = open_manifest(tmp_path / "a")
    file = shard_file(tmp_path / "a", "demo/patch", manifest.columns["demo/patch"], 0)
    content = bytearray(file.read_bytes())
    content[5] ^= 1
    file.write_bytes(content)
    with pytest.raises(
        CorruptRowError, match=re.escape(f"row 0 of demo/patch is corrupt (wrong checksum) in {file}")
    ):
        join(tmp_path / "a", made / "b.cache", out=tmp_path / "out")


def test_shards_of_another_size_are_joined_into_those_of_the_first(made: Path, tmp_path: Path) -> None:
    encode(made / "b", tmp_path / "b", shard_rows=3)
    join(made / "a.cache", tmp_path / "b", out=tmp_path / "out", data=str(made / "whole"))
    assert folder_contents(tmp_path / "out") == folder_contents(made / "whole.cache")


def refused(message: str, *parts: Path, out: Path, **changes: Any) -> None:
    with pytest.raises(RepaError, match=message) as caught:
        join(*parts, out=out, **changes)
    assert "\n" not in str(caught.value)
    assert "; " in str(caught.value) or ": " in str(caught.value)
    assert not (out / "zarr.json").exists() or out in parts


def test_what_does_not_fit_is_refused_in_one_line(made: Path, tmp_path: Path) -> None:
    a, b, out = made / "a.cache", made / "b.cache", tmp_path / "out"

    def other(**changes: Any) -> Path:
        folder = tmp_path / "other"
        shutil.rmtree(folder, ignore_errors=True)
        return encode(made / "b", folder, **changes)

    refused("name at least two", a, out=out)
    refused("is one of the parts", a, b, out=a)
    refused("there is no cache at", a, tmp_path / "none", out=out)
    refused(r"image class0/1.png is in .*a.cache and in .*a.cache", a, a, out=out)
    refused("resolution is 16, not 32", a, other(resolution=32), out=out)
    refused("exif_orientation is ignored, not applied", a, other(apply_exif=True), out=out)
    refused("different forms: batch_size is 1, not 2", a, other(batch_size=2), out=out)
    refused(
        r"columns.demo/patch is float16\[4, 128\], not float32",
        a,
        other(feature_dtype="float32"),
        out=out,
    )
    refused("has no demo, .*a.cache has; .* --source sd-vae$", a, other(encoders=["none"]), out=out)
    refused("has demo, .*other has not; .* --source sd-vae$", other(encoders=["none"]), b, out=out)
    refused("has no source dino; it has sd-vae, demo", a, b, out=out, sources=["dino"])
    refused(
        "11 of the 12 images",
        a,
        b,
        out=out,
        data=str(draw(tmp_path / "x", NAMES[:1] + [f"y/{i}.png" for i in range(11)])),
    )


def test_images_other_than_the_parts_were_made_from_are_refused(made: Path, tmp_path: Path) -> None:
    a, b, out = made / "a.cache", made / "b.cache", tmp_path / "out"
    changed = Path(shutil.copytree(made / "whole", tmp_path / "changed"))
    (changed / "class2/0.png").write_bytes(b"shorter")
    refused("another size in .*changed than when", a, b, out=out, data=str(changed))
    refused("is of kind demo, the parts were made from folder", a, b, out=out, data="demo")
    refused("image class0/1.png of .*a.cache is not among", a, b, out=out, data=str(made / "b"))


def test_a_part_that_is_not_complete_is_refused(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "a.cache", tmp_path / "a")
    (tmp_path / "a" / "commits" / "demo" / "1.json").unlink()
    with pytest.raises(CacheError, match="not wholly written"):
        join(tmp_path / "a", made / "b.cache", out=tmp_path / "out")
    # what is chosen is complete
    join(tmp_path / "a", made / "b.cache", out=tmp_path / "latents", sources=["sd-vae"])
    assert list(open_manifest(tmp_path / "latents").sources) == ["sd-vae"]
    assert read_keys(tmp_path / "latents", open_manifest(tmp_path / "latents")) == NAMES
    with CacheReader(tmp_path / "latents", ["sd-vae/moments"]) as reader:
        assert len(reader.valid_rows) == len(NAMES) - 1


def test_calibrations_of_their_own_are_said_and_what_to_do(made: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        encode(made / name, tmp_path / name, feature_dtype="int8")
    message = (
        "have demo with a calibration each, fitted and measured on their own images, and the whole needs one "
        "for all; leave it out with --source sd-vae, then add it to the whole with "
        "`repa preprocess --encoder demo`"
    )
    refused(re.escape(message), tmp_path / "a", tmp_path / "b", out=tmp_path / "out")
    whole = str(made / "whole")
    join(tmp_path / "a", tmp_path / "b", out=tmp_path / "out", sources=["sd-vae"], data=whole)
    encode(made / "whole", tmp_path / "out", feature_dtype="int8")
    encode(made / "whole", tmp_path / "at-once", feature_dtype="int8")
    assert folder_contents(tmp_path / "out") == folder_contents(tmp_path / "at-once")


def test_factors_of_parts_have_a_calibration_each(made: Path, tmp_path: Path) -> None:
    """However many components the heads of each part have come to."""
    flags: dict[str, Any] = {"attention": "4,6", "attention_kl": 1e-3}
    for name in ("a", "b"):
        encode(made / name, tmp_path / name, **flags)
    noted = [open_manifest(tmp_path / name).sources["demo+attention"].notes for name in ("a", "b")]
    assert noted[0]["components"] != noted[1]["components"]
    message = (
        "have demo+attention with a calibration each, fitted and measured on their own images, and the whole "
        "needs one for all; leave it out with --source sd-vae --source demo, then add it to the whole with "
        "`repa preprocess --encoder demo --attention …`"
    )
    refused(re.escape(message), tmp_path / "a", tmp_path / "b", out=tmp_path / "out")
    whole = str(made / "whole")
    join(tmp_path / "a", tmp_path / "b", out=tmp_path / "out", sources=["sd-vae", "demo"], data=whole)
    encode(made / "whole", tmp_path / "out", **flags)
    encode(made / "whole", tmp_path / "at-once", **flags)
    assert folder_contents(tmp_path / "out") == folder_contents(tmp_path / "at-once")
    # other flags are another thing
    encode(made / "b", tmp_path / "c", attention="4,6", attention_bytes=3000)
    refused("in different forms", tmp_path / "a", tmp_path / "c", out=tmp_path / "other")


def test_loose_images_of_two_folders_have_no_common_class(tmp_path: Path) -> None:
    for number, name in enumerate(("x", "y")):
        draw(tmp_path / name, [f"{name}{i}.png" for i in range(2)], seed=number)
        encode(tmp_path / name, tmp_path / f"{name}.cache", encoders=["none"])
    parts = (tmp_path / "x.cache", tmp_path / "y.cache")
    refused("lie in no class folder", *parts, out=tmp_path / "out")


def test_a_full_disk_is_said_before_anything_is_copied(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage: Callable[..., Any] = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(path)._replace(free=1000))
    with pytest.raises(RepaError, match=r"kB are to be copied to .*, its disk has 1 kB free; free some"):
        join(made / "a.cache", made / "b.cache", out=tmp_path / "out")
