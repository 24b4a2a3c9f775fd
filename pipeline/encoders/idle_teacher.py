"""Channel-idle teachers by name. Needs neither torch nor timm.

``dinov2-b-idle75`` is DINOv2-B with 75 % of its hidden channels idle, its LayerNorms kept, merged;
``dinov2-b-idle75-bn`` the same with BatchNorms, merged too. Its weights are what `repa distill` wrote, see
`distilled`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Final

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
