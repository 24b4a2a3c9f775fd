"""The training step: the loss written out, draws as a function of (seed, rank, step), EMA, phases."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from repa.data.format.columns import MOMENTS
from repa.trainer import compiling
from repa.trainer.methods import METHODS
from repa.trainer.methods.base import Flags, Method, MethodConfig, Phase, Step, Term
from repa.trainer.models.capture import Capture
from repa.trainer.models.conditioning import LabelConditioner
from repa.trainer.objectives.flow import Flow, FlowConfig
from repa.trainer.run.assembly import assemble
from repa.trainer.run.checks import check
from repa.trainer.run.identity import identity_of
from repa.trainer.run.lightning_trainer import make_trainer, quiet_lightning
from repa.trainer.run.metrics import read_metrics
from repa.trainer.step.draws import StepDraws
from repa.trainer.step.randomness import derived_seed, generator_for

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from repa.trainer.config import TrainConfig
    from repa.trainer.input.datamodule import CacheData
    from repa.trainer.step.module import TrainingModule

    Settings = Callable[..., TrainConfig]


def build_run(config: TrainConfig) -> tuple[TrainingModule, CacheData]:
    checked = check(config)
    assert checked.problems == []
    return assemble(config, checked, identity_of(checked, config))


class Watch(Callback):
    """Copies of the weights and of the means after every step."""

    def __init__(self) -> None:
        self.weights: list[dict[str, torch.Tensor]] = []
        self.means: list[dict[str, float]] = []
        self.columns: list[tuple[str, ...]] = []

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch.micro == pl_module.config.accumulate - 1:
            self.weights.append({key: value.clone() for key, value in pl_module.state_dict().items()})
            self.means.append(pl_module.take_means())
            self.columns.append(tuple(batch.columns))


def train(config: TrainConfig, *callbacks: Callback) -> tuple[Watch, TrainingModule]:
    module, data = build_run(config)
    watch = Watch()
    with quiet_lightning():
        make_trainer(config, callbacks=[watch, *callbacks]).fit(module, datamodule=data)
    return watch, module


def of(weights: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}


def test_loss_written_out(settings: Settings) -> None:
    """Step 0 by hand: own draws, own interpolation, own cosine."""
    config = settings(seed=3, method__weight=0.25, max_steps=1)
    module, data = build_run(config)
    watch, _ = train(config)
    data.trainer = make_trainer(config)
    batch = next(iter(data.train_dataloader()))
    data.teardown("fit")
    streams = {
        name: generator_for(3, name, 0, 0, device="cpu") for name in ("posterior", "noise", "time", "drop")
    }
    posterior, noise = (torch.randn(8, 4, 4, 4, generator=streams[name]) for name in ("posterior", "noise"))
    t = torch.rand(8, generator=streams["time"])
    labels = torch.where(torch.rand(8, generator=streams["drop"]) < 0.1, 3, batch.label)
    mean, std = batch.columns[MOMENTS].chunk(2, dim=1)
    x0 = (mean + std * posterior) * 0.18215
    x_t = (1 - t.view(8, 1, 1, 1)) * x0 + t.view(8, 1, 1, 1) * noise
    with torch.no_grad():
        student = module.backbone(x_t, t, labels, Capture(hidden=(1,)))
        projected = module.method.projectors[0](student.hidden[1])
    velocity = (student.prediction - (noise - x0)).square().mean()
    cosine = torch.nn.functional.cosine_similarity(projected, batch.columns["demo/patch"].float(), dim=-1)
    found = watch.means[0]
    assert found["velocity"] == pytest.approx(velocity.item(), rel=1e-5)
    assert found["repa"] == pytest.approx(-cosine.mean().item(), rel=1e-5)
    assert found["repa_weight"] == 0.25
    assert found["loss"] == pytest.approx(found["velocity"] + 0.25 * found["repa"], rel=1e-6)


def test_one_batch_of_eight_is_two_of_four(settings: Settings) -> None:
    once, _ = train(settings(accumulate=1))
    twice, _ = train(settings(accumulate=2))
    assert len(once.means) == len(twice.means) == 4
    for first, second in zip(once.means, twice.means, strict=True):
        assert first == pytest.approx(second, rel=2e-5)
    for key, value in once.weights[-1].items():
        torch.testing.assert_close(twice.weights[-1][key], value, rtol=0, atol=2e-6)


def test_draws_are_sliced_not_drawn_again() -> None:
    def draws(rank: int = 0, seed: int = 0, step: int = 0) -> Any:
        made = StepDraws(seed=seed, rank=rank, device=torch.device("cpu"))
        times, conditioner = Flow(FlowConfig()).times, LabelConditioner(3, 4)
        return made.of_step(step, 8, (2, 3, 3), times, conditioner, own=own)

    def own(count: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        return {"offset": torch.rand(count, 2, generator=generator)}

    whole = draws()
    parts = [whole.micro_batch(index, 2).own["offset"] for index in range(4)]
    assert torch.equal(torch.cat(parts), whole.own["offset"])
    assert torch.equal(whole.own["offset"], draws().own["offset"])
    assert not torch.equal(whole.own["offset"], draws(step=1).own["offset"])
    for name in ("posterior", "noise", "t", "dropped"):
        parts = [getattr(whole.micro_batch(index, 2), name) for index in range(4)]
        assert torch.equal(torch.cat(parts), getattr(whole, name))
        assert torch.equal(getattr(whole, name), getattr(draws(), name))
    for other in (draws(rank=1), draws(seed=1), draws(step=1)):
        assert not torch.equal(other.noise, whole.noise)
        assert not torch.equal(other.t, whole.t)
    assert not torch.equal(whole.noise, whole.posterior)


def test_streams_do_not_shift_each_other() -> None:
    """Another law of time, or no label dropout, leaves the noise as it was."""

    def draws(times: str, drop: float) -> Any:
        made = StepDraws(seed=0, rank=0, device=torch.device("cpu"))
        return made.of_step(
            5, 4, (2, 3, 3), Flow(FlowConfig(times=times)).times, LabelConditioner(3, 4, drop)
        )

    first, second = draws("uniform", 0.1), draws("lognormal", 0.0)
    assert torch.equal(first.noise, second.noise)
    assert not torch.equal(first.t, second.t)


def test_derived_seeds() -> None:
    """Golden: a changed hash would change every run."""
    assert derived_seed(0, "noise", 0, 0) == 7507748294902743722
    assert derived_seed(0, "a", 1, 12) != derived_seed(0, "a", 11, 2)


def test_ema_is_the_closed_form(settings: Settings) -> None:
    """EMA_k = d^k·w_0 + (1 − d)·Σ d^(k−i)·w_i: every step, from a hard copy of the initial weights."""
    decay = 0.9
    config = settings(ema_decay=decay, lr=1e-2, max_steps=5)
    initial = {key: value.clone() for key, value in build_run(config)[0].backbone.state_dict().items()}
    watch, _ = train(config)
    for k in (1, 2, 5):
        for key, start in initial.items():
            expected = decay**k * start.double()
            for i in range(1, k + 1):
                expected += (1 - decay) * decay ** (k - i) * watch.weights[i - 1][f"backbone.{key}"].double()
            torch.testing.assert_close(
                watch.weights[k - 1][f"ema.{key}"].double(), expected, rtol=1e-5, atol=1e-6
            )
    moved = watch.weights[-1]["backbone.blocks.0.attn.qkv.weight"] - initial["blocks.0.attn.qkv.weight"]
    assert moved.abs().max() > 1e-3


def test_ema_once_a_step_under_accumulation(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    from repa.trainer.step.module import TrainingModule

    original = TrainingModule.update_ema
    monkeypatch.setattr(TrainingModule, "update_ema", lambda self: (calls.append(1), original(self))[1])
    train(settings(accumulate=4, max_steps=3))
    assert len(calls) == 3


def test_initial_backbone_does_not_depend_on_the_method(settings: Settings) -> None:
    first = build_run(settings(method="repa"))[0].backbone.state_dict()
    second = build_run(settings(method="none"))[0].backbone.state_dict()
    other = build_run(settings(method="none", seed=1))[0].backbone.state_dict()
    assert all(torch.equal(value, second[key]) for key, value in first.items())
    assert not all(torch.equal(value, other[key]) for key, value in first.items())


class Gradients(Callback):
    """The norm of the gradient at the end of a batch, and whether there is one when the network is called."""

    def __init__(self) -> None:
        self.norms: list[float] = []
        self.there: list[bool] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        parameters = list(pl_module.backbone.parameters())
        pl_module.backbone.register_forward_pre_hook(
            lambda *_: self.there.append(any(each.grad is not None for each in parameters))
        )

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        gradients = [each.grad for each in pl_module.parameters() if each.grad is not None]
        self.norms.append(torch.nn.utils.get_total_norm(gradients).item())


def test_gradient_is_clipped_and_its_norm_recorded(settings: Settings) -> None:
    def run(clip: float | None) -> tuple[float, float]:
        gradients = Gradients()
        watch, _ = train(settings(clip=clip, max_steps=1), gradients)
        return watch.means[0]["gradient_norm"], gradients.norms[0]

    recorded, left = run(None)
    assert recorded == left > 0.1
    assert run(1e-3) == (recorded, pytest.approx(1e-3, rel=1e-4))
    assert run(10 * recorded) == (recorded, recorded)


def test_no_gradient_lies_there_while_the_first_forward_pass_of_a_step_computes(settings: Settings) -> None:
    gradients = Gradients()
    train(settings(accumulate=2, max_steps=2), gradients)
    assert gradients.there == [False, True, False, True]


def test_bf16_keeps_weights_and_losses_in_float32(settings: Settings) -> None:
    exact, _ = train(settings(max_steps=2))
    mixed, module = train(settings(max_steps=2, precision="bf16-mixed"))
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}
    assert mixed.means[0]["loss"] == pytest.approx(exact.means[0]["loss"], rel=2e-2)
    assert mixed.means[0]["loss"] != exact.means[0]["loss"]


def test_compile_changes_no_key_and_no_loss(
    settings: Settings, run_fit: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the ``eager`` backend: what dynamo captures, without waiting for a compiler."""
    monkeypatch.setattr(compiling, "BACKEND", "eager")
    run_fit(settings(compile="whole"), "compiled")
    run_fit(settings(), "plain")
    rows = [read_metrics(tmp_path / name / "metrics.csv") for name in ("compiled", "plain")]
    for first, second in zip(*rows, strict=True):
        assert first == pytest.approx(second, rel=1e-5)
    states = [
        torch.load(tmp_path / name / "checkpoints" / "step-00000004.ckpt", weights_only=True)["state_dict"]
        for name in ("compiled", "plain")
    ]
    assert states[0].keys() == states[1].keys()


