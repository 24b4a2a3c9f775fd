"""`repa analyze` as a function: its numbers against direct ones, its pictures, and what it refuses."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image
from repa.commands.analyze.flags import DOCUMENT, AnalyzeFlags
from repa.commands.analyze.run import analyze
from repa.data.errors import RepaError
from repa.data.format.columns import MOMENTS, ColumnSpec
from repa.data.format.opening import open_manifest
from repa.data.reading.latents import scale_latent
from repa.data.testing import expected_row, synthetic_cache
from repa.trainer.config import build
from repa.trainer.evaluation.attention_maps import attention_entropy, attention_maps
from repa.trainer.evaluation.blocks import block_features
from repa.trainer.evaluation.similarity import cknna
from repa.trainer.evaluation.structure import local_distant_similarity, spatial_contrast
from repa.trainer.evaluation.tokens import object_component, principal_components
from repa.trainer.models.capture import Capture
from repa.trainer.models.sit import SIT_SIZES, SiTSize
from repa.trainer.run.fit import fit
from repa.trainer.run.trained_beside import beside_of
from repa.trainer.sampling.generate import model_of_file, newest_checkpoint
from rich.console import Console

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

ROWS = 30
COLUMNS = {
    MOMENTS: ColumnSpec(shape=(8, 4, 4), dtype="float32"),
    "demo/patch": ColumnSpec(shape=(64, 8), dtype="float32"),
    "demo/q": ColumnSpec(shape=(2, 3, 64, 4), dtype="float16"),
    "demo/k": ColumnSpec(shape=(2, 3, 64, 4), dtype="float16"),
    "small/patch": ColumnSpec(shape=(4, 6), dtype="int8"),
    "small/patch-scale": ColumnSpec(shape=(6,), dtype="float32"),
    "small/cls": ColumnSpec(shape=(6,), dtype="float16"),
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("analyze") / "cache"
    synthetic_cache(path, num_rows=ROWS, columns=COLUMNS, invalid={4: "damaged"})
    return path


@pytest.fixture(scope="module")
def run(cache: Path) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SIT_SIZES, "T", SiTSize(depth=2, width=48, heads=3))
        for name, dropout in (("run", 0.1), ("conditional", 0)):
            values = {
                "cache": str(cache),
                "model": "SiT-T/2",
                "method": "none",
                "max_steps": 2,
                "batch_size": 8,
                "checkpoint_every": 1,
                "preview_every": 0,
                "label_dropout": dropout,
            }
            fit(build(flags=values), cache.parent / name, console=Console(file=io.StringIO()))
        yield cache.parent / "run"


def analyzed(flags: AnalyzeFlags) -> tuple[dict[str, Any], str]:
    assert flags.out is not None
    console = Console(file=io.StringIO(), width=120)
    analyze(flags, console=console)
    return json.loads((flags.out / DOCUMENT).read_text()), console.file.getvalue()


def valid(column: str) -> torch.Tensor:
    rows = [row for row in range(ROWS) if row != 4]
    return torch.from_numpy(np.stack([expected_row(column, row, COLUMNS[column]) for row in rows])).float()


def test_a_cache_by_its_numbers(cache: Path, tmp_path: Path) -> None:
    flags = AnalyzeFlags(cache=str(cache), out=tmp_path / "out", pictures=2, vae="demo", batch_size=7)
    found, printed = analyzed(flags)
    assert found["images"] == ROWS - 1
    demo, small = found["teachers"]["demo"], found["teachers"]["small"]
    tokens = valid("demo/patch")
    assert demo["lds"] == pytest.approx(float(local_distant_similarity(tokens, (8, 8)).mean()))
    assert demo["rmsc"] == pytest.approx(float(spatial_contrast(tokens).mean()))
    assert 7.9 < demo["effective_rank"] <= 8  # independent channels fill the space
    norms = tokens.norm(dim=-1).flatten()
    assert demo["norm_median"] == pytest.approx(float(norms.median()))
    assert demo["outliers"] == pytest.approx(float((norms > 2 * norms.median()).double().mean()))
    assert small["lds"] is small["cds"] is small["srss"] is None
    assert small["rmsc"] > 0
    maps = attention_maps(valid("demo/q")[:, 1], valid("demo/k")[:, 1], 0.5)
    assert found["attention"]["demo"]["entropy"]["2"] == pytest.approx(
        attention_entropy(maps).mean(dim=0).tolist(), rel=1e-5
    )
    moments = valid(MOMENTS).double()
    assert found["latents"]["mean"] == pytest.approx(moments[:, :4].mean(dim=(0, 2, 3)).tolist())
    spread = moments[:, :4].var(dim=(0, 2, 3)) + moments[:, 4:].square().mean(dim=(0, 2, 3))
    assert found["latents"]["std"] == pytest.approx(spread.sqrt().tolist())
    assert "demo" in printed
    assert found["pictures"] == ["tokens.png", "attention-demo.png"]
    for name in found["pictures"]:
        assert np.asarray(Image.open(tmp_path / "out" / name)).std() > 10
    again, _ = analyzed(replace(flags, out=tmp_path / "again", batch_size=64, pictures=0, vae=None))
    assert again["pictures"] == []
    for name in ("teachers", "latents"):
        assert _near(again[name], found[name])


def _near(one: Any, two: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(_near(one[key], two[key]) for key in one)
    if isinstance(one, list):
        return all(_near(*pair) for pair in zip(one, two, strict=True))
    return one == (two if two is None else pytest.approx(two, rel=1e-6))


def test_a_run_by_its_blocks(run: Path, cache: Path, tmp_path: Path) -> None:
    flags = AnalyzeFlags(run=run, times="0.2,0.7", out=tmp_path / "out", teachers=["demo"], k=5, batch_size=8)
    found, printed = analyzed(flags)
    assert list(found["times"]) == ["0.2", "0.7"]
    assert list(found["times"]["0.2"]) == ["1", "2"]
    assert found["condition"] == "none"
    assert found["step"] == 2
    for blocks in found["times"].values():
        for each in blocks.values():
            assert 0 <= each["probe"] <= 1
            assert each["norm"] > 0
            assert -1 <= each["cknna"]["demo"] <= 1
            assert 0 <= each["cka"]["demo"] <= 1
    assert "CKNNA demo" in printed
    assert (tmp_path / "out" / "blocks.png").stat().st_size > 5000
    other, _ = analyzed(replace(flags, out=tmp_path / "other", batch_size=64, cache=str(cache)))
    assert _near(other["times"]["0.7"]["2"]["cka"], found["times"]["0.7"]["2"]["cka"])
    earlier, _ = analyzed(replace(flags, out=tmp_path / "earlier", step=1, times="0.2"))
    assert earlier["times"]["0.2"]["2"]["norm"] != found["times"]["0.2"]["2"]["norm"]


def test_a_probe_wants_images_of_each_class(run: Path, cache: Path, tmp_path: Path) -> None:
    flags = AnalyzeFlags(run=run, out=tmp_path / "out", teachers=["demo"], num=8, k=3)
    found, printed = analyzed(flags)
    assert found["times"]["0.5"]["1"]["probe"] is None
    assert found["teachers"]["demo"]["probe"] is None
    assert "--num" in printed


def test_a_network_that_always_saw_labels_has_no_probe(run: Path, tmp_path: Path) -> None:
    found, _ = analyzed(AnalyzeFlags(run=run.parent / "conditional", out=tmp_path / "out", teachers=["demo"]))
    assert found["condition"] == "own"
    assert found["times"]["0.5"]["1"]["probe"] is None


@pytest.fixture(scope="module")
def reg_run(run: Path, cache: Path) -> Path:
    values = {
        "cache": str(cache),
        "model": "SiT-T/2",
        "method": "reg",
        "method.depth": 1,
        "method.encoders": "small",
        "method.projector_width": 16,
        "method.standardise": True,
        "max_steps": 2,
        "lr": 1e-2,
        "ema_decay": 0.5,
        "batch_size": 8,
        "preview_every": 0,
    }
    fit(build(flags=values), run.parent / "reg", console=Console(file=io.StringIO()))
    return run.parent / "reg"


def test_a_network_beside_whose_latent_a_class_token_is_denoised(
    reg_run: Path, cache: Path, tmp_path: Path
) -> None:
    """At t = 0 the token is the image's own, standardised as in training."""
    flags = AnalyzeFlags(run=reg_run, times="0,0.6", out=tmp_path / "out", teachers=["demo"], batch_size=7)
    found, _ = analyzed(flags)
    again, _ = analyzed(replace(flags, batch_size=64, out=tmp_path / "again"))
    for one, two in zip(found["times"].values(), again["times"].values(), strict=True):
        for block in ("1", "2"):
            assert one[block]["norm"] == pytest.approx(two[block]["norm"], rel=1e-5)
            assert one[block]["cka"]["demo"] == pytest.approx(two[block]["cka"]["demo"], rel=1e-4)

    file = newest_checkpoint(reg_run)
    model, manifest = model_of_file(file), open_manifest(cache)
    beside = beside_of(file, model.backbone, manifest, where=str(cache))
    tokens = valid("small/cls")
    standardised = beside.values(beside.vectors[0], {"small/cls": tokens})
    assert standardised.mean(dim=0).abs().max() < 1e-5
    assert standardised.std(dim=0, correction=0).sub(1).abs().max() < 1e-5
    moments = valid(MOMENTS)
    moments[:, 4:] = 0  # no draw of the posterior, so that nothing is random at t = 0
    batch = {MOMENTS: moments, "small/cls": tokens, "label": torch.zeros(len(moments), dtype=torch.int64)}
    features = block_features(model, [batch], 0, beside, seed=0)
    zeros = torch.zeros(len(moments))
    null = torch.full((len(moments),), model.num_classes)
    capture = Capture(hidden=(1, 2))
    scaled = scale_latent(moments[:, :4], *model.scale)
    with torch.no_grad():
        expected = model.backbone(scaled, zeros, null, capture, (standardised,)).hidden
    for block in (1, 2):
        torch.testing.assert_close(features[block].features, expected[block].mean(dim=1))


