"""The stored attention of a teacher, as tensors.

PyTorch is imported where tensors are made and not before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from .data.errors import CacheError
from .data.format.columns import ATTENTION_KINDS, attention_source, column_name

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from .data.format.manifest import Manifest
    from .data.storage.bucket import CachePath


class Attention(NamedTuple):
    """The attention of one block of a teacher, softmax over the keys of (q · kᵀ) · scale.

    Attributes:
        queries: ``[B, H, T, r]``, in floating point.
        keys: ``[B, H, T, r]``, in floating point.
        scale: of the logits.
    """

    queries: Tensor
    keys: Tensor
    scale: float


def attention_of(
    path: CachePath, manifest: Manifest, batch: Mapping[str, Tensor], teacher: str, block: int
) -> Attention:
    """Return queries and keys of a teacher's block in floating point, decoded where the batch lies.

    Args:
        path: of the cache.
        manifest: of the cache.
        batch: of a loader with the teacher's ``q`` and ``k``, on any device.
        teacher: for example ``dinov2-b``.
        block: one of the blocks whose attention is stored, counted from 1.

    Raises:
        CacheError: the cache has no attention of that block.
    """
    from .trainer.methods.alignment import attention_target

    source = attention_source(teacher)
    provenance = manifest.sources.get(source)
    blocks = [] if provenance is None else list(provenance.notes["blocks"])
    if provenance is None or block not in blocks:
        has = f"blocks {', '.join(map(str, blocks))}" if blocks else "none"
        raise CacheError(
            f"cache {path} has no attention of block {block} of {teacher} (it has {has})",
            f"add it with `repa preprocess --cache {path} --encoder {teacher} --attention …`",
            field=source,
        )
    names = [column_name(teacher, kind) for kind in ATTENTION_KINDS]
    queries, keys = attention_target(batch, names, manifest.columns, provenance.notes, at=blocks.index(block))
    return Attention(queries, keys, provenance.notes["logit_scale"])
