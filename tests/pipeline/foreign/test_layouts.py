"""Latents of each layout, row by row, as the programs' own writers leave them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from foreign_layouts import (
    COUNT,
    EACH,
    image_keys,
    write_fast_dit,
    write_images,
    write_lightningdit,
    write_mar,
    write_repa,
    zip_folder,
)
from repa.data.errors import RepaError
from repa.data.reading.latents import scale_latent
from repa.pipeline.foreign.base import ForeignLatents, ForeignOptions
from repa.pipeline.foreign.open import LAYOUTS, open_foreign

LABELS = np.arange(COUNT) // EACH
NONE = ForeignOptions()


def all_rows(latents: ForeignLatents) -> np.ndarray:
    for name in latents.files:
        assert len(latents.survey(name)) == 64
    rows = np.stack([latents.read(row) for row in range(len(latents.keys))])
    assert rows.dtype == np.float32
    assert rows.shape == (len(latents.keys), len(latents.views), *latents.shape)
    return rows


def test_moments_of_repa_are_kept_bit_for_bit(tmp_path: Path) -> None:
    moments = write_repa(tmp_path)
    for root in (tmp_path, tmp_path / "vae-sd"):
        latents = open_foreign("repa", root, NONE)
        assert np.array_equal(all_rows(latents)[:, 0], moments)
        assert latents.labels.tolist() == LABELS.tolist()
        assert latents.keys[7] == "00000/img00000007.png", "the image's name in the tree"
        assert (latents.views, latents.scale.scaling_factor) == (("original",), 0.18215)
        assert list(latents.class_names) == ["0", "1"]


def test_repa_may_be_packed_in_a_zip_file(tmp_path: Path) -> None:
    moments = write_repa(tmp_path / "tree")
    zip_folder(tmp_path / "tree" / "vae-sd", tmp_path / "vae-sd.zip")
    folder = open_foreign("repa", tmp_path / "tree", NONE)
    for root in (tmp_path, tmp_path / "vae-sd.zip"):
        latents = open_foreign("repa", root, NONE)
        assert np.array_equal(all_rows(latents)[:, 0], moments)
        assert [latents.survey(name) for name in latents.files] == [folder.survey(n) for n in folder.files]


def test_a_set_of_repa_without_classes_is_one_class(tmp_path: Path) -> None:
    write_repa(tmp_path)
    (tmp_path / "vae-sd" / "dataset.json").write_text('{"labels": null}')
    latents = open_foreign("repa", tmp_path, NONE)
    assert latents.labels.tolist() == [0] * COUNT
    assert list(latents.class_names) == ["images"]


def test_log_variances_of_mar_become_deviations_of_both_views(tmp_path: Path) -> None:
    views = write_mar(tmp_path)
    latents = open_foreign("mar", tmp_path, NONE)
    rows = all_rows(latents)
    for view, moments in enumerate(views):
        assert np.array_equal(rows[:, view, :4], moments[:, :4])
        deviations = torch.from_numpy(moments[:, 4:]).double().clamp(-30, 20).mul(0.5).exp().float().numpy()
        np.testing.assert_allclose(rows[:, view, 4:], deviations, rtol=2e-7)
    assert rows[0, 0, 4:].max() == pytest.approx(np.exp(-15), rel=1e-6), "clamped, as MAR does"
    assert (list(latents.keys), list(latents.class_names)) == (image_keys(), ["class0", "class1"])
    assert latents.labels.tolist() == LABELS.tolist()
    assert (latents.views, latents.scale.scaling_factor) == (("original", "mirrored"), 0.2325)


def test_features_of_fast_dit_are_unscaled_within_the_rounding(tmp_path: Path) -> None:
    scaled = write_fast_dit(tmp_path)
    latents = open_foreign("fast-dit", tmp_path, NONE)
    rows = all_rows(latents)[:, 0]
    assert not rows[:, 4:].any(), "a draw has no deviation"
    again = scale_latent(torch.from_numpy(rows[:, :4]), *latents.scale).numpy()
    # unscaled and scaled again, each rounded to float32
    assert np.abs(again - scaled).max() <= 2 * np.spacing(np.abs(scaled)).max()
    np.testing.assert_allclose(again, scaled, rtol=2.4e-7)
    assert latents.labels.tolist() == LABELS.tolist()
    assert latents.keys[10] == "imagenet256_features/10.npy", "by number, not by letter"
    assert latents.latents == "sampled"
    other = open_foreign("fast-dit", tmp_path, ForeignOptions(scaling_factor=0.5))
    assert np.array_equal(other.read(3)[0, :4], 2 * scaled[3])


@pytest.mark.parametrize("world", [1, 3, 5])
def test_rows_of_lightningdit_come_in_the_order_of_the_images(world: int, tmp_path: Path) -> None:
    """Of 5 processes, each has 3 of 12 images, and the first 3 images come twice."""
    views = write_lightningdit(tmp_path / "latents", world=world)
    latents = open_foreign("lightningdit", tmp_path / "latents", NONE)
    rows = all_rows(latents)
    for view, values in enumerate(views):
        assert np.array_equal(rows[:, view, :4], values)
    assert not rows[:, :, 4:].any()
    assert latents.labels.tolist() == LABELS.tolist()
    assert latents.scale.mean[0] == -0.5
    assert latents.scale.std[0] == 1.5
    images = write_images(tmp_path / "images")
    named = open_foreign("lightningdit", tmp_path / "latents", ForeignOptions(data=str(images)))
    assert list(named.keys) == image_keys()
    assert list(named.class_names) == ["class0", "class1"]
    assert np.array_equal(all_rows(named), rows)


def test_rows_of_lightningdit_are_in_the_order_of_image_folder(tmp_path: Path) -> None:
    """A class comes before another whose name goes on from it, whatever the characters after."""
    write_lightningdit(tmp_path / "latents")
    keys = [f"{folder}/{number}.png" for folder in ("a", "a-b") for number in range(EACH)]
    assert sorted(keys)[0] == "a-b/0.png"
    images = write_images(tmp_path / "images", keys)
    named = open_foreign("lightningdit", tmp_path / "latents", ForeignOptions(data=str(images)))
    assert list(named.keys) == keys


def test_half_precision_is_widened_exactly(tmp_path: Path) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        folder = tmp_path / str(dtype)
        latents, _ = write_lightningdit(folder, dtype=dtype)
        expected = torch.from_numpy(latents).to(dtype).float().numpy()
        assert np.array_equal(all_rows(open_foreign("lightningdit", folder, NONE))[:, 0, :4], expected)


def test_other_images_than_the_rows_of_lightningdit_are_refused(tmp_path: Path) -> None:
    write_lightningdit(tmp_path / "latents", world=5)
    keys = image_keys()
    for number, wrong in enumerate(
        (keys[:-3], [*keys, "class1/6.png", "class1/7.png", "class1/8.png", "z/1.png"])
    ):
        images = write_images(tmp_path / f"images{number}", wrong)
        with pytest.raises(RepaError) as caught:
            open_foreign("lightningdit", tmp_path / "latents", ForeignOptions(data=str(images)))
        assert caught.value.field == "--data"
    images = write_images(tmp_path / "classes", [key.replace("class1/0", "class0/9") for key in keys])
    with pytest.raises(RepaError) as caught:
        open_foreign("lightningdit", tmp_path / "latents", ForeignOptions(data=str(images)))
    assert caught.value.field == "--data"


def test_without_statistics_somebody_must_say_the_scale(tmp_path: Path) -> None:
    write_lightningdit(tmp_path, statistics=False)
    with pytest.raises(RepaError) as caught:
        open_foreign("lightningdit", tmp_path, NONE)
    assert caught.value.field == "--scaling-factor"
    assert open_foreign("lightningdit", tmp_path, ForeignOptions(scaling_factor=2.0)).scale == (
        2.0,
        0.0,
        (),
        (),
    )


def test_a_shift_beside_statistics_of_channels_means_nothing(tmp_path: Path) -> None:
    write_lightningdit(tmp_path)
    with pytest.raises(RepaError) as caught:
        open_foreign("lightningdit", tmp_path, ForeignOptions(shift_factor=0.1))
    assert caught.value.field == "shift_factor"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_not_there_is_said(layout: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("text")
    for root in ("empty", "file", "nowhere"):
        with pytest.raises(RepaError) as caught:
            open_foreign(layout, tmp_path / root, NONE)
        assert caught.value.field == "FROM"
        assert root in caught.value.what


def test_only_rows_without_names_are_named_by_images(tmp_path: Path) -> None:
    for layout in ("repa", "mar", "fast-dit"):
        with pytest.raises(RepaError) as caught:
            open_foreign(layout, tmp_path, ForeignOptions(data="images"))
        assert caught.value.field == "--data"
    with pytest.raises(RepaError) as caught:
        open_foreign("dit", tmp_path, NONE)
    assert caught.value.field == "--format"
