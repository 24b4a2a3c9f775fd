"""Images in a ZIP file, as `dataset_tool` of EDM2 writes them, or a folder that was packed.

The directory at the file's end is read once, by `zipfile`; an image is then read by its offset, so that
threads and processes decode rows as of a folder, and none of them keeps the directory.
"""

from __future__ import annotations

import os
import struct
import zipfile
import zlib
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np

from ...data.errors import RepaError
from ...data.storage.bucket import is_remote
from ...data.storage.descriptors import DescriptorCache
from ...data.storage.files import os_errors
from ...data.storage.regular import open_regular
from .base import FOLDER_LABELS, JSON_LABELS, NO_LABELS, ONLY_CLASS, UndecodableImage
from .dataset_json import DATASET_JSON, labels_of, parse_dataset_json
from .decode import MAX_BYTES
from .folder import EXTENSIONS, above_classes
from .listed import ListedImages, Listing

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from .base import SourceOptions

_LOCAL_HEADER = struct.Struct("<4s22xHH")  # APPNOTE 4.3.7: signature, …, lengths of name and extra field
_SIGNATURE = b"PK\3\4"
_ENCRYPTED = 1
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_CHANGED = "run the same command again"


class ZipImages(ListedImages):
    """The JPEG, PNG and WebP members of a ZIP file, sorted by name, see `ListedImages`.

    Where all lie in one folder that has more in it than images, as in a packed folder, that is the root.
    Labels are those of a ``dataset.json`` in the root, else of the first-level folders below it; images that
    lie in the root itself are one class. Names that begin with a dot and ``__MACOSX`` are passed over.

    Raises:
        RepaError: also for a file that is no ZIP, is in a bucket, or has encrypted members.
    """

    kind = "zip"

    def list_images(self) -> Listing:
        """List the members, see `ListedImages.list_images`."""
        if is_remote(self.place):
            raise RepaError(
                f"images are read from a ZIP file on a disk, and {self.place} is in a bucket",
                "fetch it, or write tars of it",
                field="--data",
            )
        self._files = DescriptorCache(1)
        with os_errors("read", Path(self.place)), open_regular(self.place) as file:
            self._stamp = _stamp(os.fstat(file.fileno()))
            try:
                with zipfile.ZipFile(file) as archive:
                    return self._listed(archive)
            # of a damaged directory zipfile raises any of these
            except (
                zipfile.BadZipFile,
                struct.error,
                ValueError,
                NotImplementedError,
                zlib.error,
                EOFError,
            ) as error:
                raise RepaError(
                    f"{self.place} is no ZIP file, or damaged ({error})", "bring it again", field="--data"
                ) from error

    def _listed(self, archive: zipfile.ZipFile) -> Listing:
        members, skipped = [], []
        for info in archive.infolist():
            parts = PurePosixPath(info.filename).parts
            if info.is_dir() or info.filename.rpartition("/")[2] == DATASET_JSON:
                continue
            if any(part.startswith(".") or part == "__MACOSX" for part in parts):
                skipped.append((info.filename, "hidden"))
            elif not info.filename.lower().endswith(EXTENSIONS):
                skipped.append((info.filename, "not named as a JPEG, PNG or WebP image"))
            else:
                self._check(info)
                members.append(info)
        members.sort(key=lambda info: info.filename)
        self._offsets = np.array([info.header_offset for info in members], dtype=np.int64)
        self._packed = np.array([info.compress_size for info in members], dtype=np.int64)
        self._sizes = np.array([info.file_size for info in members], dtype=np.int64)
        self._deflated = np.array([info.compress_type != zipfile.ZIP_STORED for info in members], dtype=bool)
        self._checksums = np.array([info.CRC for info in members], dtype=np.uint32)
        keys = [info.filename for info in members]
        labels, names, remarks = self._labelled(archive, keys)
        return Listing(
            keys=keys, sizes=self._sizes, labels=labels, class_names=names, skipped=skipped, remarks=remarks
        )

    def _check(self, info: zipfile.ZipInfo) -> None:
        if info.flag_bits & _ENCRYPTED:
            what, remedy = "is encrypted", "write the ZIP without a password"
        elif info.compress_type not in _METHODS:
            what, remedy = f"is packed by method {info.compress_type}", "write the ZIP stored or deflated"
        elif info.file_size != info.compress_size and info.compress_type == zipfile.ZIP_STORED:
            what, remedy = "is stored under two sizes", "bring the ZIP again"
        else:
            return
        raise RepaError(f"{info.filename} in {self.place} {what}", remedy, field="--data")

    def _labelled(
        self, archive: zipfile.ZipFile, keys: list[str]
    ) -> tuple[NDArray[np.int64] | None, Sequence[str] | None, tuple[str, ...]]:
        """Return labels of the keys, class names where they are folders, and remarks."""
        asked = self.options.labels
        if not keys or asked == NO_LABELS:
            return None, None, ()
        root = _root(keys, archive)
        names = [key.removeprefix(root) for key in keys]
        member = f"{root}{DATASET_JSON}"
        where = f"{self.place}/{member}"
        if asked != FOLDER_LABELS and member in archive.namelist():
            if archive.getinfo(member).file_size > MAX_BYTES:
                raise RepaError(
                    f"{where} has more than {MAX_BYTES:,} bytes", "write it again", field="--data"
                )
            found = parse_dataset_json(archive.read(member), where)
            if found is not None and found.labels is not None:
                labels, remarks = labels_of(found, names, where)
                return labels, None, remarks
            if found is not None:
                said = f"{where} says that there are no classes: all images are one"
                return np.zeros(len(keys), dtype=np.int64), (ONLY_CLASS,), (said,)
        if asked == JSON_LABELS:
            raise RepaError(
                f"{where} does not exist, or has no labels", "leave --labels out", field="--labels"
            )
        return self._by_folder(names, root)

    def _by_folder(
        self, names: list[str], root: str
    ) -> tuple[NDArray[np.int64], Sequence[str], tuple[str, ...]]:
        contents: dict[str, list[str]] = {}
        loose = [name for name in names if "/" not in name]
        if loose and len(loose) < len(names):
            raise RepaError(
                f"{self.place} has images ({root}{loose[0]}, …) beside folders of images, so classes are "
                "ambiguous",
                "give `--labels none` for one class of all",
                field="--labels",
            )
        if loose:
            return np.zeros(len(names), dtype=np.int64), (ONLY_CLASS,), ()
        for name in names:
            contents.setdefault(name.partition("/")[0], []).append(name)
        classes = sorted(contents)
        number = {name: label for label, name in enumerate(classes)}
        labels = np.array([number[name.partition("/")[0]] for name in names], dtype=np.int64)
        return labels, classes, above_classes(f"{self.place}/{root}".rstrip("/"), contents)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_files"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._files = DescriptorCache(1)

    def read(self, number: int) -> bytes:
        """Return the bytes of a member, see `ListedImages.read`."""
        size, packed = int(self._sizes[number]), int(self._packed[number])
        if max(size, packed) > MAX_BYTES:
            raise UndecodableImage(f"more than {MAX_BYTES:,} bytes")
        offset = int(self._offsets[number])
        with os_errors("read", Path(self.place)):
            descriptor = self._files.open(self.place).descriptor
            if _stamp(os.fstat(descriptor)) != self._stamp:
                raise RepaError(f"{self.place} has changed since it was listed", _CHANGED, field="--data")
            header = os.pread(descriptor, _LOCAL_HEADER.size, offset)
            if len(header) < _LOCAL_HEADER.size:
                raise UndecodableImage("its ZIP file is cut off")
            signature, *lengths = _LOCAL_HEADER.unpack(header)
            if signature != _SIGNATURE:
                raise UndecodableImage("its ZIP file is damaged: no member where one should begin")
            content = os.pread(descriptor, packed, offset + _LOCAL_HEADER.size + sum(lengths))
        if self._deflated[number]:
            # a byte more than stated shows a member that would go on, whatever it holds
            unpacking = zlib.decompressobj(-zlib.MAX_WBITS)
            try:
                content = unpacking.decompress(content, size + 1)
            except zlib.error:
                raise UndecodableImage("its bytes cannot be unpacked: the ZIP file is damaged") from None
        if len(content) != size or zlib.crc32(content) != int(self._checksums[number]):
            raise UndecodableImage("its bytes do not match their checksum: the ZIP file is damaged")
        return content


def open_images(data: str, options: SourceOptions) -> ZipImages:
    """Return the images of a ZIP file, see `ZipImages`."""
    return ZipImages(data, options)


def _stamp(status: os.stat_result) -> tuple[int, int]:
    return status.st_size, status.st_mtime_ns


def _root(keys: list[str], archive: zipfile.ZipFile) -> str:
    """Find the folder in which everything lies, with a slash. It is empty where that is the ZIP itself."""
    if DATASET_JSON in archive.namelist():
        return ""
    first = keys[0].partition("/")[0]
    inner = f"{first}/"
    if not all(key.startswith(inner) for key in keys):
        return ""
    deeper = any("/" in key.removeprefix(inner) for key in keys)
    return inner if deeper or f"{inner}{DATASET_JSON}" in archive.namelist() else ""
