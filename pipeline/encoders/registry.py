"""Teachers by name, be they of the table, a ViT of timm, or from outside the package.

``timm:NAME`` is any ViT of timm, and ``timm-NAME`` the same: that is what its columns are called. A package
offers teachers as entry points of the group ``repa.encoders``; any other is named in full as
``my_package.my_module:MyTeacher``. See ``docs/extending/teacher.md``. A channel-idle copy of a teacher is
called ``TEACHER-idle75`` or by the file that `repa distill` wrote. See ``docs/distill.md``.
"""

from __future__ import annotations

import difflib
import inspect
import re
from pathlib import Path
from typing import Final

from ...data.errors import RepaError
from ...data.format.columns import AUTOENCODER, column_name
from ...data.outside import entry_names, find_outside, names_object
from .base import OwnTeacher, Teacher
from .distilled import read_distilled
from .idle_teacher import SUFFIX, idle_teacher, split_idle_name
from .teachers import TEACHERS
from .timm_teacher import TimmTeacher

GROUP: Final = "repa.encoders"
FLAG: Final = "--encoder"

_TIMM = re.compile(r"timm[:-](?P<name>[A-Za-z0-9_][A-Za-z0-9_.-]*)")
_COLUMNS = "timm-{}"

_found: dict[str, Teacher] = {}
"""What this process has found outside the table, by the name it was asked for and by its own."""


def find_teacher(name: str, *, may_import: bool = False) -> Teacher:
    """Return what is known of a teacher without its weights.

    Args:
        name: what ``--encoder`` takes, or the name of a source in a cache.
        may_import: whether a module may be imported because the name says so; only a name from the command
            line may.

    Raises:
        RepaError: there is no such teacher, or it cannot be one; says which names come nearest.
    """
    if name in TEACHERS:
        return TEACHERS[name]
    if name not in _found:
        teacher = _find(name, may_import)
        known = TEACHERS.get(teacher.name) or _found.get(teacher.name)
        if teacher.name == AUTOENCODER or (known is not None and type(known) is not type(teacher)):
            raise RepaError(
                f"the teacher {name} calls itself {teacher.name!r}, which is another's name",
                "give it a name of its own",
                field=FLAG,
            )
        _found[name] = _found[teacher.name] = teacher
    return _found[name]


def file_of(name: str) -> Path | None:
    """Return the file of a merged encoder if that is what ``--encoder`` names, else None."""
    return Path(name) if name.endswith(SUFFIX) and not names_object(name) else None


def _find(name: str, may_import: bool) -> Teacher:
    file = file_of(name)
    if file is not None:
        return find_teacher(read_distilled(file).name)
    split = None if name in entry_names(GROUP) or names_object(name) else split_idle_name(name)
    if split is not None:
        teacher, idle, norm = split
        return idle_teacher(name, find_teacher(teacher), idle, norm)
    match = _TIMM.fullmatch(name)
    if match is not None:
        from .timm_facts import timm_teacher

        return timm_teacher(match["name"], _COLUMNS, FLAG)
    if not names_object(name) and name not in entry_names(GROUP):
        known = [*TEACHERS, *entry_names(GROUP)]
        near = difflib.get_close_matches(name, known, n=3)
        suggestion = f"did you mean {' or '.join(near)}? " if near else ""
        raise RepaError(
            f"encoder {name!r} is unknown",
            f"{suggestion}give --encoder one of {', '.join(known)}, timm:NAME for any ViT of timm, "
            "my_module:MyTeacher, or the file of a merged encoder",
            field=FLAG,
        )
    found = find_outside(
        name,
        group=GROUP,
        flag=FLAG,
        what="teacher",
        example="my_package.my_module:MyTeacher",
        may_import=may_import,
    )
    return _checked(name, found)


def _checked(name: str, found: object) -> Teacher:
    """Return what was found outside, if it can be a teacher, which is a class of one or a row."""
    if inspect.isclass(found) and issubclass(found, OwnTeacher):
        if inspect.isabstract(found):
            left = ", ".join(sorted(found.__abstractmethods__))
            raise RepaError(f"the teacher {name} leaves out {left}", "define it in the class", field=FLAG)
        found = found()
    if not isinstance(found, OwnTeacher | TimmTeacher):
        raise RepaError(
            f"{name} is no teacher",
            f"make it a subclass of {OwnTeacher.__module__}.OwnTeacher",
            field=FLAG,
        )
    own = getattr(found, "name", None)
    numbers = [getattr(found, each, None) for each in ("width", "depth", "patch_size", "pixels_per_token")]
    if not isinstance(own, str) or not all(isinstance(each, int) and each > 0 for each in numbers):
        raise RepaError(
            f"the teacher {name} does not say its name, width, depth, patch_size and pixels_per_token",
            "set a text and four numbers above 0 in its class",
            field=FLAG,
        )
    column_name(own, "patch")
    return found
