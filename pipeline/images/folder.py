"""Images of a folder, sorted by path.

An image whose *content* cannot be decoded raises `UndecodableImage` and keeps its row, marked invalid. A file
that cannot be *read* (permission, disk, vanished) raises `RepaError`: it can be mended, so nothing is marked.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ...data.errors import RepaError
from ...data.storage.files import os_errors
from ...data.storage.regular import other_kind, read_regular
from .base import AUTO_LABELS, FOLDER_LABELS, JSON_LABELS, NO_LABELS, ONLY_CLASS
from .dataset_json import DATASET_JSON, labels_of, parse_dataset_json
from .decode import MAX_BYTES, decode_image
from .listing import check_key, class_names_of, fingerprint_of, spaced

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray
    from PIL import Image

    from .base import SourceOptions
    from .dataset_json import DatasetJson

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp")


# folders of this name hold a part of a set, and classes below
_SPLITS = re.compile(r"(?:train|training|val|valid|validation|test|testing|dev)(?:\d{4})?", re.IGNORECASE)
_FEW = 3


class FolderImages:
    """A folder of JPEG, PNG and WebP files.

    Labels are those of a ``dataset.json`` at the top (see `dataset_json`), if there is one. Else the class of
    an image is the first-level sub-folder it lies in, however deeply; classes are numbered by sorted name. A
    folder without sub-folders of images is one class, named after the folder. Rows are sorted by key, the
    path relative to the root with ``/``, compared by code point.

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
        labels: one of `LABELS`: ``folders`` passes a ``dataset.json`` over, ``none`` makes all images one
            class, wherever they lie.
        class_names: file with the name of a class in each line, for the numbers of a ``dataset.json``.

    Raises:
        RepaError: no such folder, no images, a class folder without images, images both in and beside class
            folders, a ``dataset.json`` that lacks one, a name that keys.txt cannot hold, or something else
            than a file where an image is expected.
    """

    kind = "folder"

    def __init__(
        self,
        root: str | Path,
        *,
        apply_exif: bool = False,
        limit: int | None = None,
        labels: str = AUTO_LABELS,
        class_names: Path | None = None,
    ) -> None:
        self.root = Path(root)
        self.name = str(root)
        self.apply_exif = apply_exif
        if not self.root.is_dir():
            what = "is a file, not a folder" if self.root.exists() else "does not exist"
            raise RepaError(
                f"image folder {root} {what}",
                "give --data a folder of images, or `--data demo`",
                field="--data",
            )
        scan = _Scan(self.root)
        found = scan.labelled(labels, class_names)
        chosen = spaced(len(found.keys), limit)
        self.keys: list[str] = [found.keys[row] for row in chosen.tolist()]
        self.labels: NDArray[np.int32] = found.labels[chosen]
        self.class_names: tuple[str, ...] = found.class_names
        self.skipped: list[tuple[str, str]] = sorted(scan.skipped)
        self.remarks: tuple[str, ...] = found.remarks
        self.fingerprint = self._fingerprint()

    def __len__(self) -> int:
        return len(self.keys)

    def load(self, index: int, /) -> Image.Image:
        """Return the image of row ``index`` as RGB, see `ImageSource.load`."""
        path = self.root / self.keys[index]
        try:
            content = read_regular(path, MAX_BYTES + 1)
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


def open_images(data: str, options: SourceOptions) -> FolderImages:
    """Return the images of a folder, see `FolderImages`."""
    return FolderImages(
        data,
        apply_exif=options.apply_exif,
        limit=options.limit,
        labels=options.labels,
        class_names=options.class_names,
    )


@dataclass(frozen=True)
class _Labelled:
    """All images of a folder. It has keys, sorted, labels int32 ``[N]``, label → name, and remarks."""

    keys: list[str]
    labels: NDArray[np.int32]
    class_names: tuple[str, ...]
    remarks: tuple[str, ...] = ()


@dataclass
class _Scan:
    """One walk over a folder. `skipped` fills as it goes."""

    root: Path
    skipped: list[tuple[str, str]] = field(default_factory=list)

    def labelled(self, labels: str, class_names: Path | None) -> _Labelled:
        """List the images and their labels, as the flags of `FolderImages` ask for them."""
        images, folders = self._listing(str(self.root), "", ancestors=())
        contents = {
            name: list(self._images(path, f"{name}/", ancestors)) for name, path, ancestors in folders
        }
        keys = [*images, *(key for inside in contents.values() for key in inside)]
        if not keys:
            raise RepaError(
                f"image folder {self.root} has no images (.jpg .jpeg .png .webp; {len(self.skipped)} "
                "other files)",
                self._remedy(),
                field="--data",
            )
        if labels == NO_LABELS:
            return _Labelled(sorted(keys), np.zeros(len(keys), dtype=np.int32), (ONLY_CLASS,))
        found = self._dataset_json(labels)
        if found is not None:
            return self._by_number(found, sorted(keys), class_names)
        if class_names is not None:
            raise RepaError(
                f"--class-names is for classes that are numbers, and those of {self.root} are folders",
                "leave it out",
                field="--class-names",
            )
        return self._by_folder(images, contents)

    def _dataset_json(self, labels: str) -> DatasetJson | None:
        """Read the labels at the top of the folder, where they are asked for."""
        path = self.root / DATASET_JSON
        if labels == FOLDER_LABELS or not path.is_file():
            if labels == JSON_LABELS:
                raise RepaError(
                    f"{path} does not exist", "leave --labels out, or bring the file", field="--labels"
                )
            return None
        with os_errors("read", path):
            found = parse_dataset_json(read_regular(path), str(path))
        if found is None and labels == JSON_LABELS:
            raise RepaError(f"{path} has no labels", "leave --labels out", field="--labels")
        if found is not None:
            self.skipped = [each for each in self.skipped if each[0] != DATASET_JSON]
        return found

    def _by_number(self, found: DatasetJson, keys: list[str], class_names: Path | None) -> _Labelled:
        where = str(self.root / DATASET_JSON)
        if found.labels is None:
            said = f"{where} says that there are no classes: all images are one"
            return _Labelled(keys, np.zeros(len(keys), dtype=np.int32), (ONLY_CLASS,), (said,))
        labels, remarks = labels_of(found, keys, where)
        names = class_names_of(labels, class_names, where=where)
        return _Labelled(keys, labels.astype(np.int32), names, remarks)

    def _by_folder(self, images: list[str], contents: dict[str, list[str]]) -> _Labelled:
        filled = sorted(name for name, keys in contents.items() if keys)
        if images and filled:
            raise RepaError(
                f"image folder {self.root} has images ({min(images)}, …) beside folders of images "
                f"({filled[0]}, …), so classes are ambiguous",
                "move the loose images to a folder of their own, or give `--labels none` for one class",
                field="--labels",
            )
        if images:
            names: tuple[str, ...] = (self.root.resolve().name or ONLY_CLASS,)
            return _Labelled(sorted(images), np.zeros(len(images), dtype=np.int32), names)
        empty = sorted(set(contents) - set(filled))
        if empty:
            raise RepaError(
                f"class folder {self.root / empty[0]} has no images"
                f"{f' (and {len(empty) - 1} more such)' if len(empty) > 1 else ''}",
                "fill it, or remove it so that classes are numbered without it; or give --data a folder in "
                f"{self.root}, or `--labels none` for one class of all",
                field="--data",
            )
        entries = sorted((key, label) for label, name in enumerate(filled) for key in contents[name])
        labels = np.array([label for _, label in entries], dtype=np.int32)
        remarks = above_classes(str(self.root), contents)
        return _Labelled([key for key, _ in entries], labels, tuple(filled), remarks)

    def _remedy(self) -> str:
        """Say what may help where there are no images, which is what there is instead."""
        for ending, what in ((".tar", "'{}' for tars"), (".zip", "{} for a ZIP file")):
            names = sorted(path for path, _ in self.skipped if path.lower().endswith(ending))
            if names:
                path = self.root / names[0]
                return f"give --data {what.format(path.parent / '*.tar' if ending == '.tar' else path)}"
        return "give --data the folder whose sub-folders are the classes"

    def _images(self, folder: str, prefix: str, ancestors: tuple[tuple[int, int], ...]) -> Iterator[str]:
        """Collect the keys of the images below a folder."""
        stack = [(folder, prefix, ancestors)]
        while stack:
            folder, prefix, ancestors = stack.pop()
            images, folders = self._listing(folder, prefix, ancestors)
            yield from images
            stack.extend((path, f"{prefix}{name}/", above) for name, path, above in folders)

    def _listing(
        self, folder: str, prefix: str, ancestors: tuple[tuple[int, int], ...]
    ) -> tuple[list[str], list[tuple[str, str, tuple[tuple[int, int], ...]]]]:
        """List images (keys) and sub-folders (name, path, identities of the folders above) of one folder."""
        images, folders = [], []
        try:
            status = os.stat(folder)
            ancestors = (*ancestors, (status.st_dev, status.st_ino))
            with os.scandir(folder) as entries:
                for entry in entries:
                    key = f"{prefix}{entry.name}"
                    check_key(key, str(self.root))
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
    """Say what stands where an image is expected."""
    try:
        kind = other_kind(entry.stat().st_mode)
    except OSError:
        kind = "a broken link"
    return RepaError(f"image {entry.path} is {kind}", "mend or remove it and run again")


def above_classes(root: str, contents: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """Say where the folders that name the classes seem to lie above the real ones.

    Args:
        root: what the classes lie in, for the remark.
        contents: class → keys of its images, which begin with the class and ``/``.
    """
    filled = sorted(name for name, keys in contents.items() if keys)
    split = [name for name in filled if _SPLITS.fullmatch(name)]
    if split and len(split) == len(filled):
        inner = f"{root}/{split[0]}"
        return (
            f"the classes are {', '.join(filled[:_FEW])}, which looks like parts of a set: if they are, give "
            f"--data {inner}, or `--labels none`",
        )
    if len(filled) == 1:
        below = {key.split("/", 2)[1] for key in contents[filled[0]] if key.count("/") > 1}
        if len(below) > 1:
            return (
                f"all images are one class, {filled[0]}, which has {len(below)} folders in it: if those are "
                f"the classes, give --data {root}/{filled[0]}",
            )
    return ()
