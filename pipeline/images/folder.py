"""Where images come from: a folder, tars, an HF data set, or the demo's drawn set; row i is image i of it.

The images of a folder are sorted; tars and data sets have an order of their own.

An image whose *content* cannot be decoded raises `UndecodableImage` and keeps its row, marked invalid. A file
that cannot be *read* (permission, disk, vanished) raises `RepaError`: it can be mended, so nothing is marked.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ...data.errors import RepaError
from ...data.tars.names import names_tars
from .listing import fingerprint_of, spaced
from .names import HUGGING_FACE

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

DEMO = "demo"
DEMO_IMAGES = 2048
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp")

# What a file is, is read from its content: ImageNet has a PNG named .JPEG. Formats that call other programs
# (EPS) or that hold pixels `convert` has no rule for (TIFF in float) stay closed.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
MAX_REASON = 160


class UndecodableImage(Exception):  # noqa: N818 — the row stays, nothing failed
    """An image whose content is broken; its row stays, marked invalid.

    Attributes:
        reason: one short line, the same on every machine: it becomes part of the commit record.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class ImageSource(Protocol):
    """Images in a fixed order, with labels. Must pickle: decoding happens in other processes.

    Attributes:
        name: for people: a folder's path, a pattern of tars, ``hf:…`` or ``demo``.
        kind: ``folder``, ``tars``, ``hf`` or ``demo``.
        keys: image key of every row, unique, ascending for a folder.
        labels: int32 ``[N]``, position of the class in ``class_names``.
        class_names: label → name.
        fingerprint: ``sha256:…``; equal for equal keys, labels and, as far as can be told cheaply, contents.
        skipped: (path, why) of every file that was passed over.
    """

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def kind(self) -> str: ...  # noqa: D102
    @property
    def keys(self) -> Sequence[str]: ...  # noqa: D102
    @property
    def labels(self) -> NDArray[np.int32]: ...  # noqa: D102
    @property
    def class_names(self) -> Sequence[str]: ...  # noqa: D102
    @property
    def fingerprint(self) -> str: ...  # noqa: D102
    @property
    def skipped(self) -> Sequence[tuple[str, str]]: ...  # noqa: D102

    def __len__(self) -> int: ...

    def load(self, index: int, /) -> Image.Image:
        """Image of row ``index`` as RGB.

        Raises:
            UndecodableImage: the content is broken.
            RepaError: the file cannot be read.
        """
        ...


def open_source(
    data: str,
    *,
    limit: int | None = None,
    apply_exif: bool = False,
    class_names: Path | None = None,
) -> ImageSource:
    """The images that ``--data`` names.

    Args:
        data: folder, tars (see `TarImages`), ``hf:…`` (see `HubImages`), or ``demo``.
        limit: number of images; None takes all (of the demo: 2,048).
        apply_exif: turn images by their EXIF orientation.
        class_names: file with the name of a class in each line, of tars.

    Raises:
        RepaError: see `FolderImages`, `TarImages` and `HubImages`.
    """
    if limit is not None and limit < 1:
        raise RepaError(f"--limit {limit} asks for no image; give 1 or more")
    if names_tars(data):
        from .tars import TarImages

        return TarImages(data, apply_exif=apply_exif, limit=limit, class_names=class_names)
    if class_names is not None:
        raise RepaError(f"--class-names is for tars, whose classes are numbers; leave it out for {data}")
    if data.startswith(HUGGING_FACE):
        from .hub import HubImages

        return HubImages(data.removeprefix(HUGGING_FACE), apply_exif=apply_exif, limit=limit)
    if data == DEMO:
        from ..demo.shapes import DemoImages

        return DemoImages(count=limit or DEMO_IMAGES)
    return FolderImages(data, apply_exif=apply_exif, limit=limit)


