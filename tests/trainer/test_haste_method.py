"""HASTE's attention term against loops and closed forms, its presets, phases and problems."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from repa.data.codec import dequantise, quantise
from repa.data.columns import ColumnSpec
from repa.trainer.methods import METHODS
from repa.trainer.methods.attention import attention_alignment
from repa.trainer.methods.base import Flags, Method, Phase, Step
from repa.trainer.methods.haste import PRESETS, Haste, HasteConfig, preset_of
from repa.trainer.methods.repa import Repa, RepaConfig
from repa.trainer.models.capture import NOTHING, BackboneFacts, Capture, Captured
from repa.trainer.models.sit import SIT_SIZES, SiT, SiTConfig
from torch import Tensor

# heads of 8 channels, 16 tokens; the teacher has two heads of 12 and blocks 3, 5, 6 in the cache
CONFIG = SiTConfig(depth=4, width=32, heads=4, patch_size=2, input_size=8, num_classes=5, qk_norm=True)
HEADS, TOKENS, RANK, STORED = 2, 16, 12, (3, 5, 6)
MOMENTS = {"sd-vae/moments": ColumnSpec(shape=(8, 8, 8), dtype="float32")}
GRIDS = {"sd-vae": (8, 8), "a": (4, 4), "a+attention": (4, 4)}
NOTES: dict[str, dict[str, Any]] = {
    "a": {},
    "a+attention": {
        "blocks": list(STORED),
        "logit_scale": 0.3,
        "head_width": 12,
        "rank": RANK,
        "form": "exact",
        "keys": "as computed",
        "calibration": None,
        "fidelity": None,
    },
}


def specs_of(dtype: str = "float32", rank: int = RANK, heads: int = HEADS) -> dict[str, ColumnSpec]:
    shape = (len(STORED), heads, TOKENS, rank)
    specs = MOMENTS | {
        "a/patch": ColumnSpec(shape=(TOKENS, 24), dtype=dtype),
        "a/q": ColumnSpec(shape=shape, dtype=dtype),
        "a/k": ColumnSpec(shape=shape, dtype=dtype),
    }
    if dtype == "int8":
        scale = ColumnSpec(shape=(len(STORED), heads, rank), dtype="float32")
        specs |= {"a/patch-scale": ColumnSpec(shape=(24,), dtype="float32")}
        specs |= {"a/q-scale": scale, "a/k-scale": scale}
    return specs


def make(
    *,
    columns: dict[str, ColumnSpec] | None = None,
    backbone: BackboneFacts = CONFIG.facts,
    grids: dict[str, tuple[int, int]] = GRIDS,
    notes: dict[str, dict[str, Any]] = NOTES,
    **settings: Any,
) -> Haste:
    torch.manual_seed(0)
    given = {"depth": 3, "student_blocks": (2, 3), "teacher_blocks": (6, 3), "stop": 10}
    config = HasteConfig(**{**given, "projector_width": 40, **settings})
    return Haste(config, backbone, specs_of() if columns is None else columns, grids, notes)


def targets(dtype: torch.dtype = torch.float32, rank: int = RANK, images: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = {"a/patch": (TOKENS, 24), "a/q": (3, HEADS, TOKENS, rank), "a/k": (3, HEADS, TOKENS, rank)}
    return {
        name: torch.randn(images, *shape, generator=generator, dtype=torch.float64).to(dtype)
        for name, shape in shapes.items()
    }


def student_of(images: int = 3, dtype: torch.dtype = torch.float64, seed: int = 2) -> Captured:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    return Captured(
        velocity=None,
        hidden={3: draw(images, TOKENS, 32)},
        grids={3: (4, 4)},
        queries={block: draw(images, 4, TOKENS, 8) for block in (2, 3)},
        keys={block: draw(images, 4, TOKENS, 8) for block in (2, 3)},
    )


def make_step(columns: dict[str, Tensor], student: Captured, index: int = 0) -> Step:
    blank = torch.zeros(1)
    return Step(
        index=index,
        columns=columns,
        x0=blank,
        noise=blank,
        t=blank,
        condition=blank,
        student=student,
        interpolate=lambda t: t,
        generator=torch.Generator(),
    )


def softmax(logits: list[float]) -> list[float]:
    largest = max(logits)
    parts = [math.exp(each - largest) for each in logits]
    return [each / math.fsum(parts) for each in parts]


def dots(query: Tensor, keys: Tensor, scale: float) -> list[float]:
    return [
        scale * math.fsum(a * b for a, b in zip(query.tolist(), key.tolist(), strict=True)) for key in keys
    ]


def slow_attention(
    columns: dict[str, Tensor], student: Captured, pairs: dict[int, int]
) -> tuple[float, float]:
    """Image by image, head by head, row by row: cross entropy, and the teacher's entropy."""
    crosses, entropies = [], []
    for mine, theirs in pairs.items():
        place = STORED.index(theirs)
        for image in range(len(columns["a/q"])):
            for head in range(HEADS):
                for row in range(TOKENS):
                    teacher = softmax(
                        dots(columns["a/q"][image, place, head, row], columns["a/k"][image, place, head], 0.3)
                    )
                    logits = dots(
                        student.queries[mine][image, head, row],
                        student.keys[mine][image, head],
                        8**-0.5,
                    )
                    own = softmax(logits)
                    crosses.append(-math.fsum(p * math.log(s) for p, s in zip(teacher, own, strict=True)))
                    entropies.append(-math.fsum(p * math.log(p) for p in teacher))
    return math.fsum(crosses) / len(crosses), math.fsum(entropies) / len(entropies)


