"""Storage forms at work, from float32 outputs of a teacher to columns, and back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...data.format.columns import SCALE_SUFFIX, column_name
from ...data.format.int8 import dequantise, quantise
from .specs import INT8, TRUNCATED, AttentionSettings, attention_columns, token_columns
from .truncation import centred, project

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ...data.format.columns import ColumnSpec
    from ..encoders.base import Encoder

_DTYPES = {"float32": torch.float32, "float16": torch.float16}


def _store(model: str, kind: str, values: Tensor, dtype: str) -> dict[str, Tensor]:
    """Cast a column's values to its dtype, and compute those of its scales."""
    name = column_name(model, kind)
    if dtype != INT8:
        return {name: values.to(_DTYPES[dtype]).contiguous()}
    stored, scale = quantise(values)
    return {name: stored, f"{name}{SCALE_SUFFIX}": scale}


def restore(model: str, kind: str, columns: Mapping[str, Tensor]) -> Tensor:
    """Compute the float32 numbers that a column stands for.

    Args:
        model: name of the teacher.
        kind: ``patch``, ``q`` or ``k``.
        columns: as stored, name → values; with the scales of an int8 column.
    """
    name = column_name(model, kind)
    scale = columns.get(f"{name}{SCALE_SUFFIX}")
    return columns[name].float() if scale is None else dequantise(columns[name], scale)


@dataclass(frozen=True, kw_only=True)
class TokenForm:
    """``<model>/patch`` and ``<model>/cls``.

    Attributes:
        model: name of the teacher.
        tokens: T.
        width: D.
        dtype: ``float16``, ``float32`` or ``int8``.
        compressor: see `ColumnSpec`.
    """

    model: str
    tokens: int
    width: int
    dtype: str
    compressor: str | None = None

    @property
    def columns(self) -> dict[str, ColumnSpec]:
        """Name → spec."""
        return token_columns(
            self.model, tokens=self.tokens, width=self.width, dtype=self.dtype, compressor=self.compressor
        )

    def exact(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what columns are rounded from, ``patch`` float32 ``[B, T, D]`` and ``cls`` ``[B, D]``."""
        return {column_name(self.model, kind): features[kind] for kind in ("patch", "cls")}

    def encode(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Encode ``patch`` float32 ``[B, T, D]`` and ``cls`` float32 ``[B, D]`` as columns."""
        whole = "float16" if self.dtype == INT8 else self.dtype
        return {
            **_store(self.model, "patch", features["patch"], self.dtype),
            **_store(self.model, "cls", features["cls"], whole),
        }

    def decode(self, columns: Mapping[str, Tensor]) -> Tensor:
        """Patch tokens float32 ``[B, T, D]`` as a reader has them."""
        return restore(self.model, "patch", columns)


@dataclass(frozen=True, kw_only=True)
class AttentionForm:
    """``<model>/q`` and ``<model>/k``.

    Attributes:
        model: name of the teacher.
        blocks: whose queries and keys, counted from 1.
        heads: H.
        tokens: T.
        head_width: Dh.
        dtype: ``float16`` or ``float32``: as computed; ``int8``: also the keys centred.
        projections: of queries and of centred keys, each float32 ``[L, H, r, Dh]``; None stores them whole.
        compressor: see `ColumnSpec`.
    """

    model: str
    blocks: tuple[int, ...]
    heads: int
    tokens: int
    head_width: int
    dtype: str
    projections: tuple[Tensor, Tensor] | None = None
    compressor: str | None = None

    @property
    def rank(self) -> int:
        """Numbers of a head, r."""
        return self.head_width if self.projections is None else self.projections[0].shape[2]

    @property
    def columns(self) -> dict[str, ColumnSpec]:
        """Name → spec."""
        return attention_columns(
            self.model,
            blocks=len(self.blocks),
            heads=self.heads,
            tokens=self.tokens,
            rank=self.rank,
            dtype=self.dtype,
            compressor=self.compressor,
        )

    @property
    def notes(self) -> dict[str, object]:
        """What who reads the columns must know."""
        return {
            "blocks": list(self.blocks),
            "head_width": self.head_width,
            "rank": self.rank,
            "form": "exact" if self.projections is None else TRUNCATED,
            "keys": "centred" if self.dtype == INT8 else "as computed",
        }

    def exact(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Compute what columns are rounded from, float32 ``[B, L, H, T, r]``, centred and cut."""
        queries, keys = features["q"], features["k"]
        if self.dtype == INT8:
            keys = centred(keys)
        if self.projections is not None:
            to_query, to_key = (each.to(queries.device) for each in self.projections)
            queries, keys = project(queries, to_query), project(keys, to_key)
        return {column_name(self.model, "q"): queries, column_name(self.model, "k"): keys}

    def encode(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Encode ``q`` and ``k``, each float32 ``[B, L, H, T, Dh]``, as columns."""
        exact = self.exact(features)
        stored: dict[str, Tensor] = {}
        for kind in ("q", "k"):
            stored |= _store(self.model, kind, exact[column_name(self.model, kind)], self.dtype)
        return stored

    def decode(self, columns: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Decode queries and keys, each float32 ``[B, L, H, T, r]``, as a reader has them."""
        return restore(self.model, "q", columns), restore(self.model, "k", columns)


def token_form(encoder: Encoder, dtype: str, compressor: str | None) -> TokenForm:
    """Make the form of an encoder's tokens."""
    return TokenForm(
        model=encoder.name,
        tokens=encoder.grid[0] * encoder.grid[1],
        width=encoder.width,
        dtype=dtype,
        compressor=compressor,
    )


def attention_form(
    encoder: Encoder, settings: AttentionSettings, projections: tuple[Tensor, Tensor] | None
) -> AttentionForm:
    """Make the form of an encoder's attention.

    Args:
        encoder: the teacher.
        settings: what is asked for.
        projections: see `AttentionForm`.
    """
    return AttentionForm(
        model=encoder.name,
        blocks=settings.blocks,
        heads=encoder.heads,
        tokens=encoder.grid[0] * encoder.grid[1],
        head_width=encoder.head_width,
        dtype=settings.stored_dtype,
        projections=projections,
        compressor=settings.compressor,
    )
