"""Runs on DiT, whose network predicts the noise and the variance of the steps of DDPM."""

from __future__ import annotations

import io
import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from every_method import STEPS, shrink, small_config, write_cache
from repa.commands.analyze.flags import AnalyzeFlags
from repa.commands.analyze.run import analyze
from repa.commands.sample import SampleFlags, sample
from repa.commands.train import TrainFlags, train
from repa.data.errors import RepaError
from repa.data.format.columns import MOMENTS
from repa.data.reading.latents import LatentScale, sample_posterior, scale_latent
from repa.data.reading.reader import CacheReader
from repa.trainer import compiling
from repa.trainer.models.dit import DiT, DiTConfig
from repa.trainer.models.sit import SIT_SIZES, SiTSize
from repa.trainer.models.timesteps import step_of
from repa.trainer.objectives.ddpm import Ddpm, DdpmConfig
from repa.trainer.run.assembly import assemble
from repa.trainer.run.checks import check
from repa.trainer.run.held_out import held_out_batches, held_out_sums, held_out_times
from repa.trainer.run.identity import identity_of
from repa.trainer.run.metrics import read_metrics
from repa.trainer.sampling.generate import model_of_run
from repa.trainer.step.latents import MomentLatents
from repa.trainer.step.randomness import generator_for
from rich.console import Console

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from repa.trainer.config import TrainConfig
    from repa.trainer.step.module import TrainingModule

MODEL = "DiT-T/2"
METHODS = ("haste", "sra")


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cache(tmp_path_factory.mktemp("dit") / "whole")


def dit(method: str, cache: Path, **changes: Any) -> TrainConfig:
    return small_config(method, cache, model=MODEL, **changes)


def rows_of(run: Path) -> list[dict[str, float]]:
    return read_metrics(run / "metrics.csv")


class Pixels:
    name, weights_sha256 = "pixels", "0"

    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        # the latents of a network of so few steps are large
        shown = latent.sign() * latent.abs().log1p()
        return (128 + 9 * shown[:, [0, 1, 3]]).clamp(0, 255).to(torch.uint8)


@pytest.mark.parametrize("method", METHODS)
def test_it_trains_resumes_and_previews(
    method: str,
    whole: Path,
    undisturbed: Callable[..., Path],
    killed_fit: Callable[..., None],
    run_fit: Callable[..., Any],
    same_run: Callable[[Path, Path, int], None],
    tmp_path: Path,
) -> None:
    extra = {"gradient_angle_every": 2, "preview_every": 4, "preview_steps": 2, "ema_decay": 0.5}
    config = dit(method, whole, **extra)
    run = undisturbed(config, decoder=Pixels())
    killed_fit(config, "killed", moment=3, decoder=Pixels())
    outcome, _ = run_fit(config, "killed", decoder=Pixels())
    assert (outcome.resumed_from, outcome.finished) == (2, True)
    same_run(run, tmp_path / "killed", STEPS)
    first = rows_of(run)[0]
    assert {"mse", "vb"} <= first.keys()
    assert "velocity" not in first
    terms = [(first[name], first.get(f"{name}_weight", 1)) for name in first if f"{name}_weight" in first]
    total = first["mse"] + first["vb"] + sum(value * weight for value, weight in terms)
    assert first["loss"] == pytest.approx(total, rel=1e-5)
    # a zero output: the noise is wrong by its own variance
    assert first["mse"] == pytest.approx(1, abs=0.2)
    assert (run / "samples" / "step-00000004.png").exists()
    assert "gradient_angle" in rows_of(run)[1]
    if method == "sra":
        assert first["sra_weight"] == 0.04


def test_every_parameter_learns(whole: Path, undisturbed: Callable[..., Path]) -> None:
    config = dit("none", whole, lr=1e-2, ema_decay=0.5)
    trained = model_of_run(undisturbed(config), weights="model").backbone
    first = build_run(config).backbone
    pairs = zip(first.named_parameters(), trained.parameters(), strict=True)
    same = [name for (name, before), after in pairs if torch.equal(before, after)]
    assert same == ["pos_embed"]


def build_run(config: TrainConfig) -> TrainingModule:
    checked = check(config)
    assert checked.problems == []
    return assemble(config, checked, identity_of(checked, config))[0]


