"""Channel-idle teachers by name, and the file that one is kept in. Needs neither torch nor timm.

``dinov2-b-idle75`` is DINOv2-B with 75 % of its hidden channels idle, its LayerNorms kept, merged;
``dinov2-b-idle75-bn`` the same with BatchNorms, merged too. Its weights are what `repa distill` wrote, and
the file says of itself what it is.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ...data.edge import parse_json
from ...data.errors import RepaError
from .timm_teacher import TimmTeacher

if TYPE_CHECKING:
    from .base import Teacher

LAYER_NORM: Final = "layer"
BATCH_NORM: Final = "batch"
NORMS: Final = (LAYER_NORM, BATCH_NORM)
FOLDER: Final = Path("encoders")
"""Where `repa distill` writes and where an idle teacher without ``--weights`` is looked for."""
SUFFIX: Final = ".safetensors"
ENTRY: Final = "repa-idle-encoder"
"""The entry of a file's header that says what is in it, as JSON."""

_NAME = re.compile(r"(?P<teacher>.+)-idle(?P<percent>[1-9][0-9]?|100)(?P<batch>-bn)?")


@dataclass(frozen=True, kw_only=True)
class IdleTeacher(TimmTeacher):
    """A merged channel-idle copy of a teacher. See `TimmTeacher` for what all have.

    Attributes:
        teacher: name of the teacher it was distilled from.
        idle: θ.
        norm: one of `NORMS`.
    """

    teacher: str
    idle: float
    norm: str


@dataclass(frozen=True, kw_only=True)
class Distilled:
    """What the file of a merged encoder says of it. It is part of the provenance of its columns.

    Attributes:
        name: of the encoder.
        teacher: the teacher's name.
        teacher_sha256: of the teacher's weights, as the cache has it.
        idle: θ.
        norm: one of `NORMS`.
        merged: True; what is not merged is no encoder.
        resolution: side of the cropped images of the cache it was distilled from.
        data: fingerprint of these images.
        views: of each.
        training: what it was trained with.
        fidelity: what was measured of it on held-out images against the cached tokens.
        speed: of it and its teacher, on one device.
    """

    name: str
    teacher: str
    teacher_sha256: str
    idle: float
    norm: str
    merged: bool
    resolution: int
    data: str
    views: tuple[str, ...]
    training: dict[str, Any]
    fidelity: dict[str, Any]
    speed: dict[str, Any]

    def notes(self) -> dict[str, Any]:
        """Return it as plain values, as they come back from JSON."""
        found: dict[str, Any] = json.loads(self.as_json())
        return found

    def as_json(self) -> str:
        """Return it as the text that a file keeps."""
        return json.dumps(asdict(self))


def idle_name(teacher: str, idle: float, norm: str) -> str:
    """Return the name of a channel-idle copy.

    Args:
        teacher: the teacher's.
        idle: θ.
        norm: one of `NORMS`.

    Raises:
        RepaError: θ is no whole number of per cent from 1 to 100, which the name could not say.
    """
    percent = round(100 * idle) if 0 < idle <= 1 else 0
    if not percent or idle != percent / 100:  # what `split_idle_name` gives back
        raise RepaError(
            f"--idle {idle:g} is no share in whole per cent",
            "give one above 0 and up to 1, as 0.75",
            field="--idle",
        )
    return f"{teacher}-idle{percent}{'-bn' if norm == BATCH_NORM else ''}"


def split_idle_name(name: str) -> tuple[str, float, str] | None:
    """Return teacher, θ and norm of an idle teacher's name, or None of another's."""
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    return match["teacher"], int(match["percent"]) / 100, BATCH_NORM if match["batch"] else LAYER_NORM


def idle_teacher(name: str, teacher: Teacher, idle: float, norm: str) -> IdleTeacher:
    """Return what is known of a channel-idle copy without its weights.

    Args:
        name: its own.
        teacher: what it is a copy of.
        idle: θ.
        norm: one of `NORMS`.

    Raises:
        RepaError: the teacher is no ViT of timm, or a copy itself.
    """
    if type(teacher) is not TimmTeacher:
        kind = "a channel-idle copy itself" if isinstance(teacher, IdleTeacher) else "no ViT of timm"
        raise RepaError(
            f"encoder {teacher.name} is {kind}, of which there is no channel-idle copy",
            "take a plain teacher, as dinov2-b",
            field="--encoder",
        )
    own = {each.name: getattr(teacher, each.name) for each in fields(TimmTeacher)}
    own |= {"name": name, "hub": None, "checkpoint_prefix": ""}
    return IdleTeacher(**own, teacher=teacher.name, idle=idle, norm=norm)


def usual_file(name: str) -> Path:
    """Return where the file of an idle teacher lies unless ``--weights`` says otherwise."""
    return FOLDER / f"{name}{SUFFIX}"


def read_distilled(path: Path) -> Distilled:
    """Read what a file says of the merged encoder in it.

    Raises:
        RepaError: it cannot be read, or is no such file.
    """
    from safetensors import SafetensorError, safe_open

    remedy = "give a file that `repa distill` wrote"
    try:
        with safe_open(path, framework="numpy") as file:
            text = (file.metadata() or {}).get(ENTRY)
    except OSError as error:
        raise RepaError(f"weights file {path} cannot be read ({error})", remedy, field="--weights") from error
    except SafetensorError as error:
        raise RepaError(f"weights file {path} is no safetensors file", remedy, field="--weights") from error
    if text is None:
        raise RepaError(f"weights file {path} is of no merged encoder", remedy, field="--weights")
    found = parse_json(
        Distilled, text.encode(), where=f"the header of {path}", remedy=remedy, error=RepaError
    )
    split = split_idle_name(found.name)
    if split != (found.teacher, found.idle, found.norm) or not found.merged:
        raise RepaError(
            f"weights file {path} calls itself {found.name}, and says otherwise what it is",
            remedy,
            field="--weights",
        )
    return found


def require_fit(found: Distilled, teacher: IdleTeacher, resolution: int, path: Path) -> None:
    """Refuse the file of another encoder, or of images of another size.

    Raises:
        RepaError: says which.
    """
    if found.name != teacher.name:
        raise RepaError(
            f"weights file {path} is of {found.name}, not of {teacher.name}",
            f"name it --encoder {found.name}, or give another file",
            field="--weights",
        )
    if found.resolution != resolution:
        raise RepaError(
            f"encoder {teacher.name} was distilled from images of {found.resolution}², and these are of "
            f"{resolution}²",
            f"give --resolution {found.resolution}, or distil from a cache of {resolution}²",
            field="--resolution",
        )
