"""Reading shape and colour from pixels: right on what is drawn, honest about what shows neither."""

from __future__ import annotations

import numpy as np
import pytest
from repa.pipeline.demo.seen import seen
from repa.pipeline.demo.shapes import CLASS_NAMES, render, scene


def test_shape_and_colour_of_drawn_images_are_read_without_a_mistake() -> None:
    count = 200
    found = seen(np.stack([render(index, 7) for index in range(count)]))
    assert found.shapes.tolist() == [index % len(CLASS_NAMES) for index in range(count)]
    assert found.colours.tolist() == [scene(index, 7).hue for index in range(count)]


def test_blur_and_noise_of_a_decoder_do_not_confuse_it() -> None:
    count = 60
    images = np.stack([render(index, 8) for index in range(count)]).astype(np.float64)
    around = [np.roll(images, (x, y), (1, 2)) for x in (-1, 0, 1) for y in (-1, 0, 1)]
    noise = np.random.default_rng(0).normal(0.0, 12.0, images.shape)
    spoilt = np.clip(np.mean(around, axis=0) + noise, 0, 255).astype(np.uint8)
    found = seen(spoilt)
    assert (found.shapes == np.arange(count) % len(CLASS_NAMES)).mean() > 0.97
    assert (found.colours == [scene(index, 8).hue for index in range(count)]).all()


def test_darkness_shows_nothing_and_half_a_picture_no_shape() -> None:
    dark = np.full((64, 64, 3), 40, np.uint8)
    half = dark.copy()
    half[:, :32] = (240, 70, 70)
    found = seen(np.stack([dark, half]))
    assert found.shapes.tolist() == [-1, -1]
    assert found.colours.tolist() == [-1, 0]


def test_images_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match="64, 64, 3"):
        seen(np.zeros((1, 32, 32, 3), np.uint8))
