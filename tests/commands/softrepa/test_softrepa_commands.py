"""`repa softrepa train` and `repa softrepa sample`, from flags to files."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from repa.cli import run_command
from repa.commands.softrepa import sample as sampling
from repa.commands.softrepa.sample import sample
from repa.commands.softrepa.sample_flags import SoftSampleFlags
from repa.commands.softrepa.train import train
from repa.commands.softrepa.train_flags import SoftTrainFlags
from repa.data.errors import RepaError
from repa.data.format.columns import MOMENTS, ColumnSpec
from repa.data.testing import synthetic_cache, synthetic_captions
from repa.soft_tokens import load_soft_tokens
from repa.trainer.config import build
from repa.trainer.reports.runs import read_runs
from repa.trainer.run.checked import ProblemsError
from repa.trainer.sampling.generate import newest_checkpoint
from repa.trainer.softrepa.sampling import Text, initial_noise, sample_latents
from repa.trainer.step.checkpoints import SOFTREPA_KEY, checkpoints_of
from rich.console import Console
from small_diffusion import denoiser_of, save_model, small_model

TEXT = {
    "clip-l-text/states": ColumnSpec(shape=(7, 12), dtype="float16"),
    "sd3-text/states": ColumnSpec(shape=(7, 24), dtype="float16"),
    "sd3-text/pooled": ColumnSpec(shape=(20,), dtype="float16"),
}
MOMENTS_SPEC = ColumnSpec(shape=(8, 8, 8), dtype="float32")


class Pixels:
    """Stands for the autoencoder, which needs weights."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        return (128 + 4 * latent[:, :3]).clamp(0, 255).to(torch.uint8)


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache, the folders of two models, and a run of each."""
    place = tmp_path_factory.mktemp("softrepa")
    synthetic_cache(place / "cache", num_rows=20, columns={MOMENTS: MOMENTS_SPEC}, resolution=64)
    synthetic_captions(place / "cache", columns=TEXT)
    for kind in ("sd15", "sd3"):
        save_model(place / kind, kind)
        more = ["layers=3"] if kind == "sd3" else []
        train(flags_of(place, kind, more=more), console=Console(file=io.StringIO()))
    return place


def flags_of(place: Path, kind: str, *, more: list[str] | None = None, **given: Any) -> SoftTrainFlags:
    settings = ["holdout=8", "eval_every=1", "accelerator=cpu", "log_every=1", "checkpoint_every=2"]
    values: dict[str, Any] = {
        "model": str(place / kind),
        "cache": str(place / "cache"),
        "run": place / f"run-{kind}",
        "max_steps": 2,
        "batch_size": 4,
        "assignments": [*settings, *(more or [])],
    }
    return SoftTrainFlags(**{**values, **given})


def pictures(folder: Path) -> list[np.ndarray]:
    return [np.asarray(Image.open(file)) for file in sorted(folder.glob("*.png"))]


@pytest.mark.parametrize("kind", ["sd15", "sd3"])
def test_samples_by_captions_do_not_depend_on_the_batch_and_differ_from_the_plain_models(
    kind: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "Decoder", Pixels)
    quiet = Console(file=io.StringIO())
    common: dict[str, Any] = {"run": place / f"run-{kind}", "num": 3, "steps": 3, "guidance": 3.0}
    sample(SoftSampleFlags(**common, out=tmp_path / "one", batch_size=1), console=quiet)
    sample(SoftSampleFlags(**common, out=tmp_path / "three", batch_size=3), console=quiet)
    sample(SoftSampleFlags(**common, out=tmp_path / "plain", plain=True), console=quiet)
    one, three, plain = (pictures(tmp_path / name) for name in ("one", "three", "plain"))
    assert [each.shape for each in one] == [(8, 8, 3)] * 3
    for first, second in zip(one, three, strict=True):
        assert np.abs(first.astype(int) - second).max() <= 1
    assert any((first != second).any() for first, second in zip(one, plain, strict=True))
    record = json.loads((tmp_path / "one" / "sampling.json").read_text())
    assert len(record["prompts"]) == 3
    assert all(each.startswith("a thing of kind") for each in record["prompts"])
    assert (record["steps"], record["guidance"], record["resolution"]) == (3, 3.0, 64)
    assert record["tokens"] == str(place / f"run-{kind}" / "tokens-best.safetensors")
    assert json.loads((tmp_path / "plain" / "sampling.json").read_text())["tokens"] is None

    wide = SoftSampleFlags(**common, out=tmp_path / "wide", resolution=128)
    if kind == "sd15":
        sample(wide, console=quiet)
        assert [each.shape for each in pictures(tmp_path / "wide")] == [(16, 16, 3)] * 3


def test_prompts_are_encoded_as_the_captions_were(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    class Encoder:
        def encode(self, texts: list[str]) -> dict[str, Any]:
            asked.extend(texts)
            return {"states": np.full((1, 7, 12), len(texts[0]), np.float32)}

    def encoder(source: str, weights: Any, **options: Any) -> Encoder:
        asked.append((source, weights, options["random_weights"], len(options["sha256"])))
        return Encoder()

    monkeypatch.setattr(sampling, "Decoder", Pixels)
    monkeypatch.setattr(sampling, "text_encoder", encoder)
    common: dict[str, Any] = {"run": place / "run-sd15", "num": 3, "steps": 1, "prompts": ["a", "a cat"]}
    flags = SoftSampleFlags(**common, out=tmp_path / "out", encoder_weights=["clip-l-text=folder"])
    sample(flags, console=Console(file=io.StringIO()))
    assert asked == [("clip-l-text", ("clip-l-text=folder",), False, 64), "a", "a cat"]
    assert json.loads((tmp_path / "out" / "sampling.json").read_text())["prompts"] == ["a", "a cat", "a"]


def test_our_sampler_gives_what_a_pipeline_of_diffusers_gives(place: Path) -> None:
    """DDIM with guidance, the tokens in both passes, from the same noise."""
    import diffusers

    generator = torch.Generator().manual_seed(3)
    text = torch.randn(2, 7, 12, generator=generator)
    made = denoiser_of(place / "sd15")
    made.model.float()
    drop_in = load_soft_tokens(made.model, place / "run-sd15" / "tokens.safetensors")
    noise = initial_noise(0, 0, 1, (4, 8, 8))
    ours = sample_latents(
        made,
        drop_in.soft,
        Text(states=text[:1], pooled=None),
        Text(states=text[1:], pooled=None),
        noise,
        steps=4,
        guidance=3.0,
        size=64,
    )
    other = load_soft_tokens(small_model("sd15").eval(), place / "run-sd15" / "tokens.safetensors")
    other.denoiser.load_state_dict(made.model.state_dict())
    pipeline: Any = diffusers.StableDiffusionPipeline(
        vae=None,
        text_encoder=None,
        tokenizer=None,
        unet=other,
        scheduler=diffusers.DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        prompt_embeds=text[:1],
        negative_prompt_embeds=text[1:],
        latents=noise.clone(),
        num_inference_steps=4,
        guidance_scale=3.0,
        height=64,
        width=64,
        output_type="latent",
    ).images
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("flags", "field"),
    [
        ({}, "--run"),
        ({"run": "run-sd15", "tokens": "run-sd15/tokens.safetensors"}, "--run"),
        ({"run": "cache"}, "--run"),
        ({"run": "run-sd15", "model": "sd3"}, "--model"),
        ({"run": "run-sd15", "resolution": 60}, "--resolution"),
        ({"run": "run-sd15", "num": 0}, "--num"),
        ({"run": "run-sd15", "steps": 1001}, "--steps"),
        ({"run": "run-sd15", "guidance": float("nan")}, "--guidance"),
        ({"run": "run-sd15", "out": "run-sd15"}, "--out"),
        ({"run": "run-sd15", "encoder_weights": ["clip-l-text=folder"]}, "--encoder-weights"),
    ],
)
def test_what_cannot_be_sampled_is_refused(flags: dict[str, Any], field: str, place: Path) -> None:
    paths = {name: place / flags[name] for name in ("run", "tokens", "out") if name in flags}
    model = {"model": str(place / flags["model"])} if "model" in flags else {}
    with pytest.raises(RepaError) as error:
        sample(SoftSampleFlags(**{**flags, **paths, **model}), console=Console(file=io.StringIO()))
    assert error.value.field == field


def test_a_dry_run_says_what_would_be_trained_and_lists_problems(place: Path, tmp_path: Path) -> None:
    printed = io.StringIO()
    console = Console(file=printed, width=200)
    train(flags_of(place, "sd15", dry_run=True, run=tmp_path / "new"), console=console)
    said = printed.getvalue()
    # 4 tokens and 100 rows of 12, and all pairs of 4 images
    assert "1,248" in said
    assert "16 predictions" in said
    assert not (tmp_path / "new").exists()
    with pytest.raises(ProblemsError):
        train(flags_of(place, "sd15", more=["layers=2"], dry_run=True, run=tmp_path / "new"), console=console)


def test_every_setting_is_explained() -> None:
    printed = io.StringIO()
    train(SoftTrainFlags(help_settings=True), console=Console(file=printed, width=200))
    lines = printed.getvalue().splitlines()
    settings = [index for index, line in enumerate(lines) if line.startswith("  ") and line[2] != " "]
    assert len(settings) > 25
    assert all(lines[index + 1].strip() for index in settings)


def test_other_commands_say_where_softrepa_is(place: Path, tmp_path: Path) -> None:
    with pytest.raises(RepaError) as error:
        newest_checkpoint(place / "run-sd15")
    assert error.value.field == "--run"
    with pytest.raises(RepaError) as error:
        build(flags={"method": "softrepa"})
    assert error.value.field == "--method"
    assert "softrepa train" in error.value.remedy
    with pytest.raises(RepaError) as error:
        run_command(["train", "--run", str(place / "run-sd15"), "--cache", str(place / "cache"), "--dry-run"])
    assert error.value.field == "--run"
    checkpoint = str(checkpoints_of(place / "run-sd15")[2])
    for words in (
        ["sample", "--ckpt", checkpoint],
        ["evaluate", "--ckpt", checkpoint, "--out", str(tmp_path)],
    ):
        with pytest.raises(RepaError) as error:
            run_command(words)
        assert error.value.field == SOFTREPA_KEY
        assert not [*tmp_path.iterdir()]


def test_a_run_of_softrepa_is_compared_by_its_own_settings(place: Path) -> None:
    run = read_runs([place / "run-sd15"])[0]
    assert (run.settings["method.name"], run.settings["model"]) == ("softrepa", str(place / "sd15"))
    assert (run.settings["tokens"], run.batch_size, run.last_step) == (4, 4, 2)
    assert not run.notes


def test_the_flags_reach_the_command(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["--set", "holdout=8", "--set", "accelerator=cpu", "--batch-size", "3"]
    arguments = ["--model", str(place / "sd3"), "--cache", str(place / "cache"), "--run", str(place / "new")]
    run_command(["softrepa", "train", *arguments, *settings, "--set", "layers=2", "--dry-run"])
    said = capsys.readouterr().out
    assert "9 predictions" in said
    assert "layers: 2" in said
