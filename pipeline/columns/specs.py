"""What a storage form is, and its columns, before any number is known. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...data.format.columns import SCALE_SUFFIX, ColumnSpec, column_name, scale_column

if TYPE_CHECKING:
    from collections.abc import Mapping

INT8 = "int8"
RANK_STEP = 8


@dataclass(frozen=True, kw_only=True)
class AttentionSettings:
    """How the attention of one encoder is to be stored.

    Attributes:
        blocks: blocks whose queries and keys are stored, counted from 1, ascending.
        dtype: ``float16`` or ``float32``: as computed. ``int8``: also the keys centred.
        rank: components of each head that are stored, as int8; None stores all.
        tolerance: nats. Of the ranks 8, 16, 24, … below the head's width, and then all of it, the first is
            taken whose mean divergence is at most this in every block and head; int8. None: ``rank`` says.
        compressor: of the columns, see `ColumnSpec`.
    """

    blocks: tuple[int, ...]
    dtype: str
    rank: int | None = None
    tolerance: float | None = None
    compressor: str | None = None

    def __post_init__(self) -> None:
        if self.rank is not None and self.tolerance is not None:
            raise ValueError("a rank and a tolerance exclude one another")

    def ranks(self, head_width: int) -> tuple[int, ...]:
        """List candidates for the rank, best first. It is a single one unless there is a tolerance."""
        if self.tolerance is None:
            return (head_width if self.rank is None else self.rank,)
        return (*range(RANK_STEP, head_width, RANK_STEP), head_width)

    @property
    def stored_dtype(self) -> str:
        """Of the columns q and k."""
        return self.dtype if self.rank is None and self.tolerance is None else INT8

    def describe(self) -> str:
        """Say the settings in words, but for the blocks, see `describe_attention`."""
        return _describe(self.stored_dtype, self.rank, self.tolerance)


def describe_attention(notes: Mapping[str, Any], columns: Mapping[str, ColumnSpec]) -> str:
    """Say how stored attention was asked for, in the words of `AttentionSettings.describe`.

    Args:
        notes: of the source.
        columns: of the source, name → spec.
    """
    dtype = next(spec.dtype for name, spec in columns.items() if not name.endswith(SCALE_SUFFIX))
    return _describe(dtype, notes["rank"] if notes["form"] == "truncated" else None, notes.get("tolerance"))


def _describe(dtype: str, rank: int | None, tolerance: float | None) -> str:
    if tolerance is not None:
        return f"by --attention-kl {tolerance:g}"
    return f"whole in {dtype}" if rank is None else f"by --attention-rank {rank}"


def token_columns(
    model: str, *, tokens: int, width: int, dtype: str, compressor: str | None = None
) -> dict[str, ColumnSpec]:
    """Return the columns of a teacher's tokens, name → spec.

    The class vector has no scales of its own: beside int8 tokens it is float16.

    Args:
        model: name of the teacher.
        tokens: T.
        width: D.
        dtype: ``float16``, ``float32`` or ``int8``.
        compressor: see `ColumnSpec`.
    """
    patch = column_name(model, "patch")
    columns = {patch: ColumnSpec(shape=(tokens, width), dtype=dtype, compressor=compressor)}
    if dtype == INT8:
        columns[scale_column(patch)] = ColumnSpec(shape=(width,), dtype="float32", compressor=compressor)
    columns[column_name(model, "cls")] = ColumnSpec(
        shape=(width,), dtype="float16" if dtype == INT8 else dtype, compressor=compressor
    )
    return columns


def attention_columns(
    model: str,
    *,
    blocks: int,
    heads: int,
    tokens: int,
    rank: int,
    dtype: str,
    compressor: str | None = None,
) -> dict[str, ColumnSpec]:
    """Return the columns of a teacher's queries and keys, name → spec.

    Args:
        model: name of the teacher.
        blocks: L.
        heads: H.
        tokens: T.
        rank: r, components of a head.
        dtype: ``float16``, ``float32`` or ``int8``.
        compressor: see `ColumnSpec`.
    """
    columns = {}
    for kind in ("q", "k"):
        name = column_name(model, kind)
        columns[name] = ColumnSpec(shape=(blocks, heads, tokens, rank), dtype=dtype, compressor=compressor)
        if dtype == INT8:
            columns[scale_column(name)] = ColumnSpec(
                shape=(blocks, heads, rank), dtype="float32", compressor=compressor
            )
    return columns


def bytes_per_image(columns: Mapping[str, ColumnSpec]) -> int:
    """Count the bytes of one image and view in all of these columns, uncompressed, without checksums."""
    return sum(spec.row_bytes for spec in columns.values())
