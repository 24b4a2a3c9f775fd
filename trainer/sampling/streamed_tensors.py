"""Safetensors files written part by part, where the library wants every tensor in memory at once.

The library's format is the length of the header, little-endian uint64; the header, JSON of each tensor's
dtype, shape and offsets, filled up with spaces to a multiple of 8; the tensors one after another.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from typing import BinaryIO

    from numpy.typing import NDArray

# the widest first, so that each tensor begins at a multiple of its numbers' size
_DTYPES = {"int64": "I64", "float32": "F32", "float16": "F16"}


@dataclass(frozen=True)
class StreamedTensor:
    """A tensor whose numbers come when they are written.

    Attributes:
        name: of the tensor.
        dtype: NumPy's name of it, of int64, float32 and float16.
        shape: of all parts together.
        parts: rows in order, each of that dtype.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    parts: Iterable[NDArray[Any]]

    @classmethod
    def of(cls, name: str, array: NDArray[Any]) -> StreamedTensor:
        """Return an array as a single part."""
        return cls(name, array.dtype.name, array.shape, (array,))


def write_tensors(file: BinaryIO, tensors: Sequence[StreamedTensor], metadata: Mapping[str, str]) -> None:
    """Write a whole file, the same bytes as the library does.

    Args:
        file: open for writing, at its beginning.
        tensors: in any order.
        metadata: words of the file's own.

    Raises:
        OSError: the operating system refuses.
        ValueError: the parts of a tensor are not of its dtype, or not as many as its shape says.
    """
    order = list(_DTYPES)
    tensors = sorted(tensors, key=lambda each: (order.index(each.dtype), each.name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    sizes = [prod(each.shape) * np.dtype(each.dtype).itemsize for each in tensors]
    end = 0
    for each, size in zip(tensors, sizes, strict=True):
        offsets = [end, end := end + size]
        header[each.name] = {"dtype": _DTYPES[each.dtype], "shape": list(each.shape), "data_offsets": offsets}
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % 8)
    file.write(len(encoded).to_bytes(8, "little") + encoded)
    for each, size in zip(tensors, sizes, strict=True):
        written = 0
        for part in each.parts:
            if part.dtype.name != each.dtype:
                raise ValueError(f"a part of {each.name} is {part.dtype.name} and not {each.dtype}")
            written += file.write(part.tobytes())
        if written != size:
            raise ValueError(f"the parts of {each.name} are {written} bytes and not {size}")
