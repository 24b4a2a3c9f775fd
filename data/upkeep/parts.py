"""Caches of parts of one image set, whether they fit together, and which row of the whole is where.

Whatever could not have come from one `repa preprocess` of all images is refused in one line.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from ..errors import CacheError
from ..format.columns import AUTOENCODER, model_of
from ..format.opening import as_recorded, declaration, differences, open_manifest, read_keys, read_labels
from ..units import counted

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from ..format.manifest import Manifest

FOLDER = "folder"
_COMMON = ("resolution", "crop", "views", "exif_orientation", "source_kind")


@dataclass(frozen=True, kw_only=True)
class ImageSet:
    """Which images the whole is made from, and in which order.

    Attributes:
        fingerprint: of the image source.
        keys: image key of every row.
        labels: int32 ``[N]``.
        class_names: label → name.
    """

    fingerprint: str
    keys: Sequence[str]
    labels: NDArray[np.int32]
    class_names: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Part:
    """One of the caches that are joined.

    Attributes:
        path: its folder.
        manifest: its manifest.
        keys: image key of every row.
        labels: int32 ``[N]``, in its own classes.
    """

    path: Path
    manifest: Manifest
    keys: Sequence[str]
    labels: NDArray[np.int32]

    @classmethod
    def open(cls, path: Path) -> Part:
        """Open a cache.

        Raises:
            CacheError: there is none, or it is damaged.
        """
        manifest = open_manifest(path)
        return cls(
            path=path, manifest=manifest, keys=read_keys(path, manifest), labels=read_labels(path, manifest)
        )


def joined_images(parts: Sequence[Part]) -> ImageSet:
    """Join the images of all parts, known from the parts alone.

    The fingerprint of an image set covers sizes that a cache does not keep, so the whole gets one of its own:
    it can be trained on, but no teacher can be added from the images. Give the images' own set for that.

    Args:
        parts: in the order their rows follow one another, unless they come from folders.

    Raises:
        CacheError: classes that cannot be told apart.
    """
    class_names = _common_classes(parts)
    # by number where numbers agree: two classes may have one name
    number = {name: label for label, name in enumerate(class_names)}
    entries: list[tuple[str, int]] = []
    for part in parts:
        own = part.manifest.class_names
        same = own == class_names[: len(own)]
        labels = [label if same else number[own[label]] for label in part.labels.tolist()]
        entries += zip(part.keys, labels, strict=True)
    if parts[0].manifest.source_kind == FOLDER:
        entries.sort()
    fingerprints = sorted(part.manifest.source_fingerprint for part in parts)
    return ImageSet(
        fingerprint=f"parts:{hashlib.sha256(chr(10).join(fingerprints).encode()).hexdigest()}",
        keys=[key for key, _ in entries],
        labels=np.array([label for _, label in entries], dtype=np.int32),
        class_names=class_names,
    )


def _common_classes(parts: Sequence[Part]) -> tuple[str, ...]:
    """Choose the class names of the whole.

    They are those of a part that begin as those of every other, or a folder's sorted.

    Raises:
        CacheError: classes that cannot be told apart.
    """
    most = max(parts, key=lambda part: len(part.manifest.class_names))
    class_names = most.manifest.class_names
    names = [part.manifest.class_names for part in parts]
    other = next(
        (part for part, own in zip(parts, names, strict=True) if own != class_names[: len(own)]), None
    )
    folders = most.manifest.source_kind == FOLDER
    if other is not None and not folders:
        raise CacheError(
            f"{most.path} and {other.path} number their classes differently, and no order of both is known",
            "encode them with the same --class-names, or give the images of the whole with --data",
        )
    loose = [part for part in parts if not all("/" in key for key in part.keys)]
    if folders and loose and len(set(names)) > 1:
        raise CacheError(
            f"the images of {loose[0].path} lie in no class folder, and the parts have different classes: "
            "which classes the whole has is not known",
            "give the folder of all images with --data",
        )
    return class_names if other is None else tuple(sorted(set().union(*names)))


def check_alike(parts: Sequence[Part]) -> None:
    """Compare what a cache has of its own, which is side, crop, views, EXIF and kind of images.

    Raises:
        CacheError: two parts differ, and how.
    """
    first = parts[0]
    here = {name: getattr(first.manifest, name) for name in _COMMON}
    for part in parts[1:]:
        different = differences(here, {name: getattr(part.manifest, name) for name in _COMMON})
        if different:
            raise CacheError(
                f"{first.path} and {part.path} are no parts of one image set: {different}",
                "encode both with the same flags",
            )


def chosen_sources(parts: Sequence[Part], asked: Sequence[str] | None) -> tuple[str, ...]:
    """Choose the sources to join, in the order of the first part.

    Args:
        parts: the parts.
        asked: names; None takes all, which every part must have then.

    Raises:
        CacheError: a part lacks one, or has one more.
    """
    first = parts[0]
    for source in asked or ():
        if source not in first.manifest.sources:
            raise CacheError(
                f"cache {first.path} has no source {source}",
                f"it has {', '.join(first.manifest.sources)}: choose among them with --source",
            )
    chosen = tuple(source for source in first.manifest.sources if asked is None or source in asked)
    for part in parts[1:]:
        if asked is None and (more := [name for name in part.manifest.sources if name not in chosen]):
            raise CacheError(
                f"cache {part.path} has {more[0]}, {first.path} has not",
                f"add it there with `repa preprocess`, or leave it out with {_flags(chosen)}",
            )
        if missing := [name for name in chosen if name not in part.manifest.sources]:
            rest = [name for name in chosen if name in part.manifest.sources]
            raise CacheError(
                f"cache {part.path} has no {missing[0]}, {first.path} has",
                f"add it there with `repa preprocess`, or leave it out with {_flags(rest)}",
            )
    return chosen


def _flags(sources: Sequence[str]) -> str:
    return " ".join(f"--source {source}" for source in sources)


def check_source(parts: Sequence[Part], source: str, chosen: Sequence[str]) -> None:
    """Compare where a source of all parts comes from and how it is stored.

    Args:
        parts: the parts.
        source: its name.
        chosen: all that are joined, for the remedy.

    Raises:
        CacheError: no one command could have written both, or each part has a calibration of its own.
    """
    first = parts[0]
    recorded = first.manifest.sources[source]
    for part in parts[1:]:
        own = part.manifest.sources[source]
        here = declaration(as_recorded(recorded, [own]), first.manifest.source_columns(source))
        there = declaration(as_recorded(own, [recorded]), part.manifest.source_columns(source))
        settled = {"notes.calibration", "notes.fidelity"}
        if recorded.notes.get("components") and own.notes.get("components"):
            # how many components the heads have, each part's images said
            settled |= {"notes.components", "notes.rank"} | _sized(first.manifest, part.manifest, source)
        fitted = {name for name in settled if here.get(name) != there.get(name)}
        different = differences(
            {name: value for name, value in here.items() if name not in fitted},
            {name: value for name, value in there.items() if name not in fitted},
        )
        if different:
            raise CacheError(
                f"{first.path} and {part.path} have {source} from different models or in different forms: "
                f"{different}",
                "encode both with the same flags",
            )
        if fitted:
            rest = [name for name in chosen if name != source]
            raise CacheError(
                f"{first.path} and {part.path} have {source} with a calibration each, fitted and measured on "
                f"their own images, and the whole needs one for all",
                f"leave it out with {_flags(rest)}, then "
                f"add it to the whole with `repa preprocess {_flag_of(source)}`",
            )


def _sized(one: Manifest, other: Manifest, source: str) -> set[str]:
    """Name the columns of a source that differ in their size alone, as `declaration` names them."""
    theirs = other.source_columns(source)
    return {
        f"columns.{name}"
        for name, spec in one.source_columns(source).items()
        if name in theirs and replace(theirs[name], shape=spec.shape) == spec
    }


def _flag_of(source: str) -> str:
    if source == AUTOENCODER:
        return "--encoder none"
    attention = "" if source == model_of(source) else " --attention …"
    return f"--encoder {model_of(source)}{attention}"


def origins(parts: Sequence[Part], images: ImageSet) -> NDArray[np.int64]:
    """Part and row in it of every row of the whole, int64 ``[N, 2]``.

    Raises:
        CacheError: an image in two parts, in none, or not of the whole, or of another class there.
    """
    where: dict[str, tuple[int, int]] = {}
    for number, part in enumerate(parts):
        for row, key in enumerate(part.keys):
            if key in where:
                raise CacheError(
                    f"image {key} is in {parts[where[key][0]].path} and in {part.path}",
                    "parts of one set have no image in common: leave one out",
                )
            where[key] = (number, row)
    absent = [key for key in images.keys if key not in where]
    if absent:
        raise CacheError(
            f"the parts lack {len(absent)} of the {counted(len(images.keys), 'image')}, the first is "
            f"{absent[0]}",
            "encode them into a part of their own, and name it too",
        )
    if len(where) > len(images.keys):
        extra = min(where.keys() - set(images.keys))
        raise CacheError(
            f"image {extra} of {parts[where[extra][0]].path} is not among the {len(images.keys)} of --data",
            "give the folder of all images",
        )
    for key, label in zip(images.keys, images.labels.tolist(), strict=True):
        number, row = where[key]
        part = parts[number]
        name = part.manifest.class_names[part.labels[row]]
        if name != images.class_names[label]:
            raise CacheError(
                f"image {key} is of class {images.class_names[label]}, in {part.path} it is of {name}",
                "give the images that the parts were made from",
            )
    return np.array([where[key] for key in images.keys], dtype=np.int64).reshape(-1, 2)
