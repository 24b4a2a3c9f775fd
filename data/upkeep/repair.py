"""Making a damaged cache one that only lacks what its writers can write again.

A manifest is the first thing: where its document is damaged it is taken from the second one beside it, and
where it is of another cache than the folder's, nothing is done.

What `verify_cache` finds falls into four kinds. Shards that are not as committed are *withdrawn*: record
first, then files, so that whoever resumes writes them again. Metadata, keys and labels follow from the
manifest and the images, and are *restored*. Calibrations are withdrawn and fitted again by the writer. Files
that no part of the cache explains are left to whoever put them there, but for those a killed writer left.

Nothing here encodes: withdraw only what can be written again.
"""

from __future__ import annotations

import hashlib
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..edge import MOST_BYTES
from ..errors import CacheError
from ..format.columns import LABEL
from ..format.commits import CommitRecord, record_misfit
from ..format.group import has_sound_copy
from ..format.layout import (
    COMMITS_FOLDER,
    GROUP_COPY,
    GROUP_FILE,
    KEYS_FILE,
    LABEL_CHUNK,
    LOCK_FILE,
    calibration_file,
    commit_file,
    same_document,
    valid_chunk,
    zarr_documents,
)
from ..format.opening import labels_sha256, open_manifest, read_keys, read_labels
from ..storage.bucket import map_files
from ..storage.files import os_errors, partial_name, read_file
from ..storage.folder import unless_changed
from ..storage.writable import open_writable
from ..writing.store import cache_lock, encode_keys, keys_sha256, metadata_documents
from ..writing.valid_rows import settle_valid
from ..writing.writer import SourceWriter

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from numpy.typing import NDArray

    from ..format.manifest import Manifest
    from ..storage.bucket import CachePath
    from .verify import Finding


@dataclass(frozen=True, kw_only=True)
class RepairPlan:
    """What is to be done about findings.

    Attributes:
        shards: source → its shards that are not as committed, or not committed, ascending.
        rows: source → rows of those shards known to be bad; the others of the shard may be sound.
        documents: Zarr's metadata that are not what the manifest makes them, the second document of the
            group, and chunks of the array of valid rows.
        tables: ``keys.txt`` or the labels, which the images are needed for.
        calibrations: sources whose calibration is missing or damaged.
        leftovers: files of a writer that was killed; nobody needs them.
        strays: findings about files that are not the cache's.
    """

    shards: Mapping[str, tuple[int, ...]]
    rows: Mapping[str, tuple[int, ...]]
    documents: tuple[CachePath, ...]
    tables: tuple[CachePath, ...]
    calibrations: tuple[str, ...]
    leftovers: tuple[CachePath, ...]
    strays: tuple[Finding, ...]

    @property
    def sources(self) -> tuple[str, ...]:
        """Sources that must be encoded again, in part or whole."""
        return tuple(dict.fromkeys([*self.shards, *self.calibrations]))

    @property
    def needs_images(self) -> bool:
        """Whether it cannot be done without the images that the cache was made from."""
        return bool(self.sources or self.tables)


def plan_repair(path: CachePath, findings: Sequence[Finding]) -> RepairPlan:
    """Sort findings by what is to be done about them.

    Args:
        path: folder of the cache.
        findings: of `verify_cache`, of all columns.

    Raises:
        CacheError: the manifest itself is damaged, which nothing else tells, or it is of another cache.
    """
    manifest = open_manifest(path)
    if findings:
        _refuse_foreign_manifest(path, manifest)
    shards: dict[str, set[int]] = {}
    rows: dict[str, set[int]] = {}
    documents, tables, leftovers = [], [], []
    calibrations: list[str] = []
    strays: list[Finding] = []
    for finding in findings:
        file = finding.path
        if finding.shard is not None:
            shards.setdefault(finding.source, set()).add(finding.shard)
            if finding.row is not None:
                rows.setdefault(finding.source, set()).add(finding.row)
        elif file in (path / KEYS_FILE, path / LABEL_CHUNK):
            tables.append(file)
        elif finding.source and file == calibration_file(path, finding.source):
            calibrations.append(finding.source)
        elif file.name.startswith(".") and file.name == partial_name(file.name[1:-8]):
            leftovers.append(file)
        elif _is_document(file, path, manifest):
            documents.append(file)
        else:
            strays.append(finding)
    order = [source for source in manifest.sources if source in shards]
    return RepairPlan(
        shards={source: tuple(sorted(shards[source])) for source in order},
        rows={source: tuple(sorted(rows[source])) for source in order if source in rows},
        documents=tuple(documents),
        tables=tuple(dict.fromkeys(tables)),
        calibrations=tuple(calibrations),
        leftovers=tuple(leftovers),
        strays=tuple(strays),
    )


