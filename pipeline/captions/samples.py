"""Captions that lie with the images, in WebDataset tars or a Hugging Face data set."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final

from ...data.errors import RepaError
from ...data.tars.names import present_tars
from ...data.tars.reader import open_tar, split_member
from ..images.hub import open_data_set
from ..images.names import HUGGING_FACE
from .base import COLUMN_FLAG, COLUMNS, FLAG, caption_column, matched_captions, texts_in

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from .base import ImageCaptions

_TEXT, _JSON = "txt", "json"
_MOST_MEMBER: Final = 1 << 20
_BATCH: Final = 4096


def captions_in_tars(
    pattern: str, keys: Sequence[str], *, column: str | None, per_image: int | None
) -> ImageCaptions:
    """Read the captions of WebDataset tars, a sample's ``.txt`` or a field of its ``.json``.

    Args:
        pattern: the tars, see `expand_tars`; a sample's key is its image's.
        keys: of the images.
        column: field of the ``.json``; None takes the ``.txt`` where there is one, else looks for the field.
        per_image: most captions of an image that are kept.

    Raises:
        RepaError: a tar cannot be read, or a caption is no text; see `matched_captions`.
    """
    return matched_captions(
        keys,
        _of_tars(pattern, column),
        name=pattern,
        kind="tars",
        per_image=per_image,
        by_file_name=False,
    )


def _of_tars(pattern: str, column: str | None) -> Iterator[tuple[str, str]]:
    for tar in present_tars(pattern):
        with open_tar(tar) as reader:
            own: tuple[str, list[str]] = ("", [])
            for member in reader:
                split = split_member(member.name)
                if split is None:
                    continue
                key, field = split
                if key != own[0]:
                    yield from ((own[0], caption) for caption in own[1])
                    own = (key, [])
                if field == _TEXT and column is None:
                    where = f"{member.name} in {tar}"
                    own = (key, [_decoded(_read(reader, member.size, where), where)])
                elif field == _JSON and not own[1]:
                    where = f"{member.name} in {tar}"
                    own = (key, _of_json(_read(reader, member.size, where), column, where))
            yield from ((own[0], caption) for caption in own[1])


def _read(reader: Any, size: int, where: str) -> bytes:
    if size > _MOST_MEMBER:
        raise RepaError(f"{where} is too large for captions ({size:,} bytes)", "see the tar", field=FLAG)
    data: bytes = reader.read()
    return data


def _decoded(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RepaError(f"{where} is not UTF-8 ({error.reason})", "write it again", field=FLAG) from error


def _of_json(data: bytes, column: str | None, where: str) -> list[str]:
    try:
        values = json.loads(data)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        # as of a label alone
        if column is None:
            return []
        raise RepaError(f"{where} is no JSON object", f"leave {COLUMN_FLAG} out", field=COLUMN_FLAG)
    name = column if column is not None else next((each for each in COLUMNS if each in values), None)
    return [] if name is None else texts_in(values.get(name), f"{name} of {where}")


def captions_in_data_set(
    name: str, keys: Sequence[str], *, column: str | None, per_image: int | None
) -> ImageCaptions:
    """Read the captions in a column of a Hugging Face data set, texts or lists of them.

    Args:
        name: ``hf:NAME[:SPLIT]``, the data set of the images.
        keys: of the images, see `HubImages`.
        column: its name; None looks for it.
        per_image: most captions of an image that are kept.

    Raises:
        RepaError: the data set cannot be had, or has no such column; see `matched_captions`.
    """
    data, split = open_data_set(name.removeprefix(HUGGING_FACE))
    chosen = caption_column(data.features, column, name)
    prefix = f"{split}/" if split else ""

    def found() -> Iterator[tuple[str, str]]:
        texts = data.select_columns([chosen])
        for start in range(0, len(texts), _BATCH):
            for offset, value in enumerate(texts[start : start + _BATCH][chosen]):
                row = start + offset
                for text in texts_in(value, f"{chosen} of row {row} of {name}"):
                    yield f"{prefix}{row:08d}", text

    return matched_captions(keys, found(), name=name, kind="hf", per_image=per_image, by_file_name=False)
