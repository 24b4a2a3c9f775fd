"""Captions of the demo's images: true of what is drawn, several an image, the same every time."""

from __future__ import annotations

import numpy as np
import pytest
from repa.pipeline.demo.captions import (
    COLOUR_WORDS,
    FULL_CAPTIONS,
    FULL_PHRASES,
    SHAPE_WORDS,
    Told,
    captions,
    say,
    told,
    vocabulary,
)
from repa.pipeline.demo.seen import seen
from repa.pipeline.demo.shapes import CLASS_NAMES, COLOUR_NAMES, HUES, render

COUNT = 120
SEED = 5


def test_captions_are_true_of_the_pixels() -> None:
    shown = seen(np.stack([render(index, SEED) for index in range(COUNT)]))
    for index in range(COUNT):
        for caption in captions(index, SEED):
            tells = told(caption)
            assert tells.shape in (None, shown.shapes[index]), caption
            assert tells.colour in (None, shown.colours[index]), caption


def test_an_image_has_different_captions_of_which_the_last_leaves_something_open() -> None:
    phrases = set()
    for index in range(COUNT):
        own = captions(index, SEED)
        assert len(own) == len(set(own)) == FULL_CAPTIONS + 1
        full = [told(caption) for caption in own[:-1]]
        assert all(tells.shape is not None and tells.colour is not None for tells in full)
        assert (told(own[-1]).shape is None) != (told(own[-1]).colour is None)
        phrases.add(tuple(len(caption.split()) for caption in own))
    assert len(phrases) > 10


def test_captions_are_a_pure_function_of_index_and_seed() -> None:
    in_order = [captions(index, 3) for index in range(24)]
    assert [captions(index, 3) for index in reversed(range(24))] == in_order[::-1]
    assert sum(captions(index, 4) == in_order[index] for index in range(24)) < 3
    with pytest.raises(ValueError, match="must not be negative"):
        captions(-1, 0)


def test_every_shape_colour_and_word_is_told() -> None:
    every = [caption for index in range(600) for caption in captions(index, 0)]
    assert {word for caption in every for word in caption.split()} == set(vocabulary())
    tells = {told(caption) for caption in every}
    full = {(each.shape, each.colour) for each in tells if None not in (each.shape, each.colour)}
    assert len(full) == len(CLASS_NAMES) * len(COLOUR_NAMES)


@pytest.mark.parametrize("phrase", FULL_PHRASES)
def test_a_phrase_tells_what_it_was_filled_with(phrase: str) -> None:
    for shape, shape_words in enumerate(SHAPE_WORDS[name] for name in CLASS_NAMES):
        for colour, colour_words in enumerate(COLOUR_WORDS[name] for name in COLOUR_NAMES):
            for words in ((shape_words[0], colour_words[0]), (shape_words[-1], colour_words[-1])):
                assert told(say(phrase, *words)) == Told(shape, colour)


@pytest.mark.parametrize(
    ("shape", "colour", "caption"),
    [
        ("heart", "orange", "an orange heart"),
        ("stripes", "red", "red stripes"),
        ("cross", "red", "a red cross"),
    ],
)
def test_articles(shape: str, colour: str, caption: str) -> None:
    assert say(FULL_PHRASES[0], shape, colour) == caption


def test_there_is_a_name_for_every_hue() -> None:
    assert len(COLOUR_NAMES) == len(HUES)
    assert told("nothing that we know") == told("") == Told(None, None)
