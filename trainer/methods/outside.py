"""Methods by name, our own, those of installed packages, and classes named on the command line.

An installed package offers methods as entry points of the group ``repa.methods``. Any other class is named as
``my_package.my_module:MyMethod``; that runs the module, so the name must come from the command line: a
configuration or a run's folder that somebody else wrote must not run code.
"""

from __future__ import annotations

import hashlib
import inspect
from dataclasses import MISSING, fields, is_dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, get_type_hints

from ...data.edge import shortened
from ...data.errors import RepaError
from ...data.outside import entry_names, find_outside, names_object
from ..typed import nearest
from .base import Method, MethodConfig
from .named_presets import unusable_presets
from .registry import METHODS

GROUP = "repa.methods"
FLAG = "--method"
RESERVED = ("name", "preset")
EXAMPLE = "my_package.my_module:MyMethod"
ELSEWHERE = {"softrepa": "train it with `repa softrepa train --model FOLDER`"}
"""Methods with commands of their own, whose network is a model of others."""


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
    if not names_object(name) and name not in entry_names(GROUP):
        module, _, attribute = name.rpartition(".")
        remedy = f"a class is named as {module}:{attribute}" if names_object(f"{module}:{attribute}") else ""
        if name in ELSEWHERE:
            raise RepaError(f"method {name} trains no backbone of ours", ELSEWHERE[name], field=FLAG)
        raise RepaError(
            f"method {shortened(name)} is unknown", remedy or nearest(name, method_names()), field=FLAG
        )
    found = find_outside(name, group=GROUP, flag=FLAG, what="method", example=EXAMPLE, may_import=may_import)
    return _checked(name, found)


def method_names() -> list[str]:
    """Return the names of all methods that can be had without naming a module."""
    return list(dict.fromkeys([*METHODS, *entry_names(GROUP)]))


def origin_of(name: str) -> dict[str, str | None]:
    """Say where the code of a method came from, for the record of a run.

    Args:
        name: of a method that was found before.

    Returns:
        ``class`` as ``module:Class``; ``package`` with its version, of an entry point; and ``file_sha256`` of
        the module's file.
    """
    method = find_method(name)
    try:
        file = inspect.getsourcefile(method)
    except (OSError, TypeError):  # a class that was typed into an interpreter
        file = None
    points = () if name in METHODS else entry_points(group=GROUP, name=name)
    packages = {f"{point.dist.name} {point.dist.version}" for point in points if point.dist is not None}
    return {
        "class": f"{method.__module__}:{method.__qualname__}",
        "package": min(packages, default=None),
        "file_sha256": None if file is None else hashlib.sha256(Path(file).read_bytes()).hexdigest(),
    }


def _checked(target: str, found: Any) -> type[Method]:
    """Return what was imported if it can be a method, found out before anything is built on it.

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
    if wrong := unusable_presets(found):
        raise RepaError(f"the presets of the method {target}: {wrong}", "mend the class", field=FLAG)
    return found


def _is_frozen(kind: type) -> bool:
    parameters = vars(kind).get("__dataclass_params__")
    return is_dataclass(kind) and parameters is not None and parameters.frozen


def _unusable(kind: type[MethodConfig]) -> tuple[str, str] | None:
    """Say what is wrong with a class of settings, and the remedy, or None if nothing is."""
    try:
        get_type_hints(kind)
    except (NameError, TypeError, SyntaxError) as error:
        return f"an annotation cannot be read ({error})", "import at run time what the annotations name"
    for item in fields(kind):
        if item.name in RESERVED:
            return (
                f"a setting cannot be called {item.name}",
                f"method.{item.name} is of all methods; call it otherwise",
            )
        if item.default is MISSING and item.default_factory is MISSING:
            return f"{item.name} has no default", "give it one: each setting can be left out"
    try:
        kind()
    except Exception as error:  # of pydantic, of a bound, or of what the class itself checks
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        return f"the defaults are refused ({reason})", "give defaults that fit the annotations"
    return None