def test_a_cache_without_the_class_tokens_of_the_run(reg_run: Path, tmp_path: Path) -> None:
    columns = {name: spec for name, spec in COLUMNS.items() if name != "small/cls"}
    synthetic_cache(tmp_path / "cache", num_rows=ROWS, columns=columns)
    with pytest.raises(RepaError) as caught:
        analyze(AnalyzeFlags(run=reg_run, cache=str(tmp_path / "cache"), out=tmp_path / "out"))
    assert caught.value.field == "--cache"
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"num": 2}, "--num"),
        ({"teachers": ["dino"]}, "--teacher"),
        ({"rows": [4]}, "--row"),
        ({"rows": [99]}, "--row"),
        ({"step": 3}, "--step"),
        ({"times": "0.5,later"}, "--times"),
        ({"times": "1.5"}, "--times"),
        ({"pictures": -1}, "--pictures"),
        ({"data": "demo", "pictures": 0, "vae": "demo"}, "--pictures"),
        ({"run": "run", "step": 7}, "--step"),
        ({"run": "run", "k": 29}, "--k"),
        ({"run": "run", "rows": [1]}, "--row"),
        ({"run": "run", "weights": "both"}, "--weights"),
    ],
)
def test_what_cannot_be_analyzed(
    changes: dict[str, Any], field: str, run: Path, cache: Path, tmp_path: Path
) -> None:
    if "run" in changes:
        changes = {**changes, "run": run.parent / changes["run"]}
    with pytest.raises(RepaError) as caught:
        analyze(AnalyzeFlags(**{"cache": str(cache), "out": tmp_path / "out", **changes}))
    assert caught.value.field == field
    assert caught.value.remedy
    assert not (tmp_path / "out" / DOCUMENT).exists()


