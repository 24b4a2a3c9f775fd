"""`repa distill` as a user types it."""

from __future__ import annotations

import io
import json
from typing import TYPE_CHECKING, Any

import pytest
from repa.commands.cache.info import info
from repa.commands.distill.flags import DistillFlags
from repa.commands.distill.run import distill
from repa.commands.preprocess import PreprocessFlags, preprocess
from repa.data.errors import RepaError
from repa.pipeline.encoders.distilled import read_distilled
from repa.pipeline.encoders.idle_teacher import usual_file
from rich.console import Console
from safetensors import safe_open

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("distil") / "cache"
    flags = PreprocessFlags(data="demo", limit=20, batch_size=5, feature_dtype="int8", cache=folder)
    preprocess(flags, console=Console(file=io.StringIO()))
    return str(folder)


def run(**flags: Any) -> str:
    output = io.StringIO()
    distill(DistillFlags(**flags), console=Console(file=output, width=200))
    return output.getvalue()


def test_it_writes_where_preprocess_looks(
    cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    printed = run(cache=cache, steps=1)
    file = usual_file("demo-idle75")
    found = read_distilled(file)
    assert found.training.steps == 1
    assert found.training.held_out == found.fidelity.images == 4
    assert found.training.fit_images == 16
    assert f"{found.fidelity.patch_cosine_mean:.4f}" in printed
    assert f"{found.fidelity.neighbour_agreement:.4f}" in printed
    assert str(file) in printed
    written = file.stat().st_mtime_ns
    assert str(file) in run(cache=cache, steps=1)
    assert file.stat().st_mtime_ns == written
    output = io.StringIO()
    flags = PreprocessFlags(
        data="demo", limit=20, batch_size=5, cache=tmp_path / "new", encoders=["demo-idle75"]
    )
    preprocess(flags, console=Console(file=output, width=200))
    assert "demo-idle75/patch" in output.getvalue()
    output = io.StringIO()
    info(cache=tmp_path / "new", console=Console(file=output, width=200))
    assert found.teacher_sha256[:12] in output.getvalue()
    for figure in (found.fidelity.patch_cosine_mean, found.fidelity.repa_loss_change):
        assert f"{figure:.3f}" in output.getvalue()


def test_a_training_that_makes_it_worse_is_said(cache: str, tmp_path: Path) -> None:
    out = tmp_path / "copy.safetensors"
    printed = run(cache=cache, steps=2, learning_rate=0.02, out=out)
    with safe_open(out.with_suffix(".training"), framework="pt") as file:
        [text] = file.metadata().values()
    start, end = json.loads(text)["start"], read_distilled(out).fidelity.patch_cosine_mean
    assert end < start - 0.01
    assert f"{start:.4f}" in printed
    assert "--steps 0" in printed


@pytest.mark.parametrize(
    ("flags", "field"),
    [
        ({"norm": "group"}, "--norm"),
        ({"steps": -1}, "--steps"),
        ({"batch_size": 0}, "--batch-size"),
        ({"norm": "batch", "batch_size": 1}, "--batch-size"),
        ({"learning_rate": 0.0}, "--learning-rate"),
        ({"learning_rate": float("nan")}, "--learning-rate"),
        ({"held_out": 1}, "--held-out"),
        ({"fit_images": 0}, "--fit-images"),
        ({"save_every": 0}, "--save-every"),
        ({"weights": ["a=b", "c=d"]}, "--weights"),
        ({"encoder": "demo", "weights": ["other=file"]}, "--weights"),
        ({"encoder": "dinov9"}, "--encoder"),
    ],
)
def test_mistakes_name_their_flag(cache: str, flags: dict[str, Any], field: str) -> None:
    with pytest.raises(RepaError) as failure:
        run(cache=cache, **flags)
    assert failure.value.field == field
