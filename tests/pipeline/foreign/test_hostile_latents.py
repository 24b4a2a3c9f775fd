"""Files that are cut off, made up or not what their name says are refused in one line that names them."""

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from foreign_layouts import LATENT, write_fast_dit, write_lightningdit, write_mar, write_repa
from hypothesis import given
from hypothesis import strategies as st
from repa.data.errors import RepaError
from repa.pipeline.foreign.arrays import parse_npy, parse_npz
from repa.pipeline.foreign.base import ForeignOptions
from repa.pipeline.foreign.open import open_foreign
from safetensors.torch import load_file, save_file

WRITERS = {
    "repa": write_repa,
    "mar": write_mar,
    "fast-dit": write_fast_dit,
    "lightningdit": write_lightningdit,
}
ROW = {
    "repa": "vae-sd/00000/img-mean-std-00000003.npy",
    "mar": "class0/3.png.npz",
    "fast-dit": "imagenet256_features/3.npy",
    "lightningdit": "latents_rank00_shard001.safetensors",
}


def read_all(layout: str, root: Path) -> None:
    """Open latents and look at every file."""
    latents = open_foreign(layout, root, ForeignOptions())
    for name in latents.files:
        latents.survey(name)


def refused(layout: str, root: Path) -> RepaError:
    """Return what is said of latents that cannot be imported."""
    with pytest.raises(RepaError) as caught:
        read_all(layout, root)
    assert caught.value.remedy
    assert "\n" not in str(caught.value)
    return caught.value


