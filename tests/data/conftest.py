"""Caches that several files of this folder read and leave as they are, and the server of their bucket."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING

import compressed_cache
import pytest
from repa.data.reading.reader import CacheReader
from repa.data.testing import synthetic_cache
from small_loader import COLUMNS, INVALID, NUM_ROWS, loader_threads

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(scope="session")
def small_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache of `small_loader`; copy it before changing it."""
    path = tmp_path_factory.mktemp("loader") / "cache"
    synthetic_cache(path, num_rows=NUM_ROWS, columns=COLUMNS, invalid=INVALID)
    return path


@pytest.fixture
def small_reader(small_cache: Path) -> Iterator[CacheReader]:
    """A reader of `small_cache`."""
    with CacheReader(small_cache, list(COLUMNS)) as reader:
        yield reader


@pytest.fixture
def no_loader_thread_is_left() -> Iterator[None]:
    """Asserts it after the test."""
    yield
    if loader_threads():
        gc.collect()
    assert loader_threads() == []


@pytest.fixture(scope="session")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache of `compressed_cache`; copy it before changing it."""
    pytest.importorskip("pcodec")
    path = tmp_path_factory.mktemp("compression") / "cache"
    compressed_cache.write(path)
    return path


@pytest.fixture(scope="session")
def s3_address() -> Iterator[str]:
    """The address of a server that runs until the last test."""
    from s3_server import s3_server

    with s3_server() as address:
        yield address


@pytest.fixture(scope="module")
def server(s3_address: str) -> Iterator[str]:
    """The address of a server with an empty bucket ``bucket``, and the environment that leads to it."""
    from s3_server import empty, lead_to

    empty(s3_address)
    with pytest.MonkeyPatch.context() as patch:
        lead_to(patch, s3_address)
        yield s3_address
