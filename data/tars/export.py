"""A cache as WebDataset tars and back, one tar a shard, bit for bit (see `shards`)."""

from __future__ import annotations

import hashlib
import os
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from crc32c import crc32c

from ..errors import CacheError, RepaError
from ..format.captions import SOURCE_KIND, has_captions, of_captions
from ..format.columns import LABEL, SCALE_SUFFIX, source_of
from ..format.commits import is_committed, read_commit
from ..format.opening import labels_sha256, open_manifest, read_keys
from ..format.survey import invalid_reasons
from ..reading.all_views import read_all_views
from ..reading.reader import CacheReader
from ..storage.bucket import map_files
from ..storage.files import create_file, make_folder, os_errors, partial_path, publish
from ..writing.calibrations import ensure_calibration, read_calibration, recorded_sha256
from ..writing.store import ensure_cache, ensure_source, keys_sha256
from ..writing.writer import SourceWriter
from .header import (
    AGAIN,
    CALIBRATION_FIELD,
    CALIBRATION_KEY,
    HEADER_KEY,
    ShardHeader,
    read_header,
    read_headers,
    restricted,
)
from .reader import missing_webdataset, open_tar
from .shards import (
    FACTS_FIELD,
    LABEL_FIELD,
    column_field,
    npy_header,
    read_samples,
    sample_facts,
    tar_key,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from ..format.manifest import Manifest
    from ..storage.bucket import CachePath

    Progress = Callable[[int, int], None]
    Read = Callable[[NDArray[np.int64]], dict[str, NDArray[Any]]]

_OWNER = "repa"
_ROWS = 64  # read at a time


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """What an export or import has done.

    Attributes:
        shards: of the cache.
        kept: those that an earlier call had finished.
        images: rows with data that were moved now.
        bytes: of their columns.
    """

    shards: int
    kept: int
    images: int
    bytes: int


def export_pattern(folder: Path | str, shards: int) -> str:
    """Return the pattern of the tars of an export in a folder, as in ``shard-{000000..001251}.tar``."""
    return f"{folder}/{_tar_name('{000000..' + f'{shards - 1:06d}' + '}' if shards > 1 else '000000')}"


def _tar_name(number: str) -> str:
    return f"shard-{number}.tar"


def export_cache(
    path: CachePath, folder: Path, columns: Sequence[str] = (), progress: Progress | None = None
) -> Transfer:
    """Write columns of a cache as tars, one for each shard. Called again, it goes on.

    Args:
        path: the cache, in a folder or a bucket.
        folder: where the tars go.
        columns: names, scales of int8 columns come along; all by default.
        progress: called with shards done and shards in all.

    Returns:
        What was done.

    Raises:
        CacheError: a column is missing or incomplete, a row corrupt, or a tar of another export is there.
        RepaError: webdataset is not installed, or the operating system refuses.
    """
    manifest = open_manifest(path)
    names = _chosen(manifest, columns, path)
    chosen = restricted(manifest, names)
    header = _Headers(path, chosen)
    kept = images = 0
    with CacheReader(path, names) as reader, ThreadPoolExecutor(reader.threads_for(1)) as pool:

        def read(rows: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
            return read_all_views(reader, rows, names, pool=pool)

        for shard in range(manifest.num_shards):
            target = folder / _tar_name(f"{shard:06d}")
            own = header.of(shard)
            if _is_there(target, own):
                kept += 1
            else:
                with os_errors("write", target):
                    _write_tar(target, own, read, header.calibrations if shard == 0 else {})
                images += len(own.rows)
            if progress is not None:
                progress(shard + 1, manifest.num_shards)
    row_bytes = sum(manifest.columns[name].row_bytes for name in names) * len(manifest.views)
    return Transfer(shards=manifest.num_shards, kept=kept, images=images, bytes=images * row_bytes)


def _chosen(manifest: Manifest, columns: Sequence[str], path: CachePath) -> tuple[str, ...]:
    text = [name for name in columns if name != LABEL and of_captions(name)]
    if text or (not columns and manifest.source_kind != SOURCE_KIND and has_captions(path)):
        raise CacheError(
            f"cache {path} has captions, which tars of one row an image do not hold",
            "name the columns of images with --columns, and copy the folder to have the captions too",
            field="--columns",
        )
    wanted = tuple(dict.fromkeys(name for name in columns or manifest.columns if name != LABEL))
    manifest.require(wanted, where=str(path))
    if not wanted:
        raise CacheError(f"cache {path} has no columns to export", "write some with `repa preprocess`")
    scales = {f"{name}{SCALE_SUFFIX}" for name in wanted} & manifest.columns.keys()
    return tuple(name for name in manifest.columns if name in wanted or name in scales)


class _Headers:
    """Headers of the tars of one export."""

    def __init__(self, path: CachePath, manifest: Manifest) -> None:
        self._path = path
        self._manifest = manifest
        self._keys = read_keys(path, manifest)
        with CacheReader(path, ()) as reader:
            self._labels = reader.labels
        self._reasons = invalid_reasons(path, open_manifest(path))
        self._all_invalid = np.array(list(self._reasons), dtype=np.int64)
        shards = range(manifest.num_shards)
        self._records = {
            source: map_files(partial(read_commit, path, source), shards, path) for source in manifest.sources
        }
        self.calibrations: dict[str, bytes] = {}
        for source, provenance in manifest.sources.items():
            data = read_calibration(path, source) if recorded_sha256(provenance) is not None else None
            if data is not None:
                self.calibrations[source] = data

    def of(self, shard: int) -> ShardHeader:
        rows = self._manifest.shard_range(shard)
        records = {
            source: record
            for source in self._manifest.sources
            if (record := self._records[source][shard]) is not None
        }
        # a row that one source alone lacks is read by nobody, and cannot be exported of the others
        lacking = {row: self._reasons[row] for row in rows if row in self._reasons}
        return ShardHeader(
            manifest=self._manifest,
            shard=shard,
            keys=tuple(self._keys[rows.start : rows.stop]),
            labels=self._labels[rows.start : rows.stop],
            invalid={source: {**lacking, **record.invalid} for source, record in records.items()},
            all_invalid=self._all_invalid,
            chunks_sha256={
                name: records[source_of(name)].columns[name].chunks_sha256
                for name in self._manifest.columns
                if source_of(name) in records
            },
        )


def _is_there(path: Path, header: ShardHeader) -> bool:
    """Tell whether the tar was written by an earlier call. One that was cut off since is written again.

    Raises:
        CacheError: it is another one.
    """
    if not path.exists():
        return False
    with open_tar(str(path)) as reader:
        members = iter(reader)
        try:
            own = read_header(reader, members).encode() == header.encode()
        except RepaError:
            own = False
        if not own:
            raise CacheError(f"{path} is of another export", "choose another --out, or delete it")
        try:
            deque(members, maxlen=0)
        except RepaError:
            return False
    return True


def _write_tar(path: Path, header: ShardHeader, read: Read, calibrations: Mapping[str, bytes]) -> None:
    try:
        from webdataset.writer import TarWriter
    except ImportError:
        raise missing_webdataset("tars are written by") from None
    make_folder(path.parent, path.parent)
    unfinished = partial_path(path)
    try:
        with open(create_file(unfinished), "wb") as file:
            with TarWriter(file, user=_OWNER, group=_OWNER, mtime=0, encoder=False) as tar:
                tar.write({"__key__": HEADER_KEY, "json": header.encode()})
                for source, data in calibrations.items():
                    tar.write({"__key__": f"{CALIBRATION_KEY}{source}", CALIBRATION_FIELD: data})
                for sample in _samples(header, read):
                    tar.write(sample)
            file.flush()
            os.fsync(file.fileno())
        publish(unfinished, path, path.parent)
    finally:
        unfinished.unlink(missing_ok=True)


def _samples(header: ShardHeader, read: Read) -> Iterator[dict[str, str | bytes]]:
    manifest = header.manifest
    views = len(manifest.views)
    start = manifest.shard_range(header.shard).start
    heads = {name: npy_header(spec, views) for name, spec in manifest.columns.items()}
    rows = header.rows
    for first in range(0, len(rows), _ROWS):
        batch = rows[first : first + _ROWS]
        arrays = read(np.array(batch, dtype=np.int64))
        for position, row in enumerate(batch):
            key, label = header.keys[row - start], int(header.labels[row - start])
            data = {name: array[position].tobytes() for name, array in arrays.items()}
            sums = {name: crc32c(values) for name, values in data.items()}
            yield {
                "__key__": tar_key(key),
                LABEL_FIELD: str(label).encode(),
                FACTS_FIELD: sample_facts(row, key, label, sums),
                **{column_field(name): heads[name] + values for name, values in data.items()},
            }


def import_cache(pattern: str, path: Path, progress: Progress | None = None) -> Transfer:
    """Make the cache that tars were exported from. Called again, it goes on.

    Its files are the original's, byte for byte, if all columns of a source were exported. A row that any
    source has as invalid is in no tar: what another source holds of it does not come back. What a compressor
    makes of equal values depends on its library's version too.

    Args:
        pattern: the tars, all of one export, see `expand_tars`.
        path: folder of the cache.
        progress: called with shards done and shards in all.

    Returns:
        What was done.

    Raises:
        CacheError: tars are missing or damaged, or another cache is there.
        RepaError: a tar cannot be read, or the operating system refuses.
    """
    tars = read_headers(pattern)
    headers = [tars[shard][1] for shard in range(len(tars))]
    manifest = headers[0].manifest
    keys = [key for header in headers for key in header.keys]
    labels = np.concatenate([header.labels for header in headers])
    _check_tables(manifest, keys, labels, pattern)
    calibrations = _calibrations(manifest, tars[0][2], tars[0][0])
    # first of all, for nothing may get into another cache
    ensure_cache(path, replace(manifest, columns={}, sources={}), keys, labels)
    for source, data in calibrations.items():
        ensure_calibration(path, source, partial(bytes, data), usable=data.__eq__)
    for source, provenance in manifest.sources.items():
        ensure_source(path, source, provenance, manifest.source_columns(source))
    kept = images = 0
    with ExitStack() as stack:
        writers = {
            source: stack.enter_context(SourceWriter(path, manifest, source, range(manifest.num_shards)))
            for source in manifest.sources
        }
        for shard, header in enumerate(headers):
            missing = [name for name in writers if not is_committed(path, manifest, name, shard)]
            if missing:
                _import_shard(tars[shard][0], header, {name: writers[name] for name in missing})
                images += len(header.rows)
            else:
                kept += 1
            if progress is not None:
                progress(shard + 1, len(headers))
    row_bytes = sum(spec.row_bytes for spec in manifest.columns.values()) * len(manifest.views)
    return Transfer(shards=len(headers), kept=kept, images=images, bytes=images * row_bytes)


def _check_tables(manifest: Manifest, keys: Sequence[str], labels: NDArray[np.int32], pattern: str) -> None:
    """Compare the keys and labels of all headers with the digests in their manifest.

    Raises:
        CacheError: they are others.
    """
    digests = {"keys_sha256": keys_sha256(keys)}
    if manifest.format_version > 1:
        digests["labels_sha256"] = labels_sha256(labels)
    for field, digest in digests.items():
        if digest != getattr(manifest, field):
            what = field.removesuffix("_sha256")
            raise CacheError(
                f"the {what} in the tars of {pattern} are not its manifest's", AGAIN, field=field
            )


def _calibrations(manifest: Manifest, found: Mapping[str, bytes], path: str) -> dict[str, bytes]:
    """Source → its calibration in the tar of shard 0.

    Raises:
        CacheError: it is missing or damaged.
    """
    calibrations = {}
    for source, provenance in manifest.sources.items():
        recorded = recorded_sha256(provenance)
        if recorded is None:
            continue
        if hashlib.sha256(found.get(source, b"")).hexdigest() != recorded:
            raise CacheError(f"{path} lacks the calibration of {source}, or it is damaged", f"{AGAIN}")
        calibrations[source] = found[source]
    return calibrations


def _import_shard(path: str, header: ShardHeader, writers: Mapping[str, SourceWriter]) -> None:
    columns = [name for name in header.manifest.columns if source_of(name) in writers]
    with ExitStack() as stack:
        shards = {
            source: stack.enter_context(writer.shard(header.shard)) for source, writer in writers.items()
        }
        for source, shard in shards.items():
            for row, reason in header.invalid[source].items():
                shard.mark_invalid(row, reason)
        with open_tar(path) as reader:
            members = iter(reader)
            if read_header(reader, members).encode() != header.encode():
                raise RepaError(f"{path} has changed while it was imported", "run the same command again")
            for row, _, arrays in read_samples(reader, members, header, lambda _: columns):
                for name, array in arrays.items():
                    shards[source_of(name)].write(row, name, array)
        for shard in shards.values():
            shard.commit()
