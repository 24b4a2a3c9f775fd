"""What a cache holds, counted from its manifest, its commit records and the sizes of its files."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..format.captions import SOURCE_KIND, captions_path, has_captions, read_record
from ..format.opening import open_manifest
from ..format.survey import Survey, survey
from ..storage.bucket import CachePath, RemotePath
from ..storage.files import os_errors

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..format.manifest import Manifest


@dataclass(frozen=True, kw_only=True)
class ColumnInfo:
    """One column.

    Attributes:
        name: ``<source>/<kind>``.
        dtype: NumPy name of the stored dtype.
        shape: of one row and view.
        compressor: how its chunks are compressed; None where they are not.
        file_bytes: bytes of its committed shards on disk.
        data_bytes: what their rows hold, not compressed and without checksums and index.
        bytes_per_image: data of one image, all views, not compressed and without checksums and index.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    compressor: str | None
    file_bytes: int
    data_bytes: int
    bytes_per_image: int

    @property
    def ratio(self) -> float | None:
        """Bytes of data per byte on disk, or None before the first shard."""
        return self.data_bytes / self.file_bytes if self.file_bytes else None


@dataclass(frozen=True, kw_only=True)
class SourceInfo:
    """One source.

    Attributes:
        name: of the source.
        model: identity of the model.
        random_weights: True when its weights were drawn, not trained.
        shards_committed: of `CacheInfo.num_shards`.
        columns: its columns.
    """

    name: str
    model: str
    random_weights: bool
    shards_committed: int
    columns: tuple[ColumnInfo, ...]


@dataclass(frozen=True, kw_only=True)
class CacheInfo:
    """A cache at a glance.

    Attributes:
        path: its folder.
        manifest: its manifest, with the full provenance.
        num_rows: N.
        valid_rows: N without the rows that a source has marked invalid so far.
        invalid: row → reason of those.
        num_classes: classes of the labels.
        resolution: side in pixels of the cropped images.
        num_shards: shards of every column.
        sources: in the order they were added.
        total_bytes: of all files in the folder, unfinished ones included.
        captions: those of the images, a cache themselves; None where there are none.
        captions_record: what was noted of where they come from.
    """

    path: CachePath
    manifest: Manifest
    num_rows: int
    valid_rows: int
    invalid: Mapping[int, str]
    num_classes: int
    resolution: int
    num_shards: int
    sources: tuple[SourceInfo, ...]
    total_bytes: int
    captions: CacheInfo | None = None
    captions_record: Mapping[str, Any] = field(default_factory=dict)

    @property
    def remote(self) -> bool:
        """Whether it lies in a bucket."""
        return isinstance(self.path, RemotePath)

    @property
    def where(self) -> str:
        """``on disk``, or ``in the bucket``."""
        return "in the bucket" if self.remote else "on disk"

    @property
    def complete(self) -> bool:
        """Whether every shard of every source is committed, of the captions too."""
        own = all(source.shards_committed == self.num_shards for source in self.sources)
        return own and (self.captions is None or self.captions.complete)


def cache_info(path: CachePath) -> CacheInfo:
    """Collect what the cache at ``path`` holds.

    Raises:
        CacheError: there is no cache, or its manifest or a commit record is damaged.
    """
    manifest = open_manifest(path)
    found = survey(path, manifest)
    invalid = found.invalid_reasons()
    captioned = manifest.source_kind != SOURCE_KIND and has_captions(path)
    return CacheInfo(
        path=path,
        manifest=manifest,
        num_rows=manifest.num_rows,
        valid_rows=manifest.num_rows - len(invalid),
        invalid=invalid,
        num_classes=len(manifest.class_names),
        resolution=manifest.resolution,
        num_shards=manifest.num_shards,
        sources=tuple(_source_info(found, manifest, source) for source in manifest.sources),
        total_bytes=folder_bytes(path),
        captions=cache_info(captions_path(path)) if captioned else None,
        captions_record=read_record(path) if captioned else {},
    )


def _source_info(found: Survey, manifest: Manifest, source: str) -> SourceInfo:
    shards = manifest.num_shards - len(found.absent[source])
    columns = manifest.source_columns(source)
    file_bytes = dict.fromkeys(columns, 0)
    images = 0
    absent = set(found.absent[source])
    for record in found.records[source]:
        if record.shard not in absent:
            images += record.rows[1] - record.rows[0] - len(record.invalid)
            for name, column in record.columns.items():
                file_bytes[name] += column.file_bytes
    views = len(manifest.views)
    return SourceInfo(
        name=source,
        model=manifest.sources[source].model,
        random_weights=manifest.sources[source].random_weights,
        shards_committed=shards,
        columns=tuple(
            ColumnInfo(
                name=name,
                dtype=spec.dtype,
                shape=spec.shape,
                compressor=spec.compressor,
                file_bytes=file_bytes[name],
                data_bytes=spec.row_bytes * views * images,
                bytes_per_image=spec.row_bytes * views,
            )
            for name, spec in columns.items()
        ),
    )


def folder_bytes(path: CachePath) -> int:
    """Return the bytes of all files in a cache, unfinished ones included.

    Raises:
        RepaError: they cannot be listed.
    """
    total = 0
    if isinstance(path, RemotePath):
        with os_errors("list", path):
            return sum(sizes_below(path).values())
    with os_errors("read", path):
        for folder, _, names in os.walk(path):
            for name in names:
                # a writer may rename its file away meanwhile
                with suppress(FileNotFoundError):
                    total += (Path(folder) / name).stat().st_size
    return total


def sizes_below(path: RemotePath) -> dict[str, int]:
    """Return name → size of the objects below a prefix of a bucket, by their names within it.

    Args:
        path: of a cache, or of the captions of one.

    Raises:
        OSError: the bucket cannot be listed.
    """
    sizes = path.bucket.sizes()
    if not path.name_in_bucket:
        return sizes
    prefix = f"{path.name_in_bucket}/"
    return {name.removeprefix(prefix): size for name, size in sizes.items() if name.startswith(prefix)}
