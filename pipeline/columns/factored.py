"""The storage form of attention as factors of each image's own logits, see `factoring`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from ...data.errors import CacheError
from ...data.format.columns import attention_source, column_name, scale_column
from ...data.format.factor_layout import FactorLayout, attention_axes
from ...data.format.factors import unpack
from .factoring import factorise
from .forms import AttentionForm, restore
from .slabs import images_at_once
from .specs import FACTORED, factored_columns

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ...data.format.columns import ColumnSpec
    from ..encoders.base import Encoder
    from .specs import AttentionSettings


@dataclass(frozen=True, kw_only=True)
class FactoredForm:
    """``<model>/q`` and ``<model>/k`` as factors, in int8 and int4.

    Attributes:
        model: name of the teacher.
        blocks: whose queries and keys, counted from 1.
        head_width: Dh.
        logit_scale: of the teacher.
        layout: components of every head.
        basis: that an image's own is found from, float64 ``[L, H, Dh, Dh]``, see `start_basis`.
        compressor: see `ColumnSpec`.
    """

    model: str
    blocks: tuple[int, ...]
    head_width: int
    logit_scale: float
    layout: FactorLayout
    basis: Tensor
    compressor: str | None = None
    dtype: str = "uint8"

    @property
    def heads(self) -> int:
        """Heads of a block, H."""
        return self.layout.heads

    @property
    def rank(self) -> int:
        """The most components that a head has, r."""
        return max(self.layout.rank(block) for block in range(len(self.blocks)))

    @property
    def columns(self) -> dict[str, ColumnSpec]:
        """Name → spec."""
        return factored_columns(self.model, self.layout, self.compressor)

    @property
    def notes(self) -> dict[str, object]:
        """What who reads the columns must know."""
        return {
            "blocks": list(self.blocks),
            "head_width": self.head_width,
            "rank": self.rank,
            "form": FACTORED,
            "keys": "centred",
            **self.layout.as_notes,
        }

    def exact(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the queries and keys that columns stand for, float32 ``[B, L, H, T, Dh]``."""
        return {column_name(self.model, kind): features[kind] for kind in ("q", "k")}

    def encode(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Encode ``q`` and ``k``, each float32 ``[B, L, H, T, Dh]``, as columns."""
        queries, keys = features["q"], features["k"]
        basis = self.basis.to(queries.device)
        # a CPU computes an image at a time: its caches hold one, and its bytes are its own whatever the batch
        size = 1 if queries.device.type == "cpu" else images_at_once(self.heads, self.layout.tokens)
        parts: list[list[Tensor]] = [[], [], []]
        for start in range(0, len(queries), size):
            images = slice(start, start + size)
            rows = [
                factorise(
                    queries[images, block],
                    keys[images, block],
                    basis[block],
                    self.layout,
                    block,
                    self.logit_scale,
                )
                for block in range(len(self.blocks))
            ]
            for part, of_blocks in zip(parts, zip(*rows, strict=True), strict=True):
                part.append(torch.cat(of_blocks, dim=1))
        names = column_name(self.model, "q"), column_name(self.model, "k")
        stored = (torch.cat(part) for part in parts)
        return dict(zip((*names, scale_column(names[0])), stored, strict=True))

    def decode(self, columns: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Decode queries and keys, each float32 ``[B, L, H, T, r]``, as a reader has them."""
        return restore_factors(self.model, self.layout, columns)


Form: TypeAlias = AttentionForm | FactoredForm
"""A form that attention may be stored in."""


def restore_factors(model: str, layout: FactorLayout, columns: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Decode all blocks of packed columns, each float32 ``[B, L, H, T, r]``.

    Args:
        model: name of the teacher.
        layout: of the cache.
        columns: as stored, name → values.
    """
    names = column_name(model, "q"), column_name(model, "k")
    rows = (columns[names[0]], columns[names[1]], columns[scale_column(names[0])])
    blocks = range(len(layout.components))
    rank = max(layout.rank(block) for block in blocks)
    decoded = [
        [F.pad(each, (0, rank - each.shape[-1])) for each in unpack(layout, block, *rows)] for block in blocks
    ]
    queries, keys = (torch.stack(each, dim=1) for each in zip(*decoded, strict=True))
    return queries, keys


def restore_attention(
    model: str, notes: Mapping[str, Any], columns: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """Decode stored queries and keys of any form, each float32 ``[B, L, H, T, r]``.

    Args:
        model: name of the teacher.
        notes: of the source.
        columns: as stored, name → values.

    Raises:
        CacheError: the notes describe no factors of so many bytes and scales.
    """
    if notes["form"] == FACTORED:
        queries = column_name(model, "q")
        shapes = [columns[name].shape[1:] for name in (queries, scale_column(queries))]
        if attention_axes(shapes[0], notes, shapes[1]) is None:
            raise CacheError(
                f"what the manifest notes of {attention_source(model)} does not fit the bytes of its rows",
                f"the manifest is damaged: write {attention_source(model)} again",
                field="components",
            )
        return restore_factors(model, FactorLayout.of_notes(notes), columns)
    return restore(model, "q", columns), restore(model, "k", columns)


def factored_form(
    encoder: Encoder, settings: AttentionSettings, layout: FactorLayout, basis: Tensor
) -> FactoredForm:
    """Make the form of an encoder's attention as factors.

    Args:
        encoder: the teacher.
        settings: what is asked for.
        layout: components of every head.
        basis: see `FactoredForm`.
    """
    return FactoredForm(
        model=encoder.name,
        blocks=settings.blocks,
        head_width=encoder.head_width,
        logit_scale=encoder.logit_scale,
        layout=layout,
        basis=basis,
        compressor=settings.compressor,
    )