@pytest.mark.parametrize("method", ["haste", "sra"])
def test_one_batch_of_eight_is_two_of_four(
    method: str, whole: Path, run_fit: Callable[..., Any], tmp_path: Path
) -> None:
    for name, changes in (("whole", {}), ("parts", {"accumulate": 2})):
        run_fit(dit(method, whole, max_steps=2, **changes), name)
    for one, two in zip(rows_of(tmp_path / "whole"), rows_of(tmp_path / "parts"), strict=True):
        assert one == pytest.approx(two, rel=1e-4, abs=1e-6)


def test_compiled_is_plain_within_rounding(
    whole: Path, run_fit: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs = []
    torch._dynamo.reset()
    monkeypatch.setattr(compiling, "BACKEND", lambda graph, _: (graphs.append(1), graph.forward)[1])
    monkeypatch.setitem(SIT_SIZES, "T", SiTSize(depth=1, width=24, heads=2))
    run_fit(dit("none", whole, max_steps=2, holdout=0), "plain")
    run_fit(dit("none", whole, max_steps=2, holdout=0, compile="whole"), "compiled")
    assert graphs == [1]
    for one, two in zip(rows_of(tmp_path / "plain"), rows_of(tmp_path / "compiled"), strict=True):
        assert one == pytest.approx(two, rel=1e-4, abs=1e-6)


def test_in_half_precision_noise_and_loss_are_float32(
    whole: Path, run_fit: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The network alone computes in bfloat16, in training and in previews."""
    seen: dict[str, set[torch.dtype]] = {"x_t": set(), "loss": set(), "prediction": set()}
    losses = Ddpm.losses

    def look(self: Ddpm, captured: Any, noised: Any) -> Any:
        found = losses(self, captured, noised)
        seen["x_t"].add(noised.x_t.dtype)
        seen["prediction"].add(captured.prediction.dtype)
        seen["loss"] |= {value.dtype for value in found.values()}
        return found

    monkeypatch.setattr(Ddpm, "losses", look)
    config = dit("repa", whole, max_steps=2, precision="bf16-mixed", preview_every=2, preview_steps=2)
    run_fit(config, decoder=Pixels())
    assert seen["prediction"] == {torch.bfloat16}
    assert seen["x_t"] == seen["loss"] == {torch.float32}
    plain = dit("repa", whole, max_steps=2)
    run_fit(plain, "plain")
    for one, two in zip(rows_of(tmp_path / "run"), rows_of(tmp_path / "plain"), strict=True):
        assert one["mse"] == pytest.approx(two["mse"], rel=0.02)
        assert one["vb"] == pytest.approx(two["vb"], rel=0.02)


def test_held_out_loss_against_a_loop(whole: Path) -> None:
    torch.manual_seed(0)
    model = DiT(DiTConfig(depth=1, width=16, heads=2, patch_size=2, input_size=8, num_classes=3))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    objective = Ddpm(DdpmConfig())
    rows, scale = np.array([1, 4, 9]), LatentScale(0.3, 0.1)
    with CacheReader(whole, (MOMENTS,)) as reader:
        sums, count = held_out_sums(
            {"a": model},
            held_out_batches(reader, rows, (MOMENTS,)),
            objective=objective,
            latents=MomentLatents(scale),
            seed=5,
            device=torch.device("cpu"),
        )
        moments = np.empty((3, 8, 8, 8), np.float32)
        reader.read_rows(rows, (MOMENTS,), {MOMENTS: moments})
        labels = torch.from_numpy(reader.labels[rows].astype(np.int64))
    generator = generator_for(5, "held out", 0)
    posterior, noise = (torch.randn(3, 4, 8, 8, generator=generator) for _ in range(2))
    x0 = scale_latent(sample_posterior(torch.from_numpy(moments), posterior), *scale)
    steps = step_of(held_out_times(0, 3))
    alpha, sigma = (
        table[steps].float()[:, None, None, None] for table in (objective.chain.alpha, objective.chain.sigma)
    )
    guess, variance = model(alpha * x0 + sigma * noise, held_out_times(0, 3), labels).prediction.chunk(2, 1)
    noised = objective.noised(x0, noise, held_out_times(0, 3))
    expected = (guess - noise).square().sum() / 256 + objective.bound(guess, variance, noised).sum() / 256
    assert count == 3
    assert sums["a"] == pytest.approx(expected.item(), rel=1e-5)


@pytest.fixture
def trained(whole: Path, undisturbed: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run whose averaged weights have learnt something, and a stand-in for its autoencoder."""
    monkeypatch.setattr("repa.commands.shared.prepared.decoder_of", lambda *_: Pixels())
    return undisturbed(dit("repa", whole, lr=1e-2, ema_decay=0.5))


def sampled(run: Path | None, out: Path, **flags: Any) -> tuple[np.ndarray, dict[str, Any]]:
    sample(SampleFlags(**{"run": run, "num": 4, "steps": 5, "npz": True, "out": out, **flags}))
    with np.load(out / "samples.npz") as arrays:
        return arrays["arr_0"].astype(int), json.loads((out / "sampling.json").read_text())


def test_samples_by_both_solvers_and_channels(trained: Path, tmp_path: Path) -> None:
    images = {}
    for name, flags in {
        "plain": {},
        "again": {"batch_size": 3},
        "ddim": {"solver": "ddim"},
        "all": {"guidance": 4.0},
        "three": {"guidance": 4.0, "guidance_channels": "three"},
    }.items():
        images[name], record = sampled(trained, tmp_path / name, **flags)
        assert record["solver"] == flags.get("solver", "ddpm")
        assert record["guidance_channels"] == flags.get("guidance_channels", "all")
        assert record["finished"]
    assert np.abs(images["plain"] - images["again"]).max() <= 1
    for first, second in (("plain", "ddim"), ("plain", "all"), ("all", "three")):
        assert np.abs(images[first] - images[second]).max() > 0
    # a folder of one choice of channels is not gone on with by another
    with pytest.raises(RepaError) as caught:
        sampled(trained, tmp_path / "all", guidance=4.0, guidance_channels="three")
    assert caught.value.field == "--out"


@pytest.mark.parametrize(
    ("flags", "field"),
    [
        ({"solver": "euler"}, "--solver"),
        ({"solver": "sde"}, "--solver"),
        ({"steps": 1001}, "--steps"),
        ({"shift": 0.3}, "--shift"),
        ({"guidance": 2.0, "guidance_channels": "four"}, "--guidance-channels"),
        ({"guidance_channels": "three"}, "--guidance-channels"),
    ],
)
def test_what_cannot_be_sampled(trained: Path, tmp_path: Path, flags: dict[str, Any], field: str) -> None:
    with pytest.raises(RepaError) as caught:
        sampled(trained, tmp_path / "out", **flags)
    assert caught.value.field == field
    assert caught.value.remedy
    assert not (tmp_path / "out").exists()


def test_a_network_of_velocities_has_no_ancestral_steps(
    whole: Path, undisturbed: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("repa.commands.shared.prepared.decoder_of", lambda *_: Pixels())
    run = undisturbed(small_config("none", whole))
    for solver in ("ddpm", "ddim"):
        with pytest.raises(RepaError) as caught:
            sampled(run, tmp_path / "out", solver=solver)
        assert caught.value.field == "--solver"


def published(config: TrainConfig, path: Path, *, seed: int) -> Path:
    """A published file of the run's architecture, with drawn weights."""
    backbone = check(config).backbone
    assert backbone is not None
    torch.manual_seed(seed)
    state = DiT(backbone).state_dict()
    torch.save({key: value + 0.02 * torch.randn_like(value) for key, value in state.items()}, path)
    return path


def test_a_published_file_is_sampled(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("repa.commands.shared.prepared.decoder_of", lambda *_: Pixels())
    named = published(dit("none", whole), tmp_path / "DiT-T-2.pt", seed=0)
    unnamed = published(dit("none", whole), tmp_path / "weights.pt", seed=0)
    common = {"num": 2, "steps": 3}
    images, record = sampled(None, tmp_path / "named", checkpoint=named, **common)
    assert (record["solver"], record["family"]) == ("ddpm", None)
    again, record = sampled(None, tmp_path / "unnamed", checkpoint=unnamed, family="DiT", **common)
    assert record["family"] == "DiT"
    assert np.array_equal(images, again)
    other, record = sampled(None, tmp_path / "other", checkpoint=unnamed, family="SiT", **common)
    assert record["solver"] == "euler"
    assert not np.array_equal(images, other)
    with pytest.raises(RepaError) as caught:
        sampled(None, tmp_path / "none", checkpoint=unnamed, **common)
    assert caught.value.field == "--family"


def test_the_family_of_a_runs_checkpoint_is_not_asked(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(RepaError) as caught:
        sampled(trained, tmp_path / "out", family="DiT")
    assert caught.value.field == "--family"


@pytest.mark.parametrize("name", ["DiT-T-2.pt", "weights.pt"])
def test_a_run_begins_with_a_published_file(
    whole: Path, run_fit: Callable[..., Any], tmp_path: Path, name: str
) -> None:
    """Of one that does not say what it is, the model says it."""
    file = published(dit("none", whole), tmp_path / name, seed=1)
    run_fit(dit("none", whole, max_steps=1, lr=1e-9, init=str(file), checkpoint_every=1))
    begun = model_of_run(tmp_path / "run", weights="model").backbone.state_dict()
    for key, value in torch.load(file, weights_only=True).items():
        torch.testing.assert_close(begun[key], value, rtol=0, atol=1e-6)
    if name != "weights.pt":
        with pytest.raises(RepaError) as caught:
            run_fit(small_config("none", whole, max_steps=1, init=str(file)), "other")
        assert caught.value.field == "--init"


def test_a_run_by_its_blocks(trained: Path, tmp_path: Path) -> None:
    flags = AnalyzeFlags(run=trained, times="0.0005,0.7", out=tmp_path / "out", teachers=["demo"], k=3)
    analyze(flags, console=Console(file=io.StringIO(), width=120))
    (document,) = (tmp_path / "out").glob("*.json")
    found = json.loads(document.read_text())
    assert found["times"].keys() == {"0.0005", "0.7"}
    for blocks in found["times"].values():
        assert blocks.keys() == {"1", "2", "3", "4"}
        assert all(np.isfinite(block["norm"]) for block in blocks.values())


def test_figures_while_training_and_afterwards(whole: Path, tmp_path: Path) -> None:
    """By ancestral steps unless told otherwise."""
    config = dit("none", whole)
    assert config.evaluate_solver == "ddpm"
    assert small_config("none", whole).evaluate_solver == "euler"
    for changes, field in (
        ({"evaluate_every": 2, "evaluate_solver": "heun"}, "evaluate_solver"),
        ({"evaluate_every": 2, "evaluate_steps": 2000}, "evaluate_steps"),
        ({"preview_every": 2, "preview_steps": 2000}, "preview_steps"),
    ):
        (problem,) = check(dit("none", whole, **changes)).problems
        assert problem.field == field
        assert problem.remedy
    assert check(dit("none", whole, evaluate_solver="heun")).problems == []


@pytest.mark.parametrize(
    ("model", "changes"), [(MODEL, {"objective": "flow"}), ("SiT-T/2", {"objective": "ddpm"})]
)
def test_backbone_and_objective_must_fit(whole: Path, model: str, changes: dict[str, Any]) -> None:
    (problem,) = check(small_config("none", whole, model=model, **changes)).problems
    assert problem.field == "objective"
    assert problem.remedy


def test_what_needs_more_than_noise_is_refused(whole: Path) -> None:
    problems = check(dit("reg", whole)).problems
    assert {problem.field for problem in problems} == {"objective", "--model"}
    with pytest.raises(RepaError) as caught:
        dit("none", whole, objective__path="cosine")
    assert caught.value.field == "objective.path"


def test_two_times_an_image(whole: Path, run_fit: Callable[..., Any], tmp_path: Path) -> None:
    """SRA's groups of tokens, each at a step of its own; nobody has published it for DiT."""
    run_fit(dit("sra", whole, max_steps=2, method__preset="dts_as"))
    first = rows_of(tmp_path / "run")[0]
    assert (first["sra_weight"], first["mse"]) == (0.5, pytest.approx(1, abs=0.2))


def test_another_backbone_does_not_go_on(whole: Path, run_fit: Callable[..., Any]) -> None:
    run_fit(dit("none", whole, max_steps=1))
    with pytest.raises(RepaError):
        run_fit(small_config("none", whole, max_steps=2))


def test_a_dry_run_says_what_is_predicted(whole: Path, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(dit("none", whole).to_yaml())
    printed = io.StringIO()
    flags = TrainFlags(config=tmp_path / "config.yaml", run=tmp_path / "run", dry_run=True)
    train(flags, console=Console(file=printed, width=300))
    (line,) = [each for each in printed.getvalue().splitlines() if each.startswith("objective: ")]
    assert "ddpm" in line
    assert "ddim" in line
    assert not (tmp_path / "run").exists()
