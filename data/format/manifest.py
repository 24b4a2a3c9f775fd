"""The manifest, which says what a cache holds and where it came from, in the attributes of its Zarr group.

`Manifest` is plain data, JSON in and out; `store` writes it and checks a cache against it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Annotated, Any, ClassVar

from annotated_types import Len, Predicate

from ..edge import parse, shortened
from ..errors import CacheError, RepaError
from .bounds import (
    MOST_COLUMNS,
    MOST_ROW_BYTES,
    MOST_SOURCES,
    Count,
    Number,
    Rows,
    Sha256,
    ShardRows,
    Side,
    Text,
    Word,
)
from .canonical import canonical_sha256
from .columns import (
    AUTOENCODER,
    LABEL,
    ColumnSpec,
    check_column,
    find_kind,
    model_of,
    source_of,
    split_column,
)
from .grammar import checked_name
from .notes import check_notes

FORMAT_VERSION = 2
"""Of what is written. Version 1 had no digest of the labels, no `valid`, and records that did not know whose
they were."""

READ_VERSIONS = (1, 2)
ATTRIBUTE = "repa"
DEFAULT_SHARD_ROWS = 1024
ORIGINAL_VIEW = "original"
MIRRORED_VIEW = "mirrored"
VIEWS = {"original": (ORIGINAL_VIEW,), "flip": (ORIGINAL_VIEW, MIRRORED_VIEW)}
"""What ``--views`` takes, and the views that a cache then has."""
LOADED_NOTE = "loaded_sha256"
"""Note of weights that are not run as their file holds them, the sha256 of the tensors as they are run."""

COMPUTE_DTYPES = ("float32", "tf32", "bfloat16", "float16")
"""What forward passes compute in.

``tf32`` is float32, its factors rounded to as many digits as float16 has."""

UNKNOWN_DTYPE = "unknown"
"""Compute dtype of columns that another program wrote, which says nothing of it."""

DEVIATION_NOTE = "deviation"
"""Note of how far a compute dtype's outputs lie from those of float32; measured, so it binds nobody."""

LATENTS_NOTE = "latent_statistics"
"""Note of mean and standard deviation of each channel of the latents; measured, so it binds nobody."""

FOREIGN_NOTE = "foreign"
"""Note of latents that another program wrote, see `notes.ForeignNote`."""

MIRRORED_AT_RANDOM = "at random"
"""What that note says of images of which some were mirrored, and nothing says which."""

IMAGES_NOTE = "images"
"""Note of imported latents, the fingerprint of the images that teachers were added from."""

