"""The grammar of columns ``<model>/<kind>``, one Zarr array each, whose first axis is the image.

A *source* is what is written and committed together: the columns that one model gave of the images
(``sd-vae``, ``dinov2-b``). The attention targets of a teacher, ``dinov2-b/q`` and ``dinov2-b/k``, are a
source of their own, ``dinov2-b+attention``: they can be added to a cache that has its tokens, which are not
touched.
``label`` is the one column without a source: it is known when the cache is created.

A column stored as int8 has a second one beside it, ``<column>-scale``: see `int8`. Queries and keys may also
be packed bytes: see `factor_layout`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from math import prod
from typing import Annotated, Any, ClassVar

import numpy as np
from annotated_types import Len

from ..edge import shortened
from ..errors import CacheError, RepaError
from .bounds import Axis  # noqa: TC001 - annotations are read when manifests are parsed
from .grammar import is_name

LABEL = "label"
AUTOENCODER = "sd-vae"
MOMENTS = f"{AUTOENCODER}/moments"
SCALE_SUFFIX = "-scale"
ATTENTION_SUFFIX = "+attention"
ATTENTION_KINDS = ("q", "k")
FLOAT_DTYPES = ("float16", "float32")
ROUNDED_DTYPES = (*FLOAT_DTYPES, "int8")
PACKED = "uint8"
STORED_DTYPES = (*ROUNDED_DTYPES, PACKED)
TEXT_STATES = "states"
COMPRESSORS = ("zstd", "blosc", "pcodec")

_MODEL = re.compile(r"[a-z0-9][a-z0-9._-]*")


@dataclass(frozen=True, kw_only=True)
class ColumnKind:
    """What the columns of a kind hold of one image and view.

    Attributes:
        axes: names of the axes of a row, for example ``("T", "D")``; one that begins with a 2 is even.
        dtypes: stored dtypes it may have.
        packed: whether a row may also be packed bytes, uint8 ``[bytes]``, whose layout the manifest notes,
            see `factor_layout`; its scales are then ``[n]``.
        of_captions: whether a row is a caption's and not an image's, see `captions`.
    """

    axes: tuple[str, ...]
    dtypes: tuple[str, ...] = FLOAT_DTYPES
    packed: bool = False
    of_captions: bool = False

    def fits(self, shape: tuple[int, ...], dtype: str) -> bool:
        """Return whether a row may have that shape and dtype."""
        if self.packed and len(shape) == 1:
            return dtype == (PACKED if PACKED in self.dtypes else "float32")
        return (
            len(shape) == len(self.axes)
            and dtype in self.dtypes
            and not (self.packed and dtype == PACKED)
            and not any(size % 2 for size, axis in zip(shape, self.axes, strict=True) if axis.startswith("2"))
        )


KINDS: dict[str, ColumnKind] = {
    "moments": ColumnKind(axes=("2C", "h", "w")),
    "patch": ColumnKind(axes=("T", "D"), dtypes=ROUNDED_DTYPES),
    "cls": ColumnKind(axes=("D",)),
    "q": ColumnKind(axes=("L", "H", "T", "r"), dtypes=STORED_DTYPES, packed=True),
    "k": ColumnKind(axes=("L", "H", "T", "r"), dtypes=STORED_DTYPES, packed=True),
    TEXT_STATES: ColumnKind(axes=("S", "E"), dtypes=ROUNDED_DTYPES, of_captions=True),
    "pooled": ColumnKind(axes=("E",), of_captions=True),
    "mask": ColumnKind(axes=("S",), dtypes=(PACKED,), of_captions=True),
}
"""The kinds of columns: one line each. One that may be int8 has a kind of scales beside it."""


def find_kind(name: str) -> ColumnKind | None:
    """Return the kind of a name, or of the scales of one, ``patch-scale``, or None if there is none.

    Scales have no token axis, the last but one: see `int8`.
    """
    kind = KINDS.get(name.removesuffix(SCALE_SUFFIX))
    if kind is None or not name.endswith(SCALE_SUFFIX):
        return kind
    if "int8" not in kind.dtypes:
        return None
    return replace(kind, axes=(*kind.axes[:-2], kind.axes[-1]), dtypes=("float32",))


def column_name(model: str, kind: str) -> str:
    """Join the two parts of a column's name, ``<model>/<kind>``.

    Raises:
        RepaError: the model or the kind is not of the grammar.
    """
    if not _MODEL.fullmatch(model) or not is_name(model):
        raise RepaError(
            f"model name {shortened(model)!r} is not of the form [a-z0-9][a-z0-9._-]*, or is taken",
            "rename it",
        )
    if find_kind(kind) is None:
        raise RepaError(
            f"column kind {shortened(kind)!r} of {model!r} is unknown", f"the kinds are {', '.join(KINDS)}"
        )
    return f"{model}/{kind}"


def split_column(column: str) -> tuple[str, str]:
    """Split a column's name into ``(model, kind)``.

    Raises:
        RepaError: the name is not of the grammar.
    """
    model, _, kind = column.partition("/")
    column_name(model, kind)
    return model, kind


def source_of(column: str) -> str:
    """Name the source that a column is written and committed with.

    It is the column's model, or its model's attention.

    Raises:
        RepaError: the name is not of the grammar.
    """
    model, kind = split_column(column)
    return attention_source(model) if kind.removesuffix(SCALE_SUFFIX) in ATTENTION_KINDS else model


def attention_source(model: str) -> str:
    """Name the source of a teacher's attention targets, for example ``dinov2-b+attention``."""
    return f"{model}{ATTENTION_SUFFIX}"


