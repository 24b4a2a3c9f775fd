"""Images that are matched to the rows of imported latents."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from foreign_layouts import COUNT, image_keys, write_fast_dit, write_images, write_lightningdit
from repa.data.errors import CacheError, RepaError
from repa.data.format.opening import open_manifest
from repa.data.testing import folder_contents
from repa.data.upkeep.imported import settle_images
from repa.pipeline.config import PreprocessConfig
from repa.pipeline.estimate import measure_encoding
from repa.pipeline.foreign.base import ForeignOptions
from repa.pipeline.foreign.open import open_foreign
from repa.pipeline.foreign.write import ImportSettings, import_latents
from repa.pipeline.images.matched import MatchedImages
from repa.pipeline.images.open import open_source
from repa.pipeline.plan import make_plan


def nothing(done: int, total: int) -> None:
    del done, total


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A cache of images whose order is another than that of their names."""
    keys = [f"{folder}/{number}.png" for folder in ("a", "a-b") for number in range(COUNT // 2)]
    images = write_images(tmp_path / "images", keys)
    write_lightningdit(tmp_path / "latents")
    latents = open_foreign("lightningdit", tmp_path / "latents", ForeignOptions(data=str(images)))
    import_latents(latents, tmp_path / "cache", ImportSettings(resolution=64), nothing, nothing)
    return tmp_path / "cache"


def matched(cache: Path, data: Path, labels: str = "auto") -> MatchedImages:
    return MatchedImages(open_source(str(data), labels=labels), cache, open_manifest(cache))


def test_each_row_gets_the_image_of_its_key(cache: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    found = matched(cache, images)
    source = open_source(str(images))
    assert list(found.keys) != list(source.keys), "the cache has another order"
    again = pickle.loads(pickle.dumps(found))
    for row, key in enumerate(found.keys):
        expected = np.asarray(source.load(source.keys.index(key)))
        assert np.array_equal(np.asarray(again.load(row)), expected)
    assert (len(found), found.fingerprint) == (COUNT, open_manifest(cache).source_fingerprint)


def test_images_without_a_row_are_left_out_and_said(cache: Path, tmp_path: Path) -> None:
    write_images(tmp_path / "images", ["a/more.png", "a-b/more.png", "z/more.png"])
    found = matched(cache, tmp_path / "images")
    assert len(found) == COUNT
    assert any("3 images" in remark for remark in found.remarks)


def test_a_row_without_an_image_is_refused(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "images" / "a" / "3.png").unlink()
    with pytest.raises(CacheError) as caught:
        matched(cache, tmp_path / "images")
    assert caught.value.field == "--data"
    assert "a/3.png" in caught.value.what


def test_other_classes_are_refused(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(CacheError) as caught:
        matched(cache, tmp_path / "images", labels="none")
    assert caught.value.field == "--labels"


def test_images_that_were_mirrored_at_random_fit_no_row(tmp_path: Path) -> None:
    write_fast_dit(tmp_path / "latents")
    latents = open_foreign("fast-dit", tmp_path / "latents", ForeignOptions())
    import_latents(latents, tmp_path / "cache", ImportSettings(), nothing, nothing)
    images = write_images(tmp_path / "images", image_keys())
    with pytest.raises(CacheError) as caught:
        matched(tmp_path / "cache", images)
    assert caught.value.field == "--data"


def test_nothing_can_be_measured_of_imported_latents_alone(cache: Path, tmp_path: Path) -> None:
    config = PreprocessConfig(data=str(tmp_path / "images"), cache=cache, encoders=(), resolution=64)
    plan = make_plan(config)
    assert plan.rows == 0
    with pytest.raises(RepaError) as caught:
        measure_encoding(plan)
    assert caught.value.field == "--encoder"


def test_what_images_are_noted_changes_nothing_else(cache: Path) -> None:
    before = open_manifest(cache)
    settle_images(cache, "sha256:images")
    noted = folder_contents(cache)
    settle_images(cache, "sha256:images")
    assert folder_contents(cache) == noted
    after = open_manifest(cache)
    assert after.sources["sd-vae"].notes["images"] == "sha256:images"
    assert (after.identity, after.source_identities) == (before.identity, before.source_identities)
