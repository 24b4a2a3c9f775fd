"""Distillation from a cache to an encoder that preprocesses like any teacher."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from repa.data.errors import CacheError, RepaError
from repa.data.format.opening import open_manifest
from repa.data.reading.reader import CacheReader
from repa.pipeline.distill.pairs import CachedPairs
from repa.pipeline.distill.training import token_loss
from repa.pipeline.encoders import load_encoder
from repa.pipeline.encoders.distilled import ENTRY, read_distilled
from repa.pipeline.encoders.idle_blocks import make_idle
from repa.pipeline.encoders.registry import find_teacher
from repa.pipeline.replay.live import LiveTeachers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from .conftest import encode

if TYPE_CHECKING:
    from collections.abc import Callable

    from repa.pipeline.encoders.distilled import Distilled

    Distil = Callable[..., tuple[Path, Distilled]]


def tokens(cache: Path, column: str) -> np.ndarray:
    with CacheReader(cache, (column,)) as reader:
        spec = reader.manifest.columns[column]
        found = np.empty((len(reader.valid_rows), *spec.shape), spec.numpy_dtype)
        reader.read_rows(reader.valid_rows, (column,), {column: found})
        return found


def test_a_copy_encodes_under_its_own_name(distil: Distil, demo_cache: Path, tmp_path: Path) -> None:
    path, found = distil(steps=2)
    assert read_distilled(path) == found
    manifest = open_manifest(demo_cache)
    assert (found.name, found.teacher, found.idle, found.norm) == ("demo-idle75", "demo", 0.75, "layer")
    assert found.teacher_sha256 == manifest.sources["demo"].weights_sha256
    assert (found.data, found.views) == (manifest.source_fingerprint, manifest.views)
    assert found.merged
    assert found.fidelity.patch_cosine_mean > 0.99 > found.fidelity.shuffled_cosine
    assert found.fidelity.merge_error < 1e-5
    assert found.speed.ratio > 0

    cache = tmp_path / "cache"
    shutil.copytree(demo_cache, cache)
    before = tokens(cache, "demo/patch")
    encode(cache, encoders=[str(path)])
    assert np.array_equal(tokens(cache, "demo/patch"), before)
    own = tokens(cache, "demo-idle75/patch")
    assert not np.array_equal(own, before)
    source = open_manifest(cache).sources["demo-idle75"]
    assert source.notes["distilled"]["teacher_sha256"] == found.teacher_sha256
    assert source.notes["distilled"]["fidelity"] == asdict(found.fidelity)
    assert source.weights_sha256 != found.teacher_sha256
    assert not source.random_weights
    live = LiveTeachers(cache, data="demo", encoders=[str(path)], exact=True)
    try:
        live.load(torch.device("cpu"))
        now = live(np.arange(8), ["demo-idle75/patch"], np.zeros(8, np.int64))["demo-idle75/patch"]
    finally:
        live.close()
    assert np.array_equal(now.half().numpy(), own[:8])
    # the same by its name and its file; its measured fidelity is that of what has been written
    encode(cache, encoders=["demo-idle75"], weights=[f"demo-idle75={path}"])
    with CachedPairs(cache, open_manifest(cache), "demo", data="demo", device=torch.device("cpu")) as pairs:
        rows = np.arange(40, dtype=np.int64)
        held = rows[(2 * np.arange(8) + 1) * 40 // 16]
        wanted = pairs.read(held).patch
    cosine = torch.nn.functional.cosine_similarity(torch.from_numpy(own[held]).float(), wanted, dim=-1)
    assert float(cosine.mean()) == pytest.approx(found.fidelity.patch_cosine_mean, abs=1e-4)


@pytest.mark.parametrize(("norm", "idle"), [("batch", 0.75), ("layer", 0.4), ("layer", 1.0)])
def test_every_form_starts_near_its_teacher(distil: Distil, norm: str, idle: float) -> None:
    path, found = distil(norm=norm, idle=idle)
    assert found.fidelity.patch_cosine_mean > 0.98 > found.fidelity.shuffled_cosine
    assert found.fidelity.merge_error < 1e-4
    load_encoder(found.name, resolution=64, weights=path)


# with one of batches there is more to resume
@pytest.mark.parametrize("norm", [pytest.param("layer", marks=pytest.mark.thorough), "batch"])
def test_resumed_is_uninterrupted(distil: Distil, tmp_path: Path, norm: str) -> None:
    whole, _ = distil(norm=norm, steps=4, out=tmp_path / "whole.safetensors")
    part, first = distil(norm=norm, steps=2, out=tmp_path / "part.safetensors")
    after_two = load_file(part)
    assert distil(norm=norm, steps=2, out=part) == (part, first), "nothing is done twice"
    distil(norm=norm, steps=4, out=part)
    for suffix in (".safetensors", ".training"):
        one, other = (load_file(each.with_suffix(suffix)) for each in (whole, part))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
    last = load_file(part)
    assert not all(torch.equal(last[name], after_two[name]) for name in last), "it has trained"


def state(file: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return what a kept state says and its tensors."""
    with safe_open(file.with_suffix(".training"), framework="pt") as opened:
        [text] = opened.metadata().values()
    return json.loads(text), load_file(file.with_suffix(".training"))


