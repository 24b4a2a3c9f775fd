"""ERW against golden numbers: what each phase runs and compares, how λ falls, what passes over at step W."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from method_steps import make_step
from repa.data.format.columns import ColumnSpec
from repa.trainer.methods.alignment import cosine_similarity
from repa.trainer.methods.base import Flags, Phase
from repa.trainer.methods.erw import FULL, HALF_LIFE, WARMUP, Erw, ErwConfig
from repa.trainer.models.capture import NOTHING, Capture, Captured
from repa.trainer.models.registry import BACKBONES, build, config_of
from repa.trainer.models.sit import SiT, SiTConfig
from repa.trainer.models.sit_down import SiTDownConfig
from repa.trainer.models.text_conditioning import TextConditioner
from repa.trainer.objectives.base import squared_error
from repa.trainer.objectives.paths import interpolant
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

if TYPE_CHECKING:
    from pathlib import Path

    from repa.trainer.methods.base import Step
    from repa.trainer.models.base import Backbone
    from repa.trainer.models.capture import BackboneFacts

GOLDEN = SiTConfig(depth=5, width=48, heads=4, patch_size=2, input_size=16, num_classes=10)
DOWN = SiTDownConfig(outer=2, middle=2, width=48, heads=4, mlp_width=64, patch_size=2, input_size=16)
COLUMNS = {"a/patch": ColumnSpec(shape=(64, 24), dtype="float32")}
GRIDS = {"sd-vae": (16, 16), "a": (8, 8)}
W = 100_000


def make(facts: BackboneFacts = GOLDEN.facts, **settings: Any) -> Erw:
    values = {"warmup_depth": 2, "depth": 4, "projector_width": 40} | settings
    return Erw(ErwConfig(**values), facts, COLUMNS, GRIDS)


def released(size: str) -> Erw:
    return make(replace(GOLDEN.facts, size_name=size), **{**Erw.named_presets["released"], "warmup_steps": W})


@pytest.fixture(scope="module")
def golden(shared: Path) -> dict[str, Any]:
    with np.load(shared / "golden" / "erw.npz") as file:
        return {
            key: torch.from_numpy(file[key]) if file[key].dtype.kind in "fib" else file[key].tolist()
            for key in file
        }


def loaded(shared: Path, *, rope: bool = False) -> tuple[SiT, Erw]:
    state = {key: value.double() for key, value in load_file(shared / "golden" / "erw.safetensors").items()}
    torch.set_default_dtype(torch.float64)
    try:
        backbone, method = SiT(replace(GOLDEN, rope=rope)), make()
    finally:
        torch.set_default_dtype(torch.float32)
    backbone.load_state_dict({key: state[key] for key in state if "projector" not in key})
    method.load_state_dict({key: state[key] for key in state if "projector" in key})
    return backbone, method


@pytest.fixture
def network(shared: Path) -> tuple[SiT, Erw]:
    return loaded(shared)


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


def warmed(network: tuple[SiT, Erw], golden: dict[str, Any]) -> Captured:
    """The forward pass of a step of the warm-up, as the training step makes it."""
    backbone, method = network
    phase = method.phase_at(0)
    law = method.time_law(phase)
    assert law is not None
    t = law(len(golden["x0"]), interpolant("linear"), torch.Generator())
    x_t = interpolant("linear").interpolate(golden["x0"], golden["noise"], t)
    assert torch.equal(x_t, golden["x0"])
    captured: Captured = backbone(x_t, t, golden["y"], method.capture(phase))
    return captured


def test_golden_of_the_warmup(network: tuple[SiT, Erw], golden: dict[str, Any]) -> None:
    """The mean over the batch: each sample has a gradient, where the released code has one sample's."""
    backbone, method = network
    captured = warmed(network, golden)
    step = make_step({"a/patch": golden["z"]}, captured)
    ((projected, z),) = method.aligned_sides(step)
    close(projected, golden["warmup_projected"])
    close(cosine_similarity(projected, z).mean(1), golden["warmup_cosine_per_sample"])
    (term,) = method.compared([(projected, z)], method.weight_at(step)).values()
    close(term.value, golden["warmup_loss"])
    assert term.weight == 0.5
    (gradient,) = torch.autograd.grad(term.weight * term.value, [projected], retain_graph=True)
    close(gradient.flatten(1).norm(dim=1), golden["warmup_gradient_norms"])
    assert float(golden["warmup_gradient_norms"].min()) > 1e-3
    weight = backbone.blocks[0].attn.qkv.bias
    (gradient,) = torch.autograd.grad(term.weight * term.value, [weight])
    close(gradient, golden["warmup_gradient_qkv1"])