def _is_document(file: CachePath, path: CachePath, manifest: Manifest) -> bool:
    """Tell whether a file follows from the manifest and the records."""
    if file == path / GROUP_COPY or file.parent == valid_chunk(path, 0).parent:
        return True
    return file.name == GROUP_FILE and _name_within(path, file) in zarr_documents(manifest)


def _name_within(path: CachePath, file: CachePath) -> str:
    return str(file).removeprefix(f"{path}/")


def restore_group(path: CachePath) -> bool:
    """Write the group's document again where it is damaged or lost, and the second one is as it was written.

    Args:
        path: folder of the cache.

    Returns:
        Whether that was so; what else may be the matter with it, `open_manifest` says.

    Raises:
        CacheError: the manifest is of another format version.
        RepaError: the operating system refuses.
    """
    folder = open_writable(path)
    with os_errors("write", path):
        if not folder.exists(path / GROUP_COPY):
            return False
        with folder.locked(path / LOCK_FILE), unless_changed(path / GROUP_FILE):
            seen = folder.seen(path / GROUP_FILE)
            try:
                open_manifest(path)
            except CacheError:
                if has_sound_copy(path):
                    folder.put_if(path / GROUP_FILE, read_file(path / GROUP_COPY, MOST_BYTES), seen)
                    return True
            return False


def _refuse_foreign_manifest(path: CachePath, manifest: Manifest) -> None:
    """Keep a ``zarr.json`` that was copied from another cache from having this one's shards withdrawn.

    Raises:
        CacheError: a commit record that is intact is not what the manifest says, and neither is another file;
            or no column's array is.
    """
    records = _intact_records(path)
    declared = [each for each in records if each[0] in manifest.sources] or records
    misfits = [
        f"{commit_file(path, source, record.shard)} (rows {record.rows[0]} to {record.rows[1] - 1} of "
        f"{', '.join(record.columns)})"
        for source, record in declared
        if not _fits(record, source, manifest)
    ][:1]
    arrays = _array_misfits(path, manifest)
    others = [*_keys_misfit(path, manifest), *arrays]
    columns = {f"{path / name / GROUP_FILE}" for name in manifest.columns}
    none_fits = len(columns) > 1 and columns.issubset(arrays)
    if (misfits and others) or none_fits:
        first, second, *_ = (*misfits, *others)
        raise CacheError(
            f"the manifest in {path / GROUP_FILE} is of another cache: neither {first} nor {second} is as it "
            "says",
            "restore the file that was there",
        )
    known = [record.cache for _, record in declared if record.cache]
    one_other = len(known) > 1 and len(set(known)) == 1 and known[0] != manifest.identity
    if one_other and manifest.format_version > 1:
        raise CacheError(
            f"the manifest in {path / GROUP_FILE} is of another cache: all {len(known)} commit records "
            "are of one that it does not describe",
            "restore the file that was there",
        )


def _intact_records(path: CachePath) -> list[tuple[str, CommitRecord]]:
    """Collect (source, record) of all that are on disk, of sources that the manifest knows or not."""
    folder, commits = open_writable(path), path / COMMITS_FOLDER

    def read(file: CachePath) -> tuple[str, CommitRecord] | None:
        # a record that is damaged, or under the name of another shard, does not tell whose cache this is
        with suppress(CacheError):
            record = CommitRecord.decode(read_file(file, MOST_BYTES), where=str(file))
            if file.name == f"{record.shard}.json":
                return file.parent.name, record
        return None

    with os_errors("read", commits):
        files = [
            commits / source / name
            for source in folder.names(commits)
            for name in folder.names(commits / source)
            if name.endswith(".json")
        ]
        return [record for record in map_files(read, files, path) if record is not None]


def _fits(record: CommitRecord, source: str, manifest: Manifest) -> bool:
    """Tell whether a record may be of the cache that the manifest describes."""
    return record_misfit(manifest, manifest.source_columns(source), record) is None


def _keys_misfit(path: CachePath, manifest: Manifest) -> list[str]:
    with suppress(OSError):
        if hashlib.sha256((path / KEYS_FILE).read_bytes()).hexdigest() != manifest.keys_sha256:
            return [f"{path / KEYS_FILE}"]
    return []


