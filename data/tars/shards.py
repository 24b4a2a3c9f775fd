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

import json
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import numpy as np
from annotated_types import Ge, Lt
from crc32c import crc32c

from ..edge import MOST_BYTES, parse_json
from ..errors import CacheError, RepaError
from ..format.bounds import Count, Label, Sha256, Text  # noqa: TC001 - read when headers are parsed
from ..format.canonical import canonical_json
from ..format.columns import source_of
from ..format.grammar import is_name
from ..format.manifest import Manifest
from .names import present_tars
from .reader import open_tar, split_member

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from ..format.columns import ColumnSpec
    from .reader import Member, TarReader

FORMAT = 1
HEADER_KEY = "__repa__/shard"
HEADER = f"{HEADER_KEY}.json"
CALIBRATION_KEY = "__repa__/calibration/"
CALIBRATION_FIELD = "safetensors"
LABEL_FIELD = "cls"
FACTS_FIELD = "json"
AGAIN = "delete that tar, then fetch or export it again"  # export keeps the tars that are there
_MOST_FACTS = 1 << 20  # bytes of what a sample says of itself
_MOST_CALIBRATION = 1 << 28
_MAGIC = b"\x93NUMPY\x01\x00"


@dataclass(frozen=True, kw_only=True)
class ShardHeader:
    """What a tar says before its first sample.

    Attributes:
        manifest: of the cache, with the exported columns and their sources alone.
        shard: which shard it is.
        keys: image key of each of its rows.
        labels: int32, of each of its rows.
        invalid: source → row → why its image has no data, of its rows.
        all_invalid: every row of the cache that some exported source has marked invalid, ascending.
        chunks_sha256: column → what the commit record says of the shard's file.
    """

    manifest: Manifest
    shard: int
    keys: tuple[str, ...]
    labels: NDArray[np.int32]
    invalid: Mapping[str, Mapping[int, str]]
    all_invalid: NDArray[np.int64]
    chunks_sha256: Mapping[str, str]

    def encode(self) -> bytes:
        """Write the header's JSON unsorted, as the order of the fields is part of a cache's bytes."""
        values = {
            "format": FORMAT,
            "manifest": self.manifest.to_json(),
            "shard": self.shard,
            "keys": list(self.keys),
            "labels": self.labels.tolist(),
            "invalid": {
                source: {str(row): reason for row, reason in rows.items()}
                for source, rows in self.invalid.items()
            },
            "all_invalid": self.all_invalid.tolist(),
            "chunks_sha256": dict(self.chunks_sha256),
        }
        return json.dumps(values, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()

    @classmethod
    def decode(cls, data: bytes, *, where: str) -> ShardHeader:
        """Parse the header in a member's bytes.

        Raises:
            CacheError: it is of another format or not a header.
        """
        named = f"the header of {where}"
        version = parse_json(_Format, data, where=named, remedy=AGAIN).format
        if version != FORMAT:
            raise CacheError(
                f"{where} is of export format {version}, this repa reads {FORMAT}",
                "export it again",
                field="format",
            )
        stored = parse_json(_Stored, data, where=named, remedy=AGAIN)
        # of the plain values, whose depth and numbers are bounded as those of a manifest in its group
        manifest = Manifest.from_json(stored.manifest, where=where)
        if field := stored.misfit(manifest):
            raise CacheError(
                f"the header of {where} is damaged: its {field} do not fit its manifest", AGAIN, field=field
            )
        return cls(
            manifest=manifest,
            shard=stored.shard,
            keys=stored.keys,
            labels=np.array(stored.labels, dtype=np.int32),
            invalid=stored.invalid,
            all_invalid=np.array(stored.all_invalid, dtype=np.int64),
            chunks_sha256=stored.chunks_sha256,
        )

    @property
    def rows(self) -> list[int]:
        """Its rows that have data, ascending."""
        invalid = set(self.all_invalid.tolist())
        return [row for row in self.manifest.shard_range(self.shard) if row not in invalid]


@dataclass(frozen=True, kw_only=True)
class _Format:
    """Of a header of whatever format."""

    format: Count


@dataclass(frozen=True, kw_only=True)
class _Stored:
    """A header as it is in its tar."""

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    format: Count
    manifest: dict[str, Any]
    shard: Count
    keys: tuple[str, ...]
    labels: tuple[Label, ...]
    invalid: dict[str, dict[int, Text]]
    all_invalid: tuple[Count, ...]
    chunks_sha256: dict[str, Sha256]

    def misfit(self, manifest: Manifest) -> str | None:
        """Return the first field that does not fit the manifest, None where all do."""
        rows = manifest.shard_range(self.shard)
        missing = {row for row in self.all_invalid if row in rows}
        ends = (-1, *self.all_invalid, manifest.num_rows)
        checks = {
            "shard": len(rows) > 0,
            "keys": len(self.keys) == len(rows) and not any("\n" in key for key in self.keys),
            "labels": len(self.labels) == len(rows),
            "all_invalid": all(first < second for first, second in pairwise(ends)),
            "invalid": self.invalid.keys() == manifest.sources.keys()
            and all(each.keys() == missing for each in self.invalid.values()),
            "chunks_sha256": self.chunks_sha256.keys() == manifest.columns.keys(),
        }
        return next((name for name, fits in checks.items() if not fits), None)


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


def read_header(reader: TarReader, members: Iterator[Member]) -> ShardHeader:
    """Read the header, which must be the tar's first member.

    Raises:
        CacheError: it is not.
    """
    first = next(members, None)
    if first is None or first.name != HEADER:
        raise CacheError(
            f"{reader.where} is no tar of a cache: it does not begin with {HEADER}",
            "give tars that `repa cache export` wrote",
        )
    return ShardHeader.decode(reader.read(MOST_BYTES), where=reader.where)


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


def restricted(manifest: Manifest, columns: Sequence[str]) -> Manifest:
    """Return a manifest of some of its columns and their sources alone, in its order."""
    sources = {source_of(name) for name in columns}
    return replace(
        manifest,
        columns={name: spec for name, spec in manifest.columns.items() if name in columns},
        sources={name: provenance for name, provenance in manifest.sources.items() if name in sources},
    )


def read_headers(pattern: str) -> dict[int, tuple[str, ShardHeader, dict[str, bytes]]]:
    """Read shard → tar, header and calibrations of every tar of an export. All tars are opened.

    Raises:
        CacheError: a tar is no cache's, of another export, comes twice, or some are missing.
        RepaError: a tar cannot be read.
    """
    found: dict[int, tuple[str, ShardHeader, dict[str, bytes]]] = {}
    first = ""
    identity: Any = None
    for tar in present_tars(pattern):
        with open_tar(tar) as reader:
            members = iter(reader)
            header = read_header(reader, members)
            calibrations = _calibrations(reader, members) if header.shard == 0 else {}
        own = (header.manifest, header.all_invalid.tolist())
        first, identity = first or tar, identity or own
        if own != identity:
            raise CacheError(f"{tar} and {first} are not of one export", "name the tars of one")
        if header.shard in found:
            raise CacheError(f"{tar} and {found[header.shard][0]} are the same shard", "name each once")
        found[header.shard] = (tar, header, calibrations)
    shards = identity[0].num_shards
    if len(found) < shards:
        first_missing = next(shard for shard in range(shards) if shard not in found)
        raise RepaError(
            f"{pattern} lacks {shards - len(found)} of the {shards} tars of the export, the first is that of "
            f"shard {first_missing}",
            "name them all",
        )
    return found


def _calibrations(reader: TarReader, members: Iterator[Member]) -> dict[str, bytes]:
    """Source → calibration, of those that follow the header."""
    found = {}
    for member in members:
        if not member.name.startswith(CALIBRATION_KEY):
            break
        source = member.name.removeprefix(CALIBRATION_KEY).removesuffix(f".{CALIBRATION_FIELD}")
        if is_name(source):
            found[source] = reader.read(_MOST_CALIBRATION)
    return found
