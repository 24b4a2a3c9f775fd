"""Reading a whole cache and saying what in it is not as it was committed.

Every stored byte is covered by some checksum: image data and their checksums by crc32c and the commit record,
shard indexes by crc32c, commit records and the manifest by their own sha256, ``keys.txt`` by the manifest,
labels by crc32c, calibrations by the notes of their source; Zarr's metadata are compared with what the
manifest makes them.
"""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from crc32c import crc32c

from .calibrations import check_calibration, read_calibration, recorded_sha256
from .columns import LABEL, source_of
from .commits import CommitRecord, read_commit
from .errors import CacheError
from .files import os_errors, partial_path
from .layout import (
    CALIBRATION_FOLDER,
    GROUP_FILE,
    KEYS_FILE,
    LABEL_CHUNK,
    LOCK_FILE,
    calibration_file,
    calibration_lock,
    commit_file,
    commit_folder,
    shard_file,
    zarr_documents,
)
from .shard_index import CHECKSUM_BYTES, MISSING, index_bytes, read_index
from .store import open_manifest, read_keys, read_labels

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterable, Sequence

    from .schema import Manifest

_RESUME = "run the same `repa preprocess` again"
_REDO = "encode it again with `repa cache repair`"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that is wrong in a cache.

    Attributes:
        path: the file.
        what: what is wrong with it, its name included, and what to do.
        source: the source it belongs to; empty for what belongs to the cache as a whole.
        column: the column; empty for what belongs to all columns.
        shard: the shard, where the file is of one.
        row: the image, where the damage is known to be in its data.
    """

    path: Path
    what: str
    source: str = ""
    column: str = ""
    shard: int | None = None
    row: int | None = None

    def __str__(self) -> str:
        row = "" if self.row is None else f"row {self.row} of {self.column}: "
        return f"{row}{self.what}"


def verify_cache(
    path: Path,
    columns: Sequence[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
    *,
    threads: int | None = None,
) -> list[Finding]:
    """Check every byte of a cache.

    Args:
        path: its folder.
        columns: check the data of these columns only, and look for no stray files; all columns by default.
        progress: called with bytes of shards checked and bytes in all, from the calling thread.
        threads: readers; as many as CPUs, at most 8, by default.

    Returns:
        What is wrong, in the order of manifest, sources, shards, columns and rows; empty for a cache that is
        complete and intact. Shards that are not committed yet are found too.

    Raises:
        CacheError: there is no cache at ``path``, or it lacks a column that was asked for.
    """
    group = path / GROUP_FILE
    try:
        manifest = open_manifest(path)
    except CacheError as error:
        if not group.exists():
            raise
        return [Finding(path=group, what=str(error))]
    if columns is not None:
        manifest.require(tuple(columns), where=str(path))
    checked = [name for name in manifest.columns if columns is None or name in columns]

    findings = [*_check_metadata(path, manifest), *_check_keys_and_labels(path, manifest)]
    records: dict[tuple[str, int], CommitRecord] = {}
    for source in dict.fromkeys(source_of(name) for name in checked):
        findings += _check_calibration(path, manifest, source)
        for shard in range(manifest.num_shards):
            record, finding = _check_record(path, manifest, source, shard)
            findings += [finding] if finding else []
            if record is not None:
                records[source, shard] = record
    tasks = [
        _ShardCheck(path, manifest, name, record)
        for (source, _), record in records.items()
        for name in checked
        if source_of(name) == source
    ]
    findings += _run(tasks, progress, threads or min(8, os.cpu_count() or 1))
    if columns is None:
        findings += _check_strays(path, manifest, records.keys())
    return findings


def _check_metadata(path: Path, manifest: Manifest) -> list[Finding]:
    """Zarr's documents against those that the manifest makes."""
    findings = []
    for name, expected in zarr_documents(manifest).items():
        file = path / name
        try:
            same = _comparable(file.read_bytes()) == _comparable(expected)
            what = "does not describe what the manifest does; restore it"
        except FileNotFoundError:
            same, what = False, "is missing; restore it"
        except ValueError:
            same, what = False, "is damaged; restore it"
        except OSError as error:
            same, what = False, f"cannot be read: {error.strerror}"
        if not same:
            array = name.removesuffix(f"/{GROUP_FILE}")
            column = array if array in manifest.columns else ""
            source = source_of(column) if column else ""
            findings.append(Finding(path=file, what=f"{file} {what}", source=source, column=column))
    return findings


