"""The captions of the demo's images, which lie with them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from repa.data.errors import RepaError
from repa.pipeline.captions.open import open_captions
from repa.pipeline.config import PreprocessConfig
from repa.pipeline.demo.captions import FULL_CAPTIONS, captions_of, told
from repa.pipeline.demo.shapes import DemoImages


@pytest.fixture
def config(tmp_path: Path) -> PreprocessConfig:
    return PreprocessConfig(data="demo", cache=tmp_path / "cache", encoders=("demo",), resolution=64)


def test_drawn_images_have_their_captions_and_labels_agree(config: PreprocessConfig) -> None:
    images = DemoImages(40, seed=0)
    found = open_captions(config, images)
    assert (found.kind, found.count, found.without) == ("demo", 40 * (FULL_CAPTIONS + 1), 0)
    assert [tuple(each) for each in found.of_images] == captions_of(images)
    for label, each in zip(images.labels, found.of_images, strict=True):
        assert {told(caption).shape for caption in each} - {None} == {label}
    fewer = open_captions(replace(config, captions_per_image=2), images)
    assert [list(each) for each in fewer.of_images] == [list(each[:2]) for each in found.of_images]
    assert fewer.left_out == 40 * (FULL_CAPTIONS - 1)


def test_a_column_of_them_is_refused(config: PreprocessConfig) -> None:
    with pytest.raises(RepaError) as caught:
        open_captions(replace(config, caption_column="text"), DemoImages(20))
    assert caught.value.field == "--caption-column"
