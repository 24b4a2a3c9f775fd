"""What a method may need, on methods that need nothing else."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from repa.data.format.columns import AUTOENCODER, ColumnSpec
from repa.trainer.methods.base import Method, MethodConfig, Problem, Requirement, Step, Term, filled
from repa.trainer.methods.requirements import (
    AlignsFirst,
    DepthWithin,
    GridDivides,
    HasPreset,
    NeedsColumn,
    Paired,
    SameGrid,
)
from repa.trainer.models.capture import BackboneFacts, BlockFacts

FACTS = BackboneFacts(depth=6, width=32, heads=4, grid=(4, 4), patch_size=2, size_name="B")
SPECS = {
    f"{name}/{kind}": ColumnSpec(shape=shape, dtype="float16")
    for name, kind, shape in (
        ("a", "patch", (16, 8)),
        ("a", "cls", (8,)),
        ("b", "patch", (16, 8)),
        ("d", "cls", (8,)),
    )
}


@dataclass(frozen=True, kw_only=True)
class Settings(MethodConfig):
    """Of the methods here."""

    encoders: tuple[str, ...] = ()
    depth: int | None = None
    blocks: tuple[int, ...] = ()
    others: tuple[int, ...] = ()
    stop: int | None = None


def problems_of(
    *needs: Requirement,
    presets: dict[str, Settings] | None = None,
    notes: dict[str, Any] | None = None,
    **settings: Any,
) -> list[Problem]:
    class Bare(Method):
        config_class = Settings
        requires = needs

        def losses(self, step: Step) -> dict[str, Term]:
            return {}

    Bare.presets = presets or {}
    return Bare(Settings(**settings), FACTS, SPECS, {}, notes).problems()


@pytest.mark.parametrize(
    ("mirrored", "into"), [(None, "this"), ("no", "this"), ("second view", "this"), ("at random", "other")]
)
def test_a_teacher_is_added_where_the_cache_takes_one(mirrored: str | None, into: str) -> None:
    """Imported images that were mirrored at random fit no image, and `repa preprocess` refuses them."""
    notes = {AUTOENCODER: {} if mirrored is None else {"foreign": {"mirrored": mirrored}}}
    [named] = problems_of(NeedsColumn("patch"), encoders=("c",), notes=notes)
    [unnamed] = problems_of(NeedsColumn("states"), notes=notes)
    for problem in (named, unnamed):
        assert problem.field == "method.encoders"
        assert "repa preprocess --encoder" in problem.remedy
        assert ("--cache" in problem.remedy) == (into == "other")


def fields_of(*needs: Requirement, **settings: Any) -> list[str]:
    return [problem.field for problem in problems_of(*needs, **settings)]


def test_nothing_is_needed_by_default() -> None:
    assert problems_of() == []


@pytest.mark.parametrize(
    ("asked", "missing"),
    [
        ((), 0),  # a alone has both columns
        (("a",), 0),
        (("b",), 1),
        (("b", "d"), 2),
        (("x",), 2),
        (("a", "a"), 1),
    ],
)
def test_a_teacher_needs_all_the_columns(asked: tuple[str, ...], missing: int) -> None:
    assert fields_of(NeedsColumn("patch", "cls"), encoders=asked) == ["method.encoders"] * missing


def test_several_teachers_and_none() -> None:
    (problem,) = problems_of(NeedsColumn("patch"))
    assert "encoders=[a]" in problem.remedy
    (problem,) = problems_of(NeedsColumn("moments"))
    assert "repa preprocess" in problem.remedy


def test_presets_fill_what_nobody_set() -> None:
    preset = Settings(depth=2, blocks=(1, 2), stop=9, encoders=("b",))
    assert filled(Settings(), preset) == preset
    assert filled(Settings(depth=5, stop=0), preset) == Settings(
        depth=5, blocks=(1, 2), stop=0, encoders=("b",)
    )
    assert filled(Settings(depth=5), None) == Settings(depth=5)

    @dataclass(frozen=True, kw_only=True)
    class More(Settings):
        extra: int | None = None

    @dataclass(frozen=True, kw_only=True)
    class Set(MethodConfig):
        extra: float | None = 3.0

    # None is what somebody said, where the default is a value
    assert filled(Set(extra=None), Set()) == Set(extra=None)

    # the table of the method that it extends does not know the new setting
    assert filled(More(), preset) == More(depth=2, blocks=(1, 2), stop=9, encoders=("b",))


@pytest.mark.parametrize("size", ["B", "L", None])
def test_what_nobody_set_is_reported_together(size: str | None) -> None:
    needs = HasPreset("depth", "blocks", "stop")
    presets = {} if size is None else {size: Settings(depth=2, blocks=(1, 2))}
    (problem,) = problems_of(needs, presets=presets)
    assert problem.field == ("method.stop" if size == "B" else "method.depth")
    assert problem.remedy.count("--set method.") == (1 if size == "B" else 3)
    assert problems_of(needs, presets=presets, depth=1, blocks=(3,), stop=4) == []


@pytest.mark.parametrize(
    ("settings", "wrong"),
    [
        ({}, []),
        ({"depth": 6, "blocks": (1, 6)}, []),
        ({"depth": 0}, ["method.depth"]),
        ({"depth": 7, "blocks": (-1, 3)}, ["method.depth", "method.blocks"]),
        ({"blocks": (1, 10**12)}, ["method.blocks"]),
    ],
)
def test_blocks_that_there_are(settings: dict[str, Any], wrong: list[str]) -> None:
    assert fields_of(DepthWithin("depth", "blocks"), **settings) == wrong


def test_pairs_and_the_first_step() -> None:
    assert fields_of(Paired("blocks", "others"), blocks=(1,), others=(2, 3)) == ["method.blocks"]
    assert fields_of(Paired("blocks", "others"), blocks=(1,), others=(2,)) == []
    assert fields_of(Paired("blocks", "others"), blocks=(1,)) == []
    assert [fields_of(AlignsFirst("stop"), stop=stop) for stop in (None, 1, 0)] == [[], [], ["method.stop"]]


def test_a_problem_is_reported_once() -> None:
    assert fields_of(DepthWithin("depth"), DepthWithin("depth", "blocks"), depth=9) == ["method.depth"]


def grid_problems(need: SameGrid, teacher: tuple[int, int], *blocks: int) -> list[Problem]:
    """Of blocks of a U-shape whose two stages have 4×4 and 2×2 tokens."""
    outer, inner = (BlockFacts(width=32, heads=4, grid=(side, side)) for side in (4, 2))
    stages = (outer, outer, inner, inner, outer, outer)
    facts = replace(FACTS, blocks=stages, siblings=(((8, 8), "other"), ((2, 2), "third")))

    class Tapped(Method):
        config_class = Settings
        requires = (need,)

        def columns(self, phase: Any) -> tuple[str, ...]:
            return ("a/patch",)

        def losses(self, step: Step) -> dict[str, Term]:
            return {}

    specs = {"a/patch": ColumnSpec(shape=(teacher[0] * teacher[1], 8), dtype="float16")}
    return Tapped(Settings(blocks=blocks), facts, specs, {"a": teacher}).problems()


def test_grids_that_differ_from_block_to_block() -> None:
    need = SameGrid(patch="blocks")
    assert grid_problems(need, (4, 4), 1, 5) == []
    assert grid_problems(need, (2, 2), 3, 4) == []
    (problem,) = grid_problems(need, (4, 4), 2, 3, 4)
    assert problem.field == "a/patch"
    assert "2×2 tokens in block 3, 4" in problem.what
    assert "1-2, 5-6" in problem.remedy
    assert "method.blocks" in problem.remedy
    (problem,) = grid_problems(need, (2, 2), 1)
    assert "3-4" in problem.remedy
    (problem,) = grid_problems(need, (8, 8), 1)
    assert "other" in problem.remedy


def test_a_grid_that_is_a_whole_multiple() -> None:
    need = GridDivides(patch="blocks")
    for teacher, blocks in (((4, 4), (1, 3)), ((8, 8), (1, 3)), ((2, 2), (3,)), ((6, 6), (3,))):
        assert grid_problems(need, teacher, *blocks) == [], (teacher, blocks)
    for teacher, block, remedy in (((2, 2), 1, "3-4"), ((6, 6), 1, "3-4"), ((4, 8), 1, "whose grid is 4×4")):
        (problem,) = grid_problems(need, teacher, block)
        assert problem.field == "a/patch"
        assert remedy in problem.remedy


@given(*[st.integers(1, 20)] * 4)
def test_whole_multiples(rows: int, columns: int, tall: int, wide: int) -> None:
    fits = GridDivides(patch="blocks").fits((tall, wide), (rows, columns))
    assert fits == any((tall, wide) == (n * rows, n * columns) for n in range(1, 21))
