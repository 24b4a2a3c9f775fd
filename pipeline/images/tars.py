"""Images in WebDataset tars, where row i is sample i, tar after tar.

The tars are indexed once, by their headers alone; an image is then read by its offset, so that a run goes on
from any shard without reading what comes before, and worker processes decode rows as of a folder. Of tars in
a bucket both are requests for ranges: one or two for the headers of a sample, one for an image.
"""

from __future__ import annotations

import json
import os
from array import array
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

import numpy as np

from ...data.errors import RepaError
from ...data.storage.bucket import REQUESTS, RemotePath, is_remote
from ...data.storage.descriptors import DescriptorCache
from ...data.storage.files import os_errors
from ...data.storage.object_file import Objects
from ...data.tars.names import is_stream, present_tars
from ...data.tars.reader import open_tar, split_member
from ...data.units import counted
from .base import AUTO_LABELS, NO_LABELS, ONLY_CLASS, UndecodableImage
from .decode import MAX_BYTES, decode_image
from .listing import check_key, class_names_of, fingerprint_of, spaced

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray
    from PIL import Image

    from ...data.tars.reader import TarReader
    from .base import SourceOptions

    # of a file its size and when it was written; of an object what the store tells it by
    Stamp = tuple[int, int] | str | None

FIELDS = ("jpg", "jpeg", "png", "webp")
LABEL_FIELD = "cls"
JSON_FIELD = "json"
JSON_LABELS = ("label", "cls")
_OPEN_TARS = 16
_LABEL_BYTES = 1 << 20
_NO_LABEL = -1


