"""The manifold term beside the cosine of REPA, iREPA and HASTE, through one setting."""

from __future__ import annotations

import math

import pytest
import torch
from method_steps import GRIDS, facts_of, make_step, student_of
from repa.data.errors import RepaError
from repa.data.format.columns import ColumnSpec
from repa.trainer.config import build
from repa.trainer.methods.irepa import Irepa, IrepaConfig
from repa.trainer.methods.repa import PatchAlignment, Repa, RepaConfig

SPECS = {
    "a/patch": ColumnSpec(shape=(16, 24), dtype="float32"),
    "b/patch": ColumnSpec(shape=(16, 12), dtype="float32"),
}


def draw(*shape: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def method_of(kind: str, **settings: object) -> PatchAlignment:
    torch.manual_seed(0)
    given = {"depth": 2, "encoders": ("a", "b"), **settings}
    if kind == "repa":
        config = RepaConfig(**given, projector_width=8)  # type: ignore[arg-type]
        return Repa(config, facts_of(), SPECS, GRIDS).double()
    return Irepa(IrepaConfig(**given), facts_of(), SPECS, GRIDS).double()  # type: ignore[arg-type]


def cosine(first: list[float], second: list[float]) -> float:
    dot = math.fsum(a * b for a, b in zip(first, second, strict=True))
    return dot / math.sqrt(math.fsum(a * a for a in first) * math.fsum(b * b for b in second))


@pytest.mark.parametrize("kind", ["repa", "irepa"])
def test_the_term_is_the_loop_over_teachers_images_and_pairs_of_tokens(kind: str) -> None:
    columns = {"a/patch": draw(2, 16, 24, seed=1), "b/patch": draw(2, 16, 12, seed=2)}
    hidden = draw(2, 16, 32, seed=3).requires_grad_()
    step = make_step(columns, student_of(hidden))
    plain = method_of(kind, weight=0.25).losses(step)
    method = method_of(kind, weight=0.25, relations=3.0)
    terms = method.losses(step)
    assert list(plain) == ["repa"]
    assert list(terms) == ["repa", "relations"]
    assert torch.equal(terms["repa"].value, plain["repa"].value)
    assert terms["relations"].weight == 0.75
    total = []
    for project, name in zip(method.projectors, columns, strict=True):
        student, teacher = project(hidden).tolist(), method.make_target(columns[name]).tolist()
        total += [
            (cosine(student[image][i], student[image][j]) - cosine(teacher[image][i], teacher[image][j])) ** 2
            for image in range(2)
            for i in range(16)
            for j in range(16)
        ]
    assert terms["relations"].value.item() == pytest.approx(math.fsum(total) / len(total), abs=1e-12)
    terms["relations"].value.backward()
    assert hidden.grad is not None
    assert (hidden.grad.abs().amax(-1) > 0).all()


def test_it_is_zero_where_the_tokens_are_the_targets_turned() -> None:
    method = method_of("repa", encoders=("a",), relations=1.0)
    rotation = torch.linalg.qr(draw(24, 24, seed=4)).Q
    hidden = torch.nn.functional.pad(draw(2, 16, 24, seed=5), (0, 8))
    method.projectors[0] = torch.nn.Linear(32, 24, bias=False).double()
    with torch.no_grad():
        method.projectors[0].weight.copy_(torch.nn.functional.pad(rotation, (0, 8)))
    terms = method.losses(make_step({"a/patch": hidden[..., :24]}, student_of(hidden)))
    assert terms["relations"].value.item() == pytest.approx(0, abs=1e-24)
    assert terms["repa"].value.item() > -0.9


def test_it_ends_with_the_alignment() -> None:
    method = method_of("repa", relations=3.0, stop=4)
    assert method.losses(make_step({}, student_of(draw(1, 16, 32, seed=0)), index=4)) == {}


@pytest.mark.parametrize("name", ["repa", "irepa", "haste"])
def test_the_setting(name: str) -> None:
    assert build(flags={"method": name}).method.relations is None  # type: ignore[attr-defined]
    chosen = build(flags={"method": name}, assignments=["method.relations=3"]).method
    assert chosen.relations == 3.0  # type: ignore[attr-defined]
    with pytest.raises(RepaError) as caught:
        build(flags={"method": name}, assignments=["method.relations=-1"])
    assert caught.value.field == "method.relations"
