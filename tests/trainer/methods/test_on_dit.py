"""Methods on DiT: golden numbers of SRA and REPA, SRA's whole steps and presets, what needs a velocity."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import small_dit as small
import torch
from repa.data.format.columns import ColumnSpec
from repa.trainer.config import build
from repa.trainer.methods.base import Step
from repa.trainer.methods.haste import Haste, HasteConfig
from repa.trainer.methods.repa import Repa, RepaConfig
from repa.trainer.methods.sra import LOSSES, Sra, SraConfig
from repa.trainer.models.dit import DiTConfig
from repa.trainer.models.timesteps import step_of, time_of
from repa.trainer.objectives.ddpm import Ddpm, DdpmConfig
from torch.testing import assert_close

if TYPE_CHECKING:
    from pathlib import Path

    from repa.trainer.methods.base import Method
    from repa.trainer.models.capture import Capture, Captured

OBJECTIVE = Ddpm(DdpmConfig())


@pytest.fixture(scope="module")
def reference(shared: Path) -> small.Reference:
    return small.load(shared)


def step_of_method(
    reference: small.Reference, method: Method, columns: dict[str, torch.Tensor] | None = None
) -> tuple[Step, torch.Tensor, list[torch.Tensor]]:
    """A step with the reference's draws, its objective's loss per sample, and the teacher's times."""
    numbers = reference.numbers
    noised = OBJECTIVE.noised(numbers["x0"], numbers["noise"], time_of(numbers["t"].double()))
    student = reference.student(noised.x_t, noised.t, numbers["y"], method.capture(method.phase_at(0)))
    taught: list[torch.Tensor] = []

    def teach(x: torch.Tensor, t: torch.Tensor, capture: Capture) -> Captured:
        taught.append(t)
        captured: Captured = reference.teacher(x, t, numbers["y"], capture)
        return captured

    step = Step(
        index=0,
        columns=columns or {},
        x0=noised.x0,
        noise=noised.noise,
        t=noised.t,
        condition=numbers["y"],
        student=student,
        interpolate=lambda t: OBJECTIVE.interpolate(noised.x0, noised.noise, t),
        generator=torch.Generator(),
        draws={"offset": numbers["sra_k"].double() / 1000},
        ema_forward=teach,
    )
    losses = OBJECTIVE.losses(student, noised)
    return step, losses["mse"] + losses["vb"], taught


def small_sra(reference: small.Reference, preset: str = "paper") -> Sra:
    config = SraConfig(student_block=2, teacher_block=5, **LOSSES[preset])
    method = Sra(config, DiTConfig.named("DiT-B/2", input_size=32).facts, {}, {})
    # of the preset of B the weight, and the head of the small network
    weight = method.config.weight
    method = Sra(SraConfig(**{**vars(config), "weight": weight}), small.CONFIG.facts, {}, {}).double()
    head = {key: value for key, value in reference.heads.items() if key.startswith("ap_head.")}
    method.load_state_dict(head)
    return method


def test_golden_sra(reference: small.Reference) -> None:
    numbers, method = reference.numbers, small_sra(reference)
    step, loss, taught = step_of_method(reference, method)
    assert_close(method.ap_head(step.student.hidden[2]), numbers["sra_head"], **small.TOLERANCE)
    terms = method.losses(step)
    assert torch.equal(step_of(taught[0]), numbers["sra_teacher_t"])
    assert_close(terms["sra"].value, numbers["sra_sml1"], **small.TOLERANCE)
    assert terms["sra"].weight == 0.04
    total = loss.mean() + terms["sra"].weight * terms["sra"].value
    assert_close(total, numbers["sra_total"], rtol=1e-12, atol=1e-9)
    weights = [method.ap_head.linear1.weight, reference.student.blocks[0].attn.proj.weight]
    for found, part in zip(torch.autograd.grad(total, weights), ("head", "proj"), strict=True):
        assert_close(found, numbers[f"sra_grad_{part}"], rtol=1e-9, atol=1e-9)
    assert_close(1 - terms["sra_cosine_token"].value, numbers["sra_cos_token"], **small.TOLERANCE)
    assert_close(1 - terms["sra_cosine_channel"].value, numbers["sra_cos_channel"], **small.TOLERANCE)


