"""`repa evaluate` against files of ADM's layout, with a network of few numbers in Inception's place."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from repa.commands.evaluate.command import evaluate
from repa.commands.evaluate.flags import EvaluateFlags
from repa.data.errors import RepaError
from repa.trainer.evaluation.frechet import frechet_distance
from repa.trainer.evaluation.results import Figure, read_evaluations
from rich.console import Console

GENERATOR = np.random.default_rng(0)
IMAGES = GENERATOR.integers(0, 256, (20, 16, 16, 3), dtype=np.uint8)
SAMPLES, REAL = IMAGES[:8], IMAGES[8:]


class FewNumbers:
    """Stands for Inception, whose weights are a download; the real network has a test of its own."""

    name = "inception"
    weights_sha256 = "few"
    random_weights = False
    widths = {"pool": 6, "spatial": 4, "logits": 3}  # noqa: RUF012 - as of the real one

    def __init__(self, weights: Path | None, *, device: str) -> None:
        assert weights == Path("few.pth")
        self.device = torch.device(device)

    def features(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        means = images.float().flatten(2).unflatten(2, (4, -1)).mean(-1).flatten(1) / 40
        return {"pool": means[:, :6], "spatial": means[:, 6:10], "logits": means[:, 9:12]}


def features(images: Any) -> dict[str, Any]:
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    found = FewNumbers(Path("few.pth"), device="cpu").features(pixels)
    return {name: values.double().numpy() for name, values in found.items()}


@pytest.fixture
def figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Evaluate samples that stand class by class; the figures and what was printed."""
    monkeypatch.setattr("repa.commands.shared.features.Inception", FewNumbers)
    np.savez(tmp_path / "samples.npz", arr_0=SAMPLES, arr_1=np.arange(8) // 4)

    def go(metrics: str, **reference: Any) -> tuple[dict[str, Figure], str]:
        np.savez(tmp_path / "reference.npz", **reference)
        printed = io.StringIO()
        flags = EvaluateFlags(
            samples=tmp_path / "samples.npz",
            reference=str(tmp_path / "reference.npz"),
            metrics=metrics,
            inception=Path("few.pth"),
            out=tmp_path / "out",
        )
        evaluate(flags, console=Console(file=printed, width=200))
        found = read_evaluations(tmp_path / "out")[-1].figures
        return {figure.metric: figure for figure in found}, printed.getvalue()

    return go


def statistics(values: Any, suffix: str = "") -> dict[str, Any]:
    return {f"mu{suffix}": values.mean(axis=0), f"sigma{suffix}": np.cov(values, rowvar=False)}


def test_adms_layout(figures: Any) -> None:
    """The distances are to the statistics in the file, though its images have others."""
    whole = {key: values + 0.5 for key, values in features(REAL).items()}
    given = {**statistics(whole["pool"]), **statistics(whole["spatial"], "_s"), "arr_0": REAL}
    found, printed = figures("fid,sfid,is,precision", **given)
    own = features(SAMPLES)
    for metric, name in (("fid", "pool"), ("sfid", "spatial")):
        assert found[metric].value == pytest.approx(frechet_distance(own[name], whole[name]), rel=1e-6)
        assert (found[metric].n, found[metric].m) == (8, None)
    shares = np.exp(own["logits"]) / np.exp(own["logits"]).sum(axis=1, keepdims=True)
    divergence = (shares * np.log(shares / shares.mean(axis=0))).sum(axis=1).mean()
    assert found["is"].value == pytest.approx(np.exp(divergence), rel=1e-6)
    assert (found["precision/inception"].m, found["recall/inception"].k) == (12, 3)
    assert "one-sided" in printed


def test_statistics_are_made_of_images_where_there_are_none(figures: Any) -> None:
    found, _ = figures("fid,sfid,kid_all", arr_0=REAL)
    own, real = features(SAMPLES), features(REAL)
    assert found["fid"].value == pytest.approx(frechet_distance(own["pool"], real["pool"]), rel=1e-6)
    assert found["sfid"].value == pytest.approx(frechet_distance(own["spatial"], real["spatial"]), rel=1e-6)
    assert (found["fid"].m, found["kid_all/inception"].m) == (12, 12)


def test_what_a_reference_does_not_give(figures: Any) -> None:
    bare = statistics(features(REAL)["pool"])
    assert set(figures("fid,is", **bare)[0]) == {"fid", "is"}
    for metrics, field in (("sfid", "--reference"), ("precision", "--reference"), ("fid,fd", "--metrics")):
        with pytest.raises(RepaError) as caught:
            figures(metrics, **bare)
        assert caught.value.field == field