def _array_misfits(path: CachePath, manifest: Manifest) -> list[str]:
    """List the documents of arrays that are there and readable, but not what the manifest says."""
    documents = zarr_documents(manifest)
    found = []
    for array in (LABEL, *manifest.columns):
        file = path / array / GROUP_FILE
        with suppress(OSError, ValueError, RecursionError):
            if not same_document(read_file(file, MOST_BYTES), documents[f"{array}/{GROUP_FILE}"]):
                found.append(f"{file}")
    return found


def restore_documents(path: CachePath, plan: RepairPlan) -> None:
    """Write Zarr's metadata again, and remove what killed writers left.

    Args:
        path: folder of the cache.
        plan: whose ``documents`` and ``leftovers`` are dealt with.

    Raises:
        CacheError: the manifest is damaged.
        RepaError: the operating system refuses.
    """
    folder = open_writable(path)
    with cache_lock(path) as locked:
        # under the lock: a writer that declares a source must not be undone
        manifest = open_manifest(path)
        documents = metadata_documents(path, manifest)
        for file in plan.documents:
            name = _name_within(path, file)
            locked.held.check()
            if file.parent == valid_chunk(path, 0).parent:
                settle_valid(path, int(file.name))
            else:
                folder.put(file, documents[GROUP_FILE if name == GROUP_COPY else name])
        folder.remove(plan.leftovers)


def restore_tables(
    path: CachePath, manifest: Manifest, keys: Sequence[str], labels: NDArray[np.int32]
) -> None:
    """Write ``keys.txt`` and the labels again, where they are not what they should be.

    Args:
        path: folder of the cache.
        manifest: its manifest.
        keys: image key of every row.
        labels: int32 ``[N]``, of the very images that the cache was made from: compare the fingerprint first.

    Raises:
        CacheError: these are not the keys of the manifest, or ``keys.txt`` has none of them.
        RepaError: the operating system refuses.
    """
    if keys_sha256(keys) != manifest.keys_sha256:
        raise CacheError(f"these are not the images of cache {path}: their keys differ", "give its --data")
    if manifest.labels_sha256 not in ("", labels_sha256(labels)):
        raise CacheError(f"these are not the images of cache {path}: their labels differ", "give its --data")
    try:
        read_keys(path, manifest)
    except CacheError as error:
        with os_errors("write", path / KEYS_FILE):
            _refuse_foreign_keys(path, keys, error)
            open_writable(path).put(path / KEYS_FILE, encode_keys(keys))
    try:
        sound = np.array_equal(read_labels(path, manifest), labels)
    except CacheError:
        sound = False
    if not sound:
        with os_errors("write", path / LABEL_CHUNK):
            documents = zarr_documents(manifest, labels=labels)
            open_writable(path).put(path / LABEL_CHUNK, documents[LABEL_CHUNK])


def _refuse_foreign_keys(path: CachePath, keys: Sequence[str], cause: CacheError) -> None:
    """Refuse the keys of other images.

    A file that is damaged still has most of its lines, one of other images has none of them.
    """
    with suppress(FileNotFoundError):
        there = (path / KEYS_FILE).read_bytes().decode(errors="replace").splitlines()
        if there and not set(keys).intersection(there):
            raise CacheError(
                f"{path / KEYS_FILE} has none of the keys that the manifest in {path / GROUP_FILE} is of, so "
                "one of the two is of another cache",
                "restore the one that is, or delete keys.txt if that is it",
            ) from cause


def withdraw(path: CachePath, manifest: Manifest, shards: Mapping[str, Iterable[int]]) -> None:
    """Take shards back. Afterwards they are not committed, and their files are gone.

    Args:
        path: folder of the cache.
        manifest: its manifest.
        shards: source → shards.

    Raises:
        CacheError: another process is writing one of them; that source is left as it is.
        RepaError: the operating system refuses.
    """
    for source, numbers in shards.items():
        with SourceWriter(path, manifest, source, numbers) as writer:
            for number in writer.shards:
                writer.withdraw(number)


def withdraw_calibration(path: CachePath, source: str) -> None:
    """Remove a calibration that is damaged, so that the next writer of its source fits it again.

    Raises:
        RepaError: the operating system refuses.
    """
    file = calibration_file(path, source)
    with os_errors("write", file):
        open_writable(path).remove([file])
