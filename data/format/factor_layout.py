"""The packed form of queries and keys, as factors of the attention of each image by itself.

A head of a block has some components in int8 and some in int4, the same numbers of them for every image of a
cache (`FactorLayout`). A row of ``<model>/q``, as one of ``<model>/k``, is uint8 ``[bytes]``, block after
block. In a block the int8 components of all heads come first, T bytes each, in two's complement. Then come
the int4 components, ⌈T/2⌉ bytes each: byte j holds token j in its low half and token ⌈T/2⌉ + j in its high
half, each as its value, −7 to 7, plus 8. ``<model>/q-scale`` has one float32 for each component, in the same
order. The logits of a head are Σ scale · q · k over its components, times the teacher's logit scale.

There is one scale for q and k together, as only their product is ever used.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

INT4_LARGEST = 7
INT8_LARGEST = 127


@dataclass(frozen=True)
class FactorLayout:
    """How the factors of a cache lie in its rows.

    Attributes:
        tokens: T.
        components: block → head → number of components in int8, and in int4.
    """

    tokens: int
    components: tuple[tuple[tuple[int, int], ...], ...]

    @classmethod
    def of_notes(cls, notes: Mapping[str, Any]) -> FactorLayout:
        """Read the layout that a manifest notes of a source, see `AttentionNotes`."""
        components = tuple(
            tuple((int(each[0]), int(each[1])) for each in block) for block in notes["components"]
        )
        return cls(tokens=int(notes["tokens"]), components=components)

    @property
    def as_notes(self) -> dict[str, Any]:
        """What a manifest notes of it, plain JSON values."""
        return {
            "tokens": self.tokens,
            "components": [[list(head) for head in block] for block in self.components],
        }

    @property
    def heads(self) -> int:
        """Heads of a block, H."""
        return len(self.components[0])

    @property
    def row_bytes(self) -> int:
        """Bytes of a row of q, as of a row of k."""
        return self._byte_starts[-1]

    @property
    def scales(self) -> int:
        """Numbers of a row of q's scales."""
        return self._scale_starts[-1]

    def counts(self, block: int) -> tuple[int, int]:
        """Count the components of all heads of a block in int8, and in int4.

        Args:
            block: index on the axis L.
        """
        heads = self.components[block]
        return sum(head[0] for head in heads), sum(head[1] for head in heads)

    def rank(self, block: int) -> int:
        """Return the most components that a head of a block has, r."""
        return max(1, *(sum(head) for head in self.components[block]))

    @cached_property
    def _byte_starts(self) -> tuple[int, ...]:
        starts = [0]
        for block in range(len(self.components)):
            whole, half = self.counts(block)
            starts.append(starts[-1] + whole * self.tokens + half * half_bytes(self.tokens))
        return tuple(starts)

    @cached_property
    def _scale_starts(self) -> tuple[int, ...]:
        starts = [0]
        for block in range(len(self.components)):
            starts.append(starts[-1] + sum(self.counts(block)))
        return tuple(starts)

    def bytes_of(self, block: int) -> slice:
        """Return where a block's bytes lie in a row of q, as in one of k."""
        return slice(self._byte_starts[block], self._byte_starts[block + 1])

    def scales_of(self, block: int) -> slice:
        """Return where a block's scales lie in a row of them."""
        return slice(self._scale_starts[block], self._scale_starts[block + 1])


def half_bytes(tokens: int) -> int:
    """Return the bytes of an int4 component of so many tokens, ⌈T/2⌉."""
    return (tokens + 1) // 2


def attention_axes(
    shape: Sequence[int], notes: Mapping[str, Any], scales: Sequence[int] | None = None
) -> tuple[int, int, int] | None:
    """Return blocks, heads and tokens of stored queries, or keys, in whatever form.

    Args:
        shape: of a row of the column, ``[L, H, T, r]``, or ``[bytes]`` of factors.
        notes: of its source.
        scales: shape of a row of scales beside it, if there is one.

    Returns:
        L, H and T; None where the notes describe no factors of so many bytes and scales.
    """
    if len(shape) > 1:
        return shape[0], shape[1], shape[2]
    if not notes.get("components") or not notes.get("tokens"):
        return None
    layout = FactorLayout.of_notes(notes)
    even = all(len(heads) == layout.heads for heads in layout.components)
    if not even or layout.row_bytes != shape[0]:
        return None
    if scales is not None and tuple(scales) != (layout.scales,):
        return None
    return len(layout.components), layout.heads, layout.tokens
