"""The packed form of queries and keys: what is packed comes back, and lies where the format says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from repa.data.format.factor_layout import FactorLayout, attention_axes, half_bytes
from repa.data.format.factors import pack, unpack
from slow_factors import decoded_slowly

Heads = tuple[tuple[int, int], ...]


def layout_of(tokens: int, *blocks: Heads) -> FactorLayout:
    return FactorLayout(tokens=tokens, components=blocks)


@st.composite
def layouts(draw: st.DrawFn) -> FactorLayout:
    """Up to three blocks of up to three heads, of up to three components in int8 and in int4 each."""
    heads = draw(st.integers(1, 3))
    counts = st.tuples(st.integers(0, 3), st.integers(0, 3))
    block = st.lists(counts, min_size=heads, max_size=heads).map(tuple)
    blocks = draw(st.lists(block.filter(lambda each: any(map(sum, each))), min_size=1, max_size=3))
    return layout_of(draw(st.integers(1, 7)), *blocks)


def codes_of(layout: FactorLayout, images: int, seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Integers of queries and of keys, ``[B, H, T, r]`` a block, zero where a head has no component."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for number, block in enumerate(layout.components):
        pair = []
        for _ in range(2):
            codes = torch.zeros(images, len(block), layout.tokens, layout.rank(number), dtype=torch.int64)
            for head, (whole, half) in enumerate(block):
                for start, stop, most in ((0, whole, 127), (whole, whole + half, 7)):
                    part = codes[:, head, :, start:stop]
                    part.copy_(torch.randint(-most, most + 1, part.shape, generator=generator))
            pair.append(codes)
        found.append((pair[0], pair[1]))
    return found


def stored(
    layout: FactorLayout, codes: list[tuple[torch.Tensor, torch.Tensor]], seed: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows of queries, keys and scales."""
    rows = [
        torch.cat([pack(layout, number, pair[side]) for number, pair in enumerate(codes)], dim=1)
        for side in (0, 1)
    ]
    generator = torch.Generator().manual_seed(seed)
    return rows[0], rows[1], torch.rand(len(rows[0]), layout.scales, generator=generator) + 0.5


@settings(max_examples=60)
@given(layouts(), st.integers(0, 2**16))
def test_what_is_packed_comes_back(layout: FactorLayout, seed: int) -> None:
    codes = codes_of(layout, 2, seed)
    queries, keys, scales = stored(layout, codes, seed)
    assert queries.shape == keys.shape == (2, layout.row_bytes)
    assert queries.dtype == torch.uint8
    for block, (q, k) in enumerate(codes):
        ours = unpack(layout, block, queries, keys, scales)
        assert ours[0].shape == ours[1].shape == q.shape
        assert ours[0].dtype == ours[1].dtype == torch.float32
        assert torch.equal(ours[1], k.float())
        # a component's scale is the same for all tokens, and none is nothing
        assert torch.equal(ours[0] == 0, q == 0)
        assert layout.rank(block) == max(sum(head) for head in layout.components[block])


@settings(max_examples=60)
@given(layouts(), st.integers(0, 2**16))
def test_a_slow_reading_of_the_bytes_agrees(layout: FactorLayout, seed: int) -> None:
    queries, keys, scales = stored(layout, codes_of(layout, 2, seed), seed)
    for image in range(2):
        slow = decoded_slowly(
            layout.tokens,
            layout.components,
            *(each[image].numpy().tobytes() for each in (queries, keys, scales)),
        )
        for block, heads in enumerate(slow):
            ours = unpack(layout, block, queries, keys, scales)
            for head, components in enumerate(heads):
                for number in range(layout.rank(block)):
                    pairs = components[number] if number < len(components) else [(0.0, 0.0)] * layout.tokens
                    for token, (query, key) in enumerate(pairs):
                        assert float(ours[0][image, head, token, number]) == pytest.approx(query, rel=1e-6)
                        assert float(ours[1][image, head, token, number]) == key


def test_the_bytes_of_a_small_row() -> None:
    """Two heads of three tokens: int8 of both, then int4, its third token in the second byte's low half."""
    layout = layout_of(3, ((1, 1), (1, 0)))
    codes = torch.tensor([[[[1, -7], [-1, 7], [127, 3]], [[-127, 0], [0, 0], [5, 0]]]])
    row = pack(layout, 0, codes)[0].tolist()
    assert row[:6] == [1, 255, 127, 129, 0, 5]
    # tokens 0 and 2, then token 1 and nothing
    assert row[6] == (3 + 8) << 4 | (-7 + 8)
    assert row[7] & 15 == 7 + 8
    assert len(row) == layout.row_bytes == 2 * 3 + 2
    assert layout.scales == 3


def test_what_a_layout_says_of_itself() -> None:
    layout = layout_of(5, ((2, 0), (0, 3)), ((1, 1), (4, 0)))
    assert layout.heads == 2
    assert (layout.counts(0), layout.counts(1)) == ((2, 3), (5, 1))
    assert (layout.rank(0), layout.rank(1)) == (3, 4)
    assert half_bytes(5) == 3
    assert layout.bytes_of(0) == slice(0, 2 * 5 + 3 * 3)
    assert layout.bytes_of(1) == slice(19, 19 + 5 * 5 + 3)
    assert layout.row_bytes == 47
    assert (layout.scales_of(0), layout.scales_of(1), layout.scales) == (slice(0, 5), slice(5, 11), 11)
    assert FactorLayout.of_notes(layout.as_notes) == layout


NOTED: dict[str, Any] = {"tokens": 4, "components": [[[1, 1], [0, 2]], [[2, 0], [1, 0]]]}
BYTES = 4 + 3 * 2 + 3 * 4


@pytest.mark.parametrize(
    ("changes", "shape", "axes"),
    [
        ({}, (BYTES,), (2, 2, 4)),
        ({}, (3, 2, 7, 5), (3, 2, 7)),
        ({}, (BYTES + 1,), None),
        ({"components": None}, (BYTES,), None),
        ({"tokens": None}, (BYTES,), None),
        ({"tokens": 5}, (BYTES,), None),
        ({"components": [[[1, 1], [0, 2]], [[3, 0]]]}, (BYTES,), None),
        ({"components": [[[1, 1], [0, 2]]]}, (BYTES,), None),
    ],
)
def test_axes_are_known_where_notes_and_bytes_agree(
    changes: dict[str, Any], shape: tuple[int, ...], axes: tuple[int, int, int] | None
) -> None:
    assert attention_axes(shape, {**NOTED, **changes}) == axes
