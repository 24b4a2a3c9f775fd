"""Runs on SiT↓, whose middle blocks have the teacher's 2×2 tokens and whose outer ones have 4×4."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from repa.commands.sample import SampleFlags, sample
from repa.data.format.columns import ColumnSpec, scale_column
from repa.data.testing import SYNTHETIC_COLUMNS, synthetic_cache
from repa.trainer.config import TrainConfig
from repa.trainer.models.sit_down import SiTDown
from repa.trainer.run.checks import check
from repa.trainer.run.metrics import read_metrics
from repa.trainer.sampling.generate import model_of_run
from repa.trainer.step.backbone import build_backbone

Settings = Callable[..., TrainConfig]


class Pixels:
    name = "pixels"
    weights_sha256 = "0"

    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        return (128 + 20 * latent[:, :3]).clamp(0, 255).to(torch.uint8)


def test_repa_trains_resumes_previews_and_samples(
    settings: Settings,
    tiny_down: str,
    undisturbed: Callable[..., Path],
    killed_fit: Callable[..., None],
    run_fit: Callable[..., Any],
    same_run: Callable[[Path, Path, int], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = {
        "holdout": 8,
        "eval_every": 3,
        "gradient_angle_every": 3,
        "preview_every": 6,
    }
    config = settings(
        model=tiny_down,
        method__depth=2,
        lr=1e-2,
        ema_decay=0.5,
        max_steps=6,
        checkpoint_every=2,
        preview_steps=2,
        **options,
    )
    whole = undisturbed(config, decoder=Pixels())
    killed_fit(config, "killed", moment=5, decoder=Pixels())
    outcome, _ = run_fit(config, "killed", decoder=Pixels())
    assert (outcome.resumed_from, outcome.finished) == (4, True)
    same_run(whole, tmp_path / "killed", 6)
    rows = read_metrics(whole / "metrics.csv")
    assert {"velocity", "repa", "held_out_ema", "gradient_angle"} <= set().union(*rows)
    assert (whole / "samples" / "step-00000006.png").exists()

    model = model_of_run(whole)
    assert isinstance(model.backbone, SiTDown)
    monkeypatch.setattr("repa.commands.shared.prepared.decoder_of", lambda *_: Pixels())
    images = []
    for guidance in (1.0, 4.0):
        out = tmp_path / f"out-{guidance}"
        sample(SampleFlags(run=whole, num=3, steps=4, guidance=guidance, npz=True, out=out))
        with np.load(out / "samples.npz") as arrays:
            images.append(arrays["arr_0"].astype(int))
    assert images[0].shape == (3, 4, 4, 3)
    assert np.abs(images[0] - images[1]).max() > 0


def test_every_parameter_learns(settings: Settings, tiny_down: str, undisturbed: Callable[..., Path]) -> None:
    """Also both tables of labels, all of the skips, and what shrinks and grows the grid."""
    config = settings(model=tiny_down, method__depth=2, lr=1e-2, max_steps=6)
    trained = model_of_run(undisturbed(config), weights="model").backbone
    method = check(config).method
    first = build_backbone(trained.config, method, config.seed)
    pairs = zip(first.named_parameters(), trained.parameters(), strict=True)
    assert [name for (name, before), after in pairs if torch.equal(before, after)] == ["pos_embed"]


@pytest.mark.parametrize(("depth", "fits"), [(1, False), (2, True), (3, True), (4, False)])
def test_repa_is_checked_by_block(settings: Settings, tiny_down: str, depth: int, fits: bool) -> None:
    problems = check(settings(model=tiny_down, method__depth=depth)).problems
    assert [problem.field for problem in problems] == ([] if fits else ["demo/patch"])
    if not fits:
        assert "2-3" in problems[0].remedy


def test_haste_runs_in_the_middle_and_nowhere_else(
    haste: Settings, tiny_down: str, run_fit: Callable[..., Any], tmp_path: Path
) -> None:
    fitting = {"model": tiny_down, "method__depth": 3, "method__student_blocks": "2,3"}
    _, printed = run_fit(haste(**fitting, max_steps=3, method__stop=2))
    rows = read_metrics(tmp_path / "run" / "metrics.csv")
    assert [{"repa", "attention"} <= set(row) for row in rows] == [True, True, False], printed
    (problem,) = check(haste(**{**fitting, "method__student_blocks": "1,2"})).problems
    assert problem.field == "demo/q"
    assert "2-3" in problem.remedy


@pytest.fixture(scope="module")
def fine_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache whose teacher has 4×4 tokens, in int8, twice the side of the middle's grid."""
    spec = ColumnSpec(shape=(16, 16), dtype="int8")
    scales = {scale_column("demo/patch"): ColumnSpec(shape=(16,), dtype="float32")}
    path = tmp_path_factory.mktemp("fine") / "cache"
    synthetic_cache(path, num_rows=40, columns={**SYNTHETIC_COLUMNS, "demo/patch": spec, **scales})
    return path


