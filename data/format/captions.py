"""The captions of a cache's images: a cache within the cache, whose rows are captions.

``<cache>/captions`` is a cache like any other. Its rows are the distinct captions, each once, in the order in
which the images have them; row 0 is the empty caption, which stands for no condition. Its keys are the
captions as JSON texts, its columns what text encoders made of them. Beside them lies the Zarr array
``of-image``, int32 ``[N, P]``, the rows of the captions of each image and −1 where it has fewer than P; an
image without any has the empty one. The fingerprint of the captions binds the two and the image set.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from crc32c import crc32c

from ..edge import MOST_BYTES, read_json
from ..errors import CacheError
from ..storage.bucket import file_bytes
from ..storage.files import os_errors, read_file
from ..storage.local import CHECKSUM_BYTES
from .columns import find_kind, split_column
from .layout import CHUNK_FOLDER, GROUP_FILE
from .manifest import ATTRIBUTE, FORMAT_VERSION, Manifest
from .opening import labels_sha256, open_manifest, read_keys

if TYPE_CHECKING:
    from collections.abc import Mapping, MutableMapping, Sequence

    from numpy.typing import NDArray

    from ..storage.bucket import CachePath
    from .layout import PathT

CAPTIONS_FOLDER = "captions"
TABLE = "of-image"
TABLE_CHUNK = f"{TABLE}/{CHUNK_FOLDER}/0/0"
SOURCE_KIND = "captions"
EMPTY = 0
"""Row of the empty caption."""

NONE = -1
MOST_CAPTIONS = 64
"""Of an image."""

_RESTORE = "restore it, or run the `repa preprocess --captions` again that made it"


def captions_path(path: PathT) -> PathT:
    """Return where the captions of a cache lie."""
    return path / CAPTIONS_FOLDER


def of_captions(column: str) -> bool:
    """Return whether a column's rows are captions.

    Raises:
        RepaError: the name is not of the grammar.
    """
    kind = find_kind(split_column(column)[1])
    return kind is not None and kind.of_captions


def number_captions(captions: Sequence[Sequence[str]]) -> tuple[list[str], NDArray[np.int32]]:
    """Return the distinct captions of images, and which of them each image has.

    Args:
        captions: of each image, in the order of the cache's rows.

    Returns:
        The captions by row, the empty one first, and the rows of each image, int32 ``[N, P]``.
    """
    rows: dict[str, int] = {"": EMPTY}
    most = max((len(each) for each in captions), default=0)
    table = np.full((len(captions), max(1, most)), NONE, np.int32)
    for image, each in enumerate(captions):
        for place, caption in enumerate(each or [""]):
            table[image, place] = rows.setdefault(caption, len(rows))
    return list(rows), table


def captions_manifest(images: Manifest, captions: Sequence[str], table: NDArray[np.int32]) -> Manifest:
    """Return the manifest of the captions of a cache, without columns.

    Args:
        images: manifest of the cache.
        captions: by row, see `number_captions`.
        table: rows of each image.
    """
    keys = "".join(f"{key}\n" for key in caption_keys(captions)).encode()
    keys_sha256 = hashlib.sha256(keys).hexdigest()
    return Manifest(
        num_rows=len(captions),
        shard_rows=images.shard_rows,
        resolution=1,
        crop="none",
        exif_orientation="ignored",
        source_kind=SOURCE_KIND,
        source_fingerprint=_fingerprint(images, keys_sha256, table),
        keys_sha256=keys_sha256,
        labels_sha256=labels_sha256(np.zeros(len(captions), np.int32)),
        class_names=("caption",),
        format_version=FORMAT_VERSION,
    )


def caption_keys(captions: Sequence[str]) -> list[str]:
    """Write captions as keys, which hold no line break."""
    return [json.dumps(caption, ensure_ascii=False) for caption in captions]


def read_captions(path: CachePath) -> list[str]:
    """Return the captions of a cache by row.

    Args:
        path: of the cache of the images.

    Raises:
        CacheError: there are none, or they are damaged.
        RepaError: they cannot be read.
    """
    where = captions_path(path)
    try:
        captions = [json.loads(key) for key in read_keys(where, open_manifest(where))]
    except ValueError:
        captions = [None]
    if not all(isinstance(caption, str) for caption in captions):
        raise CacheError(f"{where} has keys that are no captions", _RESTORE, field="keys_sha256")
    return captions


def read_table(path: CachePath, images: Manifest, captions: Manifest) -> NDArray[np.int32]:
    """Return the rows of the captions of each image, int32 ``[N, P]``, −1 where an image has fewer.

    Args:
        path: of the cache of the images.
        images: its manifest.
        captions: manifest of its captions.

    Raises:
        CacheError: the array is missing, damaged, or of other images or captions.
        RepaError: it cannot be read.
    """
    file = captions_path(path) / TABLE_CHUNK
    with os_errors("read", file):
        try:
            data = read_file(file, 4 * MOST_CAPTIONS * images.num_rows + CHECKSUM_BYTES)
        except FileNotFoundError as error:
            raise CacheError(f"{file} is missing", _RESTORE) from error
    values, stored = data[:-CHECKSUM_BYTES], int.from_bytes(data[-CHECKSUM_BYTES:], "little")
    if not values or len(values) % (4 * images.num_rows) or crc32c(values) != stored:
        raise CacheError(f"{file} does not match its checksum", _RESTORE)
    table = np.frombuffer(values, "<i4").astype(np.int32).reshape(images.num_rows, -1)
    if captions.source_fingerprint != _fingerprint(images, captions.keys_sha256, table):
        raise CacheError(f"{file} is of other images or captions", _RESTORE, field=TABLE)
    if table.min() < NONE or table.max() >= captions.num_rows or (table[:, 0] == NONE).any():
        raise CacheError(f"{file} names captions that there are not", _RESTORE, field=TABLE)
    return table


def table_documents(table: NDArray[np.int32], record: Mapping[str, Any] | None = None) -> dict[str, bytes]:
    """Make the files of the array ``of-image``, relative path → bytes, the values last.

    Args:
        table: its values.
        record: attribute of the array that says where the captions come from.
    """
    import zarr
    from zarr.codecs import BytesCodec, Crc32cCodec
    from zarr.storage import MemoryStore

    files: MutableMapping[str, Any] = {}
    zarr.create_array(
        MemoryStore(files),
        name=TABLE,
        data=table,
        chunks=table.shape,
        compressors=[Crc32cCodec()],
        serializer=BytesCodec(endian="little"),
        fill_value=NONE,
        attributes=None if record is None else {ATTRIBUTE: dict(record)},
        config={"write_empty_chunks": True},
    )
    document = f"{TABLE}/{GROUP_FILE}"
    return {name: files[name].to_bytes() for name in (document, TABLE_CHUNK)}


def read_record(path: CachePath) -> dict[str, Any]:
    """Return what was noted of where the captions of a cache come from, which binds nobody.

    Args:
        path: of the cache of the images.

    Raises:
        CacheError: the document of the table is damaged.
        RepaError: it cannot be read.
    """
    file = captions_path(path) / TABLE / GROUP_FILE
    with os_errors("read", file):
        try:
            data = read_file(file, MOST_BYTES)
        except FileNotFoundError as error:
            raise CacheError(f"{file} is missing", _RESTORE) from error
    values = read_json(data, str(file), remedy=_RESTORE)
    record = values.get("attributes", {}).get(ATTRIBUTE) if isinstance(values, dict) else None
    return record if isinstance(record, dict) else {}


def with_captions(path: CachePath, images: Manifest) -> Manifest:
    """Return a cache's manifest with the columns of its captions, for those who look up both.

    Args:
        path: of the cache of the images.
        images: its manifest.

    Raises:
        CacheError: the captions' manifest is damaged, or a source of theirs has the name of one of images.
        RepaError: it cannot be read.
    """
    where = captions_path(path)
    if not _there(where):
        return images
    captions = open_manifest(where)
    both = sorted(images.sources.keys() & captions.sources.keys())
    if both:
        raise CacheError(
            f"{both[0]} is a source of images and of captions in {path}", _RESTORE, field="sources"
        )
    return replace(
        images,
        columns={**images.columns, **captions.columns},
        sources={**images.sources, **captions.sources},
    )


def has_captions(path: CachePath, document: str = GROUP_FILE) -> bool:
    """Return whether a cache has captions.

    Args:
        path: of the cache of the images.
        document: file that tells.

    Raises:
        RepaError: the file system or bucket cannot be asked.
    """
    return _there(captions_path(path), document)


def _there(where: CachePath, document: str = GROUP_FILE) -> bool:
    file = where / document
    with os_errors("read", file):
        try:
            return file_bytes(file) > 0
        except FileNotFoundError:
            return False


def _fingerprint(images: Manifest, keys_sha256: str, table: NDArray[np.int32]) -> str:
    digest = hashlib.sha256(f"{images.keys_sha256} {keys_sha256} {table.shape}".encode())
    digest.update(np.ascontiguousarray(table, "<i4").tobytes())
    return f"sha256:{digest.hexdigest()}"
