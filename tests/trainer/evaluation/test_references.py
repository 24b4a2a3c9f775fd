"""References, as an .npz file of ADM's, statistics alone or a cache, and what metrics may ask of them."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from repa.data.errors import CacheError, RepaError
from repa.data.testing import synthetic_cache
from repa.trainer.evaluation.frechet import frechet_distance
from repa.trainer.evaluation.image_sets import array_of, open_samples
from repa.trainer.evaluation.measuring import (
    Measured,
    asked_for,
    check_asked,
    figures_of,
    needs_images,
    notes_of,
)
from repa.trainer.evaluation.references import reference_of_cache, reference_of_file
from repa.trainer.evaluation.registry import REFERENCE_SPATIAL_STATISTICS, REFERENCE_STATISTICS

GENERATOR = np.random.default_rng(0)
POOL = GENERATOR.standard_normal((40, 4))
SPATIAL = GENERATOR.standard_normal((40, 3))
IMAGES = GENERATOR.integers(0, 256, (10, 8, 8, 3), dtype=np.uint8)


def statistics(rows: Any, suffix: str = "") -> dict[str, Any]:
    return {f"mu{suffix}": rows.mean(axis=0), f"sigma{suffix}": np.cov(rows, rowvar=False)}


@pytest.fixture
def adm(tmp_path: Path) -> Path:
    """A file as ``VIRTUAL_imagenet256_labeled.npz`` is laid out."""
    arrays = {"arr_0": IMAGES, "arr_1": np.arange(10), **statistics(POOL), **statistics(SPATIAL, "_s")}
    np.savez(tmp_path / "adm.npz", **arrays)
    return tmp_path / "adm.npz"


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A file of statistics alone, without those of sFID."""
    np.savez(tmp_path / "bare.npz", **statistics(POOL))
    return tmp_path / "bare.npz"


def measured(reference: Any, rows: Any) -> dict[str, Measured]:
    return {
        "inception": Measured(
            samples={"pool": rows, "spatial": SPATIAL, "logits": rows},
            reference={},
            statistics=reference.statistics_of("inception"),
            weights_sha256="0",
        )
    }


def test_adms_layout(adm: Path) -> None:
    reference = reference_of_file(adm)
    assert reference.statistics.keys() == {REFERENCE_STATISTICS, REFERENCE_SPATIAL_STATISTICS}
    assert (reference.resolution, reference.count("inception"), reference.said.kind) == (8, 10, "npz")
    assert reference.statistics_of("dinov2-b") == {}
    rows = GENERATOR.standard_normal((30, 4)) + 0.3
    asked = asked_for(("fid", "sfid", "precision"), reference)
    assert [needs_images(each, reference, "inception") for each in (asked[:2], asked)] == [False, True]
    check_asked(asked, reference, 30, {"inception": 10})
    figures = {each.metric: each for each in figures_of(asked[:2], measured(reference, rows))}
    assert figures["fid"].value == pytest.approx(frechet_distance(rows, POOL), rel=1e-9)
    assert figures["sfid"].value == pytest.approx(0, abs=1e-9)
    # of how many images its statistics are, the file does not say
    assert (figures["fid"].n, figures["fid"].m) == (30, None)


def test_statistics_alone(bare: Path) -> None:
    reference = reference_of_file(bare)
    assert reference.resolution is None
    check_asked(asked_for(("fid", "is"), reference), reference, 5000, {})
    for name in ("sfid", "precision", "kid"):
        with pytest.raises(RepaError) as caught:
            check_asked(asked_for((name,), reference), reference, 5000, {})
        assert caught.value.field == "--reference"


