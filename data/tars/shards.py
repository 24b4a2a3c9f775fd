"""A shard of a cache as a WebDataset tar, with what is in it and how it is read back.

::

    __repa__/shard.json                  the manifest, and the shard's keys, labels and invalid rows
    __repa__/calibration/<source>.safetensors     in the tar of shard 0, of sources that have one
    <key>.cls                            label
    <key>.<model>.<kind>.npy             a column's row [V, *shape], NumPy format 1.0
    <key>.json                           row, image key, label, crc32c of each column's bytes

Invalid rows have no sample. A tar's key is the image's key, "." and "%" of its last component written as in
URLs, as WebDataset ends a key at its first dot; members named ``__…__`` it skips. Everything depends on the
cache alone: times are 0 and owners fixed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import numpy as np
from annotated_types import Ge, Lt
from crc32c import crc32c

from ..edge import parse_json
from ..errors import CacheError
from ..format.bounds import Count, Label  # noqa: TC001 - read when headers are parsed
from ..format.canonical import canonical_json
from .header import AGAIN
from .reader import split_member

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from ..format.columns import ColumnSpec
    from .header import ShardHeader
    from .reader import Member, TarReader

LABEL_FIELD = "cls"
FACTS_FIELD = "json"
_MOST_FACTS = 1 << 20  # bytes of what a sample says of itself
_MAGIC = b"\x93NUMPY\x01\x00"


@dataclass(frozen=True, kw_only=True)
class _Facts:
    """The ``.json`` of a sample."""

    row: Count
    key: str
    label: Label
    crc32c: dict[str, Annotated[int, Ge(0), Lt(2**32)]]


def tar_key(key: str) -> str:
    """Make the key under which WebDataset knows the image ``key``. It differs for different images.

    Raises:
        CacheError: as the name of a file it would lie outside the folder that a tar is unpacked in.
    """
    if key.startswith("/") or ".." in key.split("/"):
        raise CacheError(f"image key {key!r} is no path within a folder", "encode the images from a folder")
    folder, slash, name = key.rpartition("/")
    name = name.replace("%", "%25").replace(".", "%2E")
    whole = f"{folder}{slash}{name}"
    return f"%5F{whole[1:]}" if whole.startswith("__") else whole


def column_field(column: str) -> str:
    """Name the field of a column, for example ``dinov2-b.patch.npy``."""
    return f"{column.replace('/', '.')}.npy"


def npy_header(spec: ColumnSpec, views: int) -> bytes:
    """Write the header of a column's row ``[V, *shape]`` in NumPy's format 1.0, to a multiple of 64 bytes.

    Source: numpy.lib.format, "Format Version 1.0".
    """
    shape = (views, *spec.shape)
    text = f"{{'descr': '{spec.numpy_dtype.str}', 'fortran_order': False, 'shape': {shape}, }}"
    padding = -(len(_MAGIC) + 2 + len(text) + 1) % 64
    encoded = f"{text}{' ' * padding}\n".encode("ascii")
    return _MAGIC + len(encoded).to_bytes(2, "little") + encoded


def sample_facts(row: int, key: str, label: int, sums: Mapping[str, int]) -> bytes:
    """Write the ``.json`` of a sample."""
    return canonical_json({"row": row, "key": key, "label": label, "crc32c": dict(sums)})


def read_samples(
    reader: TarReader,
    members: Iterator[Member],
    header: ShardHeader,
    columns_of: Callable[[int], Collection[str]],
) -> Iterator[tuple[int, int, dict[str, NDArray[np.generic]]]]:
    """Yield the samples of a tar whose header has been read, each checked against its checksums.

    Args:
        reader: the tar.
        members: its members after the header.
        header: its header.
        columns_of: row → columns that are wanted of it; of a row without any, nothing is checked.

    Yields:
        (row, label, column → array ``[V, *shape]``), rows ascending, those without columns left out.

    Raises:
        CacheError: a sample is missing, damaged or not the header's.
    """
    start = header.manifest.shard_range(header.shard).start
    rows = {tar_key(header.keys[row - start]): row for row in header.rows}
    columns = {column_field(name): name for name in header.manifest.columns}
    sample = _Sample(reader.where, header)
    views = len(header.manifest.views)
    heads = {name: npy_header(spec, views) for name, spec in header.manifest.columns.items()}
    expected = iter(header.rows)
    for member in members:
        split = split_member(member.name)
        if split is None:
            continue
        key, field = split
        if key != sample.key:
            yield from sample.finish()
            row = rows.get(key)
            if row is None or row != next(expected, None):
                raise CacheError(
                    f"{reader.where} holds {member.name} where its header has another sample", f"{AGAIN}"
                )
            sample = _Sample(reader.where, header, key, row, tuple(columns_of(row)))
        if sample.wanted and (field in (LABEL_FIELD, FACTS_FIELD) or columns.get(field) in sample.wanted):
            name = columns.get(field)
            most = len(heads[name]) + views * header.manifest.columns[name].row_bytes if name else _MOST_FACTS
            sample.fields[field] = reader.read(most)
    yield from sample.finish()
    if (missing := next(expected, None)) is not None:
        raise CacheError(f"{reader.where} has no sample of row {missing}", f"{AGAIN}")


class _Sample:
    """The members of one key so far. The first, of no key, has none."""

    def __init__(
        self, where: str, header: ShardHeader, key: str = "", row: int = -1, wanted: Sequence[str] = ()
    ) -> None:
        self.key = key
        self.wanted = wanted
        self.fields: dict[str, bytes] = {}
        self._where = where
        self._header = header
        self._row = row

    def finish(self) -> Iterator[tuple[int, int, dict[str, NDArray[np.generic]]]]:
        if not self.wanted:
            return
        manifest = self._header.manifest
        within = self._row - manifest.shard_range(self._header.shard).start
        label = int(self._header.labels[within])
        try:
            facts = self._facts()
            if (facts.row, facts.key, facts.label) != (self._row, self._header.keys[within], label):
                raise self._damaged("its json contradicts the header")
            if int(self.fields[LABEL_FIELD]) != label:
                raise self._damaged("its cls contradicts the header")
            arrays = {name: self._array(name, facts.crc32c[name]) for name in self.wanted}
        except KeyError as error:
            raise self._damaged(f"it has no {error}") from error
        except ValueError as error:
            raise self._damaged(f"its cls is no number: {error}") from error
        yield self._row, label, arrays

    def _facts(self) -> _Facts:
        try:
            return parse_json(_Facts, self.fields[FACTS_FIELD], where="its json")
        except CacheError as error:
            raise self._damaged(error.what) from error

    def _array(self, column: str, checksum: int) -> NDArray[np.generic]:
        manifest = self._header.manifest
        spec, views = manifest.columns[column], len(manifest.views)
        header, content = npy_header(spec, views), self.fields[column_field(column)]
        data = memoryview(content)[len(header) :]
        if not content.startswith(header) or len(data) != views * spec.row_bytes:
            raise self._damaged(f"its {column} has another shape")
        if crc32c(data) != checksum:
            raise self._damaged(f"its {column} does not match its checksum")
        return np.frombuffer(data, dtype=spec.numpy_dtype).reshape(views, *spec.shape)

    def _damaged(self, why: str) -> CacheError:
        return CacheError(
            f"row {self._row} in {self._where}, sample {self.key}, is damaged ({why})", f"{AGAIN}"
        )