def test_principal_components_are_of_the_largest_variance_and_objects_positive() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = 0.1 * torch.randn(5, 64, 6, generator=generator)
    inside = torch.zeros(8, 8, dtype=torch.bool)
    inside[2:6, 2:6] = True
    for sign in (1, -1):
        tokens[:, inside.flatten(), 2] = 4.0 * sign
        found = object_component(tokens, (8, 8))
        assert torch.equal(found.of(tokens)[0, :, 0] > 0, inside.flatten())
        assert float(found.directions[0, 2].abs()) > 0.99
    three = principal_components(tokens)
    torch.testing.assert_close(three.directions @ three.directions.T, torch.eye(3, dtype=torch.float64))
    assert three.of(tokens).var(dim=(0, 1)).diff().max() < 0


def test_attention_from_even_to_sharp() -> None:
    even = attention_maps(torch.zeros(1, 2, 16, 3), torch.randn(1, 2, 16, 3), 0.5)
    assert attention_entropy(even).tolist() == [pytest.approx([np.log(16)] * 2, rel=1e-6)]
    eye = 1000 * torch.eye(16).expand(1, 2, 16, 16)
    assert attention_entropy(attention_maps(eye, eye, 1.0)).abs().max() < 1e-6


def test_cknna_takes_the_same_images_on_both_sides() -> None:
    values = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    assert cknna(values, values.flip(0), k=5) < 0.5 < cknna(values, values, k=5)
