"""SRA: golden numbers of three generations of its loss, its weight, its gradients, what it refuses."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import small_sra as small
import torch
from repa.trainer.config import build
from repa.trainer.methods.alignment import smooth_l1
from repa.trainer.methods.sra import LOSSES, Sra, SraConfig
from repa.trainer.models.capture import BlockFacts, Capture
from repa.trainer.models.published import load_published
from repa.trainer.models.sit import SIT_SIZES, SiTConfig
from safetensors.torch import load_file
from torch.testing import assert_close

if TYPE_CHECKING:
    from pathlib import Path

DISTANCES = {"paper": ("sml1", 0.2), "released": ("cos_token", 0.5), "channel": ("cos_channel", 0.5)}


@pytest.fixture(scope="module")
def reference(shared: Path) -> small.Reference:
    return small.load(shared)


@pytest.mark.parametrize("preset", DISTANCES)
def test_golden(reference: small.Reference, preset: str) -> None:
    numbers, (name, weight) = reference.numbers, DISTANCES[preset]
    method = small.make(reference, preset=preset)
    step, velocity = small.step_of(reference, method)
    assert_close(step.student.hidden[2], numbers["tap"], **small.TOLERANCE)
    assert_close(method.ap_head(step.student.hidden[2]), numbers["head"], **small.TOLERANCE)
    assert_close(velocity, numbers["gen"], **small.TOLERANCE)
    terms = method.losses(step)
    assert terms["sra"].weight == weight
    assert_close(terms["sra"].value, numbers[name], **small.TOLERANCE)
    total = velocity.mean() + weight * terms["sra"].value
    assert_close(total, numbers[f"total_{preset}"], **small.TOLERANCE)
    gradients = torch.autograd.grad(
        total, [reference.student.blocks[0].attn.proj.weight, method.ap_head.linear1.weight]
    )
    for found, part in zip(gradients, ("proj", "head"), strict=True):
        assert_close(found, numbers[f"grad_{preset}_{part}"], **small.TOLERANCE)


def test_golden_teacher(reference: small.Reference) -> None:
    """Its time and input, and what the record holds of both sides."""
    numbers, method = reference.numbers, small.make(reference)
    step, _ = small.step_of(reference, method)
    seen = []
    forward = step.ema_forward
    assert forward is not None

    def look(x: torch.Tensor, t: torch.Tensor, capture: Capture) -> object:
        seen.append((x, t, capture, forward(x, t, capture)))
        return seen[0][-1]

    terms = method.losses(replace(step, ema_forward=look))
    ((x, t, capture, captured),) = seen
    assert_close(t, numbers["teacher_t"], **small.TOLERANCE)
    assert_close(x, numbers["teacher_x"], **small.TOLERANCE)
    assert_close(captured.hidden[5], numbers["teacher"], **small.TOLERANCE)
    assert capture == Capture(hidden=(5,), stop_after=5)
    assert captured.prediction is None
    assert_close(1 - terms["sra_cosine_channel"].value, numbers["cos_channel"], **small.TOLERANCE)
    assert_close(1 - terms["sra_cosine_token"].value, numbers["cos_token"], **small.TOLERANCE)
    assert_close(terms["sra_student_norm"].value, numbers["head"].norm(dim=-1).mean(), **small.TOLERANCE)
    assert_close(terms["sra_teacher_norm"].value, numbers["teacher"].norm(dim=-1).mean(), **small.TOLERANCE)
    logged = [term for name, term in terms.items() if name != "sra"]
    assert all(term.weight is None and not term.value.requires_grad for term in logged)


def test_the_published_names(reference: small.Reference, shared: Path, tmp_path: Path) -> None:
    """A file as the authors', with the head in both sets of weights, which samples without it."""
    states = [load_file(shared / "golden" / f"{name}.safetensors") for name in ("sra", "sra_ema")]
    torch.save({"model": states[0], "ema": states[1], "steps": 5}, tmp_path / "sra.pt")
    for weights, network in (("model", reference.student), ("ema", reference.teacher)):
        found = load_published(tmp_path / "sra.pt", weights=weights, heads=4)
        assert found.config == small.CONFIG
        for key, value in found.build().state_dict().items():
            assert torch.equal(value.double(), network.state_dict()[key])
    head = {key: value for key, value in states[1].items() if key.startswith(small.HEAD)}
    assert {f"{small.HEAD}{key}" for key in found.projectors} == head.keys()
    small.make().ap_head.load_state_dict(found.projectors)


