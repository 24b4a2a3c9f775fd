"""Joining the captions of parts, which are distinct captions of the whole again."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..errors import CacheError
from ..format.captions import EMPTY, captions_path, has_captions, read_captions, read_table
from ..format.opening import open_manifest
from ..reading.reader import CacheReader
from ..writing.captions import ensure_captions
from ..writing.store import ensure_source
from .copier import COPY_THREADS, RowCopier, check_room
from .parts import Part, check_source, chosen_sources

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class CaptionedParts:
    """Parts whose images have captions.

    Attributes:
        images: the parts.
        captions: the caches of their captions.
        sources: text encoders whose columns are joined.
    """

    images: Sequence[Part]
    captions: Sequence[Part]
    sources: tuple[str, ...]


def captioned_parts(parts: Sequence[Part], asked: Sequence[str] | None) -> CaptionedParts | None:
    """Look whether the captions of parts are to be joined, and can be.

    Args:
        parts: the parts.
        asked: names of sources; None asks for all there is.

    Returns:
        What is to be joined; None where no part has captions or the names are those of images alone.

    Raises:
        CacheError: some parts have captions and some have not, or their text encoders differ.
    """
    captioned = [part for part in parts if has_captions(part.path)]
    if not captioned:
        return None
    known = {name for part in captioned for name in open_manifest(captions_path(part.path)).sources}
    if asked is not None and not known.intersection(asked):
        return None
    if len(captioned) < len(parts):
        without = next(part for part in parts if part not in captioned)
        raise CacheError(
            f"cache {captioned[0].path} has captions, {without.path} has not",
            "add them there with `repa preprocess --captions`, or name the sources to join with --source",
            field="--source",
        )
    captions = [Part.open(captions_path(part.path)) for part in parts]
    names = None if asked is None else [name for name in asked if name in known]
    chosen = chosen_sources(captions, names)
    for source in chosen:
        check_source(captions, source, chosen)
    return CaptionedParts(images=parts, captions=captions, sources=chosen)


def merge_captions(parts: CaptionedParts, out: Path, origin: NDArray[np.int64]) -> None:
    """Give the whole the captions of its parts, and copy what text encoders made of them.

    Args:
        parts: what is joined.
        out: folder of the whole, whose images are there.
        origin: part and row in it of every row of the whole, int64 ``[N, 2]``.

    Raises:
        CacheError: a part is not complete or damaged.
        RepaError: the disk is full, or refuses.
    """
    texts = [read_captions(part.path) for part in parts.images]
    tables = [
        read_table(part.path, part.manifest, own.manifest)
        for part, own in zip(parts.images, parts.captions, strict=True)
    ]
    of_images = [
        [texts[number][each] for each in tables[number][row].tolist() if each > EMPTY]
        for number, row in origin.tolist()
    ]
    where = ensure_captions(out, of_images, {"kind": "joined", "parts": len(texts)})
    first: dict[str, tuple[int, int]] = {}
    for number, own in enumerate(texts):
        for row, text in enumerate(own):
            first.setdefault(text, (number, row))
    rows = np.array([first[text] for text in read_captions(out)], np.int64)
    manifest = open_manifest(where)
    model = parts.captions[0].manifest
    columns = [name for source in parts.sources for name in model.source_columns(source)]
    with ExitStack() as stack:
        readers = [stack.enter_context(CacheReader(part.path, columns)) for part in parts.captions]
        pool = stack.enter_context(ThreadPoolExecutor(COPY_THREADS))
        copier = RowCopier(where, parts.captions, readers, rows, pool)
        for source in parts.sources:
            manifest = ensure_source(where, source, model.sources[source], model.source_columns(source))
        check_room(where, manifest, parts.sources)
        for source in parts.sources:
            for _ in copier.copy(manifest, source):
                pass
