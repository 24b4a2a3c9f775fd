"""Reading a whole cache and saying what in it is not as it was committed.

Every stored byte is covered by some checksum: image data and their checksums by crc32c and the commit record,
shard indexes by crc32c, commit records and the manifest by their own sha256, ``keys.txt`` by the manifest,
labels by crc32c, calibrations by the notes of their source; Zarr's metadata are compared with what the
manifest makes them.

A cache in a bucket is checked as one in a folder, and as strictly: what was copied there arrived whole.
"""

from __future__ import annotations

import errno
import json
import os
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from ..edge import MOST_BYTES
from ..errors import CacheError
from ..format.captions import (
    SOURCE_KIND,
    TABLE,
    TABLE_CHUNK,
    captions_path,
    has_captions,
    read_table,
    table_documents,
)
from ..format.columns import LABEL, source_of
from ..format.commits import read_commit, record_misfit
from ..format.group import read_group
from ..format.layout import (
    GROUP_COPY,
    GROUP_FILE,
    KEYS_FILE,
    LABEL_CHUNK,
    VALID,
    calibration_file,
    commit_file,
    same_document,
    valid_chunk,
    zarr_documents,
)
from ..format.manifest import ATTRIBUTE
from ..format.opening import open_manifest, read_keys, read_labels
from ..format.valid import encode_valid
from ..storage.bucket import REQUESTS, RemotePath, map_files
from ..storage.files import os_errors, read_file
from ..storage.local import CHECKSUM_BYTES
from ..writing.calibrations import check_calibration, read_calibration, recorded_sha256
from .shard_check import REDO, Finding, ShardCheck
from .strays import check_strays

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Mapping, Sequence
    from concurrent.futures import Executor

    from ..format.commits import CommitRecord
    from ..format.manifest import Manifest
    from ..storage.bucket import CachePath

__all__ = ["Finding", "verify_cache"]

_AGAIN = "have it written again by `repa cache repair`"
_RESUME = "run the same `repa preprocess` again"
_REMOTE_FILES = 16  # of a bucket at once, several requests each