def loss_of_trained(file: Path, idle: float, cache: Path) -> float:
    encoder = load_encoder(find_teacher("demo"), resolution=64)
    student = make_idle(encoder.model, idle, "layer")
    tensors = {name.removeprefix("model."): each for name, each in state(file)[1].items()}
    student.load_state_dict({name: tensors[name] for name in student.state_dict()})
    rows = np.setdiff1d(np.arange(40), (2 * np.arange(8) + 1) * 40 // 16)
    with CachedPairs(cache, open_manifest(cache), "demo", data="demo", device=torch.device("cpu")) as pairs:
        batch = pairs.read(rows)
    with torch.no_grad():
        return float(token_loss(encoder.with_model(student).compute(batch.images), batch))


def test_training_at_the_usual_rate_lowers_the_loss_step_by_step(
    distil: Distil, demo_cache: Path, tmp_path: Path
) -> None:
    out = tmp_path / "copy.safetensors"
    losses, cosines = [], []
    for steps in (0, 10, 20):
        _, found = distil(idle=1.0, fit_images=8, learning_rate=2e-6, steps=steps, out=out)
        losses.append(loss_of_trained(out, 1.0, demo_cache))
        cosines.append(found.fidelity.patch_cosine_mean)
    assert losses[2] < losses[1] < losses[0]
    assert cosines[2] > cosines[1] > cosines[0]
    assert state(out)[0]["start"] == pytest.approx(cosines[0], abs=1e-5), "it outlives resuming"


def test_it_trains_unasked_where_most_images_are_new(
    distil: Distil, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("repa.pipeline.distill.run.STEPS", 2)
    for fit_images, steps in ((6, 2), (7, 0)):
        _, found = distil(fit_images=fit_images, steps=None, out=tmp_path / f"{fit_images}.safetensors")
        assert found.training.steps == steps


def test_only_the_start_of_an_older_version_is_gone_on_with(distil: Distil, tmp_path: Path) -> None:
    out = tmp_path / "copy.safetensors"
    for steps in (0, 1):
        distil(steps=steps, out=out)
        out.unlink()
        entry, tensors = state(out)
        entry = {name: value for name, value in entry.items() if name not in ("rule", "start")}
        save_file(tensors, out.with_suffix(".training"), {"repa-distillation": json.dumps(entry)})
        if steps:
            with pytest.raises(RepaError) as failure:
                distil(steps=2, out=out)
            assert failure.value.field == "--out"
        else:
            assert distil(steps=1, out=out)[1].training.steps == 1
            out.unlink()


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"idle": 0.755}, "--idle"),
        ({"idle": 0.0}, "--idle"),
        ({"idle": 0.07000000000001}, "--idle"),
        ({"out": Path("copy")}, "--out"),
        ({"out": Path("copy.training")}, "--out"),
        ({"teacher": "demo-idle75"}, "--encoder"),
        ({"held_out": 40}, "--held-out"),
        ({"fit_images": 33}, "--fit-images"),
    ],
)
def test_what_cannot_be_asked_for(distil: Distil, changes: dict[str, Any], field: str) -> None:
    with pytest.raises(RepaError) as failure:
        distil(**changes)
    assert failure.value.field == field


def test_another_distillation_is_not_written_over(distil: Distil, tmp_path: Path) -> None:
    out = tmp_path / "copy.safetensors"
    distil(out=out)
    for kept in (out, out.with_suffix(".training")):
        for changes, field in (({"seed": 1}, "--seed"), ({"idle": 0.5}, "--out")):
            with pytest.raises(RepaError) as failure:
                distil(out=out, **changes)
            assert failure.value.field == field
            assert str(kept) in failure.value.what
        out.unlink(missing_ok=True)


