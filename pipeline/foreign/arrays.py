"""Arrays of others, from bytes that are bounded, and numbers that are checked before they are stored.

No pickle is ever read, and nothing is made in a size that a header says and the bytes do not have.
"""

from __future__ import annotations

import io
import tokenize
import zipfile
import zlib
from functools import lru_cache
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.lib import format as npy

from ...data.edge import printable
from ...data.errors import RepaError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

MOST_BYTES = 64 << 20
"""Of a file that holds one image; the largest latents that anybody trains on have a hundredth of it."""

FLOATS = ("float32", "float16")
AGAIN = "bring the file again"
# of a header that is none numpy raises any of these
_NO_HEADER = (
    ValueError,
    KeyError,
    SyntaxError,
    TypeError,
    RecursionError,
    MemoryError,
    UserWarning,
    tokenize.TokenError,
)
_MOST_HEADER = 1 << 16
_HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}


@lru_cache(maxsize=64)
def _header(raw: bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Return the shape, order and dtype of a header, which a million files may share."""
    file = io.BytesIO(raw)
    shape, by_columns, dtype = _HEADERS[npy.read_magic(file)](file)
    if file.tell() != len(raw):
        raise ValueError("its header is not as long as it says")
    return shape, by_columns, dtype


def parse_npy(raw: bytes, where: str) -> NDArray[Any]:
    """Return the array in the bytes of an ``.npy`` file (NumPy's NEP 1), of its shape and dtype.

    Args:
        raw: the bytes.
        where: the file's name, for the error.

    Raises:
        RepaError: it is none, is cut off, or holds objects.
    """
    # NEP 1: magic and version in 8 bytes, the header's length in 2, or in 4 of version 2
    width = 2 if raw[6:7] == b"\1" else 4
    start = 8 + width + int.from_bytes(raw[8 : 8 + width], "little")
    try:
        shape, by_columns, dtype = _header(raw[: min(start, _MOST_HEADER)])
    except _NO_HEADER as error:
        reason = printable(" ".join(str(error).split())[:80])
        raise RepaError(f"{where} is no .npy file of numbers ({reason})", AGAIN) from None
    expected = prod(shape) * dtype.itemsize
    if dtype.hasobject or dtype.kind not in "fiu" or any(size < 0 for size in shape):
        raise RepaError(f"{where} holds {printable(dtype)}, not numbers", AGAIN)
    if len(raw) - start != expected:
        raise RepaError(f"{where} has {max(0, len(raw) - start):,} bytes of {expected:,} of its array", AGAIN)
    return np.frombuffer(raw, dtype, offset=start).reshape(shape, order="F" if by_columns else "C")


def parse_npz(raw: bytes, names: Sequence[str], where: str) -> list[NDArray[Any]]:
    """Return arrays in the bytes of an ``.npz`` file, which is a ZIP of ``.npy`` files.

    Args:
        raw: the bytes.
        names: of the arrays that are wanted.
        where: the file's name, for the error.

    Raises:
        RepaError: it is none, is damaged, lacks one, or unpacks to more than `MOST_BYTES`.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(raw)) as archive:
            found = []
            for name in names:
                member = archive.getinfo(f"{name}.npy")
                if member.file_size > MOST_BYTES:
                    raise RepaError(f"{name} in {where} unpacks to {member.file_size:,} bytes", AGAIN)
                with archive.open(member) as file:
                    # what a directory says of a member's size is only said
                    content = file.read(MOST_BYTES + 1)
                if len(content) != member.file_size:
                    raise RepaError(f"{name} in {where} is not as long as its directory says", AGAIN)
                found.append(parse_npy(content, f"{name} in {where}"))
            return found
    except KeyError:
        raise RepaError(f"{where} has no array {name}", AGAIN, field=name) from None
    except (
        zipfile.BadZipFile,
        zlib.error,
        EOFError,
        NotImplementedError,
        RuntimeError,
        ValueError,
        OSError,
    ) as error:
        raise RepaError(f"{where} is no .npz file, or damaged ({printable(error)})", AGAIN) from None


def checked_numbers(array: NDArray[Any], shape: tuple[int, ...], where: str) -> NDArray[np.float32]:
    """Return finite numbers of a shape as float32, to which half precision is widened exactly.

    Args:
        array: as it was read.
        shape: what it must have.
        where: the file's name, for the error.

    Raises:
        RepaError: another shape or dtype, or a number that is not finite.
    """
    if array.dtype.name not in FLOATS or not array.dtype.isnative:
        raise RepaError(
            f"{where} holds {array.dtype}, and latents are {' or '.join(FLOATS)}", "write it as float32"
        )
    if array.shape != shape:
        raise RepaError(
            f"{where} has the shape {list(array.shape)}, and the others have {list(shape)}",
            "import files of one resolution and one autoencoder",
        )
    if not np.isfinite(array).all():
        raise RepaError(f"{where} holds a number that is not finite", "encode its image again")
    return array.astype(np.float32, copy=False)
