"""Dataclasses from text: dotted keys and YAML values, typed from the annotations of the fields.

Every mistake is one line that says the key, the value and what was expected.
"""

from __future__ import annotations

import difflib
import math
import types
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from ..data.errors import RepaError

T = TypeVar("T")

_TRUE = ("true", "yes", "on", "1")
_FALSE = ("false", "no", "off", "0")
_LIKE = 0.6
_NONE = ("none", "null", "~", "")


class _MismatchError(Exception):
    """The value is not of the annotation; turned into a line with the key where the key is known."""


def describe(annotation: Any) -> str:
    """An annotation in words, for errors: ``integer``, ``number or none``, ``one of linear, cosine``."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return "one of " + ", ".join(str(choice) for choice in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(describe(argument) for argument in arguments)
    if origin is tuple:
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return f"list of {describe(arguments[0])}"
        return "(" + ", ".join(describe(argument) for argument in arguments) + ")"
    names = {int: "integer", float: "number", bool: "true or false", str: "text", type(None): "none"}
    return names.get(annotation, str(annotation))


def coerce(value: Any, annotation: Any, key: str) -> Any:
    """A value as its annotation wants it.

    Args:
        value: text of ``--set key=value``, or what YAML made of it.
        annotation: ``int``, ``float``, ``bool``, ``str``, ``Literal``, ``tuple``, or an optional one of them.
        key: dotted key, for the error.

    Raises:
        RepaError: the value is not of the type; names key, value and expected type.
    """
    try:
        return _coerce(value, annotation)
    except (_MismatchError, ValueError):
        raise RepaError(f"{key}={value!s} is not valid: expected {describe(annotation)}") from None


def _coerce(value: Any, annotation: Any) -> Any:  # noqa: PLR0911 - one return per kind of annotation
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return _choice(value, arguments)
    if origin in (Union, types.UnionType):
        return _first_fit(value, arguments)
    if origin is tuple:
        return _tuple(value, arguments)
    if annotation is bool:
        return _bool(value)
    if annotation is int:
        return _int(value)
    if annotation is float:
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            raise _MismatchError
        if not math.isfinite(float(value)):
            raise _MismatchError
        return float(value)
    if annotation is str:
        if not isinstance(value, str):
            raise _MismatchError
        return value
    raise _MismatchError


def _choice(value: Any, choices: tuple[Any, ...]) -> Any:
    if isinstance(value, bool):
        value = "on" if value else "off"  # what YAML makes of these words
    for choice in choices:
        if value == choice or str(value) == str(choice):
            return choice
    raise _MismatchError


def _first_fit(value: Any, annotations: Iterable[Any]) -> Any:
    for annotation in annotations:
        if annotation is type(None):
            if value is None or (isinstance(value, str) and value.lower() in _NONE):
                return None
            continue
        try:
            return _coerce(value, annotation)
        except (_MismatchError, ValueError):
            continue
    raise _MismatchError


def _tuple(value: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    if isinstance(value, str):
        text = value.strip().removeprefix("[").removesuffix("]").removeprefix("(").removesuffix(")")
        value = [item.strip() for item in text.split(",") if item.strip()]
    if not isinstance(value, (list, tuple)):
        raise _MismatchError
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        return tuple(_coerce(item, arguments[0]) for item in value)
    if len(value) != len(arguments):
        raise _MismatchError
    return tuple(_coerce(item, argument) for item, argument in zip(value, arguments, strict=True))


def _bool(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    text = str(value).lower()
    if text in _TRUE:
        return True
    if text in _FALSE:
        return False
    raise _MismatchError


def _int(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise _MismatchError
    if isinstance(value, str):
        try:
            return int(value)
        except ValueError:
            value = float(value)  # 4e5 is how steps are written in papers
    if not math.isfinite(value) or value != int(value):
        raise _MismatchError
    return int(value)


def nearest(key: str, known: Iterable[str]) -> str:
    """A clause that names the known keys closest to a mistyped one."""
    known = list(known)
    if not known:
        return "there are none to set"
    # weight is near method.weight too, whose section was forgotten
    ratios = {name: max(_likeness(key, name), _likeness(key, name.rpartition(".")[2])) for name in known}
    close = sorted((name for name in known if ratios[name] >= _LIKE), key=lambda name: -ratios[name])[:2]
    if close:
        return f"did you mean {' or '.join(close)}?"
    return f"the names are {', '.join(known)}"


def _likeness(first: str, second: str) -> float:
    return difflib.SequenceMatcher(None, first, second).ratio()


def from_mapping(kind: type[T], values: Mapping[str, Any], *, prefix: str = "") -> T:
    """A dataclass from plain values.

    Args:
        kind: the dataclass; its annotations give the types.
        values: field → value, as text or as YAML read it.
        prefix: what stands before the field's name in errors, for example ``method.``.

    Raises:
        RepaError: an unknown field, with the nearest names, or a value of another type.
    """
    if not is_dataclass(kind):
        raise TypeError(f"{kind} is not a dataclass")
    annotations = get_type_hints(kind)
    names = [item.name for item in fields(kind) if item.init]
    for key in values:
        if key not in names:
            raise RepaError(
                f"unknown setting {prefix}{key}",
                f"{nearest(prefix + key, [prefix + name for name in names])}",
            )
    return kind(**{key: coerce(value, annotations[key], prefix + key) for key, value in values.items()})


def plain(value: Any) -> Any:
    """Dataclasses as dicts and tuples as lists: what YAML and JSON can hold."""
    if is_dataclass(value) and not isinstance(value, type):
        return {item.name: plain(getattr(value, item.name)) for item in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def parse_assignment(text: str) -> tuple[str, str]:
    """``(key, value)`` of ``key=value``.

    Raises:
        RepaError: there is no ``=`` or no key.
    """
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise RepaError(f"--set {text!r} is not of the form key=value, for example --set lr=2e-4")
    return key.strip(), value.strip()
