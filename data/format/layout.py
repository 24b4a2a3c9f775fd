"""Where everything in a cache lies, and the Zarr metadata of its groups and arrays.

The metadata documents are made by zarr-python in memory and written by us: that keeps them what any Zarr
reader expects and lets them reach the disk whole, in an order of our choosing.
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ..storage.bucket import CachePath, RemotePath
from ..storage.folder import LOCK_NAME
from .bounds import MOST_COLUMNS
from .canonical import canonical_sha256
from .columns import LABEL, ColumnSpec, split_column
from .grammar import checked_name
from .manifest import ATTRIBUTE

if TYPE_CHECKING:
    from collections.abc import Mapping, MutableMapping

    import numpy as np
    from numpy.typing import NDArray

    from .manifest import Manifest

# of a folder or of a bucket, as what is asked about
PathT = TypeVar("PathT", Path, RemotePath, CachePath)

GROUP_FILE = "zarr.json"
GROUP_COPY = "zarr.json.copy"
"""The same document again, for the day that it is damaged."""

KEYS_FILE = "keys.txt"
LOCK_FILE = LOCK_NAME
COMMITS_FOLDER = "commits"
CALIBRATION_FOLDER = "calibration"
CHUNK_FOLDER = "c"
LABEL_CHUNK = f"{LABEL}/{CHUNK_FOLDER}/0"
VALID = "valid"
CHECKSUM_ATTRIBUTE = f"{ATTRIBUTE}_sha256"


def shard_file(path: PathT, column: str, spec: ColumnSpec, shard: int) -> PathT:
    """Return the path of one shard of one column.

    It is ``<column>/c/<shard>/0/0…``, with a zero for each view and shape axis.

    Args:
        path: folder of the cache.
        column: name of the column.
        spec: its spec, for the number of axes.
        shard: index of the shard.

    Raises:
        RepaError: the column's name is not of the grammar.
    """
    return path.joinpath(*_column_parts(column), CHUNK_FOLDER, f"{shard:d}", *["0"] * (1 + len(spec.shape)))


@lru_cache(maxsize=MOST_COLUMNS)
def _column_parts(column: str) -> tuple[str, str]:
    """Split a column's path into its components, each checked to be of the grammar."""
    return split_column(column)


def commit_folder(path: PathT, source: str) -> PathT:
    """Return the folder of a source's commit records and of its writers' lock.

    Raises:
        CacheError: the source's name is not of the grammar.
    """
    return path / COMMITS_FOLDER / checked_name(source)


def commit_file(path: PathT, source: str, shard: int) -> PathT:
    """Return the path of the commit record of one shard of a source.

    Raises:
        CacheError: the source's name is not of the grammar.
    """
    return commit_folder(path, source) / f"{shard:d}.json"


def valid_chunk(path: PathT, shard: int) -> PathT:
    """Return the file of a shard's rows in the array ``valid``."""
    return path.joinpath(VALID, CHUNK_FOLDER, f"{shard:d}")


def calibration_file(path: PathT, source: str) -> PathT:
    """Return the path of what was fitted to some images before a source was written (`calibrations`).

    Raises:
        CacheError: the source's name is not of the grammar.
    """
    return path / CALIBRATION_FOLDER / f"{checked_name(source)}.safetensors"


def calibration_lock(path: PathT, source: str) -> PathT:
    """Return the path of the lock under which that file is made.

    Raises:
        CacheError: the source's name is not of the grammar.
    """
    return path / CALIBRATION_FOLDER / f".{checked_name(source)}{LOCK_FILE}"


def group_attributes(manifest: Manifest) -> dict[str, Any]:
    """Make the attributes of the cache's group.

    They are the manifest and the sha256 of its canonical JSON.
    """
    values = manifest.to_json()
    return {ATTRIBUTE: values, CHECKSUM_ATTRIBUTE: canonical_sha256(values)}


def zarr_documents(
    manifest: Manifest,
    *,
    attributes: Mapping[str, Any] | None = None,
    labels: NDArray[np.int32] | None = None,
) -> dict[str, bytes]:
    """Make every Zarr metadata document of a cache, relative path → bytes, as zarr-python makes them.

    Args:
        manifest: the cache.
        attributes: of the cache's group; the manifest's own by default.
        labels: int32 ``[N]``; given, the one chunk of the label array comes too.

    Raises:
        RepaError: a compressor needs a package that is not installed.
    """
    import zarr
    from zarr.codecs import BytesCodec, Crc32cCodec
    from zarr.storage import MemoryStore

    from .compression import quiet_about_pcodec, zarr_codecs

    files: MutableMapping[str, Any] = {}
    group = zarr.create_group(
        MemoryStore(files),
        attributes=dict(group_attributes(manifest) if attributes is None else attributes),
        zarr_format=3,
    )
    label = group.create_array(
        LABEL,
        shape=(manifest.num_rows,),
        dtype="int32",
        chunks=(manifest.num_rows,),
        compressors=[Crc32cCodec()],
        serializer=BytesCodec(endian="little"),
        fill_value=0,
        config={"write_empty_chunks": True},
    )
    if labels is not None:
        label[:] = labels
    if manifest.format_version > 1:
        group.create_array(
            VALID,
            shape=(manifest.num_rows,),
            dtype="bool",
            chunks=(manifest.shard_rows,),
            compressors=[Crc32cCodec()],
            serializer=BytesCodec(endian=None),
            fill_value=False,
            config={"write_empty_chunks": True},
        )
    views = len(manifest.views)
    for source in dict.fromkeys(split_column(column)[0] for column in manifest.columns):
        group.create_group(source)
    with quiet_about_pcodec():
        for column, spec in manifest.columns.items():
            group.create_array(
                column,
                shape=(manifest.num_rows, views, *spec.shape),
                dtype=spec.dtype,
                chunks=(1, 1, *spec.shape),
                shards=(manifest.shard_rows, views, *spec.shape),
                **zarr_codecs(spec),
                fill_value=0,
                config={"write_empty_chunks": True},
            )
    return {name: buffer.to_bytes() for name, buffer in files.items()}


def same_document(data: bytes, expected: bytes) -> bool:
    """Tell whether a Zarr document says what another does.

    Raises:
        ValueError: it is not JSON.
        RecursionError: it is nested beyond reason.
    """
    return bool(_comparable(data) == _comparable(expected))


def _comparable(document: bytes) -> Any:
    """Strip a Zarr document of what users may add and writers may leave out."""
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
