"""Labels of a ``dataset.json``, as `dataset_tool` of StyleGAN, EDM and EDM2 writes it, and REPA after them.

The file lies at the top of a folder or ZIP: ``{"labels": [["00000/img00000000.png", 0], …]}``, a name and a
number for each image. A set without classes has ``"labels": null``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from ...data.edge import parse_json
from ...data.errors import RepaError
from ...data.units import counted

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

DATASET_JSON = "dataset.json"
_MOST_BYTES = 1 << 30  # of 14 million images it has half of it
_REMEDY = "write it again by dataset_tool, or give `--labels folders` or `--labels none`"


class DatasetJson(BaseModel):
    """The file's content.

    Attributes:
        labels: (name, class) of each image; None where the set has no classes.
    """

    model_config = ConfigDict(extra="ignore", strict=True)
    labels: list[tuple[str, Annotated[int, Field(ge=0, lt=2**31)]]] | None = None


def parse_dataset_json(raw: bytes, where: str) -> DatasetJson | None:
    """Return the content of the file, None where it is another tool's file of that name.

    Args:
        raw: its bytes.
        where: its path, for errors.

    Raises:
        RepaError: it is damaged.
    """
    if b'"labels"' not in raw:
        return None
    found = parse_json(DatasetJson, raw, where=where, remedy=_REMEDY, error=RepaError, most_bytes=_MOST_BYTES)
    return found if "labels" in found.model_fields_set else None


def labels_of(
    found: DatasetJson, keys: Sequence[str], where: str
) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """Return the labels of images by their names.

    Args:
        found: a file's content, which has labels.
        keys: names of the images, relative to where the file lies.
        where: its path, for errors.

    Returns:
        int64 ``[N]``, and remarks.

    Raises:
        RepaError: it lacks the label of an image.
    """
    known = dict(found.labels or ())
    missing = [key for key in keys if key not in known]
    if missing:
        raise RepaError(
            f"{where} has no label for {counted(len(missing), 'image')}, first {missing[0]}",
            _REMEDY,
            field="--labels",
        )
    labels = np.fromiter((known[key] for key in keys), dtype=np.int64, count=len(keys))
    there = set(keys)
    absent = [key for key in known if key not in there]
    if not absent:
        return labels, ()
    return labels, (
        f"{where} labels {counted(len(absent), 'image')} that cannot be found, first {absent[0]}: is the "
        "copy complete?",
    )
