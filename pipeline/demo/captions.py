"""Captions of the demo's drawn images, several of each, made of what is drawn.

The captions of image `index` of seed `seed` are a pure function of the two numbers, as the image is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from .shapes import CLASS_NAMES, COLOUR_NAMES, DemoImages, scene

if TYPE_CHECKING:
    from collections.abc import Sequence

SHAPE_WORDS: Final[dict[str, tuple[str, ...]]] = {
    **{name: (name,) for name in CLASS_NAMES},
    "crescent": ("crescent", "moon"),
    "disc": ("disc", "circle"),
}
"""What a shape may be called."""

COLOUR_WORDS: Final[dict[str, tuple[str, ...]]] = {
    **{name: (name,) for name in COLOUR_NAMES},
    "cyan": ("cyan", "turquoise"),
    "pink": ("pink", "magenta"),
}
"""What a colour may be called."""

FULL_PHRASES: Final = (
    "{a_coloured} {shape}",
    "{a_coloured} {shape} on dark",
    "{a}{shape} in {colour}",
    "the {shape} {be} {colour}",
    "a drawing of {a_coloured} {shape}",
    "{colour} {shape}",
)
"""Phrases that tell shape and colour."""

PARTIAL_PHRASES: Final = ("{a}{shape} on dark", "something {colour}")
"""Phrases that leave the one or the other open."""

FULL_CAPTIONS: Final = 3
"""Captions of an image that tell both; one more tells less."""

_SHAPES = {word: CLASS_NAMES.index(name) for name, words in SHAPE_WORDS.items() for word in words}
_COLOURS = {word: COLOUR_NAMES.index(name) for name, words in COLOUR_WORDS.items() for word in words}


@dataclass(frozen=True)
class Told:
    """What a caption tells of an image.

    Attributes:
        shape: position in `CLASS_NAMES`; None where it is left open.
        colour: position in `COLOUR_NAMES`; None where it is left open.
    """

    shape: int | None
    colour: int | None


def captions(index: int, seed: int) -> tuple[str, ...]:
    """Write the captions of image `index` of the set `seed`, all different.

    Returns:
        `FULL_CAPTIONS` that tell shape and colour, and one that tells one of them.

    Raises:
        ValueError: either is negative.
    """
    what = scene(index, seed)
    # the image's own generator far ahead of what the image takes, so that neither changes with the other
    bits = np.random.Philox(key=np.array([seed, index], dtype=np.uint64), counter=[0, 0, 0, 1])
    generator = np.random.Generator(bits)
    shapes, colours = SHAPE_WORDS[CLASS_NAMES[what.label]], COLOUR_WORDS[COLOUR_NAMES[what.hue]]

    def chosen(among: Sequence[str]) -> str:
        return among[int(generator.random() * len(among))]

    found: dict[str, None] = {}
    for number in generator.random(len(FULL_PHRASES)).argsort().tolist():
        if len(found) < FULL_CAPTIONS:
            # of stripes, which have no article, two phrases may be the same
            found[say(FULL_PHRASES[number], chosen(shapes), chosen(colours))] = None
    return (*found, say(chosen(PARTIAL_PHRASES), chosen(shapes), chosen(colours)))


def captions_of(images: DemoImages) -> list[tuple[str, ...]]:
    """Write the captions of every image of a set, by row."""
    return [captions(index, images.seed) for index in images.indices]


def say(phrase: str, shape: str, colour: str) -> str:
    """Fill a phrase with the words of a shape and of a colour."""
    many = shape == "stripes"
    article = "an" if colour[0] in "aeiou" else "a"
    return phrase.format(
        a="" if many else "a ",
        a_coloured=colour if many else f"{article} {colour}",
        be="are" if many else "is",
        shape=shape,
        colour=colour,
    )


def told(caption: str) -> Told:
    """Return what the words of a caption tell, the first of each kind."""
    words = caption.lower().split()
    return Told(
        shape=next((_SHAPES[word] for word in words if word in _SHAPES), None),
        colour=next((_COLOURS[word] for word in words if word in _COLOURS), None),
    )


def vocabulary() -> list[str]:
    """Return every word that a caption may have, sorted."""
    phrases = [
        say(phrase, shape, colour)
        for phrase in FULL_PHRASES + PARTIAL_PHRASES
        for shape in _SHAPES
        for colour in _COLOURS
    ]
    return sorted({word for phrase in phrases for word in phrase.split()})
