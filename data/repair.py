"""Making a damaged cache one that only lacks what its writers can write again.

What `verify_cache` finds falls into four kinds. Shards that are not as committed are *withdrawn*: record
first, then files, so that whoever resumes writes them again. Metadata, keys and labels follow from the
manifest and the images, and are *restored*. Calibrations are withdrawn and fitted again by the writer. Files
that no part of the cache explains are left to whoever put them there, but for those a killed writer left.

Nothing here encodes: withdraw only what can be written again.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .errors import CacheError
from .files import locked, os_errors, partial_path, sync_folders, write_file
from .layout import (
    CALIBRATION_FOLDER,
    GROUP_FILE,
    KEYS_FILE,
    LABEL_CHUNK,
    LOCK_FILE,
    calibration_file,
    commit_file,
    shard_file,
    zarr_documents,
)
from .store import (
    encode_keys,
    keys_sha256,
    metadata_documents,
    open_manifest,
    read_keys,
    read_labels,
)
from .writer import SourceWriter

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from numpy.typing import NDArray

    from .schema import Manifest
    from .verify import Finding


@dataclass(frozen=True, kw_only=True)
class RepairPlan:
    """What is to be done about findings.

    Attributes:
        shards: source → its shards that are not as committed, or not committed, ascending.
        rows: source → rows of those shards known to be bad; the others of the shard may be sound.
        documents: Zarr's metadata that are not what the manifest makes them.
        tables: ``keys.txt`` or the labels, which the images are needed for.
        calibrations: sources whose calibration is missing or damaged.
        leftovers: files of a writer that was killed; nobody needs them.
        strays: findings about files that are not the cache's.
    """

    shards: Mapping[str, tuple[int, ...]]
    rows: Mapping[str, tuple[int, ...]]
    documents: tuple[Path, ...]
    tables: tuple[Path, ...]
    calibrations: tuple[str, ...]
    leftovers: tuple[Path, ...]
    strays: tuple[Finding, ...]

    @property
    def sources(self) -> tuple[str, ...]:
        """Sources that must be encoded again, in part or whole."""
        return tuple(dict.fromkeys([*self.shards, *self.calibrations]))

    @property
    def needs_images(self) -> bool:
        """Whether it cannot be done without the images that the cache was made from."""
        return bool(self.sources or self.tables)


def plan_repair(path: Path, findings: Sequence[Finding]) -> RepairPlan:
    """Sort findings by what is to be done about them.

    Args:
        path: folder of the cache.
        findings: of `verify_cache`, of all columns.

    Raises:
        CacheError: the manifest itself is damaged, which nothing else tells.
    """
    manifest = open_manifest(path)
    shards: dict[str, set[int]] = {}
    rows: dict[str, set[int]] = {}
    documents, tables, leftovers = [], [], []
    calibrations: list[str] = []
    strays: list[Finding] = []
    for finding in findings:
        file = Path(finding.path)
        if finding.shard is not None:
            shards.setdefault(finding.source, set()).add(finding.shard)
            if finding.row is not None:
                rows.setdefault(finding.source, set()).add(finding.row)
        elif file in (path / KEYS_FILE, path / LABEL_CHUNK):
            tables.append(file)
        elif finding.source and file == calibration_file(path, finding.source):
            calibrations.append(finding.source)
        elif file.name.startswith(".") and file == partial_path(file.with_name(file.name[1:-8])):
            leftovers.append(file)
        elif file.name == GROUP_FILE and str(file.relative_to(path)) in zarr_documents(manifest):
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


def restore_documents(path: Path, plan: RepairPlan) -> None:
    """Write Zarr's metadata again, and remove what killed writers left.

    Args:
        path: folder of the cache.
        plan: whose ``documents`` and ``leftovers`` are dealt with.

    Raises:
        CacheError: the manifest is damaged.
        RepaError: the operating system refuses.
    """
    with os_errors("write", path), locked(path / LOCK_FILE):
        # under the lock: a writer that declares a source must not be undone
        manifest = open_manifest(path)
        documents = metadata_documents(path, manifest)
        for file in plan.documents:
            write_file(file, documents[str(file.relative_to(path))], path)
        for file in plan.leftovers:
            with suppress(FileNotFoundError):
                file.unlink()


def restore_tables(path: Path, manifest: Manifest, keys: Sequence[str], labels: NDArray[np.int32]) -> None:
    """Write ``keys.txt`` and the labels again, where they are not what they should be.

    Args:
        path: folder of the cache.
        manifest: its manifest.
        keys: image key of every row.
        labels: int32 ``[N]``, of the very images that the cache was made from: compare the fingerprint first.

    Raises:
        CacheError: these are not the keys of the manifest.
        RepaError: the operating system refuses.
    """
    if keys_sha256(keys) != manifest.keys_sha256:
        raise CacheError(f"these are not the images of cache {path}: their keys differ; give its --data")
    try:
        read_keys(path, manifest)
    except CacheError:
        with os_errors("write", path / KEYS_FILE):
            write_file(path / KEYS_FILE, encode_keys(keys), path)
    try:
        sound = np.array_equal(read_labels(path, manifest), labels)
    except CacheError:
        sound = False
    if not sound:
        with os_errors("write", path / LABEL_CHUNK):
            write_file(path / LABEL_CHUNK, zarr_documents(manifest, labels=labels)[LABEL_CHUNK], path)


def withdraw(path: Path, manifest: Manifest, shards: Mapping[str, Iterable[int]]) -> None:
    """Take shards back: afterwards they are not committed, and their files are gone.

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
                record = commit_file(path, source, number)
                with os_errors("write", record):
                    record.unlink(missing_ok=True)
                    # before a file goes: a record must never stand beside files that it was not made from
                    sync_folders(record.parent, path)
                    for column, spec in manifest.source_columns(source).items():
                        shard_file(path, column, spec, number).unlink(missing_ok=True)


def withdraw_calibration(path: Path, source: str) -> None:
    """Remove a calibration that is damaged, so that the next writer of its source fits it again.

    Raises:
        RepaError: the operating system refuses.
    """
    file = calibration_file(path, source)
    with os_errors("write", file):
        file.unlink(missing_ok=True)
        if (path / CALIBRATION_FOLDER).is_dir():
            sync_folders(path / CALIBRATION_FOLDER, path)
