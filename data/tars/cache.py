"""An exported cache read in sequence from its tars, be they local, pipes or URLs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..errors import CacheError
from ..format.captions import with_captions
from ..format.opening import open_manifest
from ..storage.bucket import cache_path
from ..units import counted
from .header import read_header
from .names import names_tars, present_tars
from .reader import open_tar
from .shards import read_samples

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence

    from numpy.typing import NDArray

    from ..format.manifest import Manifest
    from .header import ShardHeader


def manifest_of(cache: str) -> Manifest:
    """Read the manifest of a cache, or of the export that a pattern of tars names.

    That of a cache has the columns of its captions too.

    Raises:
        CacheError: there is neither.
        RepaError: it cannot be read.
    """
    if names_tars(cache):
        return _first_header(present_tars(cache)[0]).manifest
    path = cache_path(cache)
    return with_captions(path, open_manifest(path))


class TarCache:
    """The tars of one export, all of them and in the order of their shards. Only the first is opened now.

    Args:
        pattern: the tars, see `expand_tars`.
        columns: the columns that may be read, without ``label``.

    Attributes:
        path: the pattern.
        manifest: of the export.
        valid_rows: rows that have data, ascending.
        invalid_rows: all others, ascending.
        counts: rows with data in each tar, int64 ``[S]``.

    Raises:
        CacheError: they are not the tars of an export, or a column was not exported.
        RepaError: the first cannot be read.
    """

    def __init__(self, pattern: str, columns: Sequence[str]) -> None:
        self.path = pattern
        self.columns = tuple(columns)
        self._tars = present_tars(pattern)
        header = _first_header(self._tars[0])
        self.manifest = header.manifest
        if len(self._tars) != self.manifest.num_shards:
            raise CacheError(
                f"{pattern} names {counted(len(self._tars), 'tar')}, the export has "
                f"{self.manifest.num_shards}",
                "name them all, in order",
            )
        missing = [name for name in columns if name not in self.manifest.columns]
        if missing:
            raise CacheError(
                f"{pattern} has no column {', '.join(missing)} (it has {', '.join(self.manifest.columns)})",
                "export it too, with `repa cache export --columns`",
            )
        self.invalid_rows = header.all_invalid
        valid = np.ones(self.manifest.num_rows, dtype=bool)
        valid[self.invalid_rows] = False
        self.valid_rows: NDArray[np.int64] = np.flatnonzero(valid).astype(np.int64)
        shards = self.valid_rows // self.manifest.shard_rows
        self.counts: NDArray[np.int64] = np.bincount(shards, minlength=self.manifest.num_shards)

    def samples(
        self, shard: int, columns_of: Callable[[int], Collection[str]]
    ) -> Iterator[tuple[int, int, dict[str, NDArray[np.generic]]]]:
        """Yield the samples of a shard, from the first to the last, see `read_samples`.

        Raises:
            CacheError: the tar is not that shard's, or a sample is missing or damaged.
            RepaError: it cannot be read.
        """
        tar = self._tars[shard]
        with open_tar(tar) as reader:
            members = iter(reader)
            header = read_header(reader, members)
            if header.manifest != self.manifest or not np.array_equal(header.all_invalid, self.invalid_rows):
                raise CacheError(f"{tar} is of another export than {self._tars[0]}", "name the tars of one")
            if header.shard != shard:
                raise CacheError(
                    f"{tar} is shard {header.shard}, named as number {shard} of {self.path}",
                    "name the tars in order",
                )
            yield from read_samples(reader, members, header, columns_of)


def _first_header(tar: str) -> ShardHeader:
    with open_tar(tar) as reader:
        return read_header(reader, iter(reader))
