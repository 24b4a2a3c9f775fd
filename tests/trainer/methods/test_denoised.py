"""The eighth question, what is denoised beside the latent, with a vector that no paper knows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from repa.trainer.config import TrainConfig
from repa.trainer.input.datamodule import CacheData
from repa.trainer.methods import METHODS
from repa.trainer.methods.base import Denoised, Flags, Method, Phase, Step, Term
from repa.trainer.models.capture import Capture
from repa.trainer.models.conditioning import LabelConditioner
from repa.trainer.models.sit import SiT, SiTConfig
from repa.trainer.objectives.flow import Flow, FlowConfig
from repa.trainer.run.assembly import assemble
from repa.trainer.run.checks import check
from repa.trainer.run.identity import identity_of
from repa.trainer.run.lightning_trainer import make_trainer
from repa.trainer.step.draws import StepDraws
from repa.trainer.step.module import TrainingModule
from repa.trainer.step.randomness import generator_for

Settings = Callable[..., TrainConfig]

WIDTH = 16


class Mood(Method):
    """Denoises the class token under another name, and looks at the averaged weights' view of it."""

    def denoised(self) -> tuple[Denoised, ...]:
        return (Denoised(name="mood", column="demo/cls", width=WIDTH, weight=0.25),)

    def capture(self, phase: Phase) -> Capture:
        del phase
        return Capture(hidden=(1,), attention=(1,))

    def flags(self, phase: Phase) -> Flags:
        del phase
        return Flags(ema_forward=True)

    def losses(self, step: Step) -> dict[str, Term]:
        assert step.ema_forward is not None
        averaged = step.ema_forward(step.interpolate(step.t), step.t, Capture(hidden=(1,)))
        distance = (averaged.leading[1] - step.student.leading[1].detach()).square().mean()
        return {
            "spread": Term(value=step.beside["mood"].x0.std(), weight=None),
            "apart": Term(value=distance, weight=None),
        }


@pytest.fixture(autouse=True)
def _mood(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "mood", Mood)  # type: ignore[misc]


def build_run(config: TrainConfig) -> tuple[TrainingModule, CacheData]:
    checked = check(config)
    assert checked.problems == []
    return assemble(config, checked, identity_of(checked, config))


def first_batch(config: TrainConfig) -> tuple[TrainingModule, Any]:
    module, data = build_run(config)
    data.trainer = make_trainer(config)
    batch = next(iter(data.train_dataloader()))
    data.teardown("fit")
    return module, batch