class TarImages:
    """The samples of WebDataset tars.

    A sample is the members of one key that follow one another: an image (.jpg .jpeg .png .webp) and its
    label, an integer as text in ``.cls``, or in ``.json`` the number itself or an object with ``label`` or
    ``cls``. The key, WebDataset's ``__key__``, is the row's; other members are ignored.

    - ``limit`` takes samples floor(i·N/limit) of the N, as of a folder; class names are those of all.
    - The fingerprint covers name (the key and the image's ending), label and size in bytes of each image
      taken, one line each, and not in which tar it lies.

    Args:
        pattern: tars, see `expand_tars`.
        apply_exif: turn images by their EXIF orientation.
        limit: number of images to take at most.
        class_names: file with the name of a class in each line; by default they are ``0`` to ``K-1``.
        labels: ``none`` makes all images one class, whether labels lie beside them or not.

    Raises:
        RepaError: no such tars, one that is damaged or cut off, a sample without a label or with two images,
            a key that comes twice, or a label without a name; on loading, a tar that has changed since.
    """

    kind = "tars"

    def __init__(
        self,
        pattern: str,
        *,
        apply_exif: bool = False,
        limit: int | None = None,
        class_names: Path | None = None,
        labels: str = AUTO_LABELS,
    ) -> None:
        self.name = pattern
        self.remarks: tuple[str, ...] = ()
        self.apply_exif = apply_exif
        self._tars = present_tars(pattern)
        self._open()
        # of each tar when it was indexed: offsets into another are no images
        self._stamps: list[Stamp] = []
        index = self._index()
        if not index.keys:
            raise RepaError(
                f"{pattern} has no images (.jpg .jpeg .png .webp from the first dot of a name on)",
                "give WebDataset tars of images",
            )
        found = np.frombuffer(index.labels, dtype=np.int32)
        if labels == NO_LABELS:
            found = np.zeros_like(found)
            self.class_names: tuple[str, ...] = (ONLY_CLASS,)
        else:
            self._require_labels(index, found)
            self.class_names = class_names_of(found, class_names, where=pattern)
        chosen = spaced(len(found), limit)
        self.keys: Sequence[str] = [index.keys[row] for row in chosen]
        self.labels: NDArray[np.int32] = found[chosen]
        self._tar = np.frombuffer(index.tars, dtype=np.int32)[chosen]
        self._offset = np.frombuffer(index.offsets, dtype=np.int64)[chosen]
        self._size = np.frombuffer(index.sizes, dtype=np.int64)[chosen]
        self.skipped = index.skipped
        names = (f"{index.keys[row]}.{FIELDS[index.fields[row]]}" for row in chosen)
        self.fingerprint = fingerprint_of(names, self.labels, self._size)

    def _require_labels(self, index: _Index, labels: NDArray[np.int32]) -> None:
        missing = np.flatnonzero(labels == _NO_LABEL)
        if not len(missing):
            return
        first = int(missing[0])
        key, tar = index.keys[first], self._tars[index.tars[first]]
        raise RepaError(
            f"{counted(len(missing), 'image')} of {len(labels)} in {self.name} have no label beside them, "
            f"first sample {key} in {tar}",
            f"add a member {key}.cls with its class as a number, or .json with a field 'label' "
            "(tar --sort=name keeps them together); or give `--labels none` to encode all as one class",
            field="--labels",
        )

    def _open(self) -> None:
        self._files = DescriptorCache(_OPEN_TARS)
        self._buckets: dict[str, Objects] = {}

    def _index(self) -> _Index:
        """Index the samples of all tars, in order.

        Those of a bucket are many at once, as each waits for its answers.
        """
        for tar in self._tars:
            if is_stream(tar) and not is_remote(tar):
                raise RepaError(
                    f"images are read from tars by their offset, which {tar} has none of",
                    "fetch it to a disk, or name it in a bucket, s3://… or gs://…",
                )
        index = _Index()
        stop = Event()
        with ThreadPoolExecutor(REQUESTS) as pool:
            one = partial(self._index_tar, stop=stop)
            numbers = range(len(self._tars))
            found: Iterable[tuple[_Index, Stamp]] = map(one, numbers)
            if any(map(is_remote, self._tars)):
                found = pool.map(one, numbers)
            try:
                for tar, (each, stamp) in zip(self._tars, found, strict=True):
                    index.join(each, tar)
                    self._stamps.append(stamp)
            except BaseException:
                # neither an error nor Ctrl-C waits for the other tars
                stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return index

    def _index_tar(self, number: int, stop: Event) -> tuple[_Index, Stamp]:
        tar = self._tars[number]
        if is_remote(tar):
            objects, name = self._object(tar)
            with os_errors("read", RemotePath(objects, name)):
                stamp: Stamp = objects.tag_of(name)
        else:
            with os_errors("read", Path(tar)):
                stamp = _stamp(os.stat(tar))
        index = _Index()
        with open_tar(tar, headers=True) as reader:
            index.add(reader, number, stop)
        return index, stamp

    def _object(self, tar: str) -> tuple[Objects, str]:
        """Find where an object lies, and its name there. A connection serves all tars of a prefix."""
        prefix, _, name = tar.rpartition("/")
        known = self._buckets.get(prefix)
        return known or self._buckets.setdefault(prefix, Objects(prefix)), name

    def __len__(self) -> int:
        return len(self.keys)

    def __getstate__(self) -> dict[str, Any]:
        # open files and connections do not travel
        return {name: value for name, value in self.__dict__.items() if name not in ("_files", "_buckets")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def load(self, index: int, /) -> Image.Image:
        """Load the image of row ``index`` as RGB, see `ImageSource.load`."""
        number, size = int(self._tar[index]), int(self._size[index])
        tar = self._tars[number]
        if size > MAX_BYTES:
            raise UndecodableImage(f"more than {MAX_BYTES:,} bytes")
        content = self._read(number, size, int(self._offset[index])) if size else b""
        if content is None or len(content) < size:
            raise RepaError(
                f"image {self.keys[index]} cannot be read from {tar}, which has changed since it was indexed",
                "run the same command again",
            )
        return decode_image(content, apply_exif=self.apply_exif)

    def _read(self, number: int, size: int, offset: int) -> bytes | None:
        """Read some bytes of a tar, fewer where it ends before. It is None where the tar has changed."""
        tar, stamp = self._tars[number], self._stamps[number]
        if is_remote(tar):
            objects, name = self._object(tar)
            assert not isinstance(stamp, tuple), "it is that of an object"
            with os_errors("read", RemotePath(objects, name)):
                return objects.read_same(name, offset, size, stamp)
        with os_errors("read", Path(tar)):
            file = self._files.open(tar)
            same = _stamp(os.fstat(file.descriptor)) == stamp
            return _read(file.descriptor, size, offset) if same else None


def open_images(data: str, options: SourceOptions) -> TarImages:
    """Return the images of tars, see `TarImages`."""
    return TarImages(
        data,
        apply_exif=options.apply_exif,
        limit=options.limit,
        class_names=options.class_names,
        labels=options.labels,
    )


def _stamp(status: os.stat_result) -> tuple[int, int]:
    """Return what changes when a file is written, which is its size and when that was."""
    return status.st_size, status.st_mtime_ns


def _read(descriptor: int, size: int, offset: int) -> bytes:
    pieces = []
    while size:
        piece = os.pread(descriptor, size, offset)
        if not piece:
            break
        pieces.append(piece)
        size, offset = size - len(piece), offset + len(piece)
    return b"".join(pieces)


@dataclass
class _Index:
    """What is known of every sample, in columns. A million rows as objects would take a gigabyte."""

    keys: list[str] = field(default_factory=list)
    fields: array[int] = field(default_factory=lambda: array("b"))
    labels: array[int] = field(default_factory=lambda: array("i"))
    tars: array[int] = field(default_factory=lambda: array("i"))
    offsets: array[int] = field(default_factory=lambda: array("q"))
    sizes: array[int] = field(default_factory=lambda: array("q"))
    skipped: list[tuple[str, str]] = field(default_factory=list)
    _seen: set[str] = field(default_factory=set)

    def add(self, reader: TarReader, number: int, stop: Event) -> None:
        """Take the samples of a tar, unless nobody wants them any more."""
        sample = _Sample(reader.where)
        for member in reader:
            if stop.is_set():
                return
            split = split_member(member.name)
            if split is None:
                self.skipped.append((f"{reader.where}:{member.name}", "no member of a sample"))
                continue
            key, kind = split
            if key != sample.key:
                self._close(sample, number)
                sample = _Sample(reader.where, key)
            if kind in FIELDS:
                sample.take_image(kind, member.offset, member.size)
            elif kind == LABEL_FIELD or (kind == JSON_FIELD and sample.label is None):
                if member.size > _LABEL_BYTES:
                    raise RepaError(
                        f"{member.name} in {reader.where} is too large for a label", "see the tar"
                    )
                sample.take_label(kind, reader.read())
        self._close(sample, number)

    def join(self, other: _Index, where: str) -> None:
        """Take the samples of the tar ``where``, which come next."""
        for key in other.keys:
            self._see(key, where)
        for name in ("keys", "fields", "labels", "tars", "offsets", "sizes", "skipped"):
            getattr(self, name).extend(getattr(other, name))

    def _see(self, key: str, where: str) -> None:
        if key in self._seen:
            raise RepaError(
                f"key {key} comes twice, the second time in {where}",
                "keys name rows, so write the tars with one sample for each",
            )
        self._seen.add(key)

    def _close(self, sample: _Sample, number: int) -> None:
        if sample.image is None:
            if sample.key:
                self.skipped.append((f"{sample.where}:{sample.key}", "a sample without an image"))
            return
        self._see(sample.key, sample.where)
        check_key(sample.key, sample.where)
        kind, offset, size = sample.image
        self.keys.append(sample.key)
        self.fields.append(FIELDS.index(kind))
        self.labels.append(_NO_LABEL if sample.label is None else sample.label)
        self.tars.append(number)
        self.offsets.append(offset)
        self.sizes.append(size)


@dataclass
class _Sample:
    """The members of one key so far."""

    where: str
    key: str = ""
    image: tuple[str, int, int] | None = None
    label: int | None = None

    def take_image(self, kind: str, offset: int, size: int) -> None:
        if self.image is not None:
            raise RepaError(
                f"sample {self.key} in {self.where} has two images, .{self.image[0]} and .{kind}", "keep one"
            )
        self.image = (kind, offset, size)

    def take_label(self, kind: str, content: bytes) -> None:
        try:
            value = int(content) if kind == LABEL_FIELD else _json_label(json.loads(content))
        except (ValueError, RecursionError):
            value = -1
        if value is None:
            return
        if not 0 <= value < 2**31:
            shown = content[:40].decode("utf-8", "replace").strip()
            raise RepaError(
                f"sample {self.key} in {self.where} has the label {shown!r} in .{kind}",
                "give the number of its class, counted from 0",
            )
        self.label = value


def _json_label(values: Any) -> int | None:
    """Parse the label in a sample's JSON. It is None if the JSON speaks of other things."""
    if isinstance(values, dict):
        values = next((values[name] for name in JSON_LABELS if name in values), None)
        if values is None:
            return None
    return values if isinstance(values, int) and not isinstance(values, bool) else -1