@dataclass(frozen=True, kw_only=True)
class PhasedConfig(MethodConfig):
    """Where the phases change."""

    warm: int = 2
    align: int = 4


class Phased(Method):
    """Alignment without velocity, then both, then velocity alone: every kind of phase in three steps each."""

    config_class = PhasedConfig

    def __init__(self, config: Any, backbone: Any, columns: Any, grids: Any, notes: Any) -> None:
        super().__init__(config, backbone, columns, grids, notes)
        self.head = torch.nn.Linear(backbone.width, 16)

    def phases(self) -> tuple[Phase, ...]:
        return (
            Phase(name="warm", stop=self.config.warm),
            Phase(name="align", start=self.config.warm, stop=self.config.align),
            Phase(name="free", start=self.config.align),
        )

    def columns(self, phase: Phase) -> tuple[str, ...]:
        return () if phase.name == "free" else ("demo/patch",)

    def capture(self, phase: Phase) -> Capture:
        if phase.name == "free":
            return Capture()
        return Capture(hidden=(1,), stop_after=1 if phase.name == "warm" else None)

    def flags(self, phase: Phase) -> Flags:
        idle = {
            "warm": ("backbone.blocks.1.", "backbone.final_layer."),
            "align": (),
            "free": ("method.",),
        }
        return Flags(
            objective_loss=phase.name != "warm",
            fresh_start=phase.name == "align",
            ema_forward=phase.name == "align",
            idle=idle[phase.name],
        )

    def losses(self, step: Step) -> dict[str, Term]:
        if "demo/patch" not in step.columns:
            assert step.ema_forward is None
            return {}
        distance = (self.head(step.student.hidden[1]) - step.columns["demo/patch"].float()).square().mean()
        terms = {"distance": Term(value=distance, weight=0.5)}
        if step.ema_forward is not None:
            teacher = step.ema_forward(step.interpolate(step.t), step.t, Capture(hidden=(2,), stop_after=2))
            assert teacher.prediction is None
            assert not teacher.hidden[2].requires_grad
            terms["self"] = Term(
                value=(step.student.hidden[1] - teacher.hidden[2]).square().mean(), weight=0.1
            )
        return terms