def test_its_loss_written_out(settings: Settings) -> None:
    module, batch = first_batch(settings(method="mood", seed=3))
    with torch.no_grad():
        for parameter in module.backbone.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    terms = module.terms(batch)
    t = torch.rand(8, generator=generator_for(3, "time", 0, 0))
    noise = torch.randn(8, WIDTH, generator=generator_for(3, "noise of mood", 0, 0))
    values = batch.columns["demo/cls"].float()
    noisy = (1 - t[:, None]) * values + t[:, None] * noise
    labels = torch.where(torch.rand(8, generator=generator_for(3, "drop", 0, 0)) < 0.1, 3, batch.label)
    latent_noise = torch.randn(8, 4, 4, 4, generator=generator_for(3, "noise", 0, 0))
    posterior = torch.randn(8, 4, 4, 4, generator=generator_for(3, "posterior", 0, 0))
    mean, std = batch.columns["sd-vae/moments"].chunk(2, dim=1)
    x0 = (mean + std * posterior) * 0.18215
    x_t = (1 - t.view(8, 1, 1, 1)) * x0 + t.view(8, 1, 1, 1) * latent_noise
    student = module.backbone(x_t, t, labels, Capture(), (noisy,))
    assert terms["mood_velocity"].weight == 0.25
    expected = (student.tokens[0] - (noise - values)).square().mean()
    torch.testing.assert_close(terms["mood_velocity"].value, expected, rtol=1e-5, atol=0)
    expected = (student.prediction - (latent_noise - x0)).square().mean()
    torch.testing.assert_close(terms["velocity"].value, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(terms["spread"].value, values.std())
    assert terms["apart"].value > 0  # the averaged weights were not moved
    assert module.objective_terms == {"velocity", "mood_velocity"}


def test_no_other_method_notices(settings: Settings) -> None:
    """Shared weights, the batch and every draw of the latent are those of `none`."""
    (plain, first), (mood, second) = (first_batch(settings(method=name)) for name in ("none", "mood"))
    assert torch.equal(first.rows, second.rows)
    assert set(second.columns) - set(first.columns) == {"demo/cls"}
    shared = plain.backbone.state_dict()
    found = mood.backbone.state_dict()
    assert set(found) - set(shared) == {
        *(f"{layer}.{kind}" for layer in ("cls_projectors2", "wg_norm") for kind in ("weight", "bias")),
        *(f"final_layer.linear_cls.{kind}" for kind in ("weight", "bias")),
    }
    for name, value in shared.items():
        if name != "pos_embed":
            assert torch.equal(found[name], value), name
    assert torch.equal(found["pos_embed"][:, 1:], shared["pos_embed"])
    assert not found["pos_embed"][:, 0].any()
    before = plain.terms(first)["velocity"]
    # at the start the output is zero, so that the loss of the latent is that of its noise alone
    assert torch.equal(mood.terms(second)["velocity"].value, before.value)


def test_its_noise_is_a_stream_of_its_own() -> None:
    def draws(**beside: int) -> Any:
        made = StepDraws(seed=0, rank=0, device=torch.device("cpu"))
        times = Flow(FlowConfig()).times
        return made.of_step(3, 8, (2, 3, 3), times, LabelConditioner(3, 4), beside)

    plain, one, two = draws(), draws(mood=5), draws(mood=5, other=5)
    assert plain.beside == {}
    for name in ("posterior", "noise", "t", "dropped"):
        assert torch.equal(getattr(plain, name), getattr(two, name))
    assert torch.equal(one.beside["mood"], two.beside["mood"])
    assert not torch.equal(two.beside["mood"], two.beside["other"])
    parts = [one.micro_batch(index, 2).beside["mood"] for index in range(4)]
    assert torch.equal(torch.cat(parts), one.beside["mood"])


def test_a_network_without_it_refuses(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SiTConfig, "most_tokens", 0)
    (problem,) = check(settings(method="mood")).problems
    assert problem.field == "--model"


def test_taps_keep_the_grid() -> None:
    config = SiTConfig(
        depth=2, width=8, heads=2, patch_size=2, input_size=8, num_classes=3, token_widths=(5,)
    )
    torch.manual_seed(0)
    network = SiT(config)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x, t, y, token = torch.randn(2, 4, 8, 8), torch.rand(2), torch.tensor([0, 3]), torch.randn(2, 5)
    captured = network(x, t, y, Capture(hidden=(1, 2), attention=(2,)), (token,))
    assert captured.tokens[0].shape == (2, 5)
    for block in (1, 2):
        assert captured.hidden[block].shape == (2, 16, 8)
        assert captured.leading[block].shape == (2, 1, 8)
        assert captured.grids[block] == (4, 4)
    assert captured.queries[2].shape == captured.keys[2].shape == (2, 2, 16, 4)
    # it is seen by the patches, and sees them
    other = network(x, t, y, Capture(hidden=(1,)), (token + 1,))
    assert not torch.allclose(other.hidden[1], captured.hidden[1])
    other = network(x + 1, t, y, Capture(hidden=(1,)), (token,))
    assert not torch.allclose(other.tokens[0], captured.tokens[0])
    stopped = network(x, t, y, Capture(hidden=(1,), stop_after=1), (token,))
    assert (stopped.prediction, stopped.tokens) == (None, ())
    for wrong in ((), (torch.randn(2, 6),), (token, token)):
        with pytest.raises(ValueError, match="channels"):
            network(x, t, y, Capture(), wrong)
