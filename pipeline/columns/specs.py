"""What a storage form is, and its columns, before any number is known. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...data.format.columns import PACKED, SCALE_SUFFIX, ColumnSpec, column_name, scale_column

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ...data.format.factor_layout import FactorLayout

INT8 = "int8"
TRUNCATED = "truncated"
FACTORED = "factored"


@dataclass(frozen=True, kw_only=True)
class AttentionSettings:
    """How the attention of one encoder is to be stored.

    Attributes:
        blocks: blocks whose queries and keys are stored, counted from 1, ascending.
        dtype: ``float16`` or ``float32``: as computed. ``int8``: also the keys centred.
        rank: components of each head that are stored, as int8, in one basis for the data set; None stores
            all.
        tolerance: nats. Factors of each image by itself, of the fewest bytes whose mean divergence is at most
            this in every block and head. With a rank: what an earlier version chose that rank for.
        bytes: of an image and view, at most. Factors of each by itself, which lose least in the worst head.
        compressor: of the columns, see `ColumnSpec`.
    """

    blocks: tuple[int, ...]
    dtype: str
    rank: int | None = None
    tolerance: float | None = None
    bytes: int | None = None
    compressor: str | None = None

    @property
    def factored(self) -> bool:
        """Whether each image has factors of its own."""
        return self.rank is None and (self.tolerance is not None or self.bytes is not None)

    @property
    def stored_dtype(self) -> str:
        """Of the columns q and k."""
        if self.factored:
            return PACKED
        return self.dtype if self.rank is None else INT8

    @property
    def asked(self) -> dict[str, Any]:
        """What a calibration depends on, plain JSON values, as every version has written them."""
        chosen = self.rank if self.tolerance is None else None
        asked: dict[str, Any] = {
            "blocks": list(self.blocks),
            "dtype": self.stored_dtype,
            "rank": chosen,
            "tolerance": self.tolerance,
        }
        return asked | ({"bytes": self.bytes} if self.bytes is not None else {})

    def describe(self) -> str:
        """Say the settings in words, but for the blocks, see `describe_attention`."""
        return _describe(self.stored_dtype, self.rank, self.tolerance, self.bytes)


def describe_attention(notes: Mapping[str, Any], columns: Mapping[str, ColumnSpec]) -> str:
    """Say how stored attention was asked for, in the words of `AttentionSettings.describe`.

    Args:
        notes: of the source.
        columns: of the source, name → spec.
    """
    dtype = next(spec.dtype for name, spec in columns.items() if not name.endswith(SCALE_SUFFIX))
    rank = notes["rank"] if notes["form"] == TRUNCATED else None
    return _describe(dtype, rank, notes.get("tolerance"), notes.get("bytes"))


def _describe(dtype: str, rank: int | None, tolerance: float | None, most_bytes: int | None) -> str:
    if tolerance is not None:
        return f"by --attention-kl {tolerance:g}"
    if most_bytes is not None:
        return f"by --attention-bytes {most_bytes}"
    return f"whole in {dtype}" if rank is None else f"by --attention-rank {rank}"


def recorded_rank(notes: Mapping[str, Any]) -> int | None:
    """Return the rank of stored attention that was asked for, or chosen for a tolerance, None of others."""
    cut = notes["form"] == TRUNCATED or (notes["form"] != FACTORED and notes.get("tolerance") is not None)
    return int(notes["rank"]) if cut else None


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


def factored_columns(
    model: str, layout: FactorLayout, compressor: str | None = None
) -> dict[str, ColumnSpec]:
    """Return the columns of a teacher's queries and keys as factors, name → spec.

    Args:
        model: name of the teacher.
        layout: components of every head.
        compressor: see `ColumnSpec`.
    """
    queries, keys = column_name(model, "q"), column_name(model, "k")
    packed = ColumnSpec(shape=(layout.row_bytes,), dtype=PACKED, compressor=compressor)
    scales = ColumnSpec(shape=(layout.scales,), dtype="float32", compressor=compressor)
    return {queries: packed, scale_column(queries): scales, keys: packed}


def bytes_per_image(columns: Mapping[str, ColumnSpec]) -> int:
    """Count the bytes of one image and view in all of these columns, uncompressed, without checksums."""
    return sum(spec.row_bytes for spec in columns.values())