_AGAIN = "restore it, or write the cache again"


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Which model wrote a source's columns and how, enough to write the same bytes again.

    Attributes:
        model: identity of the model, a hub id, a timm name or the folder's name.
        weights_sha256: sha256 of the weights, of the tensors that a file holds for the model, before any of
            them is resampled to an input size; empty where another program ran them.
        random_weights: True when the weights were drawn, not trained; training warns of it.
        input_size: side in pixels of what the model saw.
        mean: per-channel mean subtracted from pixels in [0, 1].
        std: per-channel standard deviation divided by.
        compute_dtype: of the forward pass, one of `COMPUTE_DTYPES`; or `UNKNOWN_DTYPE`.
        batch_size: images a forward pass; features of another batch size may differ in the last bits. 0 where
            it is not known.
        grid: rows and columns of the patch tokens, or of the latent.
        libraries: name → version of the libraries that computed.
        notes: what else the kind of model needs said, for example ``{"scaling_factor": 0.18215}``.
    """

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    model: Text
    weights_sha256: Text
    random_weights: bool
    input_size: Side
    mean: Annotated[tuple[Number, ...], Len(0, 64)]
    std: Annotated[tuple[Number, ...], Len(0, 64)]
    compute_dtype: Annotated[str, Predicate((*COMPUTE_DTYPES, UNKNOWN_DTYPE).__contains__)]
    batch_size: Count
    grid: tuple[Side, Side]
    libraries: Mapping[Word, Text]
    notes: Mapping[str, Any] = field(default_factory=dict)

    def identity(self) -> dict[str, Any]:
        """Return what two runs must share for their rows to stand in one column.

        Library versions are left out, the weights as they are run, which follow from those of the file, how
        far the compute dtype lies from float32, which every device measures a little differently, the
        statistics of what was written, and the images that teachers of imported latents were added from.
        """
        values: dict[str, Any] = _plain(asdict(self))
        del values["libraries"]
        for derived in (LOADED_NOTE, DEVIATION_NOTE, LATENTS_NOTE, IMAGES_NOTE):
            values["notes"].pop(derived, None)
        return values


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything about a cache that is not a row.

    Attributes:
        num_rows: N, images of the source, undecodable ones included.
        views: names of the views, axis V; ``("original",)`` by default.
        shard_rows: rows of a shard, the unit of work, commit and resume.
        resolution: side in pixels of the cropped images.
        crop: name of the crop, ``adm-center``.
        exif_orientation: ``ignored`` or ``applied``.
        source_kind: ``folder``, ``tars``, ``hf`` or ``demo``; of imported latents
            ``<layout> import``.
        source_fingerprint: ``sha256:…`` over keys, labels and sizes of the source.
        keys_sha256: sha256 of ``keys.txt``.
        labels_sha256: sha256 of the labels, int32 little endian, in row order; empty in format version 1.
        class_names: label → name.
        columns: name → spec of every column that has been declared, complete or not; without ``label``.
        sources: source → provenance.
    """

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    num_rows: Rows
    views: Annotated[tuple[Word, ...], Len(1, 8)] = (ORIGINAL_VIEW,)
    shard_rows: ShardRows = DEFAULT_SHARD_ROWS
    resolution: Side
    crop: Text
    exif_orientation: Text
    source_kind: Text
    source_fingerprint: Text
    keys_sha256: Sha256
    labels_sha256: Annotated[str, Len(0, 64)] = ""
    class_names: tuple[Text, ...]
    columns: Annotated[Mapping[str, ColumnSpec], Len(0, MOST_COLUMNS)] = field(default_factory=dict)
    sources: Annotated[Mapping[str, Provenance], Len(0, MOST_SOURCES)] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    @property
    def num_shards(self) -> int:
        """Shards of every column. The last may be part empty."""
        return -(-self.num_rows // self.shard_rows)

    def shard_range(self, shard: int) -> range:
        """Return the rows of a shard."""
        start = shard * self.shard_rows
        return range(start, min(start + self.shard_rows, self.num_rows))

    def source_columns(self, source: str) -> dict[str, ColumnSpec]:
        """Return the columns of one source, name → spec."""
        return {name: spec for name, spec in self.columns.items() if source_of(name) == source}

    def with_source(self, source: str, provenance: Provenance, columns: Mapping[str, ColumnSpec]) -> Manifest:
        """Return a manifest with one more source and its columns, in place of what it said of that source."""
        others = {name: spec for name, spec in self.columns.items() if source_of(name) != source}
        return replace(
            self,
            columns={**others, **columns},
            sources={**self.sources, source: provenance},
        )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, for the group's attributes."""
        values: dict[str, Any] = _plain(asdict(self))
        if self.format_version == 1:
            del values["labels_sha256"]
        return values

    @property
    def outdated(self) -> str:
        """Say what a cache of an earlier format version lacks, as a note. It is empty for one of today's."""
        if self.format_version == FORMAT_VERSION:
            return ""
        return (
            f"was written before rows knew whose they are (format version {self.format_version}); "
            "`repa cache upgrade` adds it in place"
        )

    def fixed(self) -> dict[str, Any]:
        """Return what a cache is from its first day on, which is everything but columns and sources."""
        return {name: value for name, value in self.to_json().items() if name not in {"columns", "sources"}}

    @cached_property
    def identity(self) -> str:
        """Return the hex sha256 of what is fixed.

        It says which cache this is, whoever writes it, and when.
        """
        return canonical_sha256(self.fixed())

    @cached_property
    def source_identities(self) -> dict[str, str]:
        """Return source → the hex sha256 of what binds of its declaration (model, settings, columns)."""
        return {
            source: canonical_sha256(
                {
                    "provenance": provenance.identity(),
                    "columns": {
                        name: _plain(asdict(spec)) for name, spec in self.source_columns(source).items()
                    },
                }
            )
            for source, provenance in self.sources.items()
        }

    @classmethod
    def from_json(cls, values: Any, *, where: str) -> Manifest:
        """Parse the manifest of a group's attributes.

        Args:
            values: the JSON values.
            where: path of the cache, for the errors.

        Raises:
            CacheError: another format version; a field that is missing, unknown or of another type; a number
                or a name that no cache has.
        """
        version = values.get("format_version") if isinstance(values, Mapping) else None
        if version not in READ_VERSIONS or isinstance(version, bool):
            raise CacheError(
                f"{where} is a cache of format version {shortened(version)}",
                f"this repa reads versions {' and '.join(map(str, READ_VERSIONS))}: "
                "write it again with `repa preprocess`, or use the repa that wrote it",
                field="format_version",
            )
        manifest = parse(cls, values, where=f"the manifest of {where}", remedy=_AGAIN)
        if len(manifest.labels_sha256) != (64 if version > 1 else 0):
            raise CacheError(
                f"the manifest of {where} has {shortened(manifest.labels_sha256)} as digest of the labels",
                _AGAIN,
                field="labels_sha256",
            )
        manifest._check_names(where)
        for source, provenance in manifest.sources.items():
            check_notes(source, provenance.notes, where=f"the manifest of {where}", remedy=_AGAIN)
            _check_known(source, provenance, where)
        return manifest

    def _check_names(self, where: str) -> None:
        """Check what the types of the fields do not say, the names and how they belong together."""
        for source in self.sources:
            checked_name(source)
        if len(set(self.views)) < len(self.views):
            raise CacheError(f"the manifest of {where} names a view twice", _AGAIN, field="views")
        for name, spec in self.columns.items():
            try:
                source = source_of(name)
            except RepaError as error:
                raise CacheError(f"the manifest of {where}: {error.what}", _AGAIN, field="columns") from None
            if source not in self.sources:
                raise CacheError(
                    f"the manifest of {where} says nothing of {source}, the source of {name}",
                    _AGAIN,
                    field="sources",
                )
            if spec.row_bytes * len(self.views) > MOST_ROW_BYTES:
                size = spec.row_bytes * len(self.views)
                raise CacheError(
                    f"the manifest of {where} gives a row of {name} {size:,} bytes",
                    _AGAIN,
                    field=f"columns.{name}.shape",
                )

    def require(self, columns: tuple[str, ...], *, where: str) -> None:
        """Check that columns were declared, and that their rows are of their kinds.

        Raises:
            CacheError: names every missing column and the command that adds it; or a shape or dtype that the
                kind of the column does not have.
        """
        missing = [name for name in columns if name != LABEL and name not in self.columns]
        if missing:
            sources = dict.fromkeys(source_of(name) for name in missing)
            models = dict.fromkeys(model_of(source) for source in sources if source != AUTOENCODER)
            flags = "".join(f" --encoder {model}" for model in models)
            if any(kind.of_captions for name in missing if (kind := find_kind(split_column(name)[1]))):
                flags = flags.replace("--encoder", "--text-encoder") + " --captions FILE"
            if any(source != model_of(source) for source in sources):
                flags += " --attention haste"
            raise CacheError(
                f"cache {where} has no column {', '.join(missing)} "
                f"(it has {', '.join(self.columns) or 'none'})",
                f"add it with `repa preprocess --cache {where}{flags}` and the --data it was made from",
            )
        for name in columns:
            if name != LABEL:
                check_column(name, self.columns[name], where=where)


def takes_teachers(notes: Mapping[str, Any]) -> bool:
    """Return whether images can be matched with the rows of a cache whose latents have these notes."""
    foreign = notes.get(FOREIGN_NOTE)
    return not isinstance(foreign, dict) or foreign.get("mirrored") != MIRRORED_AT_RANDOM


def _check_known(source: str, provenance: Provenance, where: str) -> None:
    """Refuse a source of ours that does not say how it was computed, as only imported latents may."""
    if source == AUTOENCODER and FOREIGN_NOTE in provenance.notes:
        return
    for name, known in (
        ("batch_size", provenance.batch_size > 0),
        ("compute_dtype", provenance.compute_dtype != UNKNOWN_DTYPE),
    ):
        if not known:
            raise CacheError(
                f"the manifest of {where} does not say the {name} of {source}",
                _AGAIN,
                field=f"sources.{source}.{name}",
            )


def _plain(value: Any) -> Any:
    """Turn tuples into lists and mappings into dicts, as a JSON round trip does."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    return value