@pytest.mark.parametrize(
    ("arrays", "field"),
    [
        ({"labels": np.arange(3)}, "--reference"),
        ({"mu": np.zeros(4), "sigma": np.zeros((3, 3))}, "--reference"),
        ({"mu": np.array(["a"]), "sigma": np.zeros((1, 1))}, "--reference"),
        ({"mu": np.full(2, np.nan), "sigma": np.zeros((2, 2))}, "--reference"),
        ({"arr_0": IMAGES[..., 0]}, "--reference"),
    ],
)
def test_files_that_are_no_reference(tmp_path: Path, arrays: dict[str, Any], field: str) -> None:
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(RepaError) as caught:
        reference_of_file(tmp_path / "x.npz")
    assert caught.value.field == field


def test_too_few_images_for_a_metric(adm: Path) -> None:
    reference = reference_of_file(adm)
    for name, num, m in (("kid", 999, 2000), ("kid", 2000, 999), ("fd_infinity/inception", 5000, 10)):
        with pytest.raises(RepaError) as caught:
            check_asked(asked_for((name,), reference), reference, num, {"inception": m})
        assert caught.value.field == "--metrics"
    check_asked(asked_for(("kid",), reference), reference, 1000, {"inception": 1000})


def test_a_cache_gives_its_class_vectors(tmp_path: Path) -> None:
    synthetic_cache(tmp_path / "cache", num_rows=20, invalid={5: "damaged"})
    reference = reference_of_cache(tmp_path / "cache")
    assert (reference.encoders, reference.said.kind) == (("demo",), "cache")
    assert reference.count("demo") == 19
    assert len(reference.cached_features("demo")) == 19
    assert [(each.metric, each.network) for each in asked_for(("fd", "kid_all"), reference)] == [
        ("fd", "demo"),
        ("kid_all", "demo"),
    ]
    assert reference.count("inception") == 0
    with pytest.raises(CacheError):
        reference_of_cache(tmp_path / "none")


@pytest.mark.parametrize("compressed", [False, True])
def test_arrays_are_read_as_numpy_reads_them(tmp_path: Path, compressed: bool) -> None:
    arrays = {"arr_0": IMAGES, "arr_1": np.asfortranarray(POOL), "arr_2": np.zeros((0, 3))}
    (np.savez_compressed if compressed else np.savez)(tmp_path / "x.npz", **arrays)
    for name, values in arrays.items():
        found = array_of(tmp_path / "x.npz", name)
        assert found.dtype == values.dtype
        assert np.array_equal(found, values)
    images = open_samples(tmp_path / "x.npz")
    assert np.array_equal(images.batch(3, 5), IMAGES[3:5])


def test_arrays_of_zip_files_of_any_writer(tmp_path: Path) -> None:
    """Extra fields before an array's bytes, and entries before it, move where it begins."""
    np.save(tmp_path / "a.npy", IMAGES)
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("readme", "text")
        entry = zipfile.ZipInfo("arr_0.npy")
        entry.extra = b"\x99\x99\x04\x00abcd"
        archive.writestr(entry, (tmp_path / "a.npy").read_bytes())
    assert np.array_equal(array_of(tmp_path / "x.npz", "arr_0"), IMAGES)


def test_class_sorted_samples(tmp_path: Path) -> None:
    for name, labels, is_sorted in (("a", np.arange(10) // 5, True), ("b", np.arange(10) % 5, False)):
        np.savez(tmp_path / f"{name}.npz", arr_0=IMAGES, arr_1=labels)
        assert open_samples(tmp_path / f"{name}.npz").class_sorted is is_sorted
    assert not open_samples(tmp_path / "a.npz", 5).class_sorted


def test_notes(adm: Path) -> None:
    reference = reference_of_file(adm)
    asked = asked_for(("is", "fid"), reference)
    few = GENERATOR.standard_normal((3, 4))
    for class_sorted, count in ((False, 1), (True, 2)):
        notes = notes_of(asked, measured(reference, few), reference, class_sorted=class_sorted)
        assert len(notes) == count
        assert "3 samples span at most 2 of the 4 channels" in notes[0]
    assert not notes_of(asked, measured(reference, POOL), reference, class_sorted=False)
