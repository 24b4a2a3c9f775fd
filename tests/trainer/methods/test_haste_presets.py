"""What HASTE is set to when nobody says, and what it says when it cannot be done."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from repa.data.format.columns import ColumnSpec
from repa.trainer.methods.base import Method
from repa.trainer.methods.haste import PRESETS, Haste, HasteConfig, preset_of
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
    large = SiTConfig.named("SiT-XL/2", input_size=64).facts
    assert preset_of(large) == replace(PRESETS["XL"], stop=300_000)
    assert preset_of(SiTConfig.named("SiT-XL/2", input_size=32).facts) == PRESETS["XL"]
    assert preset_of(SiTConfig.named("SiT-B/2", input_size=64).facts) == PRESETS["B"]
    assert preset_of(SiTConfig.named("SiT-S/2", input_size=32).facts) is None


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
    assert method.depth == preset.depth
    assert method.capture(method.phase_at(0)) == Capture(
        hidden=(preset.depth,), attention=preset.student_blocks
    )
    assert method.teacher_blocks == preset.teacher_blocks
    assert method.phase_at(preset.stop - 1).name == "align"
    assert method.phase_at(preset.stop).name == "plain"
    set_by_hand = preset_method(size, depth=2, student_blocks=(1,), teacher_blocks=(9,), stop=7)
    assert set_by_hand.problems() == []
    assert set_by_hand.capture(set_by_hand.phase_at(6)) == Capture(hidden=(2,), attention=(1,))
    assert set_by_hand.phase_at(7).name == "plain"


def the_problem(method: Method) -> tuple[str, str]:
    (problem,) = method.problems()
    assert "\n" not in problem.what + problem.remedy
    return problem.what, problem.remedy


def test_no_preset() -> None:
    what, remedy = the_problem(make_small())
    assert "no preset for SiT-S (it has for T, B, L, XL)" in what
    assert "method.depth, method.student_blocks, method.teacher_blocks, method.stop not set" in what
    for name in ("depth", "student_blocks", "teacher_blocks", "stop"):
        assert f"--set method.{name}=" in remedy
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
    what, remedy = the_problem(method)
    assert f"method.stop is {stop}" in what
    assert "--method none" in remedy
    assert method.phase_at(0).name == "plain"


def test_problem_no_attention_targets() -> None:
    columns = {name: spec for name, spec in specs_of().items() if name not in ("a/q", "a/k")}
    method = make(columns=columns)
    what, remedy = the_problem(method)
    assert what == "the cache has no attention targets of a (a/q, a/k)"
    assert "`repa preprocess --encoder a --attention 6,3`" in remedy
    # so that the plan shows what is missing
    assert method.columns(method.phase_at(0)) == ("a/patch", "a/q", "a/k")


def test_problem_no_teacher_at_all() -> None:
    what, _ = the_problem(make(columns=MOMENTS))
    assert "no teacher with a patch column" in what


def test_problem_blocks_that_are_not_stored() -> None:
    what, remedy = the_problem(make(teacher_blocks=(6, 4)))
    assert what == "the cache has the attention of blocks 3, 5, 6 of a, not of 4"
    assert "--set method.teacher_blocks=" in remedy
    assert "--attention 6,4" in remedy


def test_problem_a_preset_for_a_teacher_of_another_depth() -> None:
    """Blocks 8, 10, 12 of 24 are there, and are not what the paper aligned with."""
    what, remedy = the_problem(preset_method("B", teacher_depth=24))
    assert what == "dinov2-b has 24 blocks, the preset of SiT-B is for a teacher of 12"
    assert "8, 9, 10, 11, 12 with `--set method.teacher_blocks=" in remedy
    assert preset_method("B", teacher_depth=24, teacher_blocks=(8, 10, 12)).problems() == []


def test_problem_counts_differ() -> None:
    what, remedy = the_problem(make(student_blocks=(1, 2, 3)))
    assert what == "method.student_blocks has 3 blocks (1, 2, 3), method.teacher_blocks 2 (6, 3)"
    assert "paired" in remedy


def test_problem_student_blocks_outside_the_backbone() -> None:
    what, _ = the_problem(make(student_blocks=(0, 5)))
    assert what == "method.student_blocks names 0, 5, the backbone has blocks 1 to 4"


def test_problem_fewer_heads_than_the_teacher() -> None:
    what, remedy = the_problem(make(columns=specs_of(heads=6)))
    assert what == "a has 6 attention heads, the backbone 4: each of the teacher's needs one"
    assert "at least 6 heads" in remedy


def test_problem_another_grid() -> None:
    facts = SiTConfig.named("SiT-B/4", input_size=8).facts
    what, remedy = the_problem(make(backbone=facts))
    assert what == "a/patch has a 4×4 grid, the backbone 2×2 tokens"
    assert remedy == "use --model SiT-B/2"


def test_problem_attention_of_another_grid_than_the_tokens() -> None:
    shape = (3, HEADS, 9, RANK)
    columns = specs_of() | {name: ColumnSpec(shape=shape, dtype="float32") for name in ("a/q", "a/k")}
    what, _ = the_problem(make(columns=columns, grids=GRIDS | {"a+attention": (3, 3)}))
    assert what == "a/q has a 3×3 grid, the backbone 4×4 tokens"
    what, remedy = the_problem(make(columns=columns))
    assert what == "a/q has 9 tokens a row, its grid 4×4 has 16"
    assert "write a+attention again" in remedy


@pytest.mark.parametrize("lost", ["blocks", "logit_scale", None])
def test_problem_a_manifest_that_does_not_say_what_is_stored(lost: str | None) -> None:
    noted = {key: value for key, value in NOTES["a+attention"].items() if key != lost}
    if lost is None:
        noted["blocks"] = [3, 5]
    what, remedy = the_problem(make(notes={"a+attention": noted}))
    assert "which blocks and logits a/q and a/k hold" in what
    assert "write a+attention again" in remedy


def test_problems_are_collected() -> None:
    method = make(encoders=("x", "a"), depth=9, student_blocks=(7,), teacher_blocks=(1, 2), stop=0)
    whats = [problem.what for problem in method.problems()]
    assert len(whats) == 6
    assert any("no column x/patch" in what for what in whats)
    assert any("no attention targets of x" in what for what in whats)


def test_several_teachers_the_first_gives_the_attention() -> None:
    columns = specs_of() | {"b/patch": ColumnSpec(shape=(TOKENS, 10), dtype="float32")}
    grids = GRIDS | {"b": (4, 4)}
    what, _ = the_problem(make(columns=columns, grids=grids))
    assert "2 teachers (a, b) and none was chosen" in what
    method = make(columns=columns, grids=grids, encoders=("a", "b"))
    assert method.problems() == []
    assert method.columns(method.phase_at(0)) == ("a/patch", "b/patch", "a/q", "a/k")
    what, _ = the_problem(make(columns=columns, grids=grids, encoders=("b", "a")))
    assert "no attention targets of b" in what
