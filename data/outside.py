"""Code from outside the package, found by the name of an entry point or as ``module:Class``.

What is installed was chosen by the user, so its name is enough. A module that is only named is run by being
imported, so such a name must come from the command line: a file that somebody else wrote must not run code.
"""

from __future__ import annotations

import os
import re
import sys
from difflib import get_close_matches
from importlib import import_module
from importlib.metadata import entry_points
from inspect import isclass
from typing import Any

from .edge import printable, shortened
from .errors import RepaError

_OBJECT = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")

_imported: dict[tuple[str, str], Any] = {}
"""What this process has imported, by group and name: to name it once more runs nothing new."""


def names_object(text: str) -> bool:
    """Return whether a text has the form ``module:Class``, with or without packages before."""
    return _OBJECT.fullmatch(text) is not None


def entry_names(group: str) -> list[str]:
    """Return the names that installed packages offer in a group of entry points, sorted."""
    return sorted({each.name for each in entry_points(group=group)})


def find_outside(
    name: str, *, group: str, flag: str, what: str, example: str, may_import: bool = False
) -> Any:
    """Return what a name stands for.

    Args:
        name: of an entry point, or ``module:Class``.
        group: of entry points.
        flag: the flag that named it, or ``--set KEY=``, for errors.
        what: what it should be, as ``image source``, for errors.
        example: how such a thing is named in full.
        may_import: whether a module may be imported because the name says so.

    Raises:
        RepaError: there is none of that name or several, or its module may not or cannot be imported.
    """
    if (group, name) in _imported:
        return _imported[group, name]
    if not names_object(name):
        found = _import(_entry(name, group, flag, what, example), flag, what)
    elif may_import:
        # as with `python my_script.py`, but behind what is installed: nothing can be shadowed
        if os.getcwd() not in sys.path:
            sys.path.append(os.getcwd())
        found = _import(name, flag, what)
    else:
        raise RepaError(
            f"the {what} {name} is code from outside repa, and a file alone cannot have it imported",
            f"if you trust that code, name it on the command line too: {_given(flag, name)}",
            field=_field(flag),
        )
    _imported[group, name] = found
    return found


def _given(flag: str, name: str) -> str:
    return f"{flag}{name}" if flag.endswith("=") else f"{flag} {name}"


def _field(flag: str) -> str:
    return flag.removeprefix("--set ").removesuffix("=")


def _entry(name: str, group: str, flag: str, what: str, example: str) -> str:
    """Return the ``module:Class`` of an entry point."""
    found = sorted({each.value for each in entry_points(group=group, name=name)})
    if not found:
        others = ", ".join(entry_names(group)) or "none"
        raise RepaError(
            f"{what} {shortened(name)} is unknown",
            f"installed packages offer {others}; a class is named as {example}",
            field=_field(flag),
        )
    if len(found) > 1:
        raise RepaError(
            f"several installed packages offer the {what} {name!r} ({', '.join(found)})",
            f"name the one you mean, as {_given(flag, found[0])}",
            field=_field(flag),
        )
    return found[0]


def _import(target: str, flag: str, what: str) -> Any:
    module, _, attribute = target.partition(":")
    try:
        found = import_module(module)
    except (Exception, SystemExit) as error:  # whatever the code of others raises, it is said in one line
        reason = printable(" ".join(f"{type(error).__name__}: {error}".split()))
        raise RepaError(
            f"{what} {target}: the module {module} cannot be imported ({reason})",
            f"start where it lies, or install its package; `python -c 'import {module}'` shows more",
            field=_field(flag),
        ) from error
    if not hasattr(found, attribute):
        classes = [key for key, value in vars(found).items() if isclass(value) and value.__module__ == module]
        near = get_close_matches(attribute, classes, n=1, cutoff=0)
        raise RepaError(
            f"{what} {target}: the module {module} has no {attribute}",
            f"did you mean {near[0]}?" if near else "define the class there, or name another module",
            field=_field(flag),
        )
    return getattr(found, attribute)
