"""Runs conditioned on captions: MM-DiT with every method that takes it, their draws, resume and samples."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from repa.commands.sample import SampleFlags, sample
from repa.commands.shared.dry_run import print_plan
from repa.data.errors import RepaError
from repa.data.format.captions import captions_path
from repa.data.format.columns import ColumnSpec
from repa.data.reading.reader import CacheReader
from repa.data.testing import SYNTHETIC_COLUMNS, expected_row, synthetic_cache, synthetic_captions
from repa.trainer.models.mmdit import MMDIT_SIZES, MMDiT, MMDiTSize
from repa.trainer.models.text_conditioning import TextConditioner
from repa.trainer.run.checked import ProblemsError
from repa.trainer.run.checks import check
from repa.trainer.sampling.generate import model_of_run
from repa.trainer.step.checkpoints import checkpoints_of, load_checkpoint
from rich.console import Console

if TYPE_CHECKING:
    from collections.abc import Callable

    from repa.trainer.config import TrainConfig

    Settings = Callable[..., TrainConfig]

TEXT = "demo-text/states"
SPEC = ColumnSpec(shape=(6, 12), dtype="float16")


class Pixels:
    name = "pixels"
    weights_sha256 = "0"

    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        return (128 + 20 * latent[:, :3]).clamp(0, 255).to(torch.uint8)


@pytest.fixture(scope="session")
def captioned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "cache"
    attention = ColumnSpec(shape=(3, 2, 4, 8), dtype="float16")
    columns = {**SYNTHETIC_COLUMNS, "demo/q": attention, "demo/k": attention}
    synthetic_cache(path, num_rows=40, invalid={5: "damaged"}, columns=columns)
    columns = {
        TEXT: SPEC,
        "small/states": ColumnSpec(shape=(6, 12), dtype="int8"),
        "small/states-scale": ColumnSpec(shape=(12,), dtype="float32"),
    }
    synthetic_captions(path, columns=columns)
    return path


@pytest.fixture
def text(settings: Settings, captioned: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """`settings` of a small MM-DiT on captions."""
    monkeypatch.setitem(MMDIT_SIZES, "6", MMDiTSize(depth=2, width=48, heads=3))

    def make(**changes: Any) -> TrainConfig:
        values = {"cache": str(captioned), "model": "MMDiT-6/2", "condition": TEXT, "lr": 1e-2}
        return settings(**{**values, **changes})

    return make


METHODS: dict[str, dict[str, Any]] = {
    "none": {},
    "repa": {},
    "haste": {
        "method__depth": 1,
        "method__student_blocks": "1,2",
        "method__teacher_blocks": "3,1",
        "method__stop": 3,
        "method__projector_width": 16,
    },
    "sra": {"method__student_block": 1, "method__teacher_block": 2},
}


@pytest.mark.parametrize("method", METHODS)
def test_killed_and_resumed_the_captions_and_all_else_are_the_same(
    method: str,
    text: Settings,
    undisturbed: Callable[..., Path],
    killed_fit: Callable[..., None],
    run_fit: Callable[..., Any],
    same_run: Callable[[Path, Path, int], None],
    tmp_path: Path,
) -> None:
    config = text(method=method, checkpoint_every=2, holdout=8, eval_every=4, **METHODS[method])
    assert not check(config).problems
    whole = undisturbed(config)
    killed_fit(config, "killed", moment=3)
    run_fit(config, "killed")
    same_run(whole, tmp_path / "killed", 4)


def test_the_run_keeps_the_states_of_the_empty_caption_and_samples(
    text: Settings, undisturbed: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = undisturbed(text(preview_every=2, preview_count=2, preview_steps=2), decoder=Pixels())
    assert len(list((run / "samples").glob("*.png"))) == 2
    weights = load_checkpoint(checkpoints_of(run)[4])["state_dict"]
    null = torch.from_numpy(expected_row(TEXT, 0, SPEC).astype(np.float32))
    for network in ("backbone", "ema"):
        assert torch.equal(weights[f"{network}.y_embedder.null_states"], null)
    model = model_of_run(run).backbone
    assert isinstance(model, MMDiT)
    assert isinstance(model.y_embedder, TextConditioner)
    assert torch.equal(model.y_embedder.null(1)[0], null)

    monkeypatch.setattr("repa.commands.shared.prepared.decoder_of", lambda *_: Pixels())
    flags = {"run": run, "num": 3, "steps": 3, "guidance": 1.5, "npz": True}
    sample(SampleFlags(**flags, out=tmp_path / "out"))
    with np.load(tmp_path / "out" / "samples.npz") as arrays:
        assert arrays["arr_0"].shape == (3, 4, 4, 3)
        assert arrays["arr_1"].tolist() == [0, 1, 2]
    record = json.loads((tmp_path / "out" / "sampling.json").read_text())
    # of images 0, 14 and 27: 39 rows have data, the fifth has none
    assert [each.startswith("a thing of kind") for each in record["prompts"]] == [True] * 3
    for prompt, row in zip(record["prompts"], (0, 14, 27), strict=True):
        assert prompt in [f"a thing of kind {(row + each) % 5}" for each in range(1 + row % 3)]


def test_int8_states_are_scaled(text: Settings, undisturbed: Callable[..., Path], captioned: Path) -> None:
    config = text(condition="small/states")
    run = undisturbed(config)
    null = load_checkpoint(checkpoints_of(run)[4])["state_dict"]["ema.y_embedder.null_states"]
    with CacheReader(captions_path(captioned), ("small/states", "small/states-scale")) as reader:
        out = {
            name: np.empty((1, *spec.shape), spec.numpy_dtype)
            for name, spec in reader.manifest.columns.items()
            if name in reader.columns
        }
        reader.read_rows(np.array([0]), reader.columns, out)
    expected = out["small/states"][0].astype(np.float32) * out["small/states-scale"][0]
    np.testing.assert_allclose(null.numpy(), expected, rtol=1e-6)


def test_what_is_no_text_or_takes_none_is_told_before_step_0(text: Settings, settings: Settings) -> None:
    (problem,) = check(text(condition="label")).problems
    assert problem.field == "condition"
    assert f"condition={TEXT}" in problem.remedy
    (problem,) = check(text(model=settings().model)).problems
    assert problem.field == "condition"
    (problem,) = check(text(condition="clip-l-text/states")).problems
    assert "--text-encoder clip-l-text" in problem.remedy
    # REG's class token is one more token, which MM-DiT does not take
    assert check(text(method="reg", method__depth=1)).problems


def test_labels_cannot_be_asked_of_a_model_of_text(
    text: Settings, undisturbed: Callable[..., Path], tmp_path: Path
) -> None:
    run = undisturbed(text())
    with pytest.raises(RepaError) as caught:
        sample(SampleFlags(run=run, num=2, labels=["1"], out=tmp_path / "out"))
    assert caught.value.field == "--label"


def test_a_dry_run_counts_the_network_with_its_text(text: Settings) -> None:
    printed = io.StringIO()
    console = Console(file=printed, width=200)
    print_plan(text(), Path("run"), console)
    # the two-block network without its projection of text, and that projection
    embedded = 12 * 48 + 48
    config = check(text()).backbone
    assert config is not None
    conditioner = TextConditioner(TEXT, (6, 12), 48)
    count = sum(each.numel() for each in MMDiT(config, conditioner).parameters())  # type: ignore[arg-type]
    assert sum(each.numel() for each in conditioner.parameters()) == embedded
    assert f"backbone {count:,}," in printed.getvalue()
    with pytest.raises(ProblemsError):
        print_plan(text(condition="label"), Path("run"), console)