def test_golden_of_the_warmup_with_rotary_positions(shared: Path, golden: dict[str, Any]) -> None:
    """As wide as float32 tables lie from ours, which are the released code's there."""
    _, method = network = loaded(shared, rope=True)
    step = make_step({"a/patch": golden["z"]}, warmed(network, golden))
    ((projected, _),) = method.aligned_sides(step)
    close(projected, golden["warmup_rope_projected"], 1e-6)
    close(method.losses(step)["repa"].value, golden["warmup_rope_loss"], 1e-6)


@pytest.mark.parametrize(("rope", "key", "tolerance"), [(False, "full", 1e-9), (True, "full_rope", 1e-6)])
def test_golden_of_the_full_phase(
    rope: bool, key: str, tolerance: float, shared: Path, golden: dict[str, Any]
) -> None:
    """Block 4 by the same projector, λ of SiT-XL as released 50,000 steps after the warm-up.

    The released rotary tables are in float32; what float64 ones give is there for two of the numbers.
    """
    backbone, method = loaded(shared, rope=rope)
    exact = "64" if rope else ""
    method.config = released("XL").config
    method.backbone = replace(method.backbone, size_name="XL")
    captured = backbone(golden["x_t"], golden["t"], golden["y"], Capture(hidden=(4,)))
    close(captured.prediction, golden[f"{key}_velocity{exact}"])
    step = make_step({"a/patch": golden["z"]}, captured, index=150_000, batch_size=256)
    ((projected, _),) = method.aligned_sides(step)
    close(projected, golden[f"{key}_projected{exact}"])
    (term,) = method.losses(step).values()
    close(term.value, golden[f"{key}_loss_repa"], tolerance)
    velocity = squared_error(captured.prediction, golden["noise"] - golden["x0"])
    close(velocity, golden[f"{key}_loss_velocity"], tolerance)
    assert term.weight is not None
    close(velocity.mean() + term.weight * term.value, golden[f"{key}_loss_total_150k_XL"], tolerance)


@pytest.mark.parametrize("size", ["B", "L", "XL"])
def test_golden_of_the_weights(size: str, golden: dict[str, Any]) -> None:
    """The released code holds λ from its last step on, where no run of ours is."""
    method = released(size)
    for step, expected in zip(
        golden["weight_steps"].tolist(), golden[f"weight_{size}"].tolist(), strict=True
    ):
        if step <= golden["weight_max_steps"]:
            found = method.weight_at(weighed(index=step, batch_size=256))
            assert found == pytest.approx(expected, rel=1e-12)


def weighed(*, index: int, batch_size: int) -> Step:
    return make_step({}, Captured(prediction=None), index=index, batch_size=batch_size)


