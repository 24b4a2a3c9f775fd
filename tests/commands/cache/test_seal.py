"""`repa cache seal`: what is missing is named, what can be settled is, and twice is once."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np
import pytest
from repa.commands.cache.seal import seal
from repa.data.errors import CacheError
from repa.data.format.columns import AUTOENCODER
from repa.data.format.layout import commit_file, valid_chunk
from repa.data.format.manifest import LATENTS_NOTE
from repa.data.format.opening import open_manifest
from repa.data.testing import folder_contents, synthetic_cache
from repa.data.upkeep.seal import seal_cache
from rich.console import Console

if TYPE_CHECKING:
    from pathlib import Path

INVALID = {3: "truncated", 17: "truncated"}


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """Twenty rows in three shards, latents not measured."""
    synthetic_cache(tmp_path / "cache", num_rows=20, invalid=INVALID)
    return tmp_path / "cache"


def test_it_settles_once(cache: Path) -> None:
    assert LATENTS_NOTE not in open_manifest(cache).sources[AUTOENCODER].notes
    written = valid_chunk(cache, 2).read_bytes()
    valid_chunk(cache, 2).unlink()
    sealed = seal_cache(cache)
    assert valid_chunk(cache, 2).read_bytes() == written
    assert sealed.info.valid_rows == 18
    assert sealed.latents is not None
    assert sealed.latents["images"] == 18
    assert np.all(np.array(sealed.latents["std"]) > 0)
    once = folder_contents(cache)
    assert seal_cache(cache) == sealed
    assert folder_contents(cache) == once


@pytest.mark.parametrize(("source", "shard"), [("sd-vae", 0), ("demo", 2)])
def test_what_is_missing_is_named(cache: Path, source: str, shard: int) -> None:
    commit_file(cache, source, shard).unlink()
    before = folder_contents(cache)
    with pytest.raises(CacheError) as caught:
        seal_cache(cache)
    assert caught.value.field == source
    assert f"{shard}:{shard + 1}" in caught.value.what  # as --shards takes it
    assert folder_contents(cache) == before


def test_damaged_records_are_refused(cache: Path) -> None:
    commit_file(cache, "demo", 1).write_text("{")
    with pytest.raises(CacheError):
        seal_cache(cache)


def test_without_a_source(tmp_path: Path) -> None:
    synthetic_cache(tmp_path / "bare", num_rows=4, columns={})
    with pytest.raises(CacheError):
        seal_cache(tmp_path / "bare")


def test_it_prints_what_it_counted(cache: Path) -> None:
    said = []
    for _ in range(2):
        output = io.StringIO()
        seal(cache=cache, console=Console(file=output, width=200))
        said.append(output.getvalue())
    assert said[0] == said[1]
    for number in ("20 images", "18 of them", "3 shards", "2 × truncated"):
        assert number in said[0]