class FolderImages:
    """A folder of JPEG, PNG and WebP files.

    The class of an image is the first-level sub-folder it lies in, however deeply; classes are numbered by
    sorted name. A folder without sub-folders of images is one class, named after the folder. Rows are sorted
    by key, the path relative to the root with ``/``, compared by code point.

    - Extensions .jpg .jpeg .png .webp in any case; other files are skipped and counted, and so is every name
      that starts with a dot (``._x.jpg`` of macOS and ``.ipynb_checkpoints`` hold no images of their own).
    - Symbolic links to files and folders are followed, as data sets are often assembled from them; a link
      back to a folder that contains it is skipped.
    - ``limit`` takes images floor(i·N/limit) of the N sorted ones: evenly spaced, so classes stay in
      proportion. Class names and labels are those of the whole folder.
    - The fingerprint covers key, label and size in bytes of each image taken (one line ``key⇥label⇥bytes``
      each), not its content, so that 1.28 M files need no read.

    Args:
        root: the folder.
        apply_exif: turn images by their EXIF orientation; by default it is ignored, as the reference does.
        limit: number of images to take at most.

    Raises:
        RepaError: no such folder, no images, a class folder without images, images both in and beside class
            folders, or a name that keys.txt cannot hold.
    """

    kind = "folder"

    def __init__(self, root: str | Path, *, apply_exif: bool = False, limit: int | None = None) -> None:
        self.root = Path(root)
        self.name = str(root)
        self.apply_exif = apply_exif
        if not self.root.is_dir():
            what = "is a file, not a folder" if self.root.exists() else "does not exist"
            raise RepaError(f"image folder {root} {what}; give --data a folder of images, or `--data demo`")
        scan = _Scan(self.root)
        entries, names = scan.classes()
        entries.sort()
        entries = [entries[row] for row in spaced(len(entries), limit).tolist()]
        self.keys: list[str] = [key for key, _ in entries]
        self.labels: NDArray[np.int32] = np.array([label for _, label in entries], dtype=np.int32)
        self.class_names: tuple[str, ...] = tuple(names)
        self.skipped: list[tuple[str, str]] = sorted(scan.skipped)
        self.fingerprint = self._fingerprint()

    def __len__(self) -> int:
        return len(self.keys)

    def load(self, index: int, /) -> Image.Image:
        """Image of row ``index`` as RGB; see `ImageSource.load`."""
        path = self.root / self.keys[index]
        try:
            content = path.read_bytes()
        except FileNotFoundError as error:
            raise RepaError(
                f"image {path} has vanished since the folder was listed; run the same command again"
            ) from error
        except OSError as error:
            raise RepaError(
                f"image {path} cannot be read ({error.strerror or error}); mend the file or its permissions, "
                "or move it out of the folder, and run again"
            ) from error
        return decode_image(content, apply_exif=self.apply_exif)

    def _fingerprint(self) -> str:
        root = os.path.join(self.root, "")  # pathlib and join cost microseconds a file

        def size(key: str) -> int:
            try:
                return os.stat(f"{root}{key}").st_size
            except OSError as error:
                raise RepaError(
                    f"image {root}{key} cannot be read ({error.strerror}); mend it and run again"
                ) from error

        return fingerprint_of(self.keys, self.labels, map(size, self.keys))


