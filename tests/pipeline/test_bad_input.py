"""Bad input of every kind: one clear line, or one image left out; and nothing that was there is lost."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image
from repa.data.errors import RepaError
from repa.data.format.columns import MOMENTS
from repa.data.format.opening import open_manifest
from repa.data.format.survey import committed_shards, invalid_reasons
from repa.data.reading.reader import CacheReader
from repa.data.testing import folder_contents
from repa.pipeline.demo import TEACHER_WEIGHTS
from repa.pipeline.images import folder as folder_module
from safetensors.torch import load_file, save_file

if TYPE_CHECKING:
    from collections.abc import Callable

Command = "Callable[..., str]"
VICTIM = "class1/2.png"
COLUMNS = (MOMENTS, "demo/patch", "demo/cls")


def read_all(cache: Path) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Valid rows of a cache and their values."""
    with CacheReader(cache, COLUMNS) as reader:
        rows = reader.valid_rows
        specs = reader.manifest.columns
        out = {name: np.empty((len(rows), *specs[name].shape), specs[name].numpy_dtype) for name in COLUMNS}
        reader.read_rows(rows, COLUMNS, out)
        return rows, out


def truncated_jpeg(file: Path) -> None:
    Image.effect_noise((64, 64), 90).convert("RGB").save(file, "JPEG")
    file.write_bytes(file.read_bytes()[:400])


UNDECODABLE = {
    "truncated JPEG": truncated_jpeg,
    "text named as an image": lambda file: file.write_text("not an image at all"),
    "empty file": lambda file: file.write_bytes(b""),
    "header only": lambda file: file.write_bytes(file.read_bytes()[:20]),
    "flipped bits": lambda file: file.write_bytes(file.read_bytes()[:60] + b"\xff" * 40),
}


@pytest.mark.parametrize("kind", UNDECODABLE)
def test_an_undecodable_image_is_left_out_and_nothing_else(
    kind: str, command: Callable[..., str], pictures: Path, complete_cache: Path, tmp_path: Path
) -> None:
    UNDECODABLE[kind](pictures / VICTIM)
    printed = command()
    cache = tmp_path / "cache"
    reasons = invalid_reasons(cache, open_manifest(cache))
    row = 4 + 2
    assert list(reasons) == [row]
    assert reasons[row]
    assert "\n" not in reasons[row]
    assert f"{VICTIM} (row {row}): {reasons[row]}" in printed
    rows, values = read_all(cache)
    assert rows.tolist() == [each for each in range(12) if each != row]
    _, clean = read_all(complete_cache)
    for column in COLUMNS:
        np.testing.assert_array_equal(values[column], clean[column][rows])


def read_only_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    target = tmp_path / "read-only"
    target.mkdir()
    real = os.access  # root may write anywhere: the system's answer to others is put in its mouth
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != target and real(path, mode))
    return {"cache": target / "cache"}


def unreadable_file(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = folder_module.read_regular

    def read_regular(path: Path, most: int) -> bytes:
        if path == pictures / VICTIM:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, most)

    monkeypatch.setattr(folder_module, "read_regular", read_regular)


def small_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 10**6 - 10**4, 10**4))


