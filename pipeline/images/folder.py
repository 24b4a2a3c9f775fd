"""Where images come from: a folder, tars, an HF data set, or the demo's drawn set; row i is image i of it.

The images of a folder are sorted; tars and data sets have an order of their own.

An image whose *content* cannot be decoded raises `UndecodableImage` and keeps its row, marked invalid. A file
that cannot be *read* (permission, disk, vanished) raises `RepaError`: it can be mended, so nothing is marked.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ...data.errors import RepaError
from ...data.storage.regular import other_kind, read_regular
from .decode import decode_image
from .listing import fingerprint_of, spaced

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray
    from PIL import Image

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp")


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
            raise RepaError(f"image folder {root} {what}", "give --data a folder of images, or `--data demo`")
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
            content = read_regular(path)
        except FileNotFoundError as error:
            raise RepaError(
                f"image {path} has vanished since the folder was listed", "run the same command again"
            ) from error
        except OSError as error:
            raise RepaError(
                f"image {path} cannot be read ({error.strerror or error})",
                "mend the file or its permissions, or move it out of the folder, and run again",
            ) from error
        return decode_image(content, apply_exif=self.apply_exif)

    def _fingerprint(self) -> str:
        root = os.path.join(self.root, "")  # pathlib and join cost microseconds a file

        def size(key: str) -> int:
            try:
                return os.stat(f"{root}{key}").st_size
            except OSError as error:
                raise RepaError(
                    f"image {root}{key} cannot be read ({error.strerror})", "mend it and run again"
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
                f"({filled[0]}, …), so classes are ambiguous",
                "move the loose images to a folder of their own",
            )
        if images:
            return [(key, 0) for key in images], [self.root.resolve().name or "images"]
        if not filled:
            raise RepaError(
                f"image folder {self.root} has no images (.jpg .jpeg .png .webp; {len(self.skipped)} "
                "other files)",
                "give --data the folder whose sub-folders are the classes",
            )
        empty = sorted(set(contents) - set(filled))
        if empty:
            raise RepaError(
                f"class folder {self.root / empty[0]} has no images"
                f"{f' (and {len(empty) - 1} more such)' if len(empty) > 1 else ''}",
                "fill it, or remove it so that classes are numbered without it",
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
                    elif not entry.is_file():
                        raise _no_file(entry)
                    else:
                        images.append(key)
        except OSError as error:
            raise RepaError(
                f"folder {folder} cannot be listed ({error.strerror or error})",
                "mend its permissions and run again",
            ) from error
        return images, folders


def _no_file(entry: os.DirEntry[str]) -> RepaError:
    """Say what stands in the place of an image."""
    try:
        kind = other_kind(entry.stat().st_mode)
    except OSError:
        kind = "a broken link"
    return RepaError(f"image {entry.path} is {kind}", "mend or remove it and run again")


def _check_name(name: str, key: str, root: Path) -> None:
    if name.isascii() and name.isprintable():
        return
    if "\n" in name or "\r" in name:
        raise RepaError(
            f"the name {key!r} in {root} holds a line break, which keys.txt cannot hold", "rename it"
        )
    try:
        name.encode()
    except UnicodeEncodeError:
        raise RepaError(f"the name {os.fsencode(key)!r} in {root} is not UTF-8", "rename it") from None
