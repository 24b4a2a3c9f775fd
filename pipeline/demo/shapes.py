"""A procedural image set of ten classes, one coloured shape on a dark, softly shaded background, 64x64.

Image `index` of seed `seed` is a pure function of the two numbers, so any image can be drawn without the
others, and another seed gives held-out images. The class of an image is `index % len(CLASS_NAMES)`: a longer
set contains a shorter one of the same seed, and classes stay balanced to within one image.
"""

from __future__ import annotations

import colorsys
import hashlib
import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
from PIL import Image, ImageDraw

from . import RESOLUTION

if TYPE_CHECKING:
    from numpy.typing import NDArray

GENERATOR_VERSION: Final = 2
"""Raise it whenever the drawn pixels change, so that a cache of older images is recognised as different."""

HUES: Final = (0.00, 0.08, 0.15, 0.36, 0.52, 0.88)
COLOUR_NAMES: Final = ("red", "orange", "yellow", "green", "cyan", "pink")
"""Of the hues, in their order."""

SUPERSAMPLING: Final = 4

Point = tuple[float, float]
Polygon = list[Point]


def _box(left: float, top: float, width: float, height: float) -> Polygon:
    """Return the corners of an upright rectangle."""
    return [(left, top), (left + width, top), (left + width, top + height), (left, top + height)]


def _circle(x: float, radius: float) -> Polygon:
    """Return a circle around `(x, 0)` as a polygon of 72 corners."""
    turns = [2.0 * math.pi * step / 72 for step in range(72)]
    return [(x + radius * math.cos(turn), radius * math.sin(turn)) for turn in turns]


def _regular(corners: int, radii: list[float]) -> Polygon:
    """Return corners at equal angles, the first on top.

    Their distances from the middle run through `radii`.
    """
    turns = [2.0 * math.pi * step / corners - math.pi / 2 for step in range(corners)]
    lengths = [radii[step % len(radii)] for step in range(corners)]
    return [(r * math.cos(turn), r * math.sin(turn)) for r, turn in zip(lengths, turns, strict=True)]


def _heart() -> Polygon:
    """Return the heart curve x = 16 sin³t, y = 13 cos t - 5 cos 2t - 2 cos 3t - cos 4t, made small."""
    points: Polygon = []
    for step in range(72):
        t = 2.0 * math.pi * step / 72
        y = 13.0 * math.cos(t) - 5.0 * math.cos(2.0 * t) - 2.0 * math.cos(3.0 * t) - math.cos(4.0 * t)
        points.append((math.sin(t) ** 3 * 1.05, -(y + 2.5) / 15.0))
    return points


OUTLINES: Final[dict[str, list[tuple[Polygon, bool]]]] = {
    "crescent": [(_circle(0.0, 1.0), True), (_circle(0.5, 0.82), False)],
    "cross": [(_box(-1.0, -0.32, 2.0, 0.64), True), (_box(-0.32, -1.0, 0.64, 2.0), True)],
    "diamond": [([(0.0, -1.15), (0.68, 0.0), (0.0, 1.15), (-0.68, 0.0)], True)],
    "disc": [(_circle(0.0, 0.95), True)],
    "heart": [(_heart(), True)],
    "ring": [(_circle(0.0, 1.0), True), (_circle(0.0, 0.52), False)],
    "square": [(_box(-0.82, -0.82, 1.64, 1.64), True)],
    "star": [(_regular(10, [1.15, 0.48]), True)],
    "stripes": [(_box(-0.95, -0.95 + 0.76 * row, 1.9, 0.38), True) for row in range(3)],
    "triangle": [([(0.0, -1.0), (1.05, 0.8), (-1.05, 0.8)], True)],
}
"""Shapes of about unit radius, y down: polygons to fill (True) or to clear again (False), in order."""

CLASS_NAMES: Final = tuple(sorted(OUTLINES))
"""In alphabetical order, so that keys sorted as text are grouped by rising label."""


@dataclass(frozen=True, kw_only=True)
class Scene:
    """All that is random about one image.

    Lengths are in pixels, the angle in radians, colours RGB in [0, 1]. `hue` is the position in `HUES` of the
    one from which the shape's colour differs a little.
    """

    label: int
    hue: int
    centre: Point
    radius: float
    angle: float
    colour: tuple[float, float, float]
    top: tuple[float, float, float]
    bottom: tuple[float, float, float]


