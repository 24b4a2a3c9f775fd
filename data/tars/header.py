"""What the tars of an export say before their first sample (see `shards`)."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ..edge import MOST_BYTES, parse_json
from ..errors import CacheError, RepaError
from ..format.bounds import Count, Label, Sha256, Text  # noqa: TC001 - read when headers are parsed
from ..format.columns import source_of
from ..format.grammar import is_name
from ..format.manifest import Manifest
from .names import present_tars
from .reader import open_tar

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from .reader import Member, TarReader

FORMAT = 1
HEADER_KEY = "__repa__/shard"
HEADER = f"{HEADER_KEY}.json"
CALIBRATION_KEY = "__repa__/calibration/"
CALIBRATION_FIELD = "safetensors"
AGAIN = "delete that tar, then fetch or export it again"  # export keeps the tars that are there
_MOST_CALIBRATION = 1 << 28


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
