"""What HASTE is set to when nobody says, and what it says when it cannot be done."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from repa.data.format.columns import ColumnSpec
from repa.trainer.methods.base import Method
from repa.trainer.methods.haste import PRESETS, Haste, HasteConfig
from repa.trainer.models.capture import Capture
from repa.trainer.models.sit import SIT_SIZES, SiTConfig
from small_haste import GRIDS, HEADS, MOMENTS, NOTES, RANK, TOKENS, make, specs_of


def test_presets_are_the_papers() -> None:
    assert set(PRESETS) == {"T", "B", "L", "XL"}
    published = {
        "B": (5, (3, 4, 5), (8, 10, 12), 100_000),
        "L": (8, (5, 6, 7, 8), (9, 10, 11, 12), 250_000),
        "XL": (8, (5, 6, 7, 8), (9, 10, 11, 12), 250_000),
    }
    for size, values in published.items():
        preset = PRESETS[size]
        assert (preset.depth, preset.student_blocks, preset.teacher_blocks, preset.stop) == values
        assert preset.teacher_depth == 12
    for size, preset in PRESETS.items():
        assert len(preset.student_blocks) == len(preset.teacher_blocks)
        assert max(preset.student_blocks) <= SIT_SIZES[size].depth
        assert max(preset.teacher_blocks) <= preset.teacher_depth
    assert Haste.preset_of(SiTConfig.named("SiT-S/2", input_size=32).facts) is None


def test_at_512_the_largest_stops_later() -> None:
    """It is the cache's images that are of 512 pixels a side; so many tokens may be of others."""
    large = replace(SiTConfig.named("SiT-XL/2", input_size=64).facts, resolution=512)
    assert Haste.preset_of(large) == replace(PRESETS["XL"], stop=300_000)
    coarse = replace(SiTConfig.named("SiT-XL/1", input_size=16).facts, resolution=512)
    assert Haste.preset_of(coarse) == Haste.preset_of(large)
    fine = replace(SiTConfig.named("SiT-XL/1", input_size=32).facts, resolution=256)
    assert fine.grid == large.grid
    assert Haste.preset_of(fine) == PRESETS["XL"] == Haste.preset_of(replace(fine, resolution=None))
    base = replace(SiTConfig.named("SiT-B/2", input_size=64).facts, resolution=512)
    assert Haste.preset_of(base) == PRESETS["B"]


def preset_method(size: str, teacher_depth: int = 12, **settings: Any) -> Haste:
    """A method with nothing set, on a cache that has what the preset of SiT-B asks of DINOv2-B."""
    facts = SiTConfig.named(f"SiT-{size}/2", input_size=32).facts
    shape = (5, 12, 256, 64)
    columns = MOMENTS | {
        "dinov2-b/patch": ColumnSpec(shape=(256, 768), dtype="float16"),
        "dinov2-b/q": ColumnSpec(shape=shape, dtype="float16"),
        "dinov2-b/k": ColumnSpec(shape=shape, dtype="float16"),
    }
    grids = {"sd-vae": (32, 32), "dinov2-b": (16, 16), "dinov2-b+attention": (16, 16)}
    noted = {"blocks": [8, 9, 10, 11, 12], "logit_scale": 0.125, "depth": teacher_depth}
    notes = {"dinov2-b+attention": noted}
    with torch.device("meta"):
        return Haste(HasteConfig(**settings), facts, columns, grids, notes)


@pytest.mark.parametrize("size", ["B", "L", "XL"])
def test_presets_fill_what_is_not_set(size: str) -> None:
    method, preset = preset_method(size), PRESETS[size]
    assert method.problems() == []
    assert method.config.depth == preset.depth
    assert method.capture(method.phase_at(0)) == Capture(
        hidden=(preset.depth,), attention=preset.student_blocks
    )
    assert method.config.teacher_blocks == preset.teacher_blocks
    assert method.phase_at(preset.stop - 1).name == "align"
    assert method.phase_at(preset.stop).name == "plain"
    set_by_hand = preset_method(size, depth=2, student_blocks=(1,), teacher_blocks=(9,), stop=7)
    assert set_by_hand.problems() == []
    assert set_by_hand.capture(set_by_hand.phase_at(6)) == Capture(hidden=(2,), attention=(1,))
    assert set_by_hand.phase_at(7).name == "plain"


def the_problem(method: Method, field: str) -> str:
    """The remedy of the only problem, which is about that setting or column."""
    (problem,) = method.problems()
    assert problem.field == field
    assert problem.what
    assert "\n" not in problem.what + problem.remedy
    return problem.remedy


