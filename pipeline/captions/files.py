"""Captions in one file beside the images, be it COCO's or a table of file names and captions."""

from __future__ import annotations

import csv
import io
import json
from typing import TYPE_CHECKING, Annotated, Final

from annotated_types import Len
from pydantic.dataclasses import dataclass

from ...data.edge import parse_json
from ...data.errors import RepaError
from ...data.storage.files import os_errors
from ...data.storage.regular import read_regular
from .base import FLAG, caption_column, matched_captions, values_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from .base import ImageCaptions

TABLES: Final = (".jsonl", ".ndjson", ".csv", ".tsv")
FILE_COLUMNS: Final = ("file_name", "filename", "file", "image", "path", "key")
"""Names of the column that says of which image a row is, the first that is there."""

_MOST_FILE: Final = 4 << 30
_REMEDY: Final = "give the captions file of COCO, or a table .jsonl, .csv or .tsv"


@dataclass(frozen=True)
class _Image:
    id: int
    file_name: str


@dataclass(frozen=True)
class _Annotation:
    image_id: int
    caption: str


@dataclass(frozen=True)
class _Coco:
    images: Annotated[tuple[_Image, ...], Len(1)]
    annotations: Annotated[tuple[_Annotation, ...], Len(1)]


def captions_in_file(
    path: Path, keys: Sequence[str], *, column: str | None, per_image: int | None
) -> ImageCaptions:
    """Read a file of captions and match it to images, by their keys or their file names.

    A file ``.json`` is COCO's, whose ``images`` have ``id`` and ``file_name`` and whose ``annotations`` have
    ``image_id`` and ``caption``. A table names the image in a column of `FILE_COLUMNS`.

    Args:
        path: of the file.
        keys: of the images.
        column: name of the captions' column; None looks for it.
        per_image: most captions of an image that are kept.

    Raises:
        RepaError: the file cannot be read, or is none of these; see `matched_captions`.
    """
    with os_errors("read", path):
        try:
            data = read_regular(path, _MOST_FILE)
        except FileNotFoundError as error:
            raise RepaError(f"captions file {path} does not exist", _REMEDY, field=FLAG) from error
    if path.suffix.lower() in TABLES:
        kind, found = "table", _table(data, path, column)
    elif column is not None:
        raise RepaError(
            f"{path} is COCO's, whose captions have no column", "leave it out", field="--caption-column"
        )
    else:
        kind, found = "coco", _coco(data, path)
    return matched_captions(keys, found, name=str(path), kind=kind, per_image=per_image, by_file_name=True)


def _coco(data: bytes, path: Path) -> Iterator[tuple[str, str]]:
    values = parse_json(_Coco, data, where=str(path), remedy=_REMEDY, error=RepaError, most_bytes=_MOST_FILE)
    names = {image.id: image.file_name for image in values.images}
    for annotation in values.annotations:
        if annotation.image_id not in names:
            raise RepaError(
                f"{path} has a caption of image {annotation.image_id}, which it does not name",
                "restore the file",
                field=FLAG,
            )
        yield names[annotation.image_id], annotation.caption


def _table(data: bytes, path: Path, column: str | None) -> Iterator[tuple[str, str]]:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RepaError(f"{path} is not UTF-8 ({error.reason})", "save it as UTF-8", field=FLAG) from error
    lines = path.suffix.lower() in (".jsonl", ".ndjson")
    file = captions = ""
    for number, row in _json_rows(text, path) if lines else _separated_rows(text, path):
        where = f"line {number} of {path}"
        if not file:
            file = next((each for each in FILE_COLUMNS if each in row), "")
            captions = caption_column([name for name in row if name != file], column, str(path))
        if not isinstance(row.get(file), str):
            raise RepaError(
                f"{where} does not say of which image it is",
                f"name the file of the image in a column {FILE_COLUMNS[0]}",
                field=FLAG,
            )
        for caption in values_of(row, captions, where):
            yield str(row[file]), caption


def _json_rows(text: str, path: Path) -> Iterator[tuple[int, Mapping[str, object]]]:
    # not `splitlines`: a JSON text may hold U+2028 as it is
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise RepaError(f"line {number} of {path} is no JSON object", "mend the line", field=FLAG)
        yield number, row


def _separated_rows(text: str, path: Path) -> Iterator[tuple[int, Mapping[str, object]]]:
    reader = csv.DictReader(
        io.StringIO(text, newline=""), delimiter="\t" if path.suffix.lower() == ".tsv" else ","
    )
    try:
        for row in reader:
            if None in row:
                raise RepaError(
                    f"line {reader.line_num} of {path} has more values than the first line has names",
                    "put captions with commas in quotes",
                    field=FLAG,
                )
            yield reader.line_num, row
    except csv.Error as error:
        raise RepaError(
            f"line {reader.line_num} of {path} is damaged ({error})", "mend it", field=FLAG
        ) from error
