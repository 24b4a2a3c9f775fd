"""Default places of caches, and numbers for people."""

from __future__ import annotations

from pathlib import Path

import pytest
from repa.data.errors import CacheError
from repa.data.testing import synthetic_cache
from repa.data.units import counted, human_bytes, human_rate, human_seconds
from repa.pipeline.images.names import cache_for, default_cache


def test_a_cache_is_named_after_folder_and_resolution() -> None:
    assert cache_for("images", 256) == Path("caches/images-256")
    assert cache_for("some/where/cats/", 512) == Path("caches/cats-512")
    assert cache_for(".", 256).name == f"{Path.cwd().name}-256"
    assert cache_for("demo", 64) == Path("caches/demo")
    assert cache_for("demo", 128) == Path("caches/demo-128")


def test_the_only_cache_is_the_default(tmp_path: Path) -> None:
    root = tmp_path / "caches"
    with pytest.raises(CacheError, match="repa preprocess"):
        default_cache(root=root)
    (root / "no-cache").mkdir(parents=True)
    with pytest.raises(CacheError, match="repa preprocess"):
        default_cache(root=root)
    synthetic_cache(root / "a-256", num_rows=2)
    assert default_cache(root=root) == root / "a-256"
    synthetic_cache(root / "b-256", num_rows=2)
    with pytest.raises(CacheError, match=r"a-256, b-256\): name one with --cache"):
        default_cache(root=root)


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (1234567, "1.23 MB"),
        (999_400, "999 kB"),
        (999_600, "1 MB"),
        (5.25e11, "525 GB"),
        (2e12, "2 TB"),
        (1.5e15, "1500 TB"),
    ],
)
def test_bytes(count: float, expected: str) -> None:
    assert human_bytes(count) == expected


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(0, "0.0 s"), (59.9, "59.9 s"), (59.96, "1 min 0 s"), (200, "3 min 20 s"), (7500, "2 h 5 min")],
)
def test_seconds(seconds: float, expected: str) -> None:
    assert human_seconds(seconds) == expected


@pytest.mark.parametrize(
    ("rate", "expected"),
    [
        (0.2049, "0.20 images/s"),
        (9.999, "10.0 images/s"),
        (35.64, "35.6 images/s"),
        (1204.4, "1204 images/s"),
    ],
)
def test_rates(rate: float, expected: str) -> None:
    assert human_rate(rate) == expected


@pytest.mark.parametrize(
    ("count", "what", "form", "expected"),
    [
        (0, "shard", "", "0 shards"),
        (1, "shard", "", "1 shard"),
        (2, "shard", "", "2 shards"),
        (1, "class", ",", "1 class"),
        (1000, "class", ",", "1,000 classes"),
        (3, "micro-batch", "", "3 micro-batches"),
        (2, "held-out image", "", "2 held-out images"),
    ],
)
def test_counts(count: int, what: str, form: str, expected: str) -> None:
    assert counted(count, what, form) == expected