def _comparable(document: bytes) -> Any:
    """A Zarr document without what users may add and writers may leave out."""
    values = json.loads(document)
    if not isinstance(values, dict):
        return values
    for name in ("attributes", "consolidated_metadata"):
        if isinstance(values.get(name), (dict, type(None))):
            values.pop(name, None)
    for name in ("storage_transformers", "dimension_names"):
        if not values.get(name):
            values.pop(name, None)
    return values


def _check_keys_and_labels(path: Path, manifest: Manifest) -> list[Finding]:
    findings = []
    try:
        read_keys(path, manifest)
    except CacheError as error:
        findings.append(Finding(path=path / KEYS_FILE, what=str(error)))
    try:
        labels = read_labels(path, manifest)
    except CacheError as error:
        findings.append(Finding(path=path / LABEL_CHUNK, column=LABEL, what=str(error)))
    else:
        outside = np.flatnonzero((labels < 0) | (labels >= len(manifest.class_names)))
        findings += [
            Finding(
                path=path / LABEL_CHUNK,
                column=LABEL,
                row=int(row),
                what=f"label {labels[row]} is of no class; write the cache again",
            )
            for row in outside
        ]
    return findings


def _check_calibration(path: Path, manifest: Manifest, source: str) -> list[Finding]:
    """The file that a source's notes speak of."""
    recorded = recorded_sha256(manifest.sources[source])
    if recorded is None:
        return []
    file = calibration_file(path, source)
    data = read_calibration(path, source)
    if data is None:
        what = f"{file} is missing; restore it, or write the cache again in another folder"
        return [Finding(path=file, source=source, what=what)]
    try:
        check_calibration(file, data, recorded)
    except CacheError as error:
        return [Finding(path=file, source=source, what=str(error))]
    return []


def _check_record(
    path: Path, manifest: Manifest, source: str, shard: int
) -> tuple[CommitRecord | None, Finding | None]:
    """A shard's record, or why it has none."""
    file = commit_file(path, source, shard)
    rows = manifest.shard_range(shard)
    columns = manifest.source_columns(source).keys()
    try:
        record = read_commit(path, source, shard)
    except CacheError as error:
        return None, Finding(path=file, source=source, shard=shard, what=str(error))
    if record is None:
        what = f"shard {shard} of {source} is not committed: {file} is missing; {_RESUME}"
    elif record.rows != (rows.start, rows.stop) or record.columns.keys() != columns:
        what = f"commit record {file} is of other rows or columns than shard {shard} of {source}; {_REDO}"
    else:
        return record, None
    return None, Finding(path=file, source=source, shard=shard, what=what)


class _ShardCheck:
    """The check of one column's shard file, for a thread.

    Args:
        path: folder of the cache.
        manifest: its manifest.
        column: name of the column.
        record: the shard's, intact.
    """

    def __init__(self, path: Path, manifest: Manifest, column: str, record: CommitRecord) -> None:
        self.bytes = record.columns[column].file_bytes
        self._column = column
        self._record = record
        self._spec = manifest.columns[column]
        self._shape = (manifest.shard_rows, len(manifest.views))
        self._file = shard_file(path, column, self._spec, record.shard)

    def __call__(self) -> list[Finding]:
        try:
            descriptor = os.open(self._file, os.O_RDONLY | os.O_CLOEXEC)
            try:
                return self._check(descriptor)
            finally:
                os.close(descriptor)
        except FileNotFoundError:
            return [self._finding(f"is missing; {_REDO}")]
        except OSError as error:
            return [self._finding(f"cannot be read: {error.strerror}")]

    def _finding(self, what: str, row: int | None = None) -> Finding:
        return Finding(
            path=self._file,
            what=f"{self._file} {what}",
            source=source_of(self._column),
            column=self._column,
            shard=self._record.shard,
            row=row,
        )

    def _check(self, descriptor: int) -> list[Finding]:
        size = os.fstat(descriptor).st_size
        if size != self.bytes:
            return [self._finding(f"has {size} bytes of {self.bytes}; {_REDO}")]
        try:
            index = read_index(descriptor, str(self._file), *self._shape)
        except CacheError as error:
            return [self._finding(f"has no sound index ({error}); {_REDO}")]

        data_bytes = size - index_bytes(*self._shape)
        plain_bytes = None if self._spec.compressor else self._spec.row_bytes + CHECKSUM_BYTES
        sizes = index[..., 1]
        buffer = memoryview(bytearray(int(sizes[sizes <= data_bytes].max(initial=0))))
        checksums = np.zeros(self._shape, dtype="<u4")
        findings = []
        first, stop = self._record.rows
        for (at, view), offset in np.ndenumerate(index[..., 0]):
            row = first + at
            missing = row >= stop or row in self._record.invalid
            if bool(offset == MISSING) != missing:
                found = "has no data" if not missing else "has data, but is invalid or no image's"
                findings.append(self._finding(f"{found}; {_REDO}", row))
            if offset == MISSING:
                continue
            chunk_bytes = int(sizes[at, view])
            inside = chunk_bytes > CHECKSUM_BYTES and int(offset) + chunk_bytes <= data_bytes
            if not inside or chunk_bytes != (plain_bytes or chunk_bytes):
                findings.append(self._finding(f"has an index that points outside its data; {_REDO}", row))
                continue
            chunk = buffer[:chunk_bytes]
            if os.preadv(descriptor, [chunk], int(offset)) != chunk_bytes:
                findings.append(self._finding(f"ends in the middle of the row; {_REDO}", row))
                continue
            stored = int.from_bytes(chunk[-CHECKSUM_BYTES:], "little")
            checksums[at, view] = stored
            if crc32c(chunk[:-CHECKSUM_BYTES]) != stored:
                findings.append(self._finding(f"has data that do not match their checksum; {_REDO}", row))
        recorded = self._record.columns[self._column].chunks_sha256
        if not findings and hashlib.sha256(checksums.tobytes()).hexdigest() != recorded:
            findings.append(self._finding(f"is intact, but not the file that was committed; {_REDO}"))
        return findings


