"""Sets of finished images, an array file as the ADM evaluation suite has it or a folder of image files."""

from __future__ import annotations

import hashlib
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

import numpy as np
from PIL import Image

from ...data.edge import printable
from ...data.errors import RepaError
from ...data.storage.files import os_errors
from ..sampling.record import ARRAY_FILE, GRID_FILE, RECORD_FILE, sha256_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

SAMPLES: Final = "--samples"
IMAGES: Final = "arr_0"
LABELS: Final = "arr_1"
SUFFIXES: Final = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_FORMATS: Final = ("PNG", "JPEG", "WEBP", "BMP")
_JPEG: Final = "JPEG"


class ImageSet(Protocol):
    """Images of one size in a fixed order. It can be sent to other processes.

    Attributes:
        name: for people.
        sha256: says which images they are.
        count: N.
        resolution: R, their side in pixels.
        notes: what a reader of figures must know of them.
    """

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def sha256(self) -> str: ...  # noqa: D102
    @property
    def count(self) -> int: ...  # noqa: D102
    @property
    def resolution(self) -> int: ...  # noqa: D102
    @property
    def notes(self) -> tuple[str, ...]: ...  # noqa: D102

    def batch(self, first: int, last: int) -> NDArray[np.uint8]:
        """Return images ``first`` to ``last``, the last left out, uint8 ``[B, R, R, 3]``.

        Raises:
            RepaError: one cannot be read.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class ArrayImages:
    """The images of an .npz file, ``arr_0`` uint8 ``[N, R, R, 3]``, see `ImageSet`.

    Attributes:
        of_vectors: whether each was given a vector, ``arr_1`` ``[N, D]``, and not a class.
    """

    file: Path
    sha256: str
    count: int
    resolution: int
    class_sorted: bool = False
    of_vectors: bool = False
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Return the file's name."""
        return self.file.name

    def batch(self, first: int, last: int) -> NDArray[np.uint8]:
        """Return some of the images, see `ImageSet.batch`."""
        with os_errors("read", self.file):
            return np.array(array_of(self.file, IMAGES)[first:last])


@dataclass(frozen=True, kw_only=True)
class FolderImages:
    """The image files of a folder and its sub-folders, sorted by path, see `ImageSet`."""

    folder: Path
    files: tuple[Path, ...]
    sha256: str
    resolution: int
    class_sorted: bool = False
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Return the folder's name."""
        return self.folder.name

    @property
    def count(self) -> int:
        """Return the number of files."""
        return len(self.files)

    def batch(self, first: int, last: int) -> NDArray[np.uint8]:
        """Return some of the images, see `ImageSet.batch`."""
        images = []
        for file in self.files[first:last]:
            with _opened(self.folder / file) as image:
                try:
                    images.append(np.asarray(image.convert("RGB")))
                # a broken file makes Pillow's decoders raise anything: OSError, SyntaxError, struct.error, …
                except Exception as error:
                    raise _no_image(self.folder / file, error) from error
        return np.stack(images)


def open_samples(path: Path, num: int | None = None) -> ArrayImages | FolderImages:
    """Open finished samples.

    Args:
        path: an .npz file, a folder of `repa sample`, or any folder of images.
        num: how many to take, from the first on; None takes all.

    Raises:
        RepaError: they are not there, fewer than asked for, grey, of several sizes, or no images.
    """
    if not path.exists():
        raise RepaError(f"{path} does not exist", "give an .npz file or a folder of images", field=SAMPLES)
    if path.is_dir():
        return _folder(path, num) if not (path / ARRAY_FILE).exists() else _array(path / ARRAY_FILE, num)
    return _array(path, num)


def open_array(file: Path, *, field: str) -> ArrayImages:
    """Open all images of an .npz file.

    Args:
        file: the file.
        field: flag that named it, for errors.

    Raises:
        RepaError: it holds none, or others than uint8 ``[N, R, R, 3]``.
    """
    return _array(file, None, field=field)


def names_in(file: Path, *, field: str) -> tuple[str, ...]:
    """Return the names of an .npz file's arrays.

    Raises:
        RepaError: it is no such file.
    """
    try:
        with os_errors("read", file), zipfile.ZipFile(file) as archive:
            return tuple(name.removesuffix(".npy") for name in archive.namelist())
    except zipfile.BadZipFile as error:
        raise RepaError(
            f"{file} is no .npz file ({error})", "give one that NumPy's savez wrote", field=field
        ) from error


