"""The contract of a teacher, which gives facts before its weights are there, and features then."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Final, Protocol

from ...data.errors import RepaError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

    from ...data.format.manifest import Provenance

IMAGENET: Final = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Mean and standard deviation per channel that most image models expect."""


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
        """Compute the features of a batch. They are the same bits with and without ``attention``.

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

    def in_float32(self) -> Encoder:
        """Return the same network computing in float32."""
        ...

    def provenance(self, batch_size: int) -> Provenance:
        """Return what the manifest keeps."""
        ...


class Teacher(ABC):
    """What is known of a teacher without its weights.

    Every teacher is scaled so that its tokens lie on the patches of SiT/2: one token per 16 pixels of the
    cropped image (8 latent positions per 64 pixels, two per token). A teacher with patches of p pixels
    therefore sees p · R / 16 pixels of an image of side R: ViT/14 sees 224 at R = 256 and 448 at 512 (the
    rule of the reference, sihyun-yu/REPA `train.py`), ViT/16 sees R itself.

    Attributes:
        name: what ``--encoder`` takes; the name of the source in a cache.
        width: D of its tokens.
        depth: number of blocks.
        heads: H of every block; 0 where queries and keys cannot be had.
        patch_size: side of a patch, in pixels of what the teacher sees.
        pixels_per_token: side of the square of the cropped image a token stands for.
        largest_resolution: side of the largest cropped image whose tokens its table of positions may be
            resampled for; None where it knows no largest.
    """

    name: str
    width: int
    depth: int
    heads: int
    patch_size: int
    pixels_per_token: int
    largest_resolution: int | None

    def grid(self, resolution: int) -> tuple[int, int]:
        """Return rows and columns of the patch tokens of an image of side ``resolution``.

        Raises:
            RepaError: the tokens would not lie on whole patches.
        """
        if resolution < self.pixels_per_token or resolution % self.pixels_per_token:
            raise RepaError(
                f"resolution {resolution} gives encoder {self.name} no whole grid: it has one token per "
                f"{self.pixels_per_token} pixels",
                f"give --resolution a multiple of {self.pixels_per_token}",
                field="--resolution",
            )
        return resolution // self.pixels_per_token, resolution // self.pixels_per_token

    def input_size(self, resolution: int) -> int:
        """Return the side in pixels of what the teacher sees of an image of side ``resolution``.

        Raises:
            RepaError: see `grid`.
        """
        return self.patch_size * self.grid(resolution)[0]

    def require_resolution(self, resolution: int) -> None:
        """Refuse images that are larger than the teacher was trained for.

        Such features would be finite and wrong, which nobody would notice.

        Raises:
            RepaError: they are; says which teachers take them.
        """
        largest = self.largest_resolution
        if largest is None or resolution <= largest:
            return
        side, most = self.grid(resolution)[0], self.grid(largest)[0]
        raise RepaError(
            f"encoder {self.name} has positions for {most}×{most} tokens, as of {largest}² images, and those "
            f"of {resolution}² have {side}×{side}",
            f"take a teacher of any size, as dinov2-b or dinov3-b, or --resolution {largest}",
            field="--encoder",
        )

    @property
    def head_width(self) -> int:
        """Dh of every head, 0 without heads."""
        return self.width // self.heads if self.heads else 0


class OwnTeacher(Teacher):
    """A teacher from outside the package, which is a torch module and what to do with it.

    A subclass sets ``name`` (lower-case letters, digits, ``.``, ``_``, ``-``), ``width`` and what else is not
    as here; its weights come from ``--weights NAME=FILE``, or are drawn by ``--random-weights``.

    Attributes:
        normalisation: mean and standard deviation per channel, of pixels in [0, 1].
    """

    depth: int = 1
    heads: int = 0
    patch_size: int = 16
    pixels_per_token: int = 16
    largest_resolution: int | None = None
    normalisation: tuple[tuple[float, float, float], tuple[float, float, float]] = IMAGENET

    @abstractmethod
    def build(self) -> nn.Module:
        """Return the network, its weights as they are drawn."""

    @abstractmethod
    def features(self, module: nn.Module, pixels: Tensor) -> Mapping[str, Tensor]:
        """Return the features of a batch.

        Args:
            module: from `build`, with its weights, on a device, not to be trained.
            pixels: normalised, float32 ``[B, 3, S, S]``, S as `input_size` says.

        Returns:
            ``patch`` ``[B, T, D]``, row-major over the grid of one token per ``pixels_per_token`` pixels, and
            ``cls`` ``[B, D]``, of any float dtype.
        """