@pytest.mark.parametrize(("preset", "name"), [("released", "token"), ("channel", "channel")])
def test_golden_cosines_of_sra(reference: small.Reference, preset: str, name: str) -> None:
    method = small_sra(reference, preset)
    step, _, _ = step_of_method(reference, method)
    terms = method.losses(step)
    assert_close(terms["sra"].value, reference.numbers[f"sra_cos_{name}"], **small.TOLERANCE)
    assert terms["sra"].weight == 0.5


def test_golden_repa(reference: small.Reference) -> None:
    numbers = reference.numbers
    columns = {"teacher/patch": ColumnSpec(shape=(64, 24), dtype="float32")}
    config = RepaConfig(depth=2, projector_width=40)
    method = Repa(config, small.CONFIG.facts, columns, {"teacher": (8, 8)}).double()
    heads = {key: value for key, value in reference.heads.items() if key.startswith("projectors.")}
    method.load_state_dict(heads)
    assert method.problems() == []
    step, _, _ = step_of_method(reference, method, {"teacher/patch": numbers["repa_z"]})
    assert_close(method.projectors[0](step.student.hidden[2]), numbers["repa_proj"], **small.TOLERANCE)
    assert_close(method.losses(step)["repa"].value, numbers["repa_loss"], **small.TOLERANCE)


@pytest.mark.parametrize(("size", "blocks"), [("B", (3, 7)), ("L", (6, 14)), ("XL", (8, 16)), ("T", (2, 4))])
def test_blocks_and_weight_of_sra_by_size(size: str, blocks: tuple[int, int]) -> None:
    facts = DiTConfig.named(f"DiT-{size}/2", input_size=32).facts
    config = Sra(SraConfig(), facts, {}, {}).config
    assert (config.student_block, config.teacher_block, config.weight) == (*blocks, 0.04)
    assert blocks[1] <= facts.depth
    assert Sra(SraConfig(), facts, {}, {}).problems() == []
    # what somebody sets stays, and the presets of the loss bring their own weight
    assert Sra(SraConfig(weight=0.3), facts, {}, {}).config.weight == 0.3
    assert Sra(SraConfig(**LOSSES["released"]), facts, {}, {}).config.weight == 0.5
    named = build(flags={"method": "sra", "method.preset": "paper", "model": f"DiT-{size}/2"}).method
    assert Sra(named, facts, {}, {}).config.weight == 0.04


def test_sizes_without_a_preset_have_the_weight_too() -> None:
    facts = DiTConfig.named("DiT-S/2", input_size=32).facts
    method = Sra(SraConfig(student_block=3, teacher_block=8), facts, {}, {})
    assert method.config.weight == 0.04
    assert method.problems() == []
    (problem,) = Sra(SraConfig(), facts, {}, {}).problems()
    assert problem.field == "method.student_block"


def test_offsets_are_whole_steps_from_0_to_199() -> None:
    method = Sra(SraConfig(), DiTConfig.named("DiT-B/2", input_size=32).facts, {}, {})
    draws = method.draws(method.phase_at(0), 20_000, torch.Generator().manual_seed(0))["offset"]
    steps = (draws * 1000).round()
    assert_close(draws, steps / 1000)
    assert (steps.min(), steps.max(), len(steps.unique())) == (0, 199, 200)
    # exactly so many steps before, of every time that is trained at
    t = OBJECTIVE.times(20_000, torch.Generator().manual_seed(1))
    found = step_of(method._teacher_times(t, draws))
    assert torch.equal(found, (step_of(t) - steps.long()).clamp(1, 999))


def test_haste_takes_the_papers_blocks() -> None:
    config = Haste(HasteConfig(), DiTConfig.named("DiT-XL/2", input_size=32).facts, {}, {}).config
    assert (config.depth, config.stop) == (8, 250_000)
    assert (config.student_blocks, config.teacher_blocks) == ((5, 6, 7, 8), (9, 10, 11, 12))