def verify_cache(
    path: CachePath,
    columns: Sequence[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
    *,
    threads: int | None = None,
) -> list[Finding]:
    """Check every byte of a cache.

    Args:
        path: its folder, or its prefix in a bucket.
        columns: check the data of these columns only, and look for no stray files; all columns by default.
        progress: called with bytes of shards checked and bytes in all, from the calling thread.
        threads: files checked at once; by default as many as CPUs, at most 8, and of a bucket 16.

    Returns:
        What is wrong, in the order of manifest, sources, shards, columns and rows; empty for a cache that is
        complete and intact. Shards that are not committed yet are found too.

    Raises:
        CacheError: there is no cache at ``path``, or it lacks a column that was asked for.
        RepaError: the bucket cannot be read, or the package that reads it is not installed.
    """
    group = path / GROUP_FILE
    try:
        manifest = open_manifest(path)
    except CacheError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise
        return [Finding(path=group, what=error.what, remedy=error.remedy)]
    if columns is not None:
        manifest.require(tuple(columns), where=str(path))
    checked = [name for name in manifest.columns if columns is None or name in columns]

    findings = [
        *_check_metadata(path, manifest),
        *_check_copy(path, manifest),
        *_check_keys_and_labels(path, manifest),
    ]
    records: dict[tuple[str, int], CommitRecord] = {}
    unsound: set[int | None] = set()  # shards with a record that is there and not to be believed
    for source in dict.fromkeys(source_of(name) for name in checked):
        findings += _check_calibration(path, manifest, source)
        sound, wrong = _check_records(path, manifest, source)
        records |= {(source, record.shard): record for record in sound}
        findings += wrong
        unsound |= {found.shard for found in wrong if found.remedy != _RESUME}
    usual = _REMOTE_FILES if isinstance(path, RemotePath) else min(8, os.cpu_count() or 1)
    with ThreadPoolExecutor(REQUESTS) as requests:
        tasks = [
            ShardCheck(path, manifest, name, record, requests)
            for (source, _), record in records.items()
            for name in checked
            if source_of(name) == source
        ]
        findings += _run(tasks, requests, progress, threads or usual)
    if columns is None:
        if manifest.format_version > 1:
            findings += _check_valid(path, manifest, records, unsound)
        findings += check_strays(path, manifest, records.keys())
        if manifest.source_kind != SOURCE_KIND:
            findings += _check_captions(path, manifest, progress, threads)
    return findings


def _check_records(
    path: CachePath, manifest: Manifest, source: str
) -> tuple[list[CommitRecord], list[Finding]]:
    """Return the commit records of a source that are sound, and what is wrong with the others."""
    found = map_files(
        lambda shard: _check_record(path, manifest, source, shard), range(manifest.num_shards), path
    )
    sound: list[CommitRecord] = []
    wrong: list[Finding] = []
    for each in found:
        if isinstance(each, Finding):
            wrong.append(each)
        else:
            sound.append(each)
    return sound, wrong


def _check_captions(
    path: CachePath, images: Manifest, progress: Callable[[int, int], None] | None, threads: int | None
) -> list[Finding]:
    """Check the cache of the captions, and which of them the images have."""
    where = captions_path(path)
    if not has_captions(path):
        # the second document says that there were some
        if not has_captions(path, GROUP_COPY):
            return []
        return [Finding(path=where / GROUP_FILE, what=f"{where / GROUP_FILE} is missing", remedy=_AGAIN)]
    remedy = "run the same `repa preprocess --captions` again"
    findings = [
        replace(each, remedy=remedy) if each.path == where / KEYS_FILE else each
        for each in verify_cache(where, progress=progress, threads=threads)
    ]
    try:
        table = read_table(path, images, open_manifest(where))
        documents = table_documents(table)
        name = next(name for name in documents if name != TABLE_CHUNK)
        if not same_document(read_file(where / name, MOST_BYTES), documents[name]):
            what = f"{where / name} does not describe what the manifest does"
            findings.append(Finding(path=where / name, what=what, remedy=remedy))
    except CacheError as error:
        findings.append(Finding(path=where / TABLE_CHUNK, what=error.what, remedy=remedy))
    except (OSError, ValueError, RecursionError) as reason:
        what = f"the document of {where / TABLE} is missing or damaged ({reason})"
        findings.append(Finding(path=where / TABLE / GROUP_FILE, what=what, remedy=remedy))
    return findings


def _check_metadata(path: CachePath, manifest: Manifest) -> list[Finding]:
    """Compare Zarr's documents with those that the manifest makes."""
    findings = []
    for name, expected in zarr_documents(manifest).items():
        file = path / name
        try:
            same = same_document(read_file(file, MOST_BYTES), expected)
            what = "does not describe what the manifest does"
        except FileNotFoundError:
            same, what = False, "is missing"
        except (ValueError, RecursionError):
            same, what = False, "is damaged"
        except OSError as error:
            if isinstance(file, RemotePath):
                with os_errors("read", file):
                    raise
            same, what = False, f"cannot be read ({error.strerror})"
        if not same:
            array = name.removesuffix(f"/{GROUP_FILE}")
            column = array if array in manifest.columns else ""
            source = source_of(column) if column else ""
            findings.append(
                Finding(path=file, what=f"{file} {what}", remedy=_AGAIN, source=source, column=column)
            )
    return findings


def _check_copy(path: CachePath, manifest: Manifest) -> list[Finding]:
    """Compare the second document of the group with the first."""
    if manifest.format_version == 1:
        return []
    file = path / GROUP_COPY
    try:
        document = read_group(path, GROUP_COPY)
        values = document["attributes"][ATTRIBUTE]
        same = values == manifest.to_json() and same_document(
            json.dumps(document).encode(), zarr_documents(manifest)[GROUP_FILE]
        )
        what = f"{file} does not say what {path / GROUP_FILE} does"
    except CacheError as error:
        same, what = False, error.what
    return [] if same else [Finding(path=file, what=what, remedy=_AGAIN)]


def _check_valid(
    path: CachePath,
    manifest: Manifest,
    records: Mapping[tuple[str, int], CommitRecord],
    unsound: Container[int | None],
) -> list[Finding]:
    """Compare the array of valid rows with the records, but of shards whose records are not all sound."""
    committed: dict[int, set[int]] = {}
    for (_, shard), record in records.items():
        committed.setdefault(shard, set()).update(record.invalid)

    def check(shard: int) -> Finding | None:
        file = valid_chunk(path, shard)
        with os_errors("read", file):
            try:
                data = read_file(file, manifest.shard_rows + CHECKSUM_BYTES)
            except FileNotFoundError:
                return Finding(path=file, column=VALID, what=f"{file} is missing", remedy=_AGAIN)
            except OSError as error:
                if error.errno != errno.EFBIG:
                    raise
                data = b""  # longer than any
        if data == encode_valid(manifest, shard, committed[shard]):
            return None
        what = f"{file} does not say which rows have data"
        return Finding(path=file, column=VALID, what=what, remedy=_AGAIN)

    found = map_files(check, [shard for shard in sorted(committed) if shard not in unsound], path)
    return [finding for finding in found if finding is not None]


def _check_keys_and_labels(path: CachePath, manifest: Manifest) -> list[Finding]:
    findings = []
    try:
        read_keys(path, manifest)
    except CacheError as error:
        findings.append(Finding(path=path / KEYS_FILE, what=error.what, remedy=error.remedy))
    try:
        labels = read_labels(path, manifest)
    except CacheError as error:
        findings.append(Finding(path=path / LABEL_CHUNK, column=LABEL, what=error.what, remedy=error.remedy))
    else:
        outside = np.flatnonzero((labels < 0) | (labels >= len(manifest.class_names)))
        findings += [
            Finding(
                path=path / LABEL_CHUNK,
                column=LABEL,
                row=int(row),
                what=f"label {labels[row]} is of no class",
                remedy="write the cache again",
            )
            for row in outside
        ]
    return findings


def _check_calibration(path: CachePath, manifest: Manifest, source: str) -> list[Finding]:
    """Check the file that a source's notes speak of."""
    recorded = recorded_sha256(manifest.sources[source])
    if recorded is None:
        return []
    file = calibration_file(path, source)
    data = read_calibration(path, source)
    if data is None:
        remedy = "restore it, or have it fitted again by `repa cache repair`"
        return [Finding(path=file, source=source, what=f"{file} is missing", remedy=remedy)]
    try:
        check_calibration(file, data, recorded)
    except CacheError as error:
        return [Finding(path=file, source=source, what=error.what, remedy=error.remedy)]
    return []


def _check_record(path: CachePath, manifest: Manifest, source: str, shard: int) -> CommitRecord | Finding:
    """Read a shard's record, or say why it has none."""
    file = commit_file(path, source, shard)
    columns = manifest.source_columns(source)
    try:
        record = read_commit(path, source, shard)
    except CacheError as error:
        return Finding(path=file, source=source, shard=shard, what=error.what, remedy=error.remedy)
    if record is None:
        what, remedy = f"shard {shard} of {source} is not committed: {file} is missing", _RESUME
    elif misfit := record_misfit(manifest, columns, record):
        what, remedy = f"commit record {file} is not of shard {shard} of {source}: {misfit}", REDO
    else:
        return record
    return Finding(path=file, source=source, shard=shard, what=what, remedy=remedy)


def _run(
    tasks: Sequence[ShardCheck],
    requests: Executor,
    progress: Callable[[int, int], None] | None,
    threads: int,
) -> list[Finding]:
    """Collect all tasks' findings, in the order of the tasks."""
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
            # Ctrl-C must not wait for the shards that nobody has begun, nor for the rest of those in a bucket
            requests.shutdown(wait=False, cancel_futures=True)
            pool.shutdown(cancel_futures=True)
            raise
    return [finding for number in sorted(found) for finding in found[number]]