def test_no_preset() -> None:
    remedy = the_problem(make_small(), "method.depth")
    # the settings of SiT-B, whose blocks a SiT-S has too
    for setting in ("depth=5", "student_blocks=[3,4,5]", "teacher_blocks=[8,10,12]", "stop=100000"):
        assert f"--set method.{setting}" in remedy
    method = make_small(depth=4, student_blocks=(2, 4), teacher_blocks=(3, 6), stop=5)
    assert method.problems() == []
    assert len(make_small(depth=4, stop=5).problems()) == 1


def make_small(**settings: Any) -> Haste:
    """SiT-S, of six heads, on the small cache."""
    facts = SiTConfig.named("SiT-S/2", input_size=8).facts
    return Haste(HasteConfig(projector_width=8, **settings), facts, specs_of(), GRIDS, NOTES)


@pytest.mark.parametrize("stop", [0, -3])
def test_problem_stop_before_the_first_step(stop: int) -> None:
    method = make(stop=stop)
    assert "--method none" in the_problem(method, "method.stop")
    assert method.phase_at(0).name == "plain"


def test_problem_no_attention_targets() -> None:
    columns = {name: spec for name, spec in specs_of().items() if name not in ("a/q", "a/k")}
    method = make(columns=columns)
    remedy = the_problem(method, "a/q")
    assert "`repa preprocess --encoder a --attention 6,3`" in remedy
    # so that the plan shows what is missing
    assert method.columns(method.phase_at(0)) == ("a/patch", "a/q", "a/k")


def test_problem_no_teacher_at_all() -> None:
    the_problem(make(columns=MOMENTS), "method.encoders")


def test_problem_blocks_that_are_not_stored() -> None:
    remedy = the_problem(make(teacher_blocks=(6, 4)), "method.teacher_blocks")
    assert "--set method.teacher_blocks=" in remedy
    assert "--attention 6,4" in remedy


def test_problem_a_preset_for_a_teacher_of_another_depth() -> None:
    """Blocks 8, 10, 12 of 24 are there, and are not what the paper aligned with."""
    remedy = the_problem(preset_method("B", teacher_depth=24), "method.teacher_blocks")
    assert "8, 9, 10, 11, 12 with `--set method.teacher_blocks=" in remedy
    assert preset_method("B", teacher_depth=24, teacher_blocks=(8, 10, 12)).problems() == []


def test_problem_counts_differ() -> None:
    assert "paired" in the_problem(make(student_blocks=(1, 2, 3)), "method.student_blocks")


def test_problem_student_blocks_outside_the_backbone() -> None:
    assert "from 1 to 4" in the_problem(make(student_blocks=(0, 5)), "method.student_blocks")


def test_problem_fewer_heads_than_the_teacher() -> None:
    remedy = the_problem(make(columns=specs_of(heads=6)), "a/q")
    assert "at least 6 heads" in remedy


def test_problem_another_grid() -> None:
    facts = SiTConfig.named("SiT-B/4", input_size=8).facts
    assert "--model SiT-B/2" in the_problem(make(backbone=facts), "a/patch")


def test_problem_attention_of_another_grid_than_the_tokens() -> None:
    shape = (3, HEADS, 9, RANK)
    columns = specs_of() | {name: ColumnSpec(shape=shape, dtype="float32") for name in ("a/q", "a/k")}
    the_problem(make(columns=columns, grids=GRIDS | {"a+attention": (3, 3)}), "a/q")
    remedy = the_problem(make(columns=columns), "a/q")
    assert "write a+attention again" in remedy


@pytest.mark.parametrize("lost", ["blocks", "logit_scale", None])
def test_problem_a_manifest_that_does_not_say_what_is_stored(lost: str | None) -> None:
    noted = {key: value for key, value in NOTES["a+attention"].items() if key != lost}
    if lost is None:
        noted["blocks"] = [3, 5]
    remedy = the_problem(make(notes={"a+attention": noted}), "a/q")
    assert "write a+attention again" in remedy


def test_problems_are_collected() -> None:
    method = make(encoders=("x", "a"), depth=9, student_blocks=(7,), teacher_blocks=(1, 2), stop=0)
    assert [problem.field for problem in method.problems()] == [
        "method.encoders",
        "method.stop",
        "method.depth",
        "method.student_blocks",
        "method.student_blocks",
        "x/q",
    ]


def test_several_teachers_the_first_gives_the_attention() -> None:
    columns = specs_of() | {"b/patch": ColumnSpec(shape=(TOKENS, 10), dtype="float32")}
    grids = GRIDS | {"b": (4, 4)}
    the_problem(make(columns=columns, grids=grids), "method.encoders")
    method = make(columns=columns, grids=grids, encoders=("a", "b"))
    assert method.problems() == []
    assert method.columns(method.phase_at(0)) == ("a/patch", "b/patch", "a/q", "a/k")
    the_problem(make(columns=columns, grids=grids, encoders=("b", "a")), "b/q")