def save_row(layout: str, root: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Write the numbers of one row anew."""
    path = root / ROW[layout]
    if layout == "lightningdit":
        content = load_file(path)
        changed = change(content["latents"].numpy())
        save_file({**content, "latents": torch.from_numpy(np.ascontiguousarray(changed))}, path)
    elif layout == "mar":
        arrays = dict(np.load(path))
        np.savez(path, moments=change(arrays["moments"]), moments_flip=arrays["moments_flip"])
    else:
        np.save(path, change(np.load(path)))


def with_nan(values: np.ndarray) -> np.ndarray:
    values = values.copy()
    values.reshape(-1)[5] = np.nan
    return values


DAMAGES = {
    "not finite": with_nan,
    "float64": lambda values: values.astype(np.float64),
    "integers": lambda values: values.astype(np.int32),
    "another side": lambda values: values[..., :4, :4],
    "not square": lambda values: values[..., :4],
    "another axis": lambda values: values[None],
    "no numbers": lambda values: values[..., :0, :0],
}


@pytest.mark.parametrize("layout", WRITERS)
@pytest.mark.parametrize("damage", DAMAGES)
def test_numbers_that_are_no_latents_are_refused(layout: str, damage: str, tmp_path: Path) -> None:
    WRITERS[layout](tmp_path)
    save_row(layout, tmp_path, DAMAGES[damage])
    assert Path(ROW[layout]).name in refused(layout, tmp_path).what


@pytest.mark.parametrize("layout", WRITERS)
@pytest.mark.parametrize("size", [0, 5, 90, -1])
def test_a_file_that_is_cut_off_is_named(layout: str, size: int, tmp_path: Path) -> None:
    WRITERS[layout](tmp_path)
    path = tmp_path / ROW[layout]
    path.write_bytes(path.read_bytes()[:size])
    assert path.name in refused(layout, tmp_path).what


@pytest.mark.parametrize("layout", WRITERS)
def test_a_pickle_is_never_read(layout: str, tmp_path: Path) -> None:
    WRITERS[layout](tmp_path)
    path = tmp_path / ROW[layout]

    class Trap:
        def __reduce__(self) -> tuple[object, ...]:
            return (os.mkdir, (str(tmp_path / "sprung"),))

    objects = np.array([Trap()], dtype=object)
    with path.open("wb") as file:
        if layout == "mar":
            np.savez(file, moments=objects, moments_flip=objects)
        elif layout == "lightningdit":
            pickle.dump(Trap(), file)
        else:
            np.save(file, objects)
    assert path.name in refused(layout, tmp_path).what
    if layout == "lightningdit":
        write_lightningdit(tmp_path)
        torch.save({"mean": Trap(), "std": Trap()}, tmp_path / "latents_stats.pt")
        assert "latents_stats.pt" in refused(layout, tmp_path).what
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("layout", WRITERS)
def test_a_pipe_is_no_file(layout: str, tmp_path: Path) -> None:
    WRITERS[layout](tmp_path)
    path = tmp_path / ROW[layout]
    path.unlink()
    os.mkfifo(path)
    assert path.name in refused(layout, tmp_path).what


def test_what_unpacks_to_more_than_any_latents_is_not_unpacked(tmp_path: Path) -> None:
    write_mar(tmp_path)
    path = tmp_path / ROW["mar"]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("moments.npy", bytes(65 << 20))
    assert path.stat().st_size < 100_000
    assert path.name in refused("mar", tmp_path).what


def test_a_header_takes_no_memory() -> None:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (1 << 40,)})
    with pytest.raises(RepaError):
        parse_npy(file.getvalue() + bytes(64), "file")


@given(st.binary(max_size=300), st.integers(0, 100))
def test_no_bytes_are_anything_but_numbers_or_an_error(noise: bytes, at: int) -> None:
    file = io.BytesIO()
    np.save(file, np.arange(6, dtype=np.float32).reshape(2, 3))
    raw = file.getvalue()
    for content in (noise, raw[:at] + noise + raw[at + len(noise) :]):
        try:
            found = parse_npy(content, "file")
        except RepaError:
            continue
        assert found.dtype.kind in "fiu"
    packed = io.BytesIO()
    np.savez(packed, moments=np.arange(6, dtype=np.float32))
    raw = packed.getvalue()
    for content in (noise, raw[:at] + noise + raw[at + len(noise) :]):
        try:
            parse_npz(content, ("moments",), "file")
        except RepaError:
            continue


def test_deviations_are_not_negative(tmp_path: Path) -> None:
    moments = write_repa(tmp_path)
    np.save(tmp_path / ROW["repa"], -moments[3])
    assert Path(ROW["repa"]).name in refused("repa", tmp_path).what


@pytest.mark.parametrize(
    "content", ["{", "{}", '{"labels": [["00000/img-mean-std-00000000.npy", 0]]}', '{"labels": [[1, 2]]}']
)
def test_labels_of_repa_are_those_of_all_rows(content: str, tmp_path: Path) -> None:
    write_repa(tmp_path)
    (tmp_path / "vae-sd" / "dataset.json").write_text(content)
    assert "dataset.json" in refused("repa", tmp_path).what


@pytest.mark.parametrize(
    "name", ["00001/img-mean-std-00000003.npy", "00000/../x.npy.npy", "other.npy", "00000/a.npy"]
)
def test_files_of_another_tree_are_no_rows_of_repa(name: str, tmp_path: Path) -> None:
    write_repa(tmp_path)
    path = tmp_path / "vae-sd" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes((tmp_path / ROW["repa"]).read_bytes())
    assert path.name in refused("repa", tmp_path).what


def test_files_of_mar_lie_in_classes(tmp_path: Path) -> None:
    write_mar(tmp_path)
    (tmp_path / "loose.npz").write_bytes((tmp_path / ROW["mar"]).read_bytes())
    assert "loose.npz" in refused("mar", tmp_path).what


def test_a_view_that_is_missing_is_named(tmp_path: Path) -> None:
    write_mar(tmp_path / "mar")
    np.savez(tmp_path / "mar" / ROW["mar"], moments=np.zeros((8, *LATENT[1:]), np.float32))
    assert refused("mar", tmp_path / "mar").field == "moments_flip"
    write_lightningdit(tmp_path / "lightningdit")
    path = tmp_path / "lightningdit" / ROW["lightningdit"]
    content = load_file(path)
    del content["latents_flip"]
    save_file(content, path)
    assert refused("lightningdit", tmp_path / "lightningdit").field == "latents_flip"


def test_numbers_of_fast_dit_come_in_pairs(tmp_path: Path) -> None:
    write_fast_dit(tmp_path)
    (tmp_path / "imagenet256_labels" / "4.npy").unlink()
    assert "number 4" in refused("fast-dit", tmp_path).what
    (tmp_path / "imagenet256_features" / "4.npy").unlink()
    open_foreign("fast-dit", tmp_path, ForeignOptions())
    for content in (np.array([-1]), np.array(1.5), np.array([1, 2]), np.array([1.0])):
        np.save(tmp_path / "imagenet256_labels" / "3.npy", content)
        assert "imagenet256_labels/3.npy" in refused("fast-dit", tmp_path).what


def test_all_files_of_lightningdit_are_needed(tmp_path: Path) -> None:
    write_lightningdit(tmp_path, world=2, shard_rows=3)
    for name in ("latents_rank01_shard000", "latents_rank00_shard000", "latents_rank01_shard001"):
        path = tmp_path / f"{name}.safetensors"
        content = path.read_bytes()
        path.unlink()
        assert refused("lightningdit", tmp_path).field == "FROM"
        path.write_bytes(content)
    (tmp_path / "more.safetensors").write_bytes(content)
    assert "more.safetensors" in refused("lightningdit", tmp_path).what


@pytest.mark.parametrize(
    "statistics",
    [
        {"mean": torch.zeros(4)},
        {"mean": torch.zeros(3), "std": torch.ones(3)},
        {"mean": torch.zeros(4), "std": torch.zeros(4)},
        {"mean": torch.full((4,), torch.nan), "std": torch.ones(4)},
        [1, 2],
    ],
)
def test_statistics_are_those_of_the_channels(statistics: object, tmp_path: Path) -> None:
    write_lightningdit(tmp_path)
    torch.save(statistics, tmp_path / "latents_stats.pt")
    refused("lightningdit", tmp_path)


def test_an_absurd_header_of_safetensors_is_refused(tmp_path: Path) -> None:
    write_lightningdit(tmp_path)
    header = json.dumps(
        {"latents": {"dtype": "F32", "shape": [1 << 40, 4, 8, 8], "data_offsets": [0, 4]}}
    ).encode()
    path = tmp_path / ROW["lightningdit"]
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    assert path.name in refused("lightningdit", tmp_path).what
