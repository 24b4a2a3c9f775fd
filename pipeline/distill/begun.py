"""What a distillation depends on, and whether one that was begun before is the same."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ...data.errors import RepaError
from ..encoders.idle_teacher import read_distilled

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from ..encoders.idle_teacher import Distilled

_FLAGS = {"encoder": "--out", "teacher_sha256": "--weights"}


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """What the weights after a step depend on.

    Attributes:
        encoder: name of the student.
        cache: identity of the cache.
        teacher_sha256: of the teacher's weights.
        fit_images: images of the closed-form start.
        held_out: images that are held out.
        batch_size: images of a step.
        learning_rate: of AdamW, constant, without weight decay.
        seed: of the order and of the images of the start.
    """

    encoder: str
    cache: str
    teacher_sha256: str
    fit_images: int
    held_out: int
    batch_size: int
    learning_rate: float
    seed: int


def there_already(out: Path, settings: TrainingSettings, steps: int) -> Distilled | None:
    """Return what is in the file if it is what is asked for, and None if it is to be written.

    Args:
        out: the file.
        settings: of the distillation.
        steps: that it is to have.

    Raises:
        RepaError: the file is of another distillation, or of one that went on longer.
    """
    if not out.exists():
        return None
    remedy = "name another file with --out, or remove it"
    try:
        found = read_distilled(out)
    except RepaError as error:
        raise RepaError(error.what, remedy, field="--out") from error
    require_same(found.training, settings, out, remedy)
    require_ahead(out, found.training.get("steps", 0), steps)
    return found if found.training.get("steps") == steps else None


def require_same(begun: Mapping[str, Any], settings: TrainingSettings, file: Path, remedy: str) -> None:
    """Refuse a distillation of other settings.

    Args:
        begun: its settings.
        settings: those asked for.
        file: where it is kept.
        remedy: what to do about another one.

    Raises:
        RepaError: says the first that differs.
    """
    for name, value in asdict(settings).items():
        if begun.get(name) != value:
            raise RepaError(
                f"the distillation in {file} was begun with {name.replace('_', ' ')} {begun.get(name)}, "
                f"not {value}",
                remedy,
                field=_FLAGS.get(name, f"--{name.replace('_', '-')}"),
            )


def require_ahead(file: Path, done: int, steps: int) -> None:
    """Refuse a distillation that has done more steps than are asked for.

    Raises:
        RepaError: it has.
    """
    if done > steps:
        raise RepaError(
            f"the distillation in {file} has done {done:,} steps, more than --steps {steps:,}",
            f"give --steps {done} or more, or name another file with --out",
            field="--steps",
        )