def scene(index: int, seed: int) -> Scene:
    """Draw the random parts of image `index` from a counter-based generator keyed by `(seed, index)`.

    Raises:
        ValueError: either is negative.
    """
    if index < 0 or seed < 0:
        raise ValueError(f"index and seed must not be negative, got index={index}, seed={seed}")
    # only uniform doubles: the same bits on every platform, which other distributions do not promise
    generator = np.random.Generator(np.random.Philox(key=np.array([seed, index], dtype=np.uint64)))
    draw = generator.random(9).tolist()

    def between(low: float, high: float, uniform: float) -> float:
        return low + (high - low) * uniform

    half = RESOLUTION / 2
    position = int(draw[0] * len(HUES))
    hue = HUES[position] + between(-0.015, 0.015, draw[1])
    shade = between(0.10, 0.24, draw[7])
    return Scene(
        label=index % len(CLASS_NAMES),
        hue=position,
        centre=(half + between(-2.0, 2.0, draw[2]), half + between(-2.0, 2.0, draw[3])),
        radius=between(20.5, 23.0, draw[4]),
        angle=math.radians(between(-5.0, 5.0, draw[5])),
        colour=colorsys.hsv_to_rgb(hue % 1.0, 0.72, between(0.85, 1.0, draw[6])),
        top=colorsys.hsv_to_rgb(0.63, 0.35, shade + 0.08),
        bottom=colorsys.hsv_to_rgb(0.63 + between(-0.08, 0.08, draw[8]), 0.35, shade - 0.05),
    )


def coverage(index: int, seed: int) -> NDArray[np.float32]:
    """Compute the fraction of each pixel that the shape covers, float32 `[64, 64]` in [0, 1]."""
    return coverage_of(scene(index, seed))


def render(index: int, seed: int) -> NDArray[np.uint8]:
    """Draw image `index` of the set `seed`, uint8 `[64, 64, 3]`."""
    what = scene(index, seed)
    height = np.linspace(0.0, 1.0, RESOLUTION)[:, None, None]
    background = np.array(what.top) * (1.0 - height) + np.array(what.bottom) * height
    covered = coverage_of(what)[:, :, None].astype(np.float64)
    image = background * (1.0 - covered) + np.array(what.colour) * covered
    return np.asarray(np.rint(image * 255.0), dtype=np.uint8)


class DemoImages:
    """Image source over the drawn set of `count` images.

    Rows are sorted by key and therefore grouped by class.

    Attributes:
        indices: of the images, by row.
        keys: `"<class>/<number>.png"`, ascending.
        labels: int32 `[count]`, position of the class in `class_names`.
        fingerprint: `"sha256:…"` of generator version, resolution, classes, seed and count.
    """

    name = "demo"
    kind = "demo"
    skipped: tuple[tuple[str, str], ...] = ()
    remarks: tuple[str, ...] = ()
    resolution = RESOLUTION

    def __init__(self, count: int = 2048, seed: int = 0) -> None:
        if count < 1:
            raise ValueError(f"count must be at least 1, got {count}")
        classes = len(CLASS_NAMES)
        if count > 100_000 * classes:
            raise ValueError(f"count must be at most {100_000 * classes}, got {count}: five digits a class")
        self.seed = seed
        self.class_names: list[str] = list(CLASS_NAMES)
        self.indices: list[int] = [
            index for label in range(classes) for index in range(label, count, classes)
        ]
        self.keys: list[str] = [f"{CLASS_NAMES[i % classes]}/{i // classes:05d}.png" for i in self.indices]
        self.labels: NDArray[np.int32] = np.array([i % classes for i in self.indices], dtype=np.int32)
        description = {
            "source": self.name,
            "generator_version": GENERATOR_VERSION,
            "resolution": RESOLUTION,
            "class_names": self.class_names,
            "seed": seed,
            "count": count,
        }
        canonical = json.dumps(description, sort_keys=True, separators=(",", ":"))
        self.fingerprint = "sha256:" + hashlib.sha256(canonical.encode()).hexdigest()

    def __len__(self) -> int:
        """Count the images."""
        return len(self.keys)

    def load(self, i: int) -> Image.Image:
        """Draw the image of row `i` as an RGB PIL image of 64x64 pixels."""
        return Image.fromarray(render(self.indices[i], self.seed))


def coverage_of(what: Scene) -> NDArray[np.float32]:
    """Draw the shape as a mask at a multiple of the resolution and average it down."""
    side = RESOLUTION * SUPERSAMPLING
    mask = Image.new("L", (side, side), 0)
    canvas = ImageDraw.Draw(mask)
    cosine, sine = math.cos(what.angle), math.sin(what.angle)
    for polygon, filled in OUTLINES[CLASS_NAMES[what.label]]:
        corners = [
            (
                (what.centre[0] + what.radius * (cosine * x - sine * y)) * SUPERSAMPLING,
                (what.centre[1] + what.radius * (sine * x + cosine * y)) * SUPERSAMPLING,
            )
            for x, y in polygon
        ]
        canvas.polygon(corners, fill=255 if filled else 0)
    fine = np.asarray(mask, dtype=np.float32).reshape(RESOLUTION, SUPERSAMPLING, RESOLUTION, SUPERSAMPLING)
    return np.asarray(fine.mean(axis=(1, 3)) / 255.0, dtype=np.float32)
