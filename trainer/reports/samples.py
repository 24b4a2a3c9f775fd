"""The sample grids of runs side by side, as pictures that a page carries in itself."""

from __future__ import annotations

import base64
import io
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from PIL import Image

from ...data.edge import printable
from ...data.errors import RepaError
from ...data.storage.files import read_file
from .tables import setting_text

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from .runs import RunRead

MOST_STEPS = 6
"""Steps that are shown where none are chosen."""

_MOST_BYTES = 64 << 20
_MOST_PIXELS = 1 << 26
_LARGEST_SIDE = 1024
_LOSSLESS_BYTES = 256 << 10
_QUALITY = 90  # of JPEG, beyond which files grow and pictures do not change to the eye

# what two grids must share for each picture of one to be of the noise and label of the other's
_OF_PREVIEW = (
    "seed",
    "preview_count",
    "preview_steps",
    "preview_shift",
    "preview_guidance",
    "condition",
    "cache",
    "latents",
)


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A sample grid.

    Attributes:
        run: name of the run.
        step: of its weights.
        address: a ``data:`` address of it.
        width: in pixels.
        height: in pixels.
    """

    run: str
    step: int
    address: str
    width: int
    height: int


@dataclass(frozen=True, kw_only=True)
class SideBySide:
    """The grids of some runs after as many steps.

    Attributes:
        step: how many.
        said: what noise and labels they share.
        pictures: one of each run.
    """

    step: int
    said: str
    pictures: tuple[Picture, ...]


def sample_grids(runs: Sequence[RunRead], steps: Sequence[int], notes: list[str]) -> list[SideBySide]:
    """Return the grids of chosen steps, apart where their noise or labels differ.

    Args:
        runs: to compare.
        steps: to show; none chooses at most `MOST_STEPS`, of those that most runs have.
        notes: takes what cannot be shown.

    Raises:
        RepaError: no run has a grid of a step; ``field`` is ``--step``.
    """
    known = {step for run in runs for step in run.previews}
    for step in steps:
        if step not in known:
            nearest = sorted(known, key=lambda each: abs(each - step))[:5]
            have = f"of {', '.join(map(str, sorted(nearest)))}" if nearest else "none"
            raise RepaError(
                f"no run has samples of step {step}, but {have}",
                "choose a step that --set preview_every=… of `repa train` has left, or leave --step out",
                field="--step",
            )
    found = []
    for step in steps or _chosen(runs):
        groups: dict[tuple[str, ...], list[RunRead]] = {}
        for run in runs:
            if step in run.previews:
                groups.setdefault(tuple(repr(run.settings.get(key)) for key in _OF_PREVIEW), []).append(run)
        for members in groups.values():
            pictures = [picture for run in members if (picture := _picture(run, step, notes)) is not None]
            if pictures:
                found.append(SideBySide(step=step, said=_said(members[0]), pictures=tuple(pictures)))
    return found


def _chosen(runs: Sequence[RunRead]) -> list[int]:
    """Choose steps that most runs have, evenly among them and with the last."""
    counts: dict[int, int] = {}
    for run in runs:
        for step in run.previews:
            counts[step] = counts.get(step, 0) + 1
    shared = sorted(step for step, count in counts.items() if count == max(counts.values()))
    if len(shared) <= MOST_STEPS:
        return shared
    return [shared[round(number * (len(shared) - 1) / (MOST_STEPS - 1))] for number in range(MOST_STEPS)]


def _said(run: RunRead) -> str:
    values: dict[str, Any] = {key: setting_text(run.settings.get(key)) for key in _OF_PREVIEW}
    return (
        f"seed {values['seed']}, {values['preview_count']} images, {values['preview_steps']} Heun steps, "
        f"guidance {values['preview_guidance']}, shift {values['preview_shift']}, averaged weights"
    )


def _picture(run: RunRead, step: int, notes: list[str]) -> Picture | None:
    path = run.previews[step]
    try:
        image = _decoded(path)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError, Warning) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "it is no whole picture"
        notes.append(f"{run.name}: {printable(path.name)} cannot be shown: {reason}")
        return None
    kind, data = _encoded(image)
    address = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return Picture(run=run.name, step=step, address=address, width=image.width, height=image.height)


def _decoded(path: Path) -> Image.Image:
    """Decode a picture anew, so that no byte of the file reaches the page."""
    raw = read_file(path, _MOST_BYTES)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with Image.open(io.BytesIO(raw), formats=("PNG",)) as image:
            if image.width * image.height > _MOST_PIXELS:
                raise ValueError("it has too many pixels")
            shown = image.convert("RGB")
    shown.thumbnail((_LARGEST_SIDE, _LARGEST_SIDE))
    return shown


def _encoded(image: Image.Image) -> tuple[str, bytes]:
    """Encode a picture without loss where that is small."""
    lossless = io.BytesIO()
    image.save(lossless, format="PNG", optimize=True)
    if lossless.tell() <= _LOSSLESS_BYTES:
        return "png", lossless.getvalue()
    small = io.BytesIO()
    image.save(small, format="JPEG", quality=_QUALITY)
    return "jpeg", small.getvalue()