@pytest.mark.parametrize("preset", DISTANCES)
def test_golden_cosine_path(reference: small.Reference, preset: str) -> None:
    name, _ = DISTANCES[preset]
    method = small.make(reference, preset=preset)
    step, velocity = small.step_of(reference, method, path="cosine")
    assert_close(velocity, reference.numbers["cosine_gen"], **small.TOLERANCE)
    assert_close(method.losses(step)["sra"].value, reference.numbers[f"cosine_{name}"], **small.TOLERANCE)


def test_the_teacher_gets_no_gradient_and_the_student_all_of_its_blocks(reference: small.Reference) -> None:
    method = small.make(reference, preset="channel")
    student, teacher = reference.student, reference.teacher
    step, _ = small.step_of(reference, method)
    names = [name for name, value in student.named_parameters() if value.requires_grad]
    gradients = torch.autograd.grad(
        method.losses(step)["sra"].value,
        [dict(student.named_parameters())[name] for name in names],
        allow_unused=True,
    )
    beyond = tuple(f"blocks.{index}." for index in (2, 3, 4, 5))
    for name, gradient in zip(names, gradients, strict=True):
        assert (gradient is None) == name.startswith((*beyond, "final_layer.")), name
        assert gradient is None or gradient.abs().max() > 0, name
    assert not any(value.requires_grad for value in teacher.parameters())


@pytest.mark.parametrize("preset", DISTANCES)
def test_no_loss_where_the_head_says_what_the_teacher_says(preset: str) -> None:
    """And each sample and token sends a gradient elsewhere."""
    method = small.make(preset=preset)
    tokens = torch.randn(3, 64, 48, dtype=torch.float64, requires_grad=True)
    losses = {
        "paper": smooth_l1,
        "released": lambda a, b: 1 - torch.cosine_similarity(a, b, dim=1).mean(),
        "channel": lambda a, b: 1 - torch.cosine_similarity(a, b, dim=2).mean(),
    }
    assert losses[preset](tokens, tokens.detach()).item() == pytest.approx(0, abs=1e-12)
    value = losses[preset](method.ap_head(tokens), torch.randn(3, 64, 48, dtype=torch.float64))
    (gradient,) = torch.autograd.grad(value, tokens)
    assert gradient.abs().amax(-1).min() > 0


def test_smooth_l1_by_loops_on_both_sides_of_beta() -> None:
    torch.manual_seed(0)
    tokens, targets = (0.05 * torch.randn(2, 3, 4, dtype=torch.float64) for _ in range(2))
    distances = [
        abs(a - b) for a, b in zip(tokens.flatten().tolist(), targets.flatten().tolist(), strict=True)
    ]
    assert min(distances) < 0.05 < max(distances)
    expected = math.fsum(d * d / 0.1 if d < 0.05 else d - 0.025 for d in distances) / len(distances)
    assert smooth_l1(tokens, targets).item() == pytest.approx(expected, rel=1e-12)


def test_half_precision_is_compared_in_float32() -> None:
    """400² · 48 overflows float16."""
    tokens = torch.full((2, 4, 48), 400.0, dtype=torch.float16)
    assert smooth_l1(tokens, -tokens).item() == pytest.approx(800 - 0.025)


@pytest.mark.parametrize(
    ("epoch", "weight"), [(0, 0.2), (149, 0.2), (200, 0.178), (400, 0.112), (800, 0.045)]
)
def test_the_weight_decays_as_published(epoch: int, weight: float) -> None:
    method = small.make()
    assert method.weight_at(epoch * 5004) == pytest.approx(weight, abs=5e-4)
    assert method.weight_at((epoch + 1) * 5004 - 1) == method.weight_at(epoch * 5004)


