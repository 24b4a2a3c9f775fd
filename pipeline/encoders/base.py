"""What the shard loop asks of a teacher."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from ...data.format.manifest import Provenance


class Encoder(Protocol):
    """A frozen teacher on one device.

    Attributes:
        name: of the source, ``dinov2-b``.
        grid: rows and columns of the patch tokens; T = rows · columns.
        width: D.
        depth: number of blocks.
        heads: H of every block.
        head_width: Dh of every head.
        logit_scale: the logits of a block's attention are q·kᵀ times this.
    """

    name: str
    grid: tuple[int, int]
    width: int
    depth: int
    heads: int
    head_width: int
    logit_scale: float

    def encode(self, images: Tensor, attention: tuple[int, ...] = ()) -> dict[str, Tensor]:
        """Features of a batch; the same bits with and without ``attention``.

        Args:
            images: uint8 ``[B, 3, R, R]``, on the teacher's device.
            attention: L blocks whose queries and keys to return as well, counted from 1, ascending.

        Returns:
            ``patch`` float32 ``[B, T, D]``, row-major over the grid, after the final norm, and ``cls``
            float32 ``[B, D]``; with ``attention`` also ``q`` and ``k`` float32 ``[B, L, H, T, Dh]`` of the
            patch tokens, after q/k norms and rotary positions, before the scale.

        Raises:
            RepaError: the model's attention is of a kind whose maps q and k do not give.
        """
        ...

    def provenance(self, batch_size: int) -> Provenance:
        """What the manifest keeps."""
        ...