def test_the_weight_is_of_images() -> None:
    """Four times the batch has seen as many images in a quarter of the steps."""
    method = make(warmup_steps=100, half_life=1024.0)
    for images in (0, 512, 1024, 4096):
        weights = [
            method.weight_at(weighed(index=100 + images // batch, batch_size=batch)) for batch in (64, 256)
        ]
        assert weights == [pytest.approx(0.5 * 2 ** (-images / 1024))] * 2
    assert method.weight_at(weighed(index=99, batch_size=64)) == method.config.warmup_weight == 0.5
    held = make(warmup_steps=100, half_life=None, weight=0.3)
    assert [held.weight_at(weighed(index=step, batch_size=64)) for step in (100, 10**9)] == [0.3, 0.3]


def test_the_manifold_term_has_the_same_weight() -> None:
    method = make(warmup_steps=0, half_life=1024.0, relations=3.0)
    student = Captured(prediction=None, hidden={4: torch.randn(2, 64, 48)})
    step = make_step({"a/patch": torch.randn(2, 64, 24)}, student, index=4, batch_size=256)
    assert {name: term.weight for name, term in method.losses(step).items()} == {
        "repa": 0.25,
        "relations": 0.75,
    }


def test_what_passes_over(network: tuple[SiT, Erw], golden: dict[str, Any]) -> None:
    backbone, method = network
    fresh = [key for key in backbone.state_dict() if key.startswith(backbone.left_out(2))]
    copied = {*backbone.state_dict(), *method.state_dict()} - {*fresh}
    assert sorted(fresh) == sorted(golden["handover_fresh"])
    assert sorted(copied) == sorted(golden["handover_copied"])


def with_its_condition(family: str) -> tuple[Backbone, torch.Tensor]:
    """A small network of a family, and a condition of two images."""
    name = {"MMDiT": "MMDiT-6/2"}.get(family, f"{family}-T/2")
    config = config_of(name, input_size=8, in_channels=4, num_classes=3)
    torch.manual_seed(0)
    if not config.takes_sequences:
        return build(config), torch.tensor([0, 1])
    conditioner = TextConditioner("clip-l-text/states", (5, 12), config.facts.width)
    return build(config, conditioner), torch.randn(2, 5, 12)


@pytest.mark.parametrize("family", BACKBONES)
def test_what_an_early_stop_leaves_out_is_what_no_gradient_reaches(family: str) -> None:
    """For every block of every family, or torchrun would wait for gradients that never come."""
    backbone, condition = with_its_condition(family)
    training = {name for name, value in backbone.named_parameters() if value.requires_grad}
    for block in range(1, backbone.facts.depth + 1):
        backbone.zero_grad()
        capture = Capture(hidden=(block,), stop_after=block)
        captured = backbone(torch.randn(2, 4, 8, 8), torch.zeros(2), condition, capture)
        captured.hidden[block].sum().backward()
        reached = {name for name, value in backbone.named_parameters() if value.grad is not None}
        assert {name for name in training if name.startswith(backbone.left_out(block))} == training - reached


def test_later_blocks_do_not_run(network: tuple[SiT, Erw], golden: dict[str, Any]) -> None:
    """Counted, and seen in the operations: two blocks of five are two fifths of the blocks' work."""
    backbone, method = network
    ran = []
    for number, block in enumerate(backbone.blocks, 1):
        block.register_forward_hook(lambda *_, number=number: ran.append(number))
    backbone.final_layer.linear.register_forward_hook(lambda *_: ran.append(0))
    captured = warmed(network, golden)
    assert ran == [1, 2]
    assert captured.prediction is None
    inputs = golden["x0"], golden["t"], golden["y"]
    operations = []
    for capture in (method.capture(method.phase_at(0)), NOTHING):
        with FlopCounterMode(display=False) as counter:
            backbone(*inputs, capture)
        operations.append(sum(counter.get_flop_counts()["Global"].values()))
    with FlopCounterMode(display=False) as counter:
        backbone.blocks[0](torch.randn(4, 64, 48).double(), torch.randn(4, 48).double())
    of_block = counter.get_total_flops()
    assert operations[1] - operations[0] >= 3 * of_block


def test_the_share_of_the_operations_is_the_papers() -> None:
    """It puts a step of the warm-up of SiT-XL/2 at 19 % of a full one."""
    with torch.device("meta"):
        config = config_of("SiT-XL/2", input_size=32, in_channels=4, num_classes=1000)
        backbone, method = build(config), Erw(ErwConfig(), config.facts, COLUMNS, GRIDS)
        inputs = torch.empty(1, 4, 32, 32), torch.empty(1), torch.zeros(1, dtype=torch.int64)
        counted = []
        for phase in method.phases():
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                backbone(*inputs, method.capture(phase))
            projector = 2 * 256 * sum(each.numel() for each in method.parameters())
            counted.append(counter.get_total_flops() + projector)
    assert counted[0] / counted[1] == pytest.approx(0.19, abs=0.005)


def test_phases() -> None:
    assert make().phases() == (Phase(name=WARMUP, stop=W), Phase(name=FULL, start=W))
    assert make(warmup_steps=0).phases() == (Phase(name=FULL),)
    method = make(warmup_steps=3, stop=7)
    warmup, full, plain = method.phases()
    assert [(each.start, each.stop) for each in (warmup, full, plain)] == [(0, 3), (3, 7), (7, None)]
    assert [method.capture(each) for each in (warmup, full, plain)] == [
        Capture(hidden=(2,), stop_after=2), Capture(hidden=(4,)), NOTHING,
    ]  # fmt: skip
    assert [method.flags(each) for each in (warmup, full, plain)] == [
        Flags(objective_loss=False), Flags(fresh_start=True), Flags(idle=("method.",)),
    ]  # fmt: skip
    assert [method.columns(each) for each in (warmup, full, plain)] == [("a/patch",), ("a/patch",), ()]
    assert [method.time_law(each) is None for each in (warmup, full, plain)] == [False, True, True]
    assert [method.predicts_after(steps) for steps in (0, 1, 3, 4, 9)] == [False, False, False, True, True]


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"warmup_depth": 4}, "method.depth"),
        ({"warmup_depth": 4, "depth": 2}, "method.depth"),
        ({"warmup_depth": 6}, "method.warmup_depth"),
        ({"warmup_depth": 0}, "method.warmup_depth"),
        ({"warmup_depth": None}, "method.warmup_depth"),
        ({"depth": 6}, "method.depth"),
        ({"warmup_steps": 0}, "method.warmup_depth"),
        ({"warmup_steps": 0, "warmup_depth": None, "warmup_weight": 1.0}, "method.warmup_weight"),
        ({"warmup_steps": 0, "warmup_depth": None, "warmup_from": "run"}, "method.warmup_from"),
        ({"warmup_steps": 5, "stop": 5}, "method.stop"),
    ],
)
def test_what_cannot_be_is_refused(settings: dict[str, Any], field: str) -> None:
    problems = make(**settings).problems()
    assert field in [problem.field for problem in problems]
    assert all(problem.remedy for problem in problems)