def array_of(file: Path, name: str) -> NDArray[Any]:
    """Return an array of an .npz file, mapped into memory where it is stored as it is.

    Raises:
        RepaError: it is damaged, or would need a pickle to be read.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            entry = archive.getinfo(f"{name}.npy")
            if entry.compress_type == zipfile.ZIP_STORED:
                return _mapped(file, entry)
            with archive.open(entry) as opened:
                found: NDArray[Any] = np.lib.format.read_array(opened, allow_pickle=False)
                return found
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        reason = printable(" ".join(str(error).split()))
        raise RepaError(f"{name} of {file} cannot be read ({reason})", "write the file again") from error


def _mapped(file: Path, entry: zipfile.ZipInfo) -> NDArray[Any]:
    """Map an array that a ZIP file holds uncompressed (APPNOTE 4.3.7, local file header)."""
    with file.open("rb") as opened:
        opened.seek(entry.header_offset + 26)
        name_bytes, extra_bytes = np.frombuffer(opened.read(4), "<u2")
        opened.seek(entry.header_offset + 30 + int(name_bytes) + int(extra_bytes))
        version = np.lib.format.read_magic(opened)
        read_header = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }.get(version)
        if read_header is None:
            raise ValueError(f"a .npy array of version {version}")
        shape, fortran, dtype = read_header(opened)
        if dtype.hasobject:
            raise ValueError("it holds objects, not numbers")
        if not np.prod(shape):
            return np.empty(shape, dtype)
        order: Any = "F" if fortran else "C"
        return np.memmap(opened, dtype, "r", offset=opened.tell(), shape=shape, order=order)


def _array(file: Path, num: int | None, *, field: str = SAMPLES) -> ArrayImages:
    names = names_in(file, field=field)
    if IMAGES not in names:
        raise RepaError(f"{file} holds no images ({IMAGES})", "give a file that does", field=field)
    with os_errors("read", file):
        images = array_of(file, IMAGES)
    resolution = _checked_array(images, file, field)
    count = _enough(len(images), num, file, field)
    labels = array_of(file, LABELS) if LABELS in names else np.zeros(0)
    ordered = labels.ndim == 1 and len(labels) == len(images) and _is_sorted(labels[:count].tolist())
    return ArrayImages(
        file=file,
        sha256=sha256_of(file),
        count=count,
        resolution=resolution,
        class_sorted=ordered,
        of_vectors=labels.ndim == 2 and labels.dtype.kind == "f",
    )


def _checked_array(images: NDArray[Any], file: Path, field: str) -> int:
    """Return the side of the images.

    Raises:
        RepaError: they are no square colour images in uint8.
    """
    remedy = "give uint8 [N, R, R, 3]"
    shown = f"{images.dtype} {list(images.shape)}"
    if images.ndim == 3 or (images.ndim == 4 and images.shape[3] == 1):
        raise RepaError(f"{IMAGES} of {file} holds grey images, {shown}", remedy, field=field)
    if images.ndim != 4 or images.shape[3] != 3 or images.dtype != np.uint8 or not len(images):
        raise RepaError(f"{IMAGES} of {file} holds no colour images, {shown}", remedy, field=field)
    if images.shape[1] != images.shape[2]:
        raise RepaError(f"{IMAGES} of {file} holds images that are not square, {shown}", remedy, field=field)
    return int(images.shape[1])


def _enough(found: int, num: int | None, where: Path, field: str) -> int:
    if num is not None and found < num:
        raise RepaError(
            f"{where} holds {found:,} images, and --num asks for {num:,}",
            "make more, or ask for fewer: figures of different numbers cannot be compared",
            field=field,
        )
    return found if num is None else num


def _is_sorted(labels: Sequence[Any]) -> bool:
    """Return whether images stand class by class."""
    return len(set(labels)) > 1 and list(labels) == sorted(labels)


def _folder(folder: Path, num: int | None) -> FolderImages:
    with os_errors("read", folder):
        found = sorted(
            path.relative_to(folder)
            for path in folder.rglob("*")
            if path.suffix.lower() in SUFFIXES and path.is_file()
        )
    if (folder / RECORD_FILE).exists():
        found = [file for file in found if file != Path(GRID_FILE)]
    if not found:
        raise RepaError(f"{folder} holds no images", "give a folder that does", field=SAMPLES)
    files = found[: _enough(len(found), num, folder, SAMPLES)]
    digest = hashlib.sha256()
    sizes: dict[tuple[int, int], Path] = {}
    lossy = 0
    for file in files:
        with _opened(folder / file) as image:
            sizes.setdefault(image.size, file)
            lossy += image.format == _JPEG
            _check_form(image, folder / file, sizes)
        digest.update(f"{file.as_posix()}\t{sha256_of(folder / file)}\n".encode())
    (width, _), *_ = sizes
    note = f"{lossy:,} of the samples are JPEG files, whose artefacts FID and its like see"
    return FolderImages(
        folder=folder,
        files=tuple(files),
        sha256=digest.hexdigest(),
        resolution=width,
        class_sorted=_is_sorted([file.parent.as_posix() for file in files]),
        notes=(note,) if lossy else (),
    )


def _check_form(image: Image.Image, file: Path, sizes: dict[tuple[int, int], Path]) -> None:
    """Refuse an image of another form than the first.

    Raises:
        RepaError: it is grey, transparent, not square or of another size.
    """
    if image.mode != "RGB":
        grey = image.mode in ("1", "L", "LA") or image.mode.startswith("I")
        raise RepaError(
            f"{file} is {'grey' if grey else f'of mode {image.mode}'}, and colour images are measured",
            "write all samples as RGB",
            field=SAMPLES,
        )
    if len(sizes) > 1 or image.width != image.height:
        first = next(iter(sizes.values()))
        other = f", and {first.name} another size" if len(sizes) > 1 else ", not square"
        raise RepaError(
            f"{file} has {image.width}×{image.height} pixels{other}",
            "give samples of one size alone",
            field=SAMPLES,
        )


def _opened(file: Path) -> Image.Image:
    try:
        return Image.open(file, formats=_FORMATS)
    except Exception as error:
        raise _no_image(file, error) from error


def _no_image(file: Path, error: Exception) -> RepaError:
    reason = printable(" ".join(str(error).split())) or type(error).__name__
    return RepaError(f"{file} is no image that can be read ({reason})", "write it again", field=SAMPLES)
