"""The folders of caches when nobody names one, under ``caches/`` by image set and resolution.

`repa preprocess` writes to `cache_for` and `repa train` reads `default_cache`, so that the two commands work
as typed, one after the other, in one folder.
"""

from __future__ import annotations

import re
from pathlib import Path

from ...data.errors import CacheError
from ...data.outside import entry_names, names_object
from ...data.tars.names import names_tars

DEFAULT_DATA = "images"
DEMO_DATA = "demo"
DEFAULT_RESOLUTION = 256
DEMO_RESOLUTION = 64
CACHES = Path("caches")
HUGGING_FACE = "hf:"
"""What the name of a Hugging Face data set begins with where images are named."""
GROUP = "repa.sources"
"""Entry points of image sources from outside."""

_GROUP_FILE = "zarr.json"
_WILD = re.compile(r"\{[^{}]*\}|\[[^]]*\]|[*?]")


def cache_for(data: str, resolution: int, *, root: Path = CACHES) -> Path:
    """Choose the cache of an image set when ``--cache`` is not given.

    Args:
        data: the image folder, tars, ``hf:…``, or ``demo``.
        resolution: side in pixels of the cropped images.
        root: folder of all caches.

    Returns:
        ``caches/<name of the folder>-<resolution>``; ``caches/demo`` for the demo at its own resolution. Tars
        give what their names have in common, ``train`` of ``train-{0000..0146}.tar``.
    """
    if data == DEMO_DATA and resolution == DEMO_RESOLUTION:
        return root / DEMO_DATA
    name = _set_name(data)
    return root / f"{DEMO_DATA if data == DEMO_DATA else name}-{resolution}"


def names_zip(data: str) -> bool:
    """Tell whether a text names a ZIP file rather than a folder."""
    return data.lower().endswith(".zip") and not Path(data).is_dir()


def split_outside(data: str) -> tuple[str, str] | None:
    """Split the name and path of an image source from outside the package.

    None stands for a text that names none.

    Args:
        data: ``NAME:PLACE`` or ``NAME`` of an entry point, ``module:Class?PLACE`` or ``module:Class``.
    """
    if Path(data).exists():
        return None
    name, _, place = data.partition(":")
    if name in entry_names(GROUP):
        return name, place
    name, _, place = data.partition("?")
    return (name, place) if names_object(name) else None


def _set_name(data: str) -> str:
    if names_tars(data):
        path = Path(data).absolute()
        name = _WILD.sub("", path.name.partition(".tar")[0].removesuffix(".tgz")).strip("-_. ")
        return name or _WILD.sub("", path.parent.name).strip("-_. ") or "tars"
    if data.startswith(HUGGING_FACE):
        # a folder keeps its name, a hub name with its split becomes one word
        data = data.removeprefix(HUGGING_FACE)
        if not Path(data.partition(":")[0]).is_dir():
            return re.sub(r"[^A-Za-z0-9._-]+", "-", data).strip("-.") or "hf"
        data, _, split = data.partition(":")
        return "-".join(filter(None, (Path(data).resolve().name, split)))
    if (outside := split_outside(data)) is not None:
        name, place = outside
        last = Path(place).name if place else name.rpartition(":")[2]
        return re.sub(r"[^A-Za-z0-9._-]+", "-", last).strip("-.") or "images"
    name = Path(data).resolve().name
    return (name[: -len(".zip")] if names_zip(data) else name) or "root"


def default_cache(*, root: Path = CACHES) -> Path:
    """Find the only cache under ``caches/``.

    Raises:
        CacheError: there is none, or there are several.
    """
    found = sorted(path.parent for path in root.glob(f"*/{_GROUP_FILE}")) if root.is_dir() else []
    if not found:
        raise CacheError(
            f"no cache under {root}/: write one with `repa preprocess`, or name one with --cache"
        )
    if len(found) > 1:
        raise CacheError(
            f"{len(found)} caches under {root}/ ({', '.join(path.name for path in found)}): "
            "name one with --cache"
        )
    return found[0]