def test_one_projector_needs_tokens_alike() -> None:
    """On a U-shaped network blocks of its middle have other grids than the first."""
    facts = DOWN.facts
    assert make(facts, warmup_depth=1, depth=6).problems() == []
    assert [each.field for each in make(facts, warmup_depth=1, depth=4).problems()] != []


@pytest.mark.parametrize(("size", "blocks"), [("S", (4, 8)), ("B", (8, 10)), ("L", (4, 15)), ("XL", (5, 18))])
def test_presets(size: str, blocks: tuple[int, int]) -> None:
    facts = config_of(f"SiT-{size}/2", input_size=16, in_channels=4, num_classes=10).facts
    with torch.device("meta"):
        method = Erw(ErwConfig(), facts, COLUMNS, GRIDS)
        assert method.problems() == []
        assert (method.config.warmup_depth, method.config.depth) == blocks
        assert (method.config.weight, method.config.half_life) == (0.5, HALF_LIFE)
        as_released = Erw(ErwConfig(**Erw.named_presets["released"]), facts, COLUMNS, GRIDS)
        assert as_released.problems() == []
        assert (as_released.config.warmup_depth, as_released.config.depth) == (4, 8)
        assert as_released.config.warmup_steps == 10_000
        readme = Erw(ErwConfig(**Erw.named_presets["readme"]), facts, COLUMNS, GRIDS)
        assert [each.field for each in readme.problems()] == ([] if facts.depth >= 14 else ["method.depth"])