@pytest.fixture
def urepa(settings: Settings, fine_cache: Path, tiny_down: str) -> Settings:
    """`settings` of U-REPA with the tap in the first block of the middle."""

    def make(**changes: Any) -> TrainConfig:
        values = {"method": "urepa", "method__depth": 2, "method__projector_width": 16}
        values |= {"cache": str(fine_cache), "model": tiny_down} | changes
        return settings(**{key: value for key, value in values.items() if value is not None})

    return make


def test_urepa_trains_resumes_and_ends_at_tau(
    urepa: Settings,
    undisturbed: Callable[..., Path],
    killed_fit: Callable[..., None],
    run_fit: Callable[..., Any],
    same_run: Callable[[Path, Path, int], None],
    tmp_path: Path,
) -> None:
    config = urepa(max_steps=6, checkpoint_every=1, method__stop=4)
    whole = undisturbed(config)
    for moment in (3, 5):  # before τ and after
        killed_fit(config, f"killed-{moment}", moment=moment)
        outcome, _ = run_fit(config, f"killed-{moment}")
        assert (outcome.resumed_from, outcome.finished) == (moment - 1, True)
        same_run(whole, tmp_path / f"killed-{moment}", 6)
    rows = read_metrics(whole / "metrics.csv")
    for row in rows[:4]:
        assert row["loss"] == pytest.approx(
            row["velocity"] + 0.5 * row["repa"] + 1.5 * row["relations"], rel=1e-6
        )
        assert (row["repa_weight"], row["relations_weight"]) == (0.5, 1.5)
        assert {"student_pair_cosine", "teacher_pair_cosine"} <= row.keys()
    assert set(rows[4]) == set(rows[5]) == {"step", "loss", "velocity", "gradient_norm"}


def test_urepa_of_one_batch_and_of_its_parts(
    urepa: Settings, run_fit: Callable[..., Any], tmp_path: Path
) -> None:
    """1 × 8 = 2 × 4: the manifold term pairs tokens of one image."""
    for name, changes in (("whole", {}), ("parts", {"accumulate": 2})):
        run_fit(urepa(max_steps=3, **changes), name)
    whole, parts = (read_metrics(tmp_path / name / "metrics.csv") for name in ("whole", "parts"))
    for one, two in zip(whole, parts, strict=True):
        for key in ("loss", "repa", "relations", "student_pair_cosine"):
            assert one[key] == pytest.approx(two[key], rel=1e-4, abs=1e-5), key


def test_the_first_step_is_that_of_the_baseline(
    settings: Settings,
    urepa: Settings,
    fine_cache: Path,
    tiny_down: str,
    run_fit: Callable[..., Any],
    tmp_path: Path,
) -> None:
    """Weights, order and noise are alike, so the first velocity loss is."""
    run_fit(urepa(max_steps=1), "aligned")
    run_fit(settings(cache=str(fine_cache), model=tiny_down, method="none", max_steps=1), "plain")
    first = [read_metrics(tmp_path / name / "metrics.csv")[0] for name in ("aligned", "plain")]
    assert first[0]["velocity"] == first[1]["velocity"]
    assert first[0]["loss"] != first[1]["loss"]


@pytest.mark.parametrize(
    ("method", "settings_of_it"),
    [("irepa", {"method__depth": 4}), ("sra", {"method__student_block": 1, "method__teacher_block": 4})],
)
def test_other_methods_where_their_blocks_have_one_grid(
    urepa: Settings, run_fit: Callable[..., Any], tmp_path: Path, method: str, settings_of_it: dict[str, Any]
) -> None:
    plain = {"method__depth": None, "method__projector_width": None} | settings_of_it
    config = urepa(method=method, max_steps=2, **plain)
    run_fit(config)
    last = read_metrics(tmp_path / "run" / "metrics.csv")[-1]
    assert last["loss"] != pytest.approx(last["velocity"], rel=1e-3)


@pytest.mark.parametrize(
    ("method", "settings_of_it", "field"),
    [
        ("irepa", {"method__depth": 2}, "demo/patch"),
        ("sra", {"method__student_block": 1, "method__teacher_block": 2}, "method.student_block"),
        ("reg", {"method__depth": 1}, "--model"),
        (
            "sra",
            {"method__student_block": 1, "method__teacher_block": 4, "method__preset": "dts_as"},
            "--model",
        ),
    ],
)
def test_other_methods_are_refused_in_one_line(
    urepa: Settings, method: str, settings_of_it: dict[str, Any], field: str
) -> None:
    plain = {"method__depth": None, "method__projector_width": None} | settings_of_it
    (problem,) = check(urepa(method=method, **plain)).problems
    assert problem.field == field
    assert problem.remedy