def _run(
    tasks: Sequence[_ShardCheck], progress: Callable[[int, int], None] | None, threads: int
) -> list[Finding]:
    """All tasks' findings, in the order of the tasks."""
    total = sum(task.bytes for task in tasks)
    done = 0
    found: dict[int, list[Finding]] = {}
    with ThreadPoolExecutor(threads) as pool:
        futures = {pool.submit(task): number for number, task in enumerate(tasks)}
        try:
            for future in as_completed(futures):
                number = futures[future]
                found[number] = future.result()
                done += tasks[number].bytes
                if progress is not None:
                    progress(done, total)
        except BaseException:
            # Ctrl-C must not wait for the shards that nobody has begun
            pool.shutdown(cancel_futures=True)
            raise
    return [finding for number in sorted(found) for finding in found[number]]


def _check_strays(path: Path, manifest: Manifest, committed: Iterable[tuple[str, int]]) -> list[Finding]:
    """Files that no part of the cache explains; those of a shard not committed are a run's in progress."""
    done = set(committed)
    known = {path / name for name in zarr_documents(manifest)}
    known |= {path / LOCK_FILE, path / KEYS_FILE, path / LABEL_CHUNK}
    for source in manifest.sources:
        known.add(commit_folder(path, source) / LOCK_FILE)
        for shard in range(manifest.num_shards):
            files = [
                shard_file(path, name, spec, shard) for name, spec in manifest.source_columns(source).items()
            ]
            files.append(commit_file(path, source, shard))
            known.update(files)
            if (source, shard) not in done:
                known.update(partial_path(file) for file in files)
    known |= _known_calibrations(path, manifest, {source for source, _ in done})
    with os_errors("read", path):
        present = [Path(folder) / name for folder, _, names in os.walk(path) for name in names]
    return [
        Finding(path=file, what=f"{file} is not the cache's; delete it")
        for file in sorted(present)
        if file not in known
    ]


def _known_calibrations(path: Path, manifest: Manifest, committed: Container[str]) -> set[Path]:
    """Calibrations that notes speak of, and those of sources that nobody has committed a shard of yet."""
    known = set()
    # a calibration is made before its source is declared, and its lock before it
    locks = sorted((path / CALIBRATION_FOLDER).glob(f".?*{LOCK_FILE}"))
    for source in {*manifest.sources, *(lock.name[1:].removesuffix(LOCK_FILE) for lock in locks)}:
        file = calibration_file(path, source)
        known.add(calibration_lock(path, source))
        if source in manifest.sources and recorded_sha256(manifest.sources[source]) is not None:
            known.add(file)
        if source not in committed:
            known |= {file, partial_path(file)}
    return known
