"""Lossless compression of a column's chunks, off by default, as it gains little and forbids direct reads.

Float features shrink by a tenth to a fifth: exponents repeat, mantissas are noise. In return every row must
be decoded, at some hundred megabytes a second and core, where an uncompressed row goes from the file into the
batch as it is. It is for caches that are kept or moved more often than they are read.

A chunk is one row and view, encoded on its own and followed by the crc32c of the encoded bytes. The codecs
are Zarr's, with fixed settings and one thread, so that equal rows give equal bytes, and any Zarr reader that
knows the codec opens the column: ``zstd`` (level 3); ``blosc`` (zstd at level 5 of bytes grouped by their
position in the number, for int8 of bits); ``pcodec`` (level 8; for floats only, not in the Zarr
specification).
"""

from __future__ import annotations

import warnings
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import RepaError
from ..units import counted

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from .columns import ColumnSpec

# numcodecs' numbers for the two ways of blosc
_SHUFFLE = 1
_BITSHUFFLE = 2
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"


class ChunkCodec:
    """Encodes and decodes the chunks of one compressed column. Threads may share it.

    Args:
        spec: the column's, which names a compressor.

    Raises:
        RepaError: the compressor needs a package that is not installed.
    """

    def __init__(self, spec: ColumnSpec) -> None:
        self._compressor = spec.compressor or ""
        self._row_bytes = spec.row_bytes
        self._dtype = spec.numpy_dtype
        self._codec = _numcodecs_codec(spec)

    def encode(self, values: NDArray[np.generic]) -> bytes:
        """Encode one row and view into the bytes that are stored, without their checksum.

        Args:
            values: ``[*shape]`` of the column's dtype.
        """
        return bytes(self._codec.encode(np.ascontiguousarray(values, dtype=self._dtype).reshape(-1)))

    def decode(self, encoded: bytes | bytearray | memoryview, out: memoryview) -> str | None:
        """Decode the stored bytes of one row and view.

        Args:
            encoded: what `encode` gave.
            out: where the row's bytes go.

        Returns:
            What is wrong with the encoded bytes, or None.
        """
        values = np.frombuffer(out, dtype=self._dtype)
        try:
            if self._compressor == "pcodec":
                return self._decode_pcodec(encoded, values)
            told = told_bytes(self._compressor, encoded)
            if told is None:
                return "it does not say how many bytes it holds"
            if told != self._row_bytes:
                return f"it decodes to {counted(told, 'byte')} of {self._row_bytes}"
            # into the row itself: whatever a chunk says, no more memory than the row's is ever taken
            self._codec.decode(encoded, out=values.view(np.uint8))
        except (RuntimeError, ValueError) as error:
            return f"it is not {self._compressor}: {error}"
        return None

    def _decode_pcodec(
        self, encoded: bytes | bytearray | memoryview, values: NDArray[np.generic]
    ) -> str | None:
        # numcodecs does not pass on how many numbers were read, nor whether more are left
        from pcodec import standalone

        progress = standalone.simple_decompress_into(bytes(encoded), values)
        if not progress.finished:
            return f"it decodes to more than {counted(self._row_bytes, 'byte')}"
        if progress.n_processed != len(values):
            read = progress.n_processed * self._dtype.itemsize
            return f"it decodes to {counted(read, 'byte')} of {self._row_bytes}"
        return None


def told_bytes(compressor: str, encoded: bytes | bytearray | memoryview) -> int | None:
    """Return the decoded size that an encoded chunk states, None where it states none.

    Of zstd the content size of its frame (RFC 8878, section 3.1.1.1), of blosc the first size of its header.

    Args:
        compressor: ``zstd`` or ``blosc``.
        encoded: the stored bytes.

    Raises:
        ValueError: it begins as nothing of the compressor's.
    """
    head = bytes(encoded[:18])
    if compressor == "blosc":
        if len(head) < 16:
            raise ValueError("it is shorter than a header")
        return int.from_bytes(head[4:8], "little")
    if len(head) < 6 or head[:4] != _ZSTD_MAGIC:
        raise ValueError("it does not begin as a frame")
    descriptor = head[4]
    single, size = bool(descriptor & 0x20), descriptor >> 6
    if not size and not single:
        return None
    first = 5 + (not single) + (0, 1, 2, 4)[descriptor & 3]  # past the window and the dictionary's number
    stated = int.from_bytes(head[first : first + (1 << size)], "little")
    return stated + 256 if size == 1 else stated


def chunk_codec(spec: ColumnSpec) -> ChunkCodec | None:
    """Make the codec of a column's chunks. It is None where they are the raw bytes.

    Raises:
        RepaError: the compressor needs a package that is not installed.
    """
    return None if spec.compressor is None else ChunkCodec(spec)


def zarr_codecs(spec: ColumnSpec) -> dict[str, Any]:
    """Choose a column's codecs as the arguments ``serializer`` and ``compressors`` of `zarr.create_array`.

    The checksum comes last: it covers what is stored.

    Raises:
        RepaError: the compressor needs a package that is not installed.
    """
    from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec, ZstdCodec
    from zarr.codecs.numcodecs import PCodec

    little, checksum = BytesCodec(endian="little"), Crc32cCodec()
    if spec.compressor is None:
        return {"serializer": little, "compressors": [checksum]}
    settings = _settings(spec)
    name = settings.pop("id")
    if name == "pcodec":
        _require_pcodec()
        with quiet_about_pcodec():
            return {"serializer": PCodec(**settings), "compressors": [checksum]}
    if name == "blosc":
        settings["shuffle"] = "bitshuffle" if settings["shuffle"] == _BITSHUFFLE else "shuffle"
        settings["typesize"] = spec.numpy_dtype.itemsize
    codec = BloscCodec(**settings) if name == "blosc" else ZstdCodec(**settings)
    return {"serializer": little, "compressors": [codec, checksum]}


@contextmanager
def quiet_about_pcodec() -> Iterator[None]:
    """Hide zarr's warning that pcodec is not in the Zarr specification. Whoever chose it was told."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Numcodecs codecs are not in the Zarr version 3")
        yield


def _settings(spec: ColumnSpec) -> dict[str, Any]:
    """Describe the codec in the words of numcodecs.

    Its bytes depend on that and on the library's version alone.
    """
    match spec.compressor:
        case "zstd":
            return {"id": "zstd", "level": 3, "checksum": False}
        case "blosc":
            shuffle = _BITSHUFFLE if spec.numpy_dtype.itemsize == 1 else _SHUFFLE
            return {"id": "blosc", "cname": "zstd", "clevel": 5, "shuffle": shuffle, "blocksize": 0}
        case _:
            return {"id": "pcodec", "level": 8}


def _numcodecs_codec(spec: ColumnSpec) -> Any:
    import numcodecs
    from numcodecs import blosc

    # threads of blosc's own would not survive a fork; zarr turns them off too
    blosc.use_threads = False
    settings = _settings(spec)
    if settings["id"] == "pcodec":
        _require_pcodec()
    return numcodecs.get_codec(settings)


def _require_pcodec() -> None:
    if find_spec("pcodec") is None:
        raise RepaError(
            "compressor pcodec needs the package pcodec, which is not installed",
            "install it with `pip install 'repa[pcodec]'`",
        )
