"""The gradient angle: its value by hand, and that looking changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from repa.trainer import compiling
from repa.trainer.config import TrainConfig
from repa.trainer.methods import METHODS
from repa.trainer.methods.base import Method, MethodConfig, Step, Term
from repa.trainer.models.capture import Capture
from repa.trainer.run.assembly import assemble
from repa.trainer.run.checks import check
from repa.trainer.run.gradient_angle import gradient_angle
from repa.trainer.run.identity import identity_of
from repa.trainer.run.lightning_trainer import make_trainer, quiet_lightning
from repa.trainer.run.metrics import read_metrics
from repa.trainer.step.draws import StepDraws
from repa.trainer.step.module import TrainingModule
from repa.trainer.step.randomness import derived_seed
from torch import Tensor

Settings = Callable[..., TrainConfig]
Fit = Callable[..., Any]


class Before(Callback):
    """Calls a function before each step, where the module measures."""

    def __init__(self, look: Callable[[TrainingModule, Any], None]) -> None:
        self._look = look

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._look(pl_module, batch)


def train(config: TrainConfig, look: Callable[[TrainingModule, Any], None]) -> TrainingModule:
    checked = check(config)
    assert checked.problems == []
    module, data = assemble(config, checked, identity_of(checked, config))
    with quiet_lightning():
        make_trainer(config, callbacks=[Before(look)]).fit(module, datamodule=data)
    return module


def by_hand(module: TrainingModule, batch: Any, block: int) -> float:
    """With `Tensor.backward` on the parameters' own gradients, and the flow written out."""
    seed = derived_seed(0, "gradient_angle")
    draws = StepDraws(seed=seed, rank=0, device=torch.device("cpu")).of_step(
        batch.step, 8, (4, 4, 4), module.objective.times, module.backbone.y_embedder
    )
    mean, std = batch.columns["sd-vae/moments"].chunk(2, dim=1)
    x0 = (mean + std * draws.posterior) * 0.18215
    labels = torch.where(draws.dropped, 3, batch.label)
    capture = module.method.capture(module.method.phase_at(batch.step))
    parameters = list(module.backbone.blocks[block - 1].parameters())
    cosines = []
    for time in (0.02, 0.1, 0.5, 0.8):
        vectors = []
        for velocity in (True, False):
            module.zero_grad()
            t = torch.full((8,), time)
            student = module.backbone((1 - time) * x0 + time * draws.noise, t, labels, capture)
            if velocity:
                loss = (student.prediction - (draws.noise - x0)).square().mean()
            else:
                step = Step(
                    index=batch.step,
                    columns=batch.columns,
                    x0=x0,
                    noise=draws.noise,
                    t=t,
                    condition=labels,
                    student=student,
                    interpolate=lambda times: times,
                    generator=torch.Generator(),
                )
                terms = module.method.losses(step)
                loss = sum(0.5 * terms[name].value for name in ("repa", "attention"))
            loss.backward()
            grads = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters]
            vectors.append(torch.cat([grad.flatten().double() for grad in grads]))
        cosines.append(torch.nn.functional.cosine_similarity(*vectors, dim=0))
    module.zero_grad()
    return torch.stack(cosines).mean().item()


@pytest.mark.parametrize(("chosen", "block"), [(None, 2), (1, 1)])
def test_the_angle_by_hand(haste: Settings, run_fit: Fit, tmp_path: Path, chosen: Any, block: int) -> None:
    """By default of the last block that alignment reaches: the tap is 1, attention is captured of 1 and 2."""
    expected: dict[int, float] = {}

    def look(module: TrainingModule, batch: Any) -> None:
        expected[batch.step + 1] = by_hand(module, batch, block)

    changes = {"max_steps": 3, "lr": 1e-2, "gradient_angle_block": chosen}
    train(haste(**changes), look)
    run_fit(haste(**changes, gradient_angle_every=1))
    rows = read_metrics(tmp_path / "run" / "metrics.csv")
    found = {int(row["step"]): row["gradient_angle"] for row in rows}
    assert found == pytest.approx(expected, abs=1e-6)
    # the output begins at zero and hides the blocks from the velocity loss
    assert found[1] == 0
    assert 1e-3 < abs(found[3]) < 1


@pytest.mark.parametrize("accumulate", [1, 2])
def test_looking_changes_nothing(
    haste: Settings, run_fit: Fit, tmp_path: Path, same_run: Callable[..., None], accumulate: int
) -> None:
    config = haste(accumulate=accumulate, max_steps=8)
    run_fit(config, "without")
    run_fit(haste(accumulate=accumulate, max_steps=8, gradient_angle_every=2), "with")
    places = [tmp_path / name / "metrics.csv" for name in ("without", "with")]
    rows = [read_metrics(place) for place in places]
    # at step 6 the last aligned step is done, from then on there is nothing to compare
    assert [row["step"] for row in rows[1] if "gradient_angle" in row] == [2, 4, 6]
    for row in rows[1]:
        row.pop("gradient_angle", None)
    assert rows[0] == rows[1]
    places[1].write_bytes(places[0].read_bytes())
    same_run(tmp_path / "without", tmp_path / "with", 8)


