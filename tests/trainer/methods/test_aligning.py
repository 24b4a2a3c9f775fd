"""The end of alignment, one mechanism: what a method answers before τ, at it and after."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import pytest
import torch
from repa.trainer.methods.aligning import ALIGN, PLAIN, Aligning, AligningConfig
from repa.trainer.methods.base import Flags, Phase, Step, Term
from repa.trainer.methods.requirements import AlignsFirst
from repa.trainer.models.capture import NOTHING, BackboneFacts, Capture, Captured
from torch import nn

if TYPE_CHECKING:
    from repa.trainer.methods.base import Requirement

FACTS = BackboneFacts(depth=4, width=8, heads=2, grid=(2, 2), patch_size=2)


class Pulled(Aligning):
    requires: ClassVar[tuple[Requirement, ...]] = (AlignsFirst("stop"),)

    def aligned_columns(self) -> tuple[str, ...]:
        return ("a/patch",)

    def aligned_capture(self) -> Capture:
        return Capture(hidden=(2,))

    def aligned_losses(self, step: Step) -> dict[str, Term]:
        return {"pulled": Term(value=step.x0.mean(), weight=1.0)}

    def aligned_flags(self) -> Flags:
        return Flags(ema_forward=True)


class Lasting(Pulled):
    """A part of it goes on after the alignment."""

    idle_after = ("method.head",)

    def __init__(self, config: AligningConfig) -> None:
        super().__init__(config, FACTS, {}, {})
        self.head = nn.Linear(2, 2)

    def columns(self, phase: Phase) -> tuple[str, ...]:
        return (*super().columns(phase), "a/cls")


def step_at(index: int) -> Step:
    blank = torch.zeros(1)
    return Step(
        index=index,
        columns={},
        x0=blank,
        noise=blank,
        t=blank,
        condition=blank,
        student=Captured(prediction=None),
        interpolate=lambda t: t,
        generator=torch.Generator(),
    )


def test_never() -> None:
    method = Pulled(AligningConfig(), FACTS, {}, {})
    assert method.phases() == (Phase(name=ALIGN),)
    assert method.problems() == []
    assert set(method.losses(step_at(10**9))) == {"pulled"}


@pytest.mark.parametrize("stop", [1, 7])
def test_nothing_is_asked_from_the_stop_on(stop: int) -> None:
    method = Pulled(AligningConfig(stop=stop), FACTS, {}, {})
    align, plain = method.phases()
    assert (align, plain) == (Phase(name=ALIGN, stop=stop), Phase(name=PLAIN, start=stop))
    assert method.phase_at(stop - 1) == align
    assert method.phase_at(stop) == plain
    assert (method.columns(align), method.columns(plain)) == (("a/patch",), ())
    assert (method.capture(align), method.capture(plain)) == (Capture(hidden=(2,)), NOTHING)
    assert (method.flags(align), method.flags(plain)) == (Flags(ema_forward=True), Flags(idle=("method.",)))
    assert set(method.losses(step_at(stop - 1))) == {"pulled"}
    assert method.losses(step_at(stop)) == {}


def test_what_lasts_is_added() -> None:
    method = Lasting(AligningConfig(stop=3))
    align, plain = method.phases()
    assert method.columns(align) == ("a/patch", "a/cls")
    assert method.columns(plain) == ("a/cls",)
    assert method.flags(plain) == Flags(idle=("method.head",))


@pytest.mark.parametrize("stop", [0, -2])
def test_a_stop_before_the_first_step_is_refused(stop: int) -> None:
    method = Pulled(AligningConfig(stop=stop), FACTS, {}, {})
    (problem,) = method.problems()
    assert problem.field == "method.stop"
    assert method.phases()[0].stop == 0
