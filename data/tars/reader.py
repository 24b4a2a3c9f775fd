"""Tar files read strictly, one member after the other, from a file, an object of a bucket, or a stream.

Python's own `tarfile` takes a damaged header in the middle of a file for its end; here whatever is not a
whole tar is an error that says where. Formats: POSIX ustar and pax (IEEE Std 1003.1, "pax"), and the long
names and large sizes of GNU tar. Samples are grouped as WebDataset does: the name up to the first dot of its
last component is the key, what follows it the field.
"""

from __future__ import annotations

import os
import re
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import RepaError
from ..storage.bucket import is_remote
from ..storage.files import os_errors
from ..storage.object_file import open_object
from ..storage.regular import open_regular
from .names import is_stream

if TYPE_CHECKING:
    from collections.abc import Iterator

BLOCK = 512
_PIECE = 1 << 20
_EXTENSION = 1 << 20  # bytes of a name or of pax records; more is damage

_FIELD = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)")
_LENGTH = re.compile(rb"([0-9]{1,9}) ")
_SIZE = re.compile(r"[0-9]{1,18}")
_OCTAL = re.compile(rb"[ \0]*([0-7]*)[ \0]*")
_META = re.compile(r"__[^/]*__($|/)")
# first bytes of compressed tars, which are not read, so that the error can name the compression
_COMPRESSED = {b"\x1f\x8b": "gzip", b"\xfd7zXZ": "xz", b"BZh": "bzip2", b"\x28\xb5\x2f\xfd": "zstd"}


class Member(NamedTuple):
    """A regular file in a tar.

    Attributes:
        name: its path in the tar.
        offset: of its content, in bytes from the beginning of the tar.
        size: of its content in bytes.
    """

    name: str
    offset: int
    size: int


class TarReader:
    """The regular files of a tar, in their order.

    Args:
        file: opened for reading bytes, at the beginning.
        where: its name, for errors.
        length: of the tar in bytes, if the file can seek; None reads what is skipped.

    Attributes:
        at_end: whether the file has no more to give.
    """

    def __init__(self, file: Any, where: str, length: int | None = None) -> None:
        self.where = where
        self.at_end = False
        self._file = file
        self._length = length
        self._at = 0
        self._unread = 0
        self._last: Member | None = None

    def __iter__(self) -> Iterator[Member]:
        """Yield members until the tar's end.

        Raises:
            RepaError: it is no tar, is compressed, damaged or cut off, goes on after its end, or holds links
                or sparse files.
        """
        extended: dict[str, str] = {}
        while (header := self._header()) is not None:
            kind, name, size = header
            if kind in (b"x", b"X"):
                extended.update(self._pax_records(size))
            elif kind == b"L":
                extended["path"] = _text(self._whole(size).rstrip(b"\0"))
            elif kind in (b"g", b"K"):
                self._skip(_padded(size))
            else:
                name = extended.get("path", name)
                if "size" in extended:
                    if not _SIZE.fullmatch(extended["size"]):
                        raise self._damaged(self._at)
                    size = int(extended["size"])
                if kind == b"S" or any(key.startswith("GNU.sparse") for key in extended):
                    raise RepaError(
                        f"{self.where} holds {name} as a sparse file, without the zeros in it",
                        "write the tar again without --sparse",
                    )
                if kind in (b"1", b"2"):
                    raise RepaError(
                        f"{self.where} holds {name} as a link, without its bytes",
                        "write the tar again with --dereference --hard-dereference",
                    )
                extended = {}
                if kind not in (b"0", b"\0", b"7") or (kind == b"\0" and name.endswith("/")):
                    continue  # folders and devices have no content
                self._last = Member(name, self._at, size)
                if self._length is not None and self._at + size > self._length:
                    self._at = self._length
                    raise self._cut_off()
                self._unread = size
                end = self._at + _padded(size)
                yield self._last
                self._unread = 0
                self._skip(end - self._at)

    def read(self, most_bytes: int | None = None) -> bytes:
        """Read the content of the member that was handed out last, once.

        Args:
            most_bytes: largest content that is taken into memory; any is, by default.

        Raises:
            RepaError: the tar is cut off, or the content is larger.
        """
        size, self._unread = self._unread, 0
        if self._last is not None and most_bytes is not None and size > most_bytes:
            raise RepaError(
                f"{self.where} holds {self._last.name} of {size:,} bytes, {most_bytes:,} are the most",
                "fetch or write it again",
            )
        return self._take(size)

    def _header(self) -> tuple[bytes, str, int] | None:
        """Read type, name and size of the next header. It is None at the end."""
        start = self._at
        block = self._file.read(BLOCK)
        self._at += len(block)
        if len(block) < BLOCK:
            self.at_end = True
            if start == 0:
                what = "is empty" if not block else "is no tar"
                raise RepaError(f"{self.where} {what}", "give WebDataset tars")
            raise self._cut_off()
        if not any(block):
            self._drain()
            return None
        for magic, program in _COMPRESSED.items():
            if start == 0 and block.startswith(magic):
                raise RepaError(f"{self.where} is compressed by {program}", f"unpack it with {program} -d")
        try:
            checksum = _octal(block[148:156])
            size = _number(block[124:136])
        except ValueError:
            checksum, size = -1, 0
        if checksum != sum(block[:148]) + sum(block[156:]) + 8 * ord(" "):
            if start == 0:
                raise RepaError(f"{self.where} is no tar", "give WebDataset tars")
            raise self._damaged(start)
        name = _text(block[:100].split(b"\0", 1)[0])
        if block[257:263] == b"ustar\0" and block[345]:
            name = f"{_text(block[345:500].split(bytes(1), 1)[0])}/{name}"
        return block[156:157], name, size

    def _pax_records(self, size: int) -> dict[str, str]:
        """Parse records ``<length> <key>=<value>\\n`` of an extended header."""
        data, records, at = self._whole(size).rstrip(b"\0"), {}, 0
        while at < len(data):
            match = _LENGTH.match(data, at)
            end = at + int(match[1]) if match else 0
            key, sign, value = data[match.end() : end - 1].partition(b"=") if match else (b"", b"", b"")
            if not sign or data[end - 1 : end] != b"\n":
                raise self._damaged(self._at - size)
            records[_text(key)] = _text(value)
            at = end
        return records

    def _whole(self, size: int) -> bytes:
        """Read the content of a header's extension, and go past it."""
        if size > _EXTENSION:
            raise self._damaged(self._at)
        return self._take(_padded(size))[:size]

    def _take(self, size: int) -> bytes:
        data: bytes = self._file.read(size)
        self._at += len(data)
        if len(data) < size:
            self.at_end = True
            raise self._cut_off()
        return data

    def _skip(self, size: int) -> None:
        if self._length is not None:
            if self._at + size > self._length:
                self._at = self._length
                raise self._cut_off()
            self._file.seek(self._at + size)
            self._at += size
            return
        while size:
            size -= len(self._take(min(size, _PIECE)))

    def _drain(self) -> None:
        """Read the zeros that follow the end mark, as a program that writes them wants to end well.

        Raises:
            RepaError: it is anything else, as where tars were joined by ``cat``: others would not read it.
        """
        foreign = False
        while piece := self._file.read(_PIECE):
            foreign = foreign or piece.count(0) < len(piece)
        self.at_end = True
        if foreign:
            raise RepaError(
                f"{self.where} goes on after an end mark at byte {self._at - BLOCK}{self.progress}: it is "
                "damaged, or tars were joined by cat",
                "fetch it again, or join them by tar --concatenate",
            )

    @property
    def progress(self) -> str:
        """How far it was read, for an error, as in ``, in a/1.jpg``.

        Nothing is said before the first member.
        """
        if self._last is None:
            return ""
        inside = self._at < self._last.offset + self._last.size
        return f", {'in' if inside else 'after'} {self._last.name}"

    def _damaged(self, at: int) -> RepaError:
        return RepaError(f"{self.where} is damaged at byte {at}{self.progress}", "fetch or write it again")

    def _cut_off(self) -> RepaError:
        return RepaError(
            f"{self.where} was cut off: it ends at byte {self._at if self._length is None else self._length}"
            f"{self.progress}, without an end mark",
            "fetch or write it again",
        )