@dataclass
class _Scan:
    """One walk over a folder; `skipped` fills as it goes."""

    root: Path
    skipped: list[tuple[str, str]] = field(default_factory=list)

    def classes(self) -> tuple[list[tuple[str, int]], list[str]]:
        """(key, label) of every image in no order, and the class names."""
        images, folders = self._listing(str(self.root), "", ancestors=())
        contents = {
            name: list(self._images(path, f"{name}/", ancestors)) for name, path, ancestors in folders
        }
        filled = sorted(name for name, keys in contents.items() if keys)
        if images and filled:
            raise RepaError(
                f"image folder {self.root} has images ({min(images)}, …) beside folders of images "
                f"({filled[0]}, …), so classes are ambiguous; move the loose images to a folder of their own"
            )
        if images:
            return [(key, 0) for key in images], [self.root.resolve().name or "images"]
        if not filled:
            raise RepaError(
                f"image folder {self.root} has no images (.jpg .jpeg .png .webp; {len(self.skipped)} "
                "other files); give --data the folder whose sub-folders are the classes"
            )
        empty = sorted(set(contents) - set(filled))
        if empty:
            raise RepaError(
                f"class folder {self.root / empty[0]} has no images"
                f"{f' (and {len(empty) - 1} more such)' if len(empty) > 1 else ''}; "
                "fill it, or remove it so that classes are numbered without it"
            )
        entries = [(key, label) for label, name in enumerate(filled) for key in contents[name]]
        return entries, filled

    def _images(self, folder: str, prefix: str, ancestors: tuple[tuple[int, int], ...]) -> Iterator[str]:
        """Keys of the images below a folder."""
        stack = [(folder, prefix, ancestors)]
        while stack:
            folder, prefix, ancestors = stack.pop()
            images, folders = self._listing(folder, prefix, ancestors)
            yield from images
            stack.extend((path, f"{prefix}{name}/", above) for name, path, above in folders)

    def _listing(
        self, folder: str, prefix: str, ancestors: tuple[tuple[int, int], ...]
    ) -> tuple[list[str], list[tuple[str, str, tuple[tuple[int, int], ...]]]]:
        """Images (keys) and sub-folders (name, path, identities of the folders above) of one folder."""
        images, folders = [], []
        try:
            status = os.stat(folder)
            ancestors = (*ancestors, (status.st_dev, status.st_ino))
            with os.scandir(folder) as entries:
                for entry in entries:
                    key = f"{prefix}{entry.name}"
                    _check_name(entry.name, key, self.root)
                    if entry.name.startswith("."):
                        self.skipped.append((key, "hidden"))
                    elif entry.is_dir():
                        target = entry.stat() if entry.is_symlink() else None
                        if target is not None and (target.st_dev, target.st_ino) in ancestors:
                            self.skipped.append((key, "link to a folder that contains it"))
                        else:
                            folders.append((entry.name, entry.path, ancestors))
                    elif not entry.name.lower().endswith(EXTENSIONS):
                        self.skipped.append((key, "not named as a JPEG, PNG or WebP image"))
                    elif entry.is_symlink() and not entry.is_file():
                        raise RepaError(
                            f"image {entry.path} is a broken link; mend or remove it and run again"
                        )
                    else:
                        images.append(key)
        except OSError as error:
            raise RepaError(
                f"folder {folder} cannot be listed ({error.strerror or error}); mend its permissions and run "
                "again"
            ) from error
        return images, folders


def _check_name(name: str, key: str, root: Path) -> None:
    if name.isascii() and name.isprintable():
        return
    if "\n" in name or "\r" in name:
        raise RepaError(
            f"the name {key!r} in {root} holds a line break, which keys.txt cannot hold; rename it"
        )
    try:
        name.encode()
    except UnicodeEncodeError:
        raise RepaError(f"the name {os.fsencode(key)!r} in {root} is not UTF-8; rename it") from None


def decode_image(content: bytes, *, apply_exif: bool = False) -> Image.Image:
    """An encoded image as RGB.

    Pixel modes become RGB by Pillow's ``convert("RGB")``, exactly as the reference does:

    - 1, L: grey repeated;
    - LA, RGBA: alpha dropped, not composited, so hidden colours show;
    - P: the palette's colours, transparency dropped;
    - CMYK (Adobe's inverted JPEGs are turned by Pillow's decoder): Pillow's plain conversion;
    - I;16, grey PNGs of 16 bits: *ours*, the high byte, as Pillow itself reads 16-bit colour PNGs;
      ``convert`` would clip every value over 255 to white.

    Of an animation the first frame is taken. Colour profiles are ignored.

    Args:
        content: bytes of the file.
        apply_exif: turn the image by its EXIF orientation.

    Raises:
        UndecodableImage: not an image, truncated, or larger than Pillow's limit against decompression bombs
            (89 million pixels).
    """
    if not content:
        raise UndecodableImage("empty file (0 bytes)")
    try:
        with warnings.catch_warnings():
            # of a palette's transparency, of odd EXIF data: both are dropped anyway
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(BytesIO(content), formats=FORMATS) as image:
                image.load()
                return _to_rgb(ImageOps.exif_transpose(image) if apply_exif else image)
    except UnidentifiedImageError:
        raise UndecodableImage("not a JPEG, PNG or WebP image") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise UndecodableImage(f"more than {Image.MAX_IMAGE_PIXELS or 0:,} pixels (Pillow's limit)") from None
    except MemoryError:
        raise
    # a broken file makes Pillow's decoders raise anything: OSError, SyntaxError, ValueError, struct.error, …
    except Exception as error:
        raise UndecodableImage(_short(error)) from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        values = np.asarray(image)  # uint16, in the machine's byte order
        return Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise UndecodableImage(f"pixels of mode {image.mode}, whose range is not known")
    return image.copy() if image.mode == "RGB" else image.convert("RGB")


def _short(error: Exception) -> str:
    reason = " ".join(str(error).split()) or type(error).__name__
    return reason if len(reason) <= MAX_REASON else f"{reason[: MAX_REASON - 1]}…"
