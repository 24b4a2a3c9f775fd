"""The captions of an image set, matched to its images."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from ...data.errors import RepaError
from ...data.format.captions import MOST_CAPTIONS
from ...data.units import counted

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

FLAG: Final = "--captions"
COLUMN_FLAG: Final = "--caption-column"
PER_IMAGE_FLAG: Final = "--captions-per-image"
COLUMNS: Final = ("caption", "captions", "text", "prompt", "sentences")
"""Names under which captions are looked for, the first that is there."""

MOST_BYTES: Final = 4096
"""Of one caption, in UTF-8; text encoders cut far shorter ones."""


@dataclass(frozen=True, kw_only=True)
class ImageCaptions:
    """The captions of each image of a set.

    Attributes:
        name: where they come from, for people.
        kind: ``coco``, ``table``, ``tars``, ``hf``, ``demo``, or ``cache``.
        of_images: the captions of each image, in the order of the images.
        left_out: captions beyond the most that are kept of an image.
        per_image: that most; None keeps all.
        strangers: captions of images that are not in the set.
    """

    name: str
    kind: str
    of_images: Sequence[Sequence[str]]
    left_out: int = 0
    per_image: int | None = None
    strangers: int = 0

    @property
    def count(self) -> int:
        """Captions of all images, equal ones each."""
        return sum(map(len, self.of_images))

    @property
    def without(self) -> int:
        """Images that have none."""
        return sum(not each for each in self.of_images)


def matched_captions(
    keys: Sequence[str],
    found: Iterable[tuple[str, str]],
    *,
    name: str,
    kind: str,
    per_image: int | None,
    by_file_name: bool,
) -> ImageCaptions:
    """Match captions to images.

    Args:
        keys: of the images.
        found: pairs of an image's name and one of its captions, in the order in which they are kept. A
            caption that an image has twice is kept once.
        name: where they come from.
        kind: of the file.
        per_image: most of an image that are kept; None keeps all.
        by_file_name: whether a name that is no key may be an image's file name, its path left out.

    Raises:
        RepaError: none of the captions is of one of these images, a file name is that of several images, or
            a caption is no text or too long.
    """
    row_of = _finder(keys, name, by_file_name=by_file_name)
    captions: list[dict[str, None]] = [{} for _ in keys]
    strangers = left_out = 0
    first = ""
    for image, text in found:
        row = row_of(image)
        if row is None:
            strangers, first = strangers + 1, first or image
            continue
        caption = _checked(text, image, name)
        if not caption or caption in captions[row]:
            continue
        if per_image is not None and len(captions[row]) == per_image:
            left_out += 1
            continue
        captions[row][caption] = None
    if not any(captions):
        other = f" its first is of {first}, and" if first else ""
        raise RepaError(
            f"{name} has no caption of any of the {counted(len(keys), 'image')}:{other} the first image is "
            f"{keys[0]}",
            f"give {FLAG} the captions of these images",
            field=FLAG,
        )
    return ImageCaptions(
        name=name,
        kind=kind,
        of_images=[list(each) for each in captions],
        left_out=left_out,
        per_image=per_image,
        strangers=strangers,
    )


def _finder(keys: Sequence[str], name: str, *, by_file_name: bool) -> Callable[[str], int | None]:
    """Return what finds the row of an image by its key, or by its file name where only one has it."""
    rows = {key: row for row, key in enumerate(keys)}
    last = [key.rpartition("/")[2] for key in keys]
    counts = Counter(last)
    files = {file: row for row, file in enumerate(last)} if by_file_name else {}

    def row_of(image: str) -> int | None:
        if image in rows:
            return rows[image]
        file = image.rpartition("/")[2]
        if file in files and counts[file] > 1:
            raise RepaError(
                f"{name} has a caption of {image}, and {counts[file]} images are called {file}",
                "name images by their paths below --data",
                field=FLAG,
            )
        return files.get(file)

    return row_of


def _checked(text: str, image: str, name: str) -> str:
    """Return a caption without the blanks around it."""
    caption = text.strip()
    try:
        size = len(caption.encode())
    except UnicodeEncodeError:
        raise RepaError(
            f"{name} has a caption of {image} that is no UTF-8", "write it again", field=FLAG
        ) from None
    if size > MOST_BYTES:
        raise RepaError(
            f"{name} has a caption of {image} of {size:,} bytes",
            f"shorten it to {MOST_BYTES:,}: text encoders read some hundred tokens",
            field=FLAG,
        )
    return caption


def check_per_image(per_image: int | None) -> None:
    """Refuse a number of captions that no cache holds.

    Raises:
        RepaError: it is below 1 or above `MOST_CAPTIONS`.
    """
    if per_image is not None and not 1 <= per_image <= MOST_CAPTIONS:
        raise RepaError(
            f"{PER_IMAGE_FLAG} {per_image} is not possible",
            f"give 1 to {MOST_CAPTIONS}",
            field=PER_IMAGE_FLAG,
        )


def texts_in(value: object, where: str) -> list[str]:
    """Return the captions that a value holds, which is a text or a list of them.

    Args:
        value: of a field or column; None holds no caption.
        where: the value, for the error.

    Raises:
        RepaError: it is something else.
    """
    values = value if isinstance(value, list | tuple) else [] if value is None else [value]
    if not all(isinstance(each, str) for each in values):
        raise RepaError(f"{where} is no caption and no list of captions", "give texts", field=FLAG)
    return list(values)


def caption_column(names: Iterable[str], asked: str | None, where: str) -> str:
    """Choose the column or field that holds captions.

    Args:
        names: of those that are there.
        asked: what ``--caption-column`` says.
        where: the file, for the error.

    Raises:
        RepaError: it is not there.
    """
    there = list(names)
    chosen = asked if asked is not None else next((each for each in COLUMNS if each in there), None)
    if chosen is None or chosen not in there:
        what = f"no column {chosen}" if chosen else "no column of captions"
        raise RepaError(
            f"{where} has {what} (it has {', '.join(map(str, there)) or 'none'})",
            f"name the column with {COLUMN_FLAG}",
            field=COLUMN_FLAG,
        )
    return chosen


def values_of(row: Mapping[str, object], column: str, where: str) -> list[str]:
    """Return the captions in a column of a row."""
    return texts_in(row.get(column), f"{column} of {where}")