@pytest.fixture
def phased(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "phased", Phased)  # type: ignore[misc]


@pytest.mark.usefixtures("phased")
def test_phases_change_terms_columns_and_what_trains(settings: Settings) -> None:
    config = settings(method="phased", max_steps=7, lr=1e-2)
    initial = build_run(config)[0].state_dict()
    watch, _ = train(config)
    assert [sorted(set(means) - {"loss", "gradient_norm"}) for means in watch.means] == [
        ["distance", "distance_weight"],
        ["distance", "distance_weight"],
        ["distance", "distance_weight", "self", "self_weight", "velocity"],
        ["distance", "distance_weight", "self", "self_weight", "velocity"],
        ["velocity"],
        ["velocity"],
        ["velocity"],
    ]
    assert watch.columns[:4] == [(MOMENTS, "demo/patch")] * 4
    assert watch.columns[4:] == [(MOMENTS,)] * 3
    output, first_block, head = (
        "backbone.final_layer.linear.weight",
        "backbone.blocks.0.attn.qkv.weight",
        "method.head.weight",
    )
    # idle parameters stay to the bit, momentum or not
    assert torch.equal(watch.weights[1][output], initial[output])
    assert not torch.equal(watch.weights[2][output], initial[output])
    assert not torch.equal(watch.weights[1][head], initial[head])
    assert torch.equal(watch.weights[6][head], watch.weights[3][head])
    assert not torch.equal(watch.weights[6][first_block], watch.weights[3][first_block])


@pytest.mark.usefixtures("phased")
def test_fresh_start_averages_from_a_hard_copy(settings: Settings) -> None:
    decay = 0.75
    watch, _ = train(settings(method="phased", max_steps=3, lr=1e-2, ema_decay=decay))
    before, after = watch.weights[1], watch.weights[2]
    key = "blocks.0.mlp.fc1.weight"
    expected = decay * before[f"backbone.{key}"] + (1 - decay) * after[f"backbone.{key}"]
    torch.testing.assert_close(after[f"ema.{key}"], expected)
    # Adam's first step has length lr whatever the gradient: the moments of the phase before are gone
    step = (after[f"backbone.{key}"] - before[f"backbone.{key}"]).abs()
    assert step.median().item() == pytest.approx(1e-2, rel=1e-3)