def model_of(source: str) -> str:
    """Name the model that a source comes from.

    It is ``dinov2-b`` of ``dinov2-b`` and of ``dinov2-b+attention``.
    """
    return source.removesuffix(ATTENTION_SUFFIX)


def scale_column(column: str) -> str:
    """Name the column of the scales of an int8 column, for example ``dinov2-b/patch-scale``."""
    return f"{column}{SCALE_SUFFIX}"


@dataclass(frozen=True, kw_only=True)
class ColumnSpec:
    """Shape, dtype and compression of one column's row. The array on disk is ``[N, V, *shape]``.

    Attributes:
        shape: shape of one row and view, for example ``(256, 768)`` for patch tokens ``[T, D]``.
        dtype: NumPy name of the stored dtype, little endian on disk.
        compressor: how its chunks are compressed, one of `COMPRESSORS`; None, the default, reads fastest
            (see `compression`).
    """

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    shape: Annotated[tuple[Axis, ...], Len(1, 8)]
    dtype: str
    compressor: str | None = None

    def __post_init__(self) -> None:
        if self.dtype not in STORED_DTYPES:
            raise RepaError(
                f"column dtype {shortened(self.dtype)!r} is unknown", f"there are {', '.join(STORED_DTYPES)}"
            )
        if not self.shape or any(size < 1 for size in self.shape):
            raise RepaError(f"column shape {self.shape} has an empty axis")
        if self.compressor is not None and self.compressor not in COMPRESSORS:
            raise RepaError(
                f"compressor {shortened(self.compressor)!r} is unknown", f"there are {', '.join(COMPRESSORS)}"
            )
        if self.compressor == "pcodec" and self.dtype not in FLOAT_DTYPES:
            raise RepaError(
                f"pcodec compresses floats only, no {self.dtype} columns",
                "use zstd or blosc for them",
                field="compressor",
            )

    @property
    def numpy_dtype(self) -> np.dtype[np.generic]:
        """The stored dtype, little endian."""
        return np.dtype(self.dtype).newbyteorder("<")

    @property
    def row_bytes(self) -> int:
        """Bytes of one row and view, not compressed and without its checksum."""
        return prod(self.shape) * self.numpy_dtype.itemsize


def check_column(column: str, spec: ColumnSpec, *, where: str) -> None:
    """Check that a column's rows are of its kind.

    Args:
        column: its name.
        spec: what the manifest says of it.
        where: path of the cache, for the error.

    Raises:
        CacheError: another number of axes or another dtype than its kind has.
        RepaError: the name is not of the grammar.
    """
    kind = find_kind(split_column(column)[1])
    if kind is None or kind.fits(spec.shape, spec.dtype):
        return
    raise CacheError(
        f"column {column} of {where} has rows {spec.dtype}{list(spec.shape)}, where its kind has "
        f"{' or '.join(kind.dtypes)} [{', '.join(kind.axes)}]",
        "write the cache again with `repa preprocess`",
        field=column,
    )
