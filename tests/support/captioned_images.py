"""A folder of small pictures with captions as COCO writes them down."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from pathlib import Path

CAPTIONS = [
    ["a red heart", "a heart on dark"],
    ["a blue star"],
    [],
    ["a red heart", "two star"],
    ["a thing of kind"],
    ["a blue star ", "a star on light", "two blue star on dark"],
]
TEXTS = [
    "",
    "a red heart",
    "a heart on dark",
    "a blue star",
    "two star",
    "a thing of kind",
    "a star on light",
    "two blue star on dark",
]
"""The distinct ones, in the order of the images."""


def save_images(folder: Path, count: int = len(CAPTIONS)) -> None:
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for number in range(count):
        pixels = generator.integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"picture_{number:03d}.png")


def save_coco(path: Path, captions: list[list[str]] = CAPTIONS) -> None:
    images = [{"id": 10 * row, "file_name": f"picture_{row:03d}.png"} for row in range(len(captions))]
    annotations = [
        {"image_id": 10 * row, "id": 100 * row + each, "caption": caption}
        for row, own in enumerate(captions)
        for each, caption in enumerate(own)
    ]
    images.append({"id": 7, "file_name": "of_another_set.png"})
    annotations.insert(0, {"image_id": 7, "id": 1, "caption": "a stranger"})
    path.write_text(json.dumps({"info": {}, "images": images, "annotations": annotations}))
