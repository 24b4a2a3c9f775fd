"""How the outputs of text encoders are stored, and how far what is stored lies from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ...data.errors import RepaError
from ...data.format.columns import SCALE_SUFFIX, TEXT_STATES, column_name
from ...data.format.int8 import dequantise, quantise
from .encoder import MASK
from .facts import INT8

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from ...data.format.columns import ColumnSpec
    from .facts import TextSizes

_DTYPES = {"float32": torch.float32, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class TextForm:
    """The columns of a text encoder.

    In int8 the tokens of a caption share the scale of a channel, as those of an image do.

    Attributes:
        name: of the source.
        sizes: of the columns.
        dtype: ``float16``, ``float32`` or ``int8``.
        compressor: see `ColumnSpec`.
    """

    name: str
    sizes: TextSizes
    dtype: str
    compressor: str | None = None

    @property
    def columns(self) -> dict[str, ColumnSpec]:
        """Name → spec."""
        return self.sizes.columns(self.name, self.dtype, self.compressor)

    def exact(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what columns are rounded from, column → float32, or the mask itself."""
        return {column_name(self.name, kind): values for kind, values in features.items()}

    def encode(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Encode features as columns ``[B, *shape]``, see `TextEncoder.features`."""
        stored: dict[str, Tensor] = {}
        for kind, values in features.items():
            name = column_name(self.name, kind)
            if kind == MASK:
                stored[name] = values
            elif kind == TEXT_STATES and self.dtype == INT8:
                stored[name], stored[f"{name}{SCALE_SUFFIX}"] = quantise(values)
            else:
                dtype = "float16" if self.dtype == INT8 else self.dtype
                stored[name] = values.to(_DTYPES[dtype]).contiguous()
        return stored

    def restore(self, columns: Mapping[str, Tensor]) -> Tensor:
        """Compute the states float32 ``[B, S, E]`` that columns stand for."""
        name = column_name(self.name, TEXT_STATES)
        scale = columns.get(f"{name}{SCALE_SUFFIX}")
        return columns[name].float() if scale is None else dequantise(columns[name], scale)


def deviation_note(pairs: Iterable[tuple[Tensor, Tensor]], source: str) -> dict[str, Any]:
    """Measure how far stored states lie from those computed in float32.

    Args:
        pairs: exact and restored states ``[B, S, E]``, batch by batch.
        source: its name, for the error.

    Returns:
        Captions; ``cosine_error_mean`` and ``_max``, 1 − cosine of a token's states; ``relative_rms``, the
        root mean square of the differences relative to that of the states.

    Raises:
        RepaError: they are not finite.
    """
    errors, off, size, captions = [], 0.0, 0.0, 0
    for exact, stored in pairs:
        a, b = exact.double(), stored.double()
        lengths = a.norm(dim=-1) * b.norm(dim=-1)
        cosine = torch.where(lengths > 0, (a * b).sum(-1) / lengths.clamp_min(1e-300), 1.0)
        errors.append((1 - cosine).clamp_min(0).cpu().numpy())
        off += float((a - b).square().sum())
        size += float(a.square().sum())
        captions += len(a)
    found = np.concatenate([each.reshape(-1) for each in errors])
    if not (np.isfinite(found).all() and np.isfinite(off)):
        raise RepaError(
            f"the states of {source} are not finite",
            "try --compute-dtype float32 or --feature-dtype float32, and check the weights",
            field="--compute-dtype",
        )
    return {
        "captions": captions,
        "cosine_error_mean": _rounded(found.mean()),
        "cosine_error_max": _rounded(found.max()),
        "relative_rms": _rounded((off / size) ** 0.5 if size else 0.0),
    }


def _rounded(value: float) -> float:
    return float(f"{float(value):.4g}")
