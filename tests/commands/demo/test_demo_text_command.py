"""`repa demo --text`, cut short: captions, prompts, what is said to be right, and a second call."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from narrow import make_narrow
from PIL import Image
from repa.cli import run_command
from repa.commands.demo import text as text_module
from repa.commands.demo import typed
from repa.commands.demo.measured import pixels
from repa.commands.demo.prompts import obeyed, prompts
from repa.commands.demo.text import demo_of_text
from repa.data.errors import RepaError
from repa.pipeline.demo.captions import captions_of, told
from repa.pipeline.demo.shapes import CLASS_NAMES, COLOUR_NAMES, DemoImages
from repa.trainer.run.metrics import read_metrics


@pytest.fixture
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(typed, "HOLDOUT", 24)
    monkeypatch.setattr(typed, "BATCH_SIZE", 4)
    monkeypatch.setattr(typed, "SOLVER_STEPS", 1)
    monkeypatch.setattr(text_module, "NOISES", 1)
    make_narrow(monkeypatch)


@pytest.mark.slow
@pytest.mark.usefixtures("_small")
def test_demo_from_captions_to_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "demo"
    demo_of_text(run_command, out=out, steps=2, images=40)
    assert capsys.readouterr().out.count("--prompts") == 2
    numbers = json.loads((out / "demo-text.json").read_text())
    rows = {row["method"]: row for row in numbers["rows"]}
    assert list(rows) == ["none", "repa"]
    assert numbers["right_both_of_unseen_images"] == 1.0
    # moments float32 [8, 8, 8], states float16 [12, 64] of one caption, patch tokens float16 [64, 128]
    moments, states, patch = 8 * 8 * 8 * 4, 12 * 64 * 2, 64 * 128 * 2
    assert rows["none"]["bytes_per_image"] == [moments + states]
    assert rows["repa"]["bytes_per_image"] == [moments + states + patch]
    for method, row in rows.items():
        assert row["model"] == "MMDiT-6/1"
        folder = out / "samples" / f"{method}-text"
        assert (
            row["velocity_loss"]
            == read_metrics(out / "runs" / f"{method}-text" / "metrics.csv")[-1]["held_out_ema"]
        )
        assert json.loads((folder / "sampling.json").read_text())["prompts"] == prompts()
        with np.load(folder / "samples.npz") as arrays:
            right = obeyed(arrays["arr_0"], prompts())
        assert row["right_both"] == right.both.mean() <= min(row["right_shape"], row["right_colour"])
        assert row["frechet_distance"] > numbers["frechet_distance_of_unseen_images"] > 0
    with Image.open(out / "demo-text.png") as picture:
        assert picture.width > 1000
    assert (out / "compare-text.html").read_text().count("<img ") >= 2

    written = {path: path.stat().st_mtime_ns for path in out.rglob("*.ckpt")}
    demo_of_text(run_command, out=out, steps=2, images=40)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.ckpt")} == written
    assert json.loads((out / "demo-text.json").read_text()) == numbers


def test_prompts_are_every_shape_in_every_colour_once() -> None:
    tells = [(each.colour, each.shape) for each in map(told, prompts())]
    assert tells == [
        (colour, shape) for colour in range(len(COLOUR_NAMES)) for shape in range(len(CLASS_NAMES))
    ]


def test_images_obey_their_own_captions_and_not_those_of_others() -> None:
    images = DemoImages(40, seed=6)
    texts = [own[0] for own in captions_of(images)]
    drawn = pixels(images)
    assert obeyed(drawn, texts).both.all()
    # rows are grouped by class, four of each
    other = obeyed(drawn, texts[4:] + texts[:4])
    assert not other.shape.any()
    twice = obeyed(np.concatenate([drawn, drawn]), texts)
    assert twice.both.shape == (80,)
    assert twice.both.all()


@pytest.mark.parametrize(
    ("given", "field"), [({"images": 10}, "--images"), ({"methods": "none,reqa"}, "--methods")]
)
def test_what_cannot_be_is_refused(tmp_path: Path, given: dict[str, object], field: str) -> None:
    with pytest.raises(RepaError) as caught:
        demo_of_text(run_command, out=tmp_path, **{"steps": 3, "images": 400, **given})
    assert caught.value.field == field
    assert list(tmp_path.iterdir()) == []


def test_without_transformers_a_line_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(RepaError) as caught:
        demo_of_text(run_command, out=tmp_path)
    assert caught.value.field == "--text-encoder"
    assert "[text]" in caught.value.remedy
    assert list(tmp_path.iterdir()) == []