def write(path: Path, text: str = "x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def without_one_tensor(file: Path) -> Path:
    state = load_file(TEACHER_WEIGHTS)
    del state["blocks.0.attn.qkv.weight"]
    save_file(state, file)
    return file


def with_pickled_code(file: Path) -> Path:
    torch.save({"model": {"weight": torch.zeros(1)}, "hook": print}, file)
    return file


# what is asked for, and what the one line must say
REFUSED: dict[str, tuple[Callable[..., dict[str, Any] | None], tuple[str, ...]]] = {
    "no such data folder": (lambda f: {"data": str(f.tmp / "nowhere")}, ("nowhere", "--data")),
    "data is a file": (lambda f: {"data": str(write(f.tmp / "file.png"))}, ("file.png", "--data")),
    "folder without images": (
        lambda f: {"data": str(write(f.tmp / "texts" / "a.txt").parent)},
        ("texts", "no images"),
    ),
    "empty class folder": (lambda f: (f.pictures / "class9").mkdir(), ("class9",)),
    "images beside class folders": (
        lambda f: shutil.copy(f.pictures / VICTIM, f.pictures / "stray.png") and None,
        ("stray.png",),
    ),
    "line break in a name": (
        lambda f: shutil.copy(f.pictures / VICTIM, f.pictures / "class1" / "a\nb.png") and None,
        ("line break",),
    ),
    "broken link": (lambda f: (f.pictures / "class1" / "x.png").symlink_to("nowhere"), ("x.png", "link")),
    "unknown encoder": (lambda f: {"encoders": ["dinov2-x"]}, ("dinov2-x", "dinov2-b")),
    "encoder twice": (lambda f: {"encoders": ["demo", "demo"]}, ("--encoder demo",)),
    "none and another encoder": (lambda f: {"encoders": ["none", "demo"]}, ("none",)),
    "weights without a name": (lambda f: {"weights": ["file.pth"]}, ("file.pth", "NAME=FILE")),
    "weights twice": (lambda f: {"weights": ["demo=a", "demo=b"]}, ("demo", "twice")),
    "weights of an encoder not asked for": (lambda f: {"weights": ["mae-l=a"]}, ("mae-l", "--encoder mae-l")),
    "weights file missing": (lambda f: {"weights": [f"demo={f.tmp / 'no.pth'}"]}, ("no.pth",)),
    "weights file is text": (lambda f: {"weights": [f"demo={write(f.tmp / 'w.safetensors')}"]}, ("w.safe",)),
    "weights of another model": (
        lambda f: {"weights": [f"demo={without_one_tensor(f.tmp / 'w.safetensors')}"]},
        ("w.safetensors", "blocks.0.attn.qkv.weight"),
    ),
    "weights with code": (lambda f: {"weights": [f"demo={with_pickled_code(f.tmp / 'w.pth')}"]}, ("w.pth",)),
    "no such autoencoder": (lambda f: {"vae": str(f.tmp / "no-vae")}, ("no-vae", "--vae")),
    "autoencoder folder empty": (lambda f: {"vae": str(f.pictures)}, ("config.json", "--vae")),
    "resolution of no whole latent": (lambda f: {"resolution": 20}, ("20", "--resolution")),
    "resolution of no whole grid": (
        lambda f: {"resolution": 24, "encoders": ["dinov2-s"]},
        ("24", "dinov2-s", "--resolution"),
    ),
    "limit of none": (lambda f: {"limit": 0}, ("--limit",)),
    "batches of none": (lambda f: {"batch_size": 0}, ("--batch-size",)),
    "unknown feature dtype": (lambda f: {"feature_dtype": "int4"}, ("--feature-dtype", "int8")),
    "unknown compression": (lambda f: {"compress": "rar"}, ("--compress", "zstd")),
    "int8 in a float compressor": (
        lambda f: {"compress": "pcodec", "feature_dtype": "int8"},
        ("pcodec", "int8", "zstd"),
    ),
    "attention of no teacher": (lambda f: {"encoders": ["none"], "attention": "haste"}, ("--encoder",)),
    "attention in words": (lambda f: {"attention": "all"}, ("--attention 'all'", "8,10,12")),
    "attention backwards": (lambda f: {"attention": "5-4"}, ("--attention '5-4'", "9-12")),
    "attention of a block that is not there": (lambda f: {"attention": "4-7"}, ("block 7", "demo", "1 to 6")),
    "attention of block 0": (lambda f: {"attention": "0,1"}, ("block 0", "1 to 6")),
    "haste without a preset": (
        lambda f: {"attention": "haste:SiT-S/2"},
        ("haste:SiT-S/2", "SiT-XL", "8,10,12"),
    ),
    "haste for a deeper teacher": (
        lambda f: {"attention": "haste", "encoders": ["dinov2-l"], "random_weights": True},
        ("SiT-B", "12 blocks", "dinov2-l has 24", "--attention 16,20,24"),
    ),
    "rank without attention": (lambda f: {"attention_rank": 8}, ("--attention-rank", "--attention")),
    "rank and tolerance": (
        lambda f: {"attention": "haste", "attention_rank": 8, "attention_kl": 0.1},
        ("--attention-rank and --attention-kl",),
    ),
    "rank of none": (lambda f: {"attention": "haste", "attention_rank": 0}, ("--attention-rank 0", "64")),
    "rank beyond the heads": (
        lambda f: {"attention": "haste", "attention_rank": 65},
        ("--attention-rank 65", "demo", "1 to 64"),
    ),
    "tolerance of nothing": (lambda f: {"attention": "haste", "attention_kl": 0.0}, ("--attention-kl 0",)),
    "tolerance that no form meets": (
        lambda f: {"attention": "haste", "attention_kl": 1e-12},
        ("--attention-kl 1e-12", "bytes an image", "nats in block", "head"),
    ),
    "too few images to measure on": (
        lambda f: {"feature_dtype": "int8", "limit": 1},
        ("1 image that can be decoded", "--data"),
    ),
    "unknown compute dtype": (lambda f: {"compute_dtype": "half"}, ("--compute-dtype", "bfloat16")),
    "target is a file": (lambda f: {"cache": write(f.tmp / "target")}, ("target", "--cache")),
    "target below a file": (lambda f: {"cache": write(f.tmp / "target") / "cache"}, ("target",)),
    "target holds something else": (
        lambda f: {"cache": write(f.tmp / "full" / "x").parent},
        ("full", "--cache"),
    ),
    "target read-only": (lambda f: read_only_folder(f.tmp, f.patch), ("read-only", "--cache")),
    "disk too small": (lambda f: small_disk(f.patch), ("10 kB", "--limit")),
    "devices within torchrun": (
        lambda f: (
            [f.patch.setenv(k, v) for k, v in (("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0"))]
            and {"devices": 2}
        ),
        ("--devices", "torchrun"),
    ),
}

Place = namedtuple("Place", "tmp pictures patch")


@pytest.fixture
def place(tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    return Place(tmp_path, pictures, monkeypatch)


def one_line(run: Callable[[], object]) -> str:
    with pytest.raises(RepaError) as caught:
        run()
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_in_one_line(kind: str, command: Callable[..., str], place: Place) -> None:
    arrange, expected = REFUSED[kind]
    changes = arrange(place) or {}
    before = folder_contents(place.tmp)
    message = one_line(lambda: command(**changes))
    for part in expected:
        assert part in message
    assert folder_contents(place.tmp) == before


def test_a_file_that_cannot_be_read_stops_the_run_and_keeps_the_shards_before(
    command: Callable[..., str], complete_cache: Path, place: Place
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        unreadable_file(place.pictures, patch)
        message = one_line(command)
    assert VICTIM in message
    assert "Permission denied" in message
    cache = place.tmp / "cache"
    assert committed_shards(cache, open_manifest(cache), "demo") == [0]
    command()
    assert folder_contents(cache) == folder_contents(complete_cache)


def newer_format(cache: Path) -> None:
    from repa.data.format.canonical import canonical_json
    from repa.data.format.layout import CHECKSUM_ATTRIBUTE, GROUP_FILE

    group = json.loads((cache / GROUP_FILE).read_text())
    values = group["attributes"]["repa"]
    values["format_version"] = 99
    import hashlib

    group["attributes"][CHECKSUM_ATTRIBUTE] = hashlib.sha256(canonical_json(values)).hexdigest()
    (cache / GROUP_FILE).write_text(json.dumps(group))


# done to a complete cache, and the flags of the second run
CHANGED: dict[str, tuple[Callable[..., dict[str, Any] | None], tuple[str, ...]]] = {
    "another resolution": (lambda f: {"resolution": 24}, ("resolution", "16", "24")),
    "other images": (lambda f: (f.pictures / VICTIM).unlink(), ("num_rows", "12", "11")),
    "an image changed": (
        lambda f: shutil.copy(TEACHER_WEIGHTS, f.pictures / VICTIM) and None,
        ("source_fingerprint",),
    ),
    "other crop orientation": (lambda f: {"apply_exif": True}, ("exif_orientation",)),
    "another shard size": (lambda f: {"shard_rows": 5}, ("shard_rows",)),
    "another batch size": (lambda f: {"batch_size": 2}, ("--batch-size 1, not 2", "demo")),
    "another feature dtype": (lambda f: {"feature_dtype": "float32"}, ("--feature-dtype float16",)),
    "another compute dtype": (lambda f: {"compute_dtype": "bfloat16"}, ("--compute-dtype",)),
    "other weights of a complete encoder": (
        lambda f: {"weights": [f"demo={other_weights(f.tmp / 'other.safetensors')}"]},
        ("weights_sha256", "demo"),
    ),
    "a newer format": (lambda f: newer_format(f.tmp / "cache"), ("format version 99",)),
    "a damaged manifest": (
        lambda f: (f.tmp / "cache" / "zarr.json").write_text("{") and None,
        ("zarr.json", "damaged"),
    ),
}


def other_weights(file: Path) -> Path:
    state = load_file(TEACHER_WEIGHTS)
    state["norm.bias"] = state["norm.bias"] + 1
    save_file(state, file)
    return file


@pytest.mark.parametrize("kind", CHANGED)
def test_a_cache_of_something_else_is_refused_and_kept(
    kind: str, command: Callable[..., str], complete_cache: Path, place: Place
) -> None:
    shutil.copytree(complete_cache, place.tmp / "cache")
    arrange, expected = CHANGED[kind]
    changes = arrange(place) or {}
    before = folder_contents(place.tmp / "cache")
    message = one_line(lambda: command(**changes))
    for part in expected:
        assert part in message
    assert folder_contents(place.tmp / "cache") == before


def test_weights_that_are_not_finite_name_the_image_and_bind_nothing(
    command: Callable[..., str], complete_cache: Path, place: Place
) -> None:
    state = load_file(TEACHER_WEIGHTS)
    state["norm.bias"] = torch.full_like(state["norm.bias"], torch.nan)
    save_file(state, place.tmp / "nan.safetensors")
    message = one_line(lambda: command(weights=[f"demo={place.tmp / 'nan.safetensors'}"]))
    for part in ("class0/0.png", "demo/", "not finite", "--compute-dtype float32"):
        assert part in message
    cache = place.tmp / "cache"
    assert committed_shards(cache, open_manifest(cache), "demo") == []
    assert not list(cache.rglob("*.partial"))
    # no shard was committed by those weights: the right ones may follow, in the same cache
    command()
    assert folder_contents(cache) == folder_contents(complete_cache)


def test_a_value_beyond_float16_says_how_to_store_it(command: Callable[..., str], place: Place) -> None:
    state = load_file(TEACHER_WEIGHTS)
    state["norm.bias"] = torch.full(state["norm.bias"].shape, 70_000.0)
    save_file(state, place.tmp / "large.safetensors")
    weights = [f"demo={place.tmp / 'large.safetensors'}"]
    assert "--feature-dtype float32" in one_line(lambda: command(weights=weights))
    command(weights=weights, feature_dtype="float32")
    _, values = read_all(place.tmp / "cache")
    assert values["demo/cls"].dtype == np.float32
    assert values["demo/cls"].max() > 65_504


HOLD = """
import sys
from pathlib import Path
from repa.data.writing.writer import SourceWriter
from repa.data.format.opening import open_manifest
path = Path(sys.argv[1])
with SourceWriter(path, open_manifest(path), "demo", [2]):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_shard_another_process_writes_is_refused(
    command: Callable[..., str], complete_cache: Path, place: Place
) -> None:
    cache = Path(shutil.copytree(complete_cache, place.tmp / "cache"))
    (cache / "commits" / "demo" / "2.json").unlink()
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(cache)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        message = one_line(command)
        assert other.stdin is not None
        other.stdin.close()
    assert "another process is writing shard 2 of demo" in message
    command()
    assert committed_shards(cache, open_manifest(cache), "demo") == [0, 1, 2]
