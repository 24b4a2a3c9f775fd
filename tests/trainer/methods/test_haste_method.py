"""HASTE's attention term against loops and closed forms, and its answers to the contract."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from method_steps import make_step
from repa.data.format.columns import ColumnSpec
from repa.data.format.factor_layout import FactorLayout
from repa.data.format.int8 import dequantise, quantise
from repa.trainer.methods import METHODS
from repa.trainer.methods.attention import attention_alignment
from repa.trainer.methods.base import Flags, MethodConfig, Phase
from repa.trainer.methods.repa import Repa, RepaConfig
from repa.trainer.models.capture import NOTHING, Capture, Captured
from repa.trainer.models.sit import SiT
from slow_factors import decoded_slowly
from small_haste import CONFIG, GRIDS, HEADS, MOMENTS, NOTES, RANK, STORED, TOKENS, make, specs_of
from torch import Tensor


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
        prediction=None,
        hidden={3: draw(images, TOKENS, 32)},
        grids={3: (4, 4)},
        queries={block: draw(images, 4, TOKENS, 8) for block in (2, 3)},
        keys={block: draw(images, 4, TOKENS, 8) for block in (2, 3)},
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
    none = METHODS["none"](MethodConfig(), CONFIG.facts, MOMENTS, GRIDS)
    assert method.columns(plain) == none.columns(plain) == ()
    assert method.capture(plain) == none.capture(plain) == NOTHING
    assert method.flags(plain) == Flags(idle=("method.",))
    assert set(method.losses(make_step({}, Captured(prediction=None), 10))) == set()
    batch = {}
    for name, values in targets().items():
        batch[name], batch[f"{name}-scale"] = quantise(values)
    before = method.losses(make_step(batch, student_of(dtype=torch.float32), 9))
    assert list(before) == ["repa", "attention", "attention_excess"]


LAYOUT = FactorLayout(tokens=TOKENS, components=(((2, 3), (1, 5)), ((4, 0), (0, 4)), ((0, 2), (3, 3))))


def factored() -> tuple[dict[str, ColumnSpec], dict[str, dict[str, Any]], dict[str, Tensor]]:
    """Specs, notes and a batch of three images of random bytes, which any bytes of factors may be."""
    generator = torch.Generator().manual_seed(4)
    specs = {name: spec for name, spec in specs_of().items() if name not in ("a/q", "a/k")} | {
        "a/q": ColumnSpec(shape=(LAYOUT.row_bytes,), dtype="uint8"),
        "a/k": ColumnSpec(shape=(LAYOUT.row_bytes,), dtype="uint8"),
        "a/q-scale": ColumnSpec(shape=(LAYOUT.scales,), dtype="float32"),
    }
    noted = {**NOTES["a+attention"], "form": "factored", "keys": "centred", **LAYOUT.as_notes}
    batch = {
        "a/patch": targets()["a/patch"],
        "a/q-scale": 0.01 * torch.rand(3, LAYOUT.scales, generator=generator),
        **{
            name: torch.randint(0, 256, (3, LAYOUT.row_bytes), generator=generator, dtype=torch.uint8)
            for name in ("a/q", "a/k")
        },
    }
    return specs, {**NOTES, "a+attention": noted}, batch


def test_factors() -> None:
    """The term is that of queries and keys read byte by byte, and only pairs in use are decoded."""
    specs, notes, batch = factored()
    method, student = make(columns=specs, notes=notes), student_of(dtype=torch.float32)
    assert method.problems() == []
    assert {"a/q", "a/k", "a/q-scale"} <= {
        name for phase in method.phases() for name in method.columns(phase)
    }
    found = method.losses(make_step(batch, student))
    # [N, L, H, T, r], as no query or key is of more than seven components
    decoded = {name: torch.zeros(3, len(STORED), HEADS, TOKENS, 7) for name in ("a/q", "a/k")}
    for image in range(3):
        row = [batch[name][image].numpy().tobytes() for name in ("a/q", "a/k", "a/q-scale")]
        for block, heads in enumerate(decoded_slowly(TOKENS, LAYOUT.components, *row)):
            for head, components in enumerate(heads):
                for number, pairs in enumerate(components):
                    query, key = zip(*pairs, strict=True)
                    decoded["a/q"][image, block, head, :, number] = torch.tensor(query)
                    decoded["a/k"][image, block, head, :, number] = torch.tensor(key)
    cross, entropy = slow_attention(decoded, student, {2: 6, 3: 3})
    assert found["attention"].value.item() == pytest.approx(cross, rel=1e-6)
    assert found["attention_excess"].value.item() == pytest.approx(cross - entropy, rel=1e-5)
    batch["a/q-scale"][:, LAYOUT.scales_of(STORED.index(5))] = torch.nan
    again = method.losses(make_step(batch, student))
    assert torch.equal(again["attention"].value, found["attention"].value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("components", None),
        ("tokens", None),
        ("tokens", TOKENS + 1),
        ("components", [[[2, 3], [1, 5]], [[4, 0], [0, 4]]]),
        ("components", [[[2, 3], [1, 5]], [[4, 0], [0, 4]], [[0, 2], [3, 3]], [[1, 0], [1, 0]]]),
        ("components", [[[2, 3], [1, 5]], [[4, 0], [0, 4]], [[0, 2], [3, 4]]]),
        ("components", [[[2, 3], [1, 5]], [[4, 0], [0, 4]], [[0, 2]]]),
        # as many bytes, other components
        ("components", [[[3, 1], [1, 5]], [[4, 0], [0, 4]], [[0, 2], [3, 3]]]),
    ],
)
def test_factors_that_are_not_as_described_are_refused(name: str, value: Any) -> None:
    specs, notes, _ = factored()
    damaged = {**notes, "a+attention": {**notes["a+attention"], name: value}}
    problems = make(columns=specs, notes=damaged).problems()
    assert [problem.field for problem in problems] == ["a/q"]
    assert all(problem.remedy for problem in problems)