def test_fewer_steps_than_are_done_are_refused(distil: Distil, tmp_path: Path) -> None:
    out = tmp_path / "copy.safetensors"
    distil(out=out, steps=2)
    for kept in (out, out.with_suffix(".training")):
        with pytest.raises(RepaError) as failure:
            distil(out=out, steps=1)
        assert failure.value.field == "--steps"
        assert str(kept) in failure.value.what
        out.unlink(missing_ok=True)


def test_a_damaged_state_is_refused(distil: Distil, tmp_path: Path) -> None:
    out = tmp_path / "copy.safetensors"
    state_file = out.with_suffix(".training")
    distil(steps=1, out=out)
    out.unlink()
    entry, kept = state(out)
    for header, tensors in (
        ({}, kept),
        ([], kept),
        ({**entry, "settings": None}, kept),
        ({**entry, "step": "2"}, kept),
        ({**entry, "step": -1}, kept),
        (entry, {key: each for key, each in kept.items() if not key.startswith("average.")}),
        (entry, {key: each for key, each in kept.items() if not key.startswith("model.norm.")}),
        (entry, {key: each.flatten() for key, each in kept.items()}),
        (entry, {key: each.int() for key, each in kept.items()}),
        ({**entry, "step": 10**30}, kept),
    ):
        save_file(tensors, state_file, {"repa-distillation": json.dumps(header)})
        with pytest.raises(RepaError) as failure:
            distil(steps=2, out=out)
        assert failure.value.remedy
        assert not out.exists()


def test_a_file_of_another_kind_in_the_way_is_refused(distil: Distil, tmp_path: Path) -> None:
    out = tmp_path / "copy.safetensors"
    for each in (out, out.with_suffix(".training")):
        each.mkdir()
        with pytest.raises(RepaError) as failure:
            distil(out=out)
        assert failure.value.field == "--out"
        each.rmdir()


def test_other_weights_and_other_images_are_refused(distil: Distil, tmp_path: Path, demo_cache: Path) -> None:
    from repa.pipeline.demo import TEACHER_WEIGHTS

    state = load_file(TEACHER_WEIGHTS)
    state["norm.bias"] = state["norm.bias"] + 0.1
    save_file(state, tmp_path / "other.safetensors")
    with pytest.raises(CacheError) as failure:
        distil(weights=tmp_path / "other.safetensors")
    assert failure.value.field == "--weights"
    with pytest.raises(RepaError):
        distil(data=str(tmp_path))


def test_tokens_of_another_image_are_noticed(distil: Distil, monkeypatch: pytest.MonkeyPatch) -> None:
    read = CachedPairs.read

    def shuffled(self: CachedPairs, rows: Any, views: Any = None) -> Any:
        found = read(self, rows, views)
        return type(found)(found.images, found.patch.flip(0), found.cls)

    monkeypatch.setattr(CachedPairs, "read", shuffled)
    with pytest.raises(CacheError) as failure:
        distil()
    assert failure.value.field == "--data"


def test_a_file_that_is_no_merged_encoder(distil: Distil, tmp_path: Path) -> None:
    path, _ = distil()
    plain = tmp_path / "plain.safetensors"
    save_file(load_file(path), plain)
    for file, name, resolution, field in (
        (plain, "demo-idle75", 64, "--weights"),
        (path, "demo-idle75-bn", 64, "--weights"),
        (path, "demo-idle50", 64, "--weights"),
        (path, "demo-idle75", 128, "--resolution"),
    ):
        with pytest.raises(RepaError) as failure:
            load_encoder(name, resolution=resolution, weights=file)
        assert failure.value.field == field
    with pytest.raises(RepaError) as failure:
        find_teacher(str(plain))
    assert failure.value.field == "--weights"
    entry = read_distilled(path).notes()
    for part, name, value in (
        ("training", "steps", "0"),
        ("fidelity", "patch_cosine_mean", None),
        ("speed", "ratio", "fast"),
    ):
        header = json.dumps({**entry, part: {**entry[part], name: value}})
        save_file(load_file(path), plain, {ENTRY: header})
        with pytest.raises(RepaError) as failure:
            read_distilled(plain)
        assert failure.value.field == f"{part}.{name}"
    with pytest.raises(RepaError):
        load_encoder("demo-idle75", resolution=64)
