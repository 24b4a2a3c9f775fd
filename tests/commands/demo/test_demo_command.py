"""`repa demo`, cut short: its own commands, table and picture; a second call does nothing twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from narrow import make_narrow
from PIL import Image
from repa.cli import run_command
from repa.commands.demo import run as demo_module
from repa.commands.demo import typed
from repa.commands.demo.run import demo
from repa.data.errors import RepaError
from repa.data.format.opening import open_manifest
from repa.trainer.evaluation.results import read_evaluations
from repa.trainer.methods import METHODS
from repa.trainer.run.metrics import read_metrics


@pytest.fixture
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(typed, "HOLDOUT", 24)
    monkeypatch.setattr(demo_module, "SAMPLES", 10)
    monkeypatch.setattr(typed, "BATCH_SIZE", 8)
    monkeypatch.setattr(typed, "SOLVER_STEPS", 1)
    make_narrow(monkeypatch)


@pytest.mark.slow
@pytest.mark.usefixtures("_small")
def test_demo_from_images_to_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "demo"
    demo(run_command, out=out, steps=2, images=64)
    printed = capsys.readouterr().out
    for method in ("none", "repa", "haste"):
        assert f"$ repa train --method {method} --model SiT-T/1" in printed
        assert (out / "runs" / method / "config.yaml").exists()
    numbers = json.loads((out / "demo.json").read_text())
    rows = {row["method"]: row for row in numbers["rows"]}
    # moments float32 [8, 8, 8]; patch tokens float16 [64, 128]; until τ also q and k
    moments, patch = 8 * 8 * 8 * 4, 64 * 128 * 2
    notes = open_manifest(out / "cache").sources["demo+attention"].notes
    attention = notes["fidelity"]["bytes_per_image"]
    # less than eight components of each of 3 × 2 heads in int4, and their scales
    assert attention < 3 * 2 * 8 * (2 * 32 + 4)
    assert rows["none"]["bytes_per_image"] == [moments]
    assert rows["repa"]["bytes_per_image"] == [moments + patch]
    assert rows["haste"]["bytes_per_image"] == [moments + patch + attention, moments]
    for method, row in rows.items():
        last = read_metrics(out / "runs" / method / "metrics.csv")[-1]
        assert row["velocity_loss"] == last["held_out_ema"]
        assert row["frechet_distance"] > numbers["frechet_distance_of_unseen_images"] > 0
        assert row["images_per_second"] > 0
    with np.load(out / "samples" / "repa" / "samples.npz") as arrays:
        assert arrays["arr_0"].shape == (10, 64, 64, 3)
        assert arrays["arr_0"].dtype == np.uint8
        assert np.bincount(arrays["arr_1"]).tolist() == [1] * 10
    with Image.open(out / "demo.png") as picture:
        assert picture.width > 1000

    page = (out / "compare.html").read_text()
    assert page.count("<img ") == 3 * 2  # of three runs, the previews of two steps
    assert 'id="notes"' not in page

    written = {path: path.stat().st_mtime_ns for path in (out / "runs").rglob("*.ckpt")}
    demo(run_command, out=out, steps=2, images=64)
    assert {path: path.stat().st_mtime_ns for path in (out / "runs").rglob("*.ckpt")} == written
    assert json.loads((out / "demo.json").read_text()) == numbers
    assert (out / "compare.html").read_text() == page

    # by run and by file `repa evaluate` has the demo's own number
    settings = ("--num", "10", "--solver", "heun", "--steps", "1", "--guidance", "2")
    folder, samples = out / "runs" / "repa", out / "samples" / "repa"
    run_command(["evaluate", "--run", str(folder), *settings])
    run_command(
        ["evaluate", "--samples", str(samples), "--reference", str(out / "cache"), "--out", str(samples)]
    )
    for place in (folder, samples):
        (figure,) = read_evaluations(place)[-1].figures
        assert (figure.metric, figure.n, figure.m) == ("fd/demo", 10, 64)
        assert figure.value == pytest.approx(rows["repa"]["frechet_distance"], rel=1e-6)

    # others on the same cache, one with a backbone of its own and one without a teacher: the report is of
    # those that were asked for
    others = ["urepa", "sra"]
    demo(run_command, out=out, steps=2, images=64, methods=",".join(["none", *others]))
    assert (
        written.items() <= {path: path.stat().st_mtime_ns for path in (out / "runs").rglob("*.ckpt")}.items()
    )
    found = {row["method"]: row for row in json.loads((out / "demo.json").read_text())["rows"]}
    assert list(found) == ["none", *others]
    assert found["none"] == rows["none"]
    assert [row["model"] for row in found.values()] == ["SiT-T/1", "SiT-down-T/1", "SiT-T/1"]
    assert [row["bytes_per_image"] for row in found.values()] == [[moments], [moments + patch], [moments]]


@pytest.mark.thorough
@pytest.mark.usefixtures("_small")
def test_demo_of_every_method(tmp_path: Path) -> None:
    demo(run_command, out=tmp_path, steps=2, images=64, methods=",".join(METHODS))
    rows = json.loads((tmp_path / "demo.json").read_text())["rows"]
    assert [row["method"] for row in rows] == list(METHODS)
    assert all(row["velocity_loss"] > 0 for row in rows)
    with Image.open(tmp_path / "demo.png") as picture:
        assert picture.height > 900  # two rows of samples over the curves


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"images": 10}, "--images"),
        ({"steps": 0}, "--steps"),
        ({"methods": "none,reqa"}, "--methods"),
        ({"methods": "none,repa,none"}, "--methods"),
        ({"methods": " , "}, "--methods"),
    ],
)
def test_demo_refuses_what_cannot_be(tmp_path: Path, given: dict[str, Any], field: str) -> None:
    with pytest.raises(RepaError) as caught:
        demo(run_command, out=tmp_path, **{"steps": 3, "images": 400, **given})
    assert caught.value.field == field
    assert caught.value.remedy
    assert list(tmp_path.iterdir()) == []
