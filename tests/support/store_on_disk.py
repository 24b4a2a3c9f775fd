"""A small cache as it must be when nothing has happened to it, and what of one on the disk is not."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from repa.data.errors import CacheError
from repa.data.format.columns import ColumnSpec, source_of
from repa.data.format.layout import commit_file, shard_file
from repa.data.format.manifest import Manifest
from repa.data.format.shard_index import MISSING, index_bytes
from repa.data.testing import folder_contents, synthetic_cache
from shard_files_read import read_index

ROWS, SHARD_ROWS, SHARDS = 7, 3, 3
VIEWS = ("original", "mirrored")
INVALID = {4: "bad"}
COLUMNS = {
    "sd-vae/moments": ColumnSpec(shape=(2, 2, 2), dtype="float32"),
    "demo/patch": ColumnSpec(shape=(2, 3), dtype="float16", compressor="zstd"),
    "demo/cls": ColumnSpec(shape=(3,), dtype="float16"),
    "demo/q": ColumnSpec(shape=(1, 2, 2, 2), dtype="int8"),
    "demo/q-scale": ColumnSpec(shape=(1, 2, 2), dtype="float32"),
}
SOURCES = ("sd-vae", "demo", "demo+attention")
CALLS = ("mkdir", "replace", "unlink", "writev")


class Killed(BaseException):
    """The process is gone: nothing it still runs changes the disk."""


@contextmanager
def life_of(steps: int | None) -> Iterator[None]:
    """Let so many calls that change the disk happen; the next, and all after it, raise `Killed`.

    Of a write that it dies in, half reaches the disk.
    """
    left = steps

    def mortal(function: Callable[..., Any], torn: bool) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal left
            if left is not None:
                left -= 1
                if left == -1 and torn:
                    descriptor, parts = args
                    whole = b"".join(parts)
                    os.write(descriptor, whole[: len(whole) // 2])
                if left < 0:
                    raise Killed
            return function(*args, **options)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in CALLS:
            patch.setattr(os, name, mortal(getattr(os, name), name == "writev"))
        yield


def write(path: Path, sources: tuple[str, ...]) -> Manifest:
    """Create, declare and write whatever of these sources is not there."""
    columns = {name: spec for name, spec in COLUMNS.items() if source_of(name) in sources}
    return synthetic_cache(
        path,
        num_rows=ROWS,
        columns=columns,
        shard_rows=SHARD_ROWS,
        views=VIEWS,
        invalid=INVALID,
    )


@cache
def whole() -> tuple[Manifest, dict[str, bytes]]:
    """The finished cache: its manifest, and its files, relative path → bytes."""
    with tempfile.TemporaryDirectory() as folder:
        manifest = write(Path(folder) / "cache", SOURCES)
        root = Path(folder) / "cache"
        return manifest, {
            str(file.relative_to(root)): file.read_bytes() for file in root.rglob("*") if file.is_file()
        }


def same(name: str, here: bytes, there: bytes) -> bool:
    """Whether a file says the same: of JSON, a flipped bit in white space does not matter."""
    if here == there or not name.endswith(("zarr.json", "zarr.json.copy")):
        return here == there
    try:
        return bool(json.loads(here) == json.loads(there))
    except ValueError:
        return False


@contextmanager
def right_or(kind: type[CacheError]) -> Iterator[list[Any]]:
    """Go on, with the error in the list if there was one."""
    caught: list[Any] = []
    try:
        yield caught
    except kind as error:
        caught.append(error)


class CacheOnDisk:
    """What is on the disk, and what is wrong with it.

    Attributes:
        path: the cache.
        group: the group's own document when it was last written; None: not yet.
    """

    path: Path
    group: bytes | None

    def good(self, name: str) -> bytes | None:
        return self.group if name in ("zarr.json", "zarr.json.copy") else whole()[1].get(name)

    def files(self) -> dict[str, Path]:
        return {
            str(file.relative_to(self.path)): file
            for file in sorted(self.path.rglob("*"))
            if file.is_file() and file.stat().st_size
        }

    def sound(self, name: str) -> bool:
        file, good = self.path / name, self.good(name)
        return good is not None and file.exists() and same(name, file.read_bytes(), good)

    def manifest(self) -> Manifest:
        """As it is when the group's document is sound."""
        assert self.group is not None
        values = json.loads(self.group)["attributes"]["repa"]
        return Manifest.from_json(values, where="the machine")

    def record(self, source: str, shard: int) -> str:
        return str(commit_file(self.path, source, shard).relative_to(self.path))

    def shard_files(self, source: str, shard: int) -> dict[str, str]:
        return {
            column: str(shard_file(self.path, column, spec, shard).relative_to(self.path))
            for column, spec in COLUMNS.items()
            if source_of(column) == source
        }

    def bad_rows(self, column: str, shard: int) -> set[tuple[int, int]] | None:
        """(row, view) of a shard file whose chunks are not as written; None: cut off, or its index is bad."""
        name = self.shard_files(source_of(column), shard)[column]
        good, file = whole()[1][name], self.path / name
        here = file.read_bytes() if file.exists() else b""
        index = index_bytes(SHARD_ROWS, len(VIEWS))
        if len(here) != len(good) or here[-index:] != good[-index:]:
            return None
        with tempfile.TemporaryFile() as copy:
            copy.write(good)
            copy.flush()
            places = read_index(copy.fileno(), name, SHARD_ROWS, len(VIEWS))
        return {
            (shard * SHARD_ROWS + at, view)
            for at, view in np.ndindex(places.shape[:2])
            if places[at, view, 0] != MISSING
            and here[int(places[at, view, 0]) :][: int(places[at, view, 1])]
            != good[int(places[at, view, 0]) :][: int(places[at, view, 1])]
        }

    def shards(self) -> Iterator[tuple[str, int]]:
        return ((source, shard) for source in self.manifest().sources for shard in range(SHARDS))

    def is_declared(self, name: str) -> bool:
        """Whether a Zarr document belongs to a column that the manifest has, or to all."""
        folder = str(Path(name).parent)
        return folder in (".", "label", "valid") or any(
            column == folder or column.startswith(f"{folder}/") for column in self.manifest().columns
        )

    def names(self) -> Iterator[str]:
        """Files that must be there; of a shard without a sound record that alone."""
        yield from ("zarr.json", "zarr.json.copy", "label/zarr.json", "keys.txt", "label/c/0")
        yield from (name for name in whole()[1] if name.endswith("/zarr.json") and self.is_declared(name))
        for source, shard in self.shards():
            record = self.record(source, shard)
            yield record
            if self.sound(record):
                yield from self.shard_files(source, shard).values()
        for shard in range(SHARDS):
            records = [self.record(source, shard) for source in self.manifest().sources]
            records = [name for name in records if (self.path / name).exists()]
            # what damaged records say of rows is not known
            if records and all(map(self.sound, records)):
                yield f"valid/c/{shard}"

    def ends_as_committed(self, name: str) -> bool:
        """Whether a shard file is as long as it was, and ends in the same checksums of chunk and index."""
        good, file, index = whole()[1][name], self.path / name, index_bytes(SHARD_ROWS, len(VIEWS))
        here = file.read_bytes() if file.exists() else b""
        ends = (slice(-4, None), slice(-index - 4, -index))
        return len(here) == len(good) and all(here[end] == good[end] for end in ends)

    def readable(self, sources: set[str]) -> bool:
        """Whether nothing that a reader of these sources must look at is missing or damaged."""
        if not (self.sound("zarr.json") and self.sound("label/c/0")):
            return False
        manifest = self.manifest()
        if not sources <= manifest.sources.keys():
            return False
        for source in manifest.sources:
            for shard in range(SHARDS):
                record = self.path / self.record(source, shard)
                # of other sources too: they say which rows are invalid
                if (record.exists() or source in sources) and not self.sound(self.record(source, shard)):
                    return False
                for name in self.shard_files(source, shard).values() if source in sources else ():
                    if not self.ends_as_committed(name):
                        return False
        return True


def data_of_a_cache(path: Path) -> dict[str, object]:
    """Every file of a cache but those that say which image set it is of; records without whose they are."""
    found: dict[str, object] = {}
    for name, content in folder_contents(path).items():
        if name.startswith("commits/") and name.endswith(".json"):
            values = json.loads((path / name).read_bytes())
            found[name] = {key: values[key] for key in values.keys() - {"cache", "source", "sha256"}}
        elif name not in ("zarr.json", "zarr.json.copy", "keys.txt"):
            found[name] = content
    return found
