"""Whether the distillation that was begun before is the one that is asked for."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from ...data.errors import RepaError
from ..encoders.distilled import read_distilled

if TYPE_CHECKING:
    from pathlib import Path

    from ..encoders.distilled import Distilled, TrainingSettings

_FLAGS = {"encoder": "--out", "teacher_sha256": "--weights"}


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
    require_ahead(out, found.training.steps, steps)
    return found if found.training.steps == steps else None


def require_same(begun: TrainingSettings, settings: TrainingSettings, file: Path, remedy: str) -> None:
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
        if (other := getattr(begun, name)) != value:
            raise RepaError(
                f"the distillation in {file} was begun with {name.replace('_', ' ')} {other}, not {value}",
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