def test_the_decay_begins_earlier_at_512_and_follows_the_epochs_of_the_run() -> None:
    facts = replace(SiTConfig.named("SiT-XL/2", input_size=64).facts, resolution=512)
    method = Sra(SraConfig(epoch_steps=10), facts, {}, {})
    assert (method.config.student_block, method.config.teacher_block) == (8, 20)
    assert method.weight_at(999) == 0.2
    assert method.weight_at(1000) == pytest.approx(0.2 * 10 ** (-1 / 800))
    assert method.weight_at(8990) == pytest.approx(0.02)
    fine = replace(SiTConfig.named("SiT-XL/1", input_size=32).facts, resolution=256)
    assert fine.grid == facts.grid
    assert Sra(SraConfig(epoch_steps=10), fine, {}, {}).weight_at(1499) == 0.2


def test_other_generations_do_not_decay_and_a_user_has_the_last_word() -> None:
    assert small.make(preset="released").weight_at(10**9) == 0.5
    method = small.make(preset="paper", weight=0.1, decay_after=10**6, distance="cosine-channel")
    assert method.weight_at(800 * 5004) == 0.1
    assert method.config.distance == "cosine-channel"
    assert build(flags={"method": "sra"}).method == SraConfig(**LOSSES["paper"])
    built = build(flags={"method": "sra", "method.preset": "released", "method.weight": 0.3}).method
    assert built == SraConfig(distance="cosine-token", weight=0.3, decay_epochs=0)


@pytest.mark.parametrize(("size", "blocks"), [("B", (3, 8)), ("L", (6, 16)), ("XL", (8, 20)), ("T", (2, 4))])
def test_blocks_by_size(size: str, blocks: tuple[int, int]) -> None:
    facts = SiTConfig.named(f"SiT-{size}/2", input_size=32).facts
    method = Sra(SraConfig(), facts, {}, {})
    assert (method.config.student_block, method.config.teacher_block) == blocks
    assert blocks[1] <= SIT_SIZES[size].depth
    assert method.problems() == []
    assert method.columns(method.phase_at(0)) == ()


def test_a_size_without_preset_names_both_blocks() -> None:
    (problem,) = Sra(SraConfig(), SiTConfig.named("SiT-S/2", input_size=32).facts, {}, {}).problems()
    assert problem.field == "method.student_block"
    assert "method.teacher_block" in problem.what


def test_blocks_outside_the_backbone() -> None:
    problems = small.make(student_block=0, teacher_block=7).problems()
    assert [each.field for each in problems] == ["method.student_block", "method.teacher_block"]


@pytest.mark.parametrize(("width", "grid"), [(96, (8, 8)), (48, (4, 4))])
def test_blocks_of_other_width_or_grid_are_refused(width: int, grid: tuple[int, int]) -> None:
    same, other = BlockFacts(width=48, heads=4, grid=(8, 8)), BlockFacts(width=width, heads=4, grid=grid)
    facts = replace(small.CONFIG.facts, blocks=(same, same, other, other, same, same))
    for blocks, wrong in ({(2, 5): 0, (3, 4): 0, (2, 3): 1, (4, 6): 1}).items():
        config = SraConfig(student_block=blocks[0], teacher_block=blocks[1])
        problems = Sra(config, facts, {}, {}).problems()
        assert [each.field for each in problems] == ["method.student_block"] * wrong


def test_offsets_are_below_the_largest_and_as_many_as_images() -> None:
    method = small.make(offset=0.05)
    draws = method.draws(method.phase_at(0), 4096, torch.Generator().manual_seed(0))
    assert draws.keys() == {"offset"}
    assert draws["offset"].shape == (4096,)
    assert 0 <= draws["offset"].min() < 1e-3
    assert 0.049 < draws["offset"].max() < 0.05
