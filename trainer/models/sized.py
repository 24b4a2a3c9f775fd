"""Architectures that come in published sizes, named ``<family>-<size>/<patch>`` as ``SiT-B/2``."""

from __future__ import annotations

import re
from collections.abc import Mapping  # noqa: TC003 - annotations are read when a checkpoint's fields are typed
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ...data.errors import RepaError
from .base import BackboneConfig

if TYPE_CHECKING:
    from typing import Self


@dataclass(frozen=True, kw_only=True)
class SizedConfig(BackboneConfig):
    """Architecture of a square grid of patches, one of the sizes of its family.

    A family says what its class attributes are, and its own fields, which are those of a size.

    Attributes:
        family: what its names begin with.
        sizes: letter of a size → its fields, as a dataclass.
        letters: of the sizes that the family has, or their depths.
        patch_sizes: that the family has.
        multiple: the side of the grid is a multiple of it.
        patch_size: side of a patch in latent pixels.
        size_name: letter of the size, None if it is none of `sizes`.
    """

    family: ClassVar[str]
    sizes: ClassVar[Mapping[str, Any]]
    letters: ClassVar[tuple[str, ...]]
    patch_sizes: ClassVar[tuple[int, ...]] = (1, 2, 4, 8)
    multiple: ClassVar[int] = 1

    patch_size: int
    size_name: str | None = None

    def __init_subclass__(cls) -> None:
        """Say what the names of a family look like."""
        super().__init_subclass__()
        example = "B" if "B" in cls.letters else cls.letters[-1]
        cls.names = (
            f"{cls.family}-<size>/<patch> with size {', '.join(cls.letters)} and patch "
            f"{', '.join(map(str, cls.patch_sizes))}, for example {cls.family}-{example}/2"
        )

    @classmethod
    def parse(cls, name: str) -> tuple[str, int]:
        """Return letter of the size and patch of a name.

        Raises:
            RepaError: the name is none of the family's; the remedy says what they look like.
        """
        match = re.fullmatch(rf"{cls.family}-([A-Z]+|[0-9]+)/([0-9]+)", name)
        if match and match[1] in cls.letters and match[2] in map(str, cls.patch_sizes):
            return match[1], int(match[2])
        raise RepaError(f"model {name!r} is unknown", f"a name is {cls.names}", field="--model")

    @classmethod
    def knows(cls, name: str) -> bool:
        """Return whether a name is one of the family's."""
        try:
            cls.parse(name)
        except RepaError:
            return False
        return True

    @classmethod
    def named(
        cls, name: str, *, input_size: int, in_channels: int = 4, num_classes: int = 1000, **settings: Any
    ) -> Self:
        """Return the architecture of a name, see `BackboneConfig.named`.

        Raises:
            RepaError: the name is unknown, or its patch does not fit the latent's side.
        """
        letter, patch_size = cls.parse(name)
        return cls(
            **vars(cls.sizes[letter]),
            patch_size=patch_size,
            input_size=input_size,
            in_channels=in_channels,
            num_classes=num_classes,
            size_name=letter,
            **settings,
        )

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the patches."""
        side = self.input_size // self.patch_size
        return side, side

    @property
    def fitting_patches(self) -> tuple[int, ...]:
        """The family's patches that fit the latent."""
        return tuple(each for each in self.patch_sizes if self.input_size % (self.multiple * each) == 0)

    @property
    def siblings(self) -> tuple[tuple[tuple[int, int], str], ...]:
        """Names of this size on this latent, each after the grid of its tokens."""
        letter = self.size_name or "<size>"
        return tuple(
            ((self.input_size // patch,) * 2, f"{self.family}-{letter}/{patch}")
            for patch in self.fitting_patches
        )
