"""The images that ``--data`` names: one row of `SOURCES` a kind, and one file with its `open_images`.

An image source from outside the package is an entry point of the group ``repa.sources``, named as
``NAME:PLACE``, or named in full as ``my_package.my_module:MySource?PLACE``; see ``docs/extending/source.md``.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Final

from ...data.errors import RepaError
from ...data.outside import find_outside
from ...data.tars.names import names_tars
from .base import AUTO_LABELS, LABELS, NO_LABELS, SourceOptions
from .names import DEMO_DATA, GROUP, HUGGING_FACE, names_zip, split_outside

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from .base import ImageSource

FLAG: Final = "--data"


@dataclass(frozen=True, kw_only=True)
class SourceKind:
    """One kind of image source.

    Attributes:
        matches: whether what ``--data`` says names one.
        module: has its ``open_images(data, options)``; imported when it is needed.
        labels: what of ``--labels`` it can follow.
        numbered: whether its classes may be numbers, which ``--class-names`` names.
    """

    matches: Callable[[str], bool]
    module: str
    labels: tuple[str, ...]
    numbered: bool = False


# asked in this order; a folder is what nothing else is
SOURCES: Final = (
    SourceKind(matches=names_tars, module="tars", labels=(AUTO_LABELS, NO_LABELS), numbered=True),
    SourceKind(
        matches=lambda data: data.startswith(HUGGING_FACE), module="hub", labels=(AUTO_LABELS, NO_LABELS)
    ),
    SourceKind(matches=lambda data: data == DEMO_DATA, module="demo", labels=(AUTO_LABELS,)),
    SourceKind(matches=names_zip, module="zip", labels=LABELS, numbered=True),
    SourceKind(
        matches=lambda data: split_outside(data) is None, module="folder", labels=LABELS, numbered=True
    ),
)


def open_source(
    data: str,
    *,
    limit: int | None = None,
    apply_exif: bool = False,
    class_names: Path | None = None,
    labels: str = AUTO_LABELS,
    may_import: bool = False,
) -> ImageSource:
    """Return the images that ``--data`` names.

    Args:
        data: folder, ZIP file, tars (see `TarImages`), ``hf:…`` (see `HubImages`), ``demo``, or an image
            source from outside.
        limit: number of images; None takes all (of the demo: 2,048).
        apply_exif: turn images by their EXIF orientation.
        class_names: file with the name of a class in each line, where classes are numbers.
        labels: where labels come from, one of `LABELS`.
        may_import: whether a module may be imported because ``data`` names it; only a name from the command
            line may.

    Raises:
        RepaError: a flag that images of this kind cannot follow; see `FolderImages`, `ZipImages`, `TarImages`
            and `HubImages`.
    """
    if limit is not None and limit < 1:
        raise RepaError(f"--limit {limit} asks for no image", "give 1 or more", field="--limit")
    if labels not in LABELS:
        raise RepaError(
            f"--labels {labels!r} is unknown", f"give one of {', '.join(LABELS)}", field="--labels"
        )
    options = SourceOptions(limit=limit, apply_exif=apply_exif, class_names=class_names, labels=labels)
    kind = next((each for each in SOURCES if each.matches(data)), None)
    if kind is None:
        return _open_outside(data, options, may_import)
    if labels not in kind.labels:
        raise RepaError(
            f"--labels {labels} means nothing for {data}",
            f"give one of {', '.join(kind.labels)}" if len(kind.labels) > 1 else "leave it out",
            field="--labels",
        )
    if class_names is not None and not kind.numbered:
        raise RepaError(
            f"--class-names is for classes that are numbers, and those of {data} have names",
            "leave it out",
            field="--class-names",
        )
    found: ImageSource = import_module(f".{kind.module}", __package__).open_images(data, options)
    return found


def _open_outside(data: str, options: SourceOptions, may_import: bool) -> ImageSource:
    found = split_outside(data)
    assert found is not None, "the last row of the table takes what is none"
    name, place = found
    kind = find_outside(
        name,
        group=GROUP,
        flag=FLAG,
        what="image source",
        example="my_package.my_module:MySource?PLACE",
        may_import=may_import,
    )
    if not callable(kind):
        raise RepaError(f"{name} is no class of image sources", "name a class", field=FLAG)
    source: ImageSource = kind(place, options)
    missing = [
        each
        for each in (
            "name",
            "kind",
            "keys",
            "labels",
            "class_names",
            "fingerprint",
            "skipped",
            "remarks",
            "load",
        )
        if not hasattr(source, each)
    ]
    if missing:
        raise RepaError(
            f"the image source {name} has no {', '.join(missing)}",
            "make it a subclass of repa.pipeline.images.listed.ListedImages",
            field=FLAG,
        )
    return source