def test_nothing_is_left_behind(haste: Settings) -> None:
    """Gradients are those of the step before, at first none; the global generator has not moved."""
    seen = []

    def look(module: TrainingModule, batch: Any) -> None:
        state = torch.get_rng_state()
        before = [None if each.grad is None else each.grad.clone() for each in module.parameters()]
        seen.append(gradient_angle(module, batch))
        assert torch.equal(torch.get_rng_state(), state)
        for parameter, grad in zip(module.parameters(), before, strict=True):
            assert (parameter.grad is None) == (grad is None)
            assert grad is None or (batch.step > 0 and torch.equal(parameter.grad, grad))

    train(haste(max_steps=7), look)
    assert [angle is None for angle in seen] == [False] * 6 + [True]
    assert not any(angle.requires_grad for angle in seen[:6])


def test_compiled(haste: Settings, run_fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With ahead-of-time autograd, whose graphs can be walked back once; no graph more than without."""
    graphs: list[int] = []

    def count(graph: Any, inputs: Any) -> Any:
        graphs.append(1)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    torch._dynamo.reset()
    monkeypatch.setattr(compiling, "BACKEND", count)
    run_fit(haste(max_steps=4, compile="blocks", gradient_angle_every=2), "compiled")
    aligned = list(graphs)
    torch._dynamo.reset()
    graphs.clear()
    run_fit(haste(max_steps=4, compile="blocks"), "without")
    assert aligned == graphs
    run_fit(haste(max_steps=4, gradient_angle_every=2), "plain")
    rows = [read_metrics(tmp_path / name / "metrics.csv") for name in ("compiled", "plain")]
    for first, second in zip(*rows, strict=True):
        assert first == pytest.approx(second, rel=1e-4, abs=1e-6)


def test_mixed_precision(haste: Settings, run_fit: Fit, tmp_path: Path) -> None:
    for precision in ("32-true", "bf16-mixed"):
        run_fit(haste(max_steps=3, lr=1e-2, gradient_angle_every=3, precision=precision), precision)
    exact, mixed = (
        read_metrics(tmp_path / name / "metrics.csv")[2]["gradient_angle"]
        for name in ("32-true", "bf16-mixed")
    )
    assert mixed == pytest.approx(exact, abs=0.05)
    assert mixed != exact


def test_repa_has_an_angle_and_plain_sit_has_none(settings: Settings, run_fit: Fit, tmp_path: Path) -> None:
    run_fit(settings(max_steps=2, gradient_angle_every=1), "repa")
    run_fit(settings(max_steps=2, gradient_angle_every=1, method="none"), "none")
    rows = [read_metrics(tmp_path / name / "metrics.csv")[1] for name in ("repa", "none")]
    assert ["gradient_angle" in row for row in rows] == [True, False]


class Parallel(Method):
    """Its term is the velocity loss itself, its weight what the seed says: the angle is 0 or π."""

    def capture(self, phase: Any) -> Capture:
        return Capture(hidden=(1,))

    def losses(self, step: Step) -> dict[str, Term]:
        assert step.student.prediction is not None
        value: Tensor = (step.student.prediction - (step.noise - step.x0)).square().mean()
        return {"same": Term(value=value, weight=self.config.weight)}


class ParallelConfig(MethodConfig):
    weight = 0.5


class OppositeConfig(MethodConfig):
    weight = -0.25


@pytest.mark.parametrize(("config", "cosine"), [(ParallelConfig, 1), (OppositeConfig, -1)])
def test_parallel_and_opposite(
    settings: Settings,
    run_fit: Fit,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    config: Any,
    cosine: int,
) -> None:
    monkeypatch.setitem(METHODS, "parallel", type("Chosen", (Parallel,), {"config_class": config}))  # type: ignore[misc]
    run_fit(settings(method="parallel", max_steps=3, lr=1e-2, gradient_angle_every=1))
    row = read_metrics(tmp_path / "run" / "metrics.csv")[2]
    assert row["gradient_angle"] == pytest.approx(cosine, abs=1e-6)


class WithTarget(Parallel):
    """As `Parallel`, and a heavier term that is the objective's and no alignment."""

    target_terms = frozenset({"target"})
    config_class = OppositeConfig

    def losses(self, step: Step) -> dict[str, Term]:
        terms = super().losses(step)
        return {**terms, "target": Term(value=terms["same"].value, weight=2.0)}


def test_a_term_of_the_target_counts_with_the_objective(
    settings: Settings, run_fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(METHODS, "parallel", WithTarget)
    run_fit(settings(method="parallel", max_steps=2, lr=1e-2, gradient_angle_every=2))
    row = read_metrics(tmp_path / "run" / "metrics.csv")[1]
    assert row["gradient_angle"] == pytest.approx(-1, abs=1e-6)
    assert METHODS["gmem"].target_terms == {"cosine"}


@pytest.mark.parametrize("block", [0, 2, -1])
def test_a_block_that_alignment_does_not_reach(settings: Settings, block: int) -> None:
    (problem,) = check(settings(gradient_angle_every=5, gradient_angle_block=block)).problems
    assert problem.what == f"gradient_angle_block is {block}, alignment reaches blocks 1 to 1"
    assert "set a block from 1 to 1" in problem.remedy
    assert check(settings(gradient_angle_block=block)).problems == []


def test_it_may_change_on_resume(
    haste: Settings, run_fit: Fit, tmp_path: Path, same_run: Callable[..., None]
) -> None:
    run_fit(haste(max_steps=4), "run")
    run_fit(haste(max_steps=8, gradient_angle_every=3), "run")
    steps = [row["step"] for row in read_metrics(tmp_path / "run" / "metrics.csv") if "gradient_angle" in row]
    assert steps == [6]
