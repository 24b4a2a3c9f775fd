"""The prompts of the demo of text, every shape in every colour, and whether images obey them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ...pipeline.demo.captions import say, told
from ...pipeline.demo.seen import seen
from ...pipeline.demo.shapes import CLASS_NAMES, COLOUR_NAMES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

PHRASE = "{a_coloured} {shape} on dark"


def prompts() -> list[str]:
    """Return the prompts, a row of shapes for each colour."""
    return [say(PHRASE, shape, colour) for colour in COLOUR_NAMES for shape in CLASS_NAMES]


@dataclass(frozen=True)
class Obeyed:
    """Which images show what their prompts say, as their pixels tell.

    Attributes:
        shape: bool ``[N]``.
        colour: bool ``[N]``.
    """

    shape: NDArray[np.bool_]
    colour: NDArray[np.bool_]

    @property
    def both(self) -> NDArray[np.bool_]:
        """Shape and colour."""
        return self.shape & self.colour


def obeyed(images: NDArray[np.uint8], texts: Sequence[str]) -> Obeyed:
    """Read from images whether they show what prompts say.

    Args:
        images: uint8 ``[N, 64, 64, 3]``.
        texts: prompts or captions that tell shape and colour, taken in turn.
    """
    found, tells = seen(images), [told(text) for text in texts]
    turns = np.arange(len(images)) % len(tells)
    shapes = np.array([each.shape for each in tells])[turns]
    colours = np.array([each.colour for each in tells])[turns]
    return Obeyed(shape=found.shapes == shapes, colour=found.colours == colours)