@contextmanager
def open_tar(tar: str, *, headers: bool = False) -> Iterator[TarReader]:
    """Open a tar that `expand_tars` named.

    A path and an object are ours to open, a pipe or URL is opened by WebDataset.

    Of an object the pieces are asked for that are read, little ones where ``headers`` alone are wanted; a
    ``pipe:<command>`` or URL is read from end to end.

    Raises:
        RepaError: it cannot be opened or read, or its command failed.
    """
    if not is_stream(tar):
        with os_errors("read", Path(tar)), open_regular(tar) as file:
            status = os.fstat(file.fileno())
            yield TarReader(file, tar, status.st_size)
        return
    if is_remote(tar):
        with open_object(tar, little=headers) as opened:
            yield TarReader(opened, tar, opened.size)
        return
    gopen, set_options = _gopen()
    try:
        stream = gopen(tar)
        # whoever stops reading early breaks the pipe, and that is no mistake of the command's
        set_options(stream, ignore_errors=True)
        with stream:
            reader = TarReader(stream, tar)
            try:
                yield reader
            finally:
                command = getattr(stream, "proc", None)
                if command is not None and reader.at_end and (status := command.wait()):
                    # the command's failure is the cause of whatever its tar lacks
                    raise OSError(f"its command ended with status {status}{reader.progress}")
    except (OSError, ValueError) as error:
        raise RepaError(f"cannot read {tar}: {error}", "try its command or URL by itself") from error


def _gopen() -> tuple[Any, Any]:
    try:
        from webdataset.gopen import gopen, set_options
    except ImportError:
        raise missing_webdataset("pipes and URLs are opened by") from None
    return gopen, set_options


def missing_webdataset(what: str) -> RepaError:
    """Make the error of a feature that needs the package webdataset."""
    return RepaError(
        f"{what} webdataset, which is not installed", "install it with `pip install 'repa[tars]'`"
    )


def split_member(name: str) -> tuple[str, str] | None:
    """Split the name of a member of a WebDataset tar into (key, field), the field in lower case.

    None is no part of a sample.

    Source: webdataset, ``base_plus_ext`` and ``skip_meta`` of its tar iterators.
    """
    match = _FIELD.fullmatch(name)
    if match is None or _META.match(name):
        return None
    return match.group(1), match.group(2).lower()


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _number(text: bytes) -> int:
    if text[0] & 0x80:  # GNU's base 256, for sizes from 8 GiB on
        return int.from_bytes(text, "big") & ~(0xFF << 8 * (len(text) - 1))
    return _octal(text)


def _octal(text: bytes) -> int:
    match = _OCTAL.fullmatch(text)
    if match is None:  # no sign either: `int` would take one
        raise ValueError(f"{text!r} is no octal number")
    return int(match[1] or b"0", 8)


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")
