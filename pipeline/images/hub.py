"""Images of a Hugging Face data set, from the hub or a folder that `save_to_disk` wrote."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...data.errors import RepaError
from ...data.storage.regular import read_regular
from ...data.units import counted
from .base import AUTO_LABELS, NO_LABELS, ONLY_CLASS
from .decode import MAX_BYTES, decode_image
from .listing import fingerprint_of, numbered_classes, spaced
from .names import HUGGING_FACE

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray
    from PIL import Image

    from .base import SourceOptions

DEFAULT_SPLIT = "train"
LABEL_NAMES = ("label", "labels", "fine_label", "cls", "class", "target")
_BATCH = 4096


class HubImages:
    """The rows of a data set with an image feature and a label, in the data set's order.

    The image is the only feature of type `Image`, the label the only one of type `ClassLabel`, which also
    names the classes; without one it is an integer feature named as in `LABEL_NAMES`, its classes ``0`` to
    ``K-1``. A row's key is its position, with the split before it where there is one: ``train/00000017``.

    - ``limit`` takes rows floor(i·N/limit) of the N, as of a folder.
    - The fingerprint covers key, label and size in bytes of each image taken; the bytes stay unread.

    Args:
        name: ``NAME`` or ``NAME:SPLIT``, NAME on the hub or a folder that `save_to_disk` wrote. The split is
            ``train`` by default, and in a folder without splits there is none.
        apply_exif: turn images by their EXIF orientation.
        limit: number of images to take at most.
        labels: ``none`` makes all images one class, whether the set has labels or not.

    Raises:
        RepaError: the package datasets is not installed, the set or split cannot be had, its features are
            not those, or a row has no label or no image.
    """

    kind = "hf"

    def __init__(
        self,
        name: str,
        *,
        apply_exif: bool = False,
        limit: int | None = None,
        labels: str = AUTO_LABELS,
    ) -> None:
        self.remarks: tuple[str, ...] = ()
        self.name = f"{HUGGING_FACE}{name}"
        self.apply_exif = apply_exif
        self.skipped: Sequence[tuple[str, str]] = ()
        data, split = open_data_set(name)
        image = _image_of(data, self.name)
        if not len(data):
            raise RepaError(f"{self.name} has no rows", "choose another data set or split", field="--data")
        if labels == NO_LABELS:
            values = np.zeros(len(data), dtype=np.int64)
            self.class_names: tuple[str, ...] = (ONLY_CLASS,)
        else:
            label, names = _label_of(data, self.name)
            values = _labels(data, label, self.name)
            self.class_names = tuple(names or numbered_classes(values, where=self.name))
        if int(values.max()) >= len(self.class_names):
            raise RepaError(
                f"{self.name} has the label {values.max()}, but names "
                f"{counted(len(self.class_names), 'class')}",
                "give each label a name in its ClassLabel",
            )
        chosen = spaced(len(values), limit)
        prefix = f"{split}/" if split else ""
        self.keys: Sequence[str] = [f"{prefix}{row:08d}" for row in chosen.tolist()]
        self.labels: NDArray[np.int32] = values[chosen].astype(np.int32)
        self._rows = chosen
        self._image = image
        # encoded as they are: decoding is ours, the same for every image set
        self._data = data.cast_column(image, _image_feature())
        self.fingerprint = fingerprint_of(
            self.keys, self.labels, _sizes(self._data, image, chosen, self.name)
        )

    def __len__(self) -> int:
        return len(self.keys)

    def load(self, index: int, /) -> Image.Image:
        """Load the image of row ``index`` as RGB, see `ImageSource.load`."""
        try:
            value = self._data[int(self._rows[index])][self._image]
            content = value["bytes"]
            if content is None:
                content = read_regular(value["path"], MAX_BYTES + 1)
        except OSError as error:
            raise RepaError(
                f"image {self.keys[index]} of {self.name} cannot be read ({error})", "mend the file"
            ) from error
        return decode_image(content, apply_exif=self.apply_exif)


def open_images(data: str, options: SourceOptions) -> HubImages:
    """Return the images of a data set, see `HubImages`."""
    return HubImages(
        data.removeprefix(HUGGING_FACE),
        apply_exif=options.apply_exif,
        limit=options.limit,
        labels=options.labels,
    )


def _image_feature() -> Any:
    from datasets import Image as ImageFeature

    return ImageFeature(decode=False)


def open_data_set(name: str) -> tuple[Any, str]:
    """Open the data set, and name its split if it is one of several."""
    try:
        from datasets import DatasetDict, load_dataset, load_from_disk
    except ImportError:
        raise RepaError(
            f"--data {HUGGING_FACE}{name} needs the package datasets, which is not installed",
            "install it with `pip install 'repa[hf]'`",
        ) from None
    data_set, _, split = name.partition(":")
    if not data_set:
        raise RepaError(f"--data {HUGGING_FACE}{name} names no data set", f"give {HUGGING_FACE}NAME[:SPLIT]")
    folder = Path(data_set)
    saved = any((folder / file).exists() for file in ("state.json", "dataset_dict.json"))
    try:
        if not saved:
            split = split or DEFAULT_SPLIT
            return load_dataset(data_set, split=split), split
        data = load_from_disk(data_set)
    # the library raises anything between an offline hub and a damaged file: one line of it is what matters
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise RepaError(
            f"the data set {name} cannot be opened ({type(error).__name__}: {reason})",
            f"check its name, split and your connection, as --data {HUGGING_FACE}NAME:SPLIT",
        ) from error
    if isinstance(data, DatasetDict):
        split = split or (next(iter(data)) if len(data) == 1 else DEFAULT_SPLIT)
        if split not in data:
            raise RepaError(
                f"{data_set} has no split {split} but {', '.join(data)}",
                f"name one as {HUGGING_FACE}{data_set}:SPLIT",
            )
        return data[split], split
    if split:
        raise RepaError(f"{data_set} has no splits", f"leave :{split} out")
    return data, ""


def _image_of(data: Any, name: str) -> str:
    """Find the name of the image feature."""
    from datasets import Image as ImageFeature

    return _only(
        [key for key, feature in data.features.items() if isinstance(feature, ImageFeature)],
        "image",
        data,
        name,
        "give a data set with one (select_columns and save_to_disk make one)",
    )


def _label_of(data: Any, name: str) -> tuple[str, Sequence[str] | None]:
    """Find the name of the label feature, and of the classes."""
    from datasets import ClassLabel, Value

    labels = [key for key, feature in data.features.items() if isinstance(feature, ClassLabel)]
    if not labels:
        labels = [
            key
            for key in LABEL_NAMES
            if isinstance(feature := data.features.get(key), Value) and "int" in feature.dtype
        ][:1]
    remedy = (
        "give a data set with one (select_columns and save_to_disk make one)"
        if labels
        else f"give `--labels none` for one class of all, or name one of the features as in {LABEL_NAMES[0]}"
    )
    label = _only(labels, "label", data, name, remedy)
    return label, getattr(data.features[label], "names", None)


def _only(found: list[str], what: str, data: Any, name: str, remedy: str) -> str:
    if len(found) != 1:
        raise RepaError(
            f"{name} has {len(found) or 'no'} {what} features among {', '.join(data.features)}",
            remedy,
            field="--data" if found or what == "image" else "--labels",
        )
    return found[0]


def _labels(data: Any, label: str, name: str) -> NDArray[np.int64]:
    values = data.select_columns([label]).with_format("arrow")[:][label]
    if values.null_count:
        raise RepaError(
            f"{name} has {counted(values.null_count, 'row')} without a {label}",
            "filter them out first, or give `--labels none`",
            field="--labels",
        )
    labels: NDArray[np.int64] = values.to_numpy().astype(np.int64)
    if len(labels) and int(labels.min()) < 0:
        row = int(np.flatnonzero(labels < 0)[0])
        raise RepaError(
            f"row {row} of {name} has the {label} {labels[row]}: the split has no labels",
            "choose another, or give `--labels none`",
            field="--labels",
        )
    return labels


def _sizes(data: Any, image: str, rows: NDArray[np.int64], name: str) -> Iterator[int]:
    """Count the bytes of each row's encoded image, from Arrow's offsets, or of the file beside the set."""
    from pyarrow import compute

    images = data.select_columns([image]).with_format("arrow")
    for start in range(0, len(rows), _BATCH):
        batch = rows[start : start + _BATCH]
        whole = bool(batch[-1] - batch[0] == len(batch) - 1)
        table = images[int(batch[0]) : int(batch[-1]) + 1] if whole else images[batch]
        column = table[image].combine_chunks()
        lengths = compute.binary_length(compute.struct_field(column, "bytes")).to_pylist()
        for at, length in enumerate(lengths):
            if length is not None:
                yield length
                continue
            path = compute.struct_field(column, "path")[at].as_py()
            if path is None:
                raise RepaError(f"row {batch[at]} of {name} has no image", "filter such rows out first")
            try:
                yield os.stat(path).st_size
            except OSError as error:
                raise RepaError(
                    f"image {path}, row {batch[at]} of {name}, cannot be read ({error.strerror})", "mend it"
                ) from error
