"""Methods by name: our own, those of installed packages, and classes named on the command line.

An installed package offers methods as entry points of the group ``repa.methods``. Any other class is named as
``my_package.my_module:MyMethod``; that runs the module, so the name must come from the command line: a
configuration or a run's folder that somebody else wrote must not run code.
"""

from __future__ import annotations

import hashlib
import inspect
import os
import sys
from dataclasses import MISSING, fields, is_dataclass
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from ...data.edge import shortened
from ...data.errors import RepaError
from ..typed import nearest
from .base import Method, MethodConfig
from .registry import METHODS

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

GROUP = "repa.methods"
FLAG = "--method"

_imported: dict[str, type[Method]] = {}
"""What this process has imported: to name it once more runs nothing new."""


def find_method(name: str, *, may_import: bool = False) -> type[Method]:
    """Return the class of a method.

    Args:
        name: of a method of ours, of an entry point of the group ``repa.methods``, or ``module:Class``.
        may_import: whether a module may be imported because the name says so; only a name from the command
            line may.

    Raises:
        RepaError: there is no such method, it is none, or its module may not or cannot be imported.
    """
    if name in METHODS:
        return METHODS[name]
    if name in _imported:
        return _imported[name]
    if ":" in name:
        _split(name)
        if not may_import:
            raise RepaError(
                f"the method {name} is code from outside repa, and a file alone cannot have it imported",
                f"if you trust that code, name it on the command line too: {FLAG} {name}",
                field=FLAG,
            )
        # as with `python my_script.py`, but behind what is installed: nothing can be shadowed
        if os.getcwd() not in sys.path:
            sys.path.append(os.getcwd())
        target = name
    else:
        target = _entry_point(name).value
    _imported[name] = _checked(target, _import(target))
    return _imported[name]


def method_names() -> list[str]:
    """Return the names of all methods that can be had without naming a module."""
    return list(dict.fromkeys([*METHODS, *sorted(each.name for each in entry_points(group=GROUP))]))


def origin_of(name: str) -> dict[str, str | None]:
    """Say where the code of a method came from, for the record of a run.

    Args:
        name: of a method that was found before.

    Returns:
        ``class`` as ``module:Class``; ``package`` with its version, of an entry point; and ``file_sha256`` of
        the module's file.
    """
    method = find_method(name)
    file = inspect.getsourcefile(method)
    found = [] if name in METHODS else [each for each in entry_points(group=GROUP) if each.name == name]
    package = found[0].dist if found else None
    return {
        "class": f"{method.__module__}:{method.__qualname__}",
        "package": None if package is None else f"{package.name} {package.version}",
        "file_sha256": None if file is None else hashlib.sha256(Path(file).read_bytes()).hexdigest(),
    }


def _entry_point(name: str) -> EntryPoint:
    """The entry point of a name.

    Raises:
        RepaError: there is none, or several packages offer one.
    """
    found = {
        (each.value, each.dist and each.dist.name): each for each in entry_points(group=GROUP, name=name)
    }
    if not found:
        module, _, attribute = name.rpartition(".")
        remedy = f"a class is named as {module}:{attribute}" if module else nearest(name, method_names())
        raise RepaError(f"method {shortened(name)} is unknown", remedy, field=FLAG)
    if len(found) > 1:
        classes = sorted(value for value, _ in found)
        raise RepaError(
            f"several installed packages offer a method {name!r} ({', '.join(classes)})",
            f"name the one you mean, as {FLAG} {classes[0]}",
            field=FLAG,
        )
    return next(iter(found.values()))


def _split(target: str) -> tuple[str, str]:
    """Module and class of ``module:Class``.

    Raises:
        RepaError: it is no such name.
    """
    module, _, attribute = target.partition(":")
    if not attribute.isidentifier() or not all(part.isidentifier() for part in module.split(".")):
        raise RepaError(
            f"{shortened(target)} is no name of a class",
            "write it as my_package.my_module:MyMethod",
            field=FLAG,
        )
    return module, attribute


def _import(target: str) -> Any:
    """What ``module:Class`` names.

    Raises:
        RepaError: it is no such name, the module cannot be imported, or has no such attribute.
    """
    module, attribute = _split(target)
    try:
        found = import_module(module)
    except (Exception, SystemExit) as error:  # whatever the code of others raises, it is said in one line
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise RepaError(
            f"method {target}: the module {module} cannot be imported ({reason})",
            f"start where it lies, or install its package; `python -c 'import {module}'` shows more",
            field=FLAG,
        ) from error
    if not hasattr(found, attribute):
        there = [
            key for key, value in vars(found).items() if inspect.isclass(value) and issubclass(value, Method)
        ]
        raise RepaError(f"the module {module} has no {attribute}", nearest(attribute, there), field=FLAG)
    return getattr(found, attribute)


def _checked(target: str, found: Any) -> type[Method]:
    """What was imported, if it can be a method; found out before anything is built on it.

    Raises:
        RepaError: it is no class of methods, leaves a question open, or its settings cannot be read.
    """
    if not (inspect.isclass(found) and issubclass(found, Method)):
        raise RepaError(
            f"{target} is not a method", f"make it a subclass of {Method.__module__}.Method", field=FLAG
        )
    if inspect.isabstract(found):
        left = ", ".join(sorted(found.__abstractmethods__))
        raise RepaError(f"the method {target} leaves out {left}", "define it in the class", field=FLAG)
    kind = found.config_class
    if not (inspect.isclass(kind) and issubclass(kind, MethodConfig) and _is_frozen(kind)):
        raise RepaError(
            f"config_class of the method {target} is no class of settings",
            f"make it a subclass of {MethodConfig.__module__}.MethodConfig, with @dataclass(frozen=True, "
            "kw_only=True)",
            field=FLAG,
        )
    reason = _unusable(kind)
    if reason:
        raise RepaError(
            f"the settings {kind.__name__} of the method {target}: {reason[0]}", reason[1], field=FLAG
        )
    return found


def _is_frozen(kind: type) -> bool:
    parameters = vars(kind).get("__dataclass_params__")
    return is_dataclass(kind) and parameters is not None and parameters.frozen


def _unusable(kind: type[MethodConfig]) -> tuple[str, str] | None:
    """What is wrong with a class of settings, and the remedy; None if nothing is."""
    try:
        get_type_hints(kind)
    except (NameError, TypeError, SyntaxError) as error:
        return f"an annotation cannot be read ({error})", "import at run time what the annotations name"
    for item in fields(kind):
        if item.name == "name":
            return "a setting cannot be called name", "method.name is the method's own; call it otherwise"
        if item.default is MISSING and item.default_factory is MISSING:
            return f"{item.name} has no default", "give it one: each setting can be left out"
    try:
        kind()
    except Exception as error:  # of pydantic, of a bound, or of what the class itself checks
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        return f"the defaults are refused ({reason})", "give defaults that fit the annotations"
    return None