def test_slow_loop_over_blocks_images_heads_and_rows() -> None:
    method, columns, student = make().double(), targets(torch.float64), student_of()
    terms = method.losses(make_step(columns, student))
    cross, entropy = slow_attention(columns, student, {2: 6, 3: 3})
    assert terms["attention"].value.dtype == torch.float64
    assert terms["attention"].value.item() == pytest.approx(cross, abs=1e-12)
    assert terms["attention_excess"].value.item() == pytest.approx(cross - entropy, abs=1e-12)
    assert {name: term.weight for name, term in terms.items()} == {
        "repa": 0.5,
        "attention": 0.5,
        "attention_excess": None,
    }
    assert not terms["attention_excess"].value.requires_grad


def test_the_feature_term_is_repas() -> None:
    """Same projectors from the same seed, same value: only the attention is added."""
    method, columns, student = make(), targets(), student_of(dtype=torch.float32)
    torch.manual_seed(0)
    plain = Repa(RepaConfig(depth=3, projector_width=40), CONFIG.facts, specs_of(), GRIDS)
    assert method.state_dict().keys() == plain.state_dict().keys()
    one, two = (each.losses(make_step(columns, student))["repa"].value for each in (method, plain))
    assert torch.equal(one, two)


def test_float32_differs_from_float64_by_rounding() -> None:
    exact = make().double().losses(make_step(targets(torch.float64), student_of()))
    single = make().losses(make_step(targets(), student_of(dtype=torch.float32)))
    for name in ("attention", "attention_excess"):
        assert single[name].value.dtype == torch.float32
        assert single[name].value.item() == pytest.approx(exact[name].value.item(), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_minimum_is_the_teachers_entropy(dtype: torch.dtype) -> None:
    """Student logits equal to the teacher's: excess 0 and gradient 0, both exactly."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, 3, 9, 8, generator=generator, dtype=dtype) for _ in range(2))
    mine, other = q.clone().requires_grad_(), k.clone().requires_grad_()
    value, excess = attention_alignment(mine, other, q, k, scale=0.4, teacher_scale=0.4)
    value.backward()
    p = torch.softmax(0.4 * q.double() @ k.double().mT, -1)
    entropy = -(p * p.log()).sum(-1).mean()
    assert value.item() == pytest.approx(entropy.item(), rel=1e-6 if dtype == torch.float32 else 1e-14)
    assert excess.item() == 0
    assert mine.grad is not None
    assert other.grad is not None
    assert not mine.grad.any()
    assert not other.grad.any()


def test_a_constant_added_to_the_keys_changes_nothing() -> None:
    """As the centred keys of a cache: softmax does not see what all keys share."""
    columns, student = targets(torch.float64), student_of()
    before = make().double().losses(make_step(columns, student))["attention"].value
    columns["a/k"] = columns["a/k"] - columns["a/k"].mean(-2, keepdim=True)
    after = make().double().losses(make_step(columns, student))["attention"].value
    torch.testing.assert_close(after, before, rtol=0, atol=1e-13)


def test_gradient_against_autograd_and_finite_differences() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = (
        torch.randn(2, 2, 5, 4, generator=generator, dtype=torch.float64, requires_grad=True)
        for _ in range(2)
    )
    tq, tk = (torch.randn(2, 2, 5, 3, generator=generator, dtype=torch.float64) for _ in range(2))

    def ours(queries: Tensor, keys: Tensor) -> Tensor:
        return attention_alignment(queries, keys, tq, tk, scale=0.5, teacher_scale=0.7)[0]

    assert torch.autograd.gradcheck(ours, (q, k))
    written_out = (
        -(torch.softmax(0.7 * tq @ tk.mT, -1) * torch.log_softmax(0.5 * q @ k.mT, -1)).sum(-1).mean()
    )
    for mine, theirs in zip(
        torch.autograd.grad(3 * ours(q, k), (q, k)), torch.autograd.grad(3 * written_out, (q, k)), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-15)


def test_backward_keeps_no_map() -> None:
    """Between forward and backward: the gradients of q and k, nothing of size T × T."""
    kept = []
    q, k = (torch.randn(2, 2, 50, 4, requires_grad=True) for _ in range(2))
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (kept.append(tuple(x.shape)), x)[1], lambda x: x):
        attention_alignment(q, k, q.detach(), k.detach(), scale=0.5, teacher_scale=0.9)
    assert kept == [(2, 2, 50, 4)] * 2


def test_gradient_reaches_queries_and_keys_of_the_listed_blocks_and_paired_heads_only() -> None:
    method, student = make(), student_of(dtype=torch.float32)
    student.queries[1] = student.queries[2].detach().clone().requires_grad_()
    student.keys[1] = student.keys[2].detach().clone().requires_grad_()
    method.losses(make_step(targets(), student))["attention"].value.backward()
    for block in (2, 3):
        for tensor in (student.queries[block], student.keys[block]):
            assert tensor.grad is not None
            # of every image and every one of the teacher's heads
            assert (tensor.grad[:, :HEADS].abs().amax((-1, -2)) > 0).all()
            assert not tensor.grad[:, HEADS:].any()
    assert student.queries[1].grad is None
    assert student.keys[1].grad is None


def test_gradient_in_a_network() -> None:
    """With the attention alone: the last block's q and k, its values not, and all before it."""
    model, method = SiT(CONFIG), make(weight=0.0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    x = torch.randn(3, 4, 8, 8, requires_grad=True)
    student = model(x, torch.rand(3), torch.tensor([0, 1, 5]), method.capture(method.phase_at(9)))
    method.losses(make_step(targets(), student))["attention"].value.backward()
    assert x.grad is not None
    assert (x.grad.abs().amax(dim=(1, 2, 3)) > 0).all()
    heads = 2 * 8
    last = model.blocks[2].attn.qkv.weight.grad.view(3, 32, 32)
    assert last[0, :heads].abs().amax() > 0
    assert last[1, :heads].abs().amax() > 0
    assert not last[:2, heads:].any()
    assert not last[2].any()
    for name, parameter in model.named_parameters():
        if name.startswith(("blocks.0.", "blocks.1.")):
            assert parameter.grad is not None
            assert parameter.grad.abs().max() > 0, name
        if name.startswith(("blocks.3.", "final_layer.", "blocks.2.mlp.", "blocks.2.attn.proj.")):
            assert parameter.grad is None, name


def test_autocast_does_not_round_logits() -> None:
    """bf16 queries go in; products and softmax are float32, as without autocast."""
    columns, student = targets(), student_of(dtype=torch.bfloat16)
    student.hidden[3] = student.hidden[3].detach().float()
    plain = make().losses(make_step(columns, student))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = make().losses(make_step(columns, student))
    for name in ("attention", "attention_excess"):
        assert mixed[name].value.dtype == torch.float32
        assert torch.equal(mixed[name].value, plain[name].value)
    mixed["attention"].value.backward()
    assert student.queries[2].grad is not None
    assert student.queries[2].grad.dtype == torch.bfloat16


@pytest.mark.parametrize("rank", [RANK, 5])
def test_int8_and_rank_cut_targets(rank: int) -> None:
    """The term is that of the decoded columns, whatever their rank, and only pairs in use are decoded."""
    notes = {**NOTES, "a+attention": {**NOTES["a+attention"], "rank": rank, "form": "truncated"}}
    columns, batch = specs_of("int8", rank), {}
    for name, values in targets(rank=rank).items():
        batch[name], batch[f"{name}-scale"] = quantise(values)
    method = make(columns=columns, notes=notes)
    assert method.problems() == []
    student = student_of(dtype=torch.float32)
    found = method.losses(make_step(batch, student))
    decoded = {name: dequantise(batch[name], batch[f"{name}-scale"]) for name in ("a/patch", "a/q", "a/k")}
    cross, entropy = slow_attention(decoded, student, {2: 6, 3: 3})
    assert found["attention"].value.item() == pytest.approx(cross, rel=1e-6)
    assert found["attention_excess"].value.item() == pytest.approx(cross - entropy, rel=1e-5)
    plain = make(columns=specs_of("float32", rank), notes=notes).losses(make_step(decoded, student))
    assert all(torch.equal(found[name].value, plain[name].value) for name in found)
    # block 5 is stored and not used: what it holds does not matter
    batch["a/q-scale"][:, STORED.index(5)] = torch.nan
    again = method.losses(make_step(batch, student))
    assert torch.equal(again["attention"].value, found["attention"].value)


def test_the_contract() -> None:
    method = make(columns=specs_of("int8"))
    align, plain = method.phases()
    assert (align, plain) == (Phase(name="align", stop=10), Phase(name="plain", start=10))
    assert [method.phase_at(step).name for step in (9, 10, 0, 11, 9)] == [
        "align",
        "plain",
        "align",
        "plain",
        "align",
    ]
    assert method.columns(align) == (
        "a/patch",
        "a/patch-scale",
        "a/q",
        "a/q-scale",
        "a/k",
        "a/k-scale",
    )
    assert make().columns(align) == ("a/patch", "a/q", "a/k")
    assert method.capture(align) == Capture(hidden=(3,), attention=(2, 3))
    assert method.flags(align) == Flags()
    # after τ it is plain SiT in every answer
    none = METHODS["none"][1](METHODS["none"][0](), CONFIG.facts, MOMENTS, GRIDS)
    assert method.columns(plain) == none.columns(plain) == ()
    assert method.capture(plain) == none.capture(plain) == NOTHING
    assert method.flags(plain) == Flags(idle=("method.",))
    assert set(method.losses(make_step({}, Captured(velocity=None), 10))) == set()
    batch = {}
    for name, values in targets().items():
        batch[name], batch[f"{name}-scale"] = quantise(values)
    before = method.losses(make_step(batch, student_of(dtype=torch.float32), 9))
    assert list(before) == ["repa", "attention", "attention_excess"]


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
    assert remedy == "use --model SiT-B/2 (patch 2)"


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
