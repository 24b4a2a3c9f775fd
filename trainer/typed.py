"""Dataclasses from dotted keys and YAML values, typed from the annotations of the fields.

pydantic types and bounds a value. What is ours is what a text may mean: on a command line ``none`` is no text
where a number may be absent, ``4e5`` is an integer, and ``8,10`` a list.
"""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import fields, is_dataclass
from functools import cache
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    Literal,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from ..data.edge import printable, shortened
from ..data.errors import RepaError

if TYPE_CHECKING:
    from pydantic import TypeAdapter

T = TypeVar("T")

_LIKE = 0.6
_NONE = ("none", "null", "~", "")
_BOUNDS = {"ge": "from", "gt": "above", "le": "to", "lt": "below"}


def describe(annotation: Any) -> str:
    """Return an annotation in words, as ``integer from 1`` or ``one of linear, cosine``."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        said = " and ".join(bound for limit in arguments[1:] for bound in _bounds_of(limit))
        return f"{describe(arguments[0])} {said.replace(' and to ', ' to ')}"
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


def _bounds_of(limit: Any) -> Iterator[str]:
    return (f"{word} {getattr(limit, name):,}" for name, word in _BOUNDS.items() if hasattr(limit, name))


def coerce(value: Any, annotation: Any, key: str) -> Any:
    """Return a value as its annotation wants it.

    Args:
        value: text of ``--set key=value``, or what YAML made of it.
        annotation: any type that pydantic knows, with bounds of ``annotated_types`` where it has some.
        key: dotted key, for the error.

    Raises:
        RepaError: the value is not of the type or out of its bounds; ``field`` is the key.
    """
    from pydantic import ValidationError

    adapter = _adapter(annotation)
    for reading in _readings(value):
        try:
            found = adapter.validate_python(reading)
        except (ValidationError, ValueError):
            continue  # ValueError: an integer of thousands of digits, which Python prints for nobody
        if not (_has_nul(found) or _is_truth_as_number(reading, found)):
            return found
    raise RepaError(
        f"{printable(key)}={shortened(value)} is not valid",
        f"expected {describe(annotation)}",
        field=printable(key),
    )


@cache
def _hints(kind: type) -> Mapping[str, Any]:
    return get_type_hints(kind, include_extras=True)


@cache
def _adapter(annotation: Any) -> TypeAdapter[Any]:
    from pydantic import ConfigDict, TypeAdapter

    return TypeAdapter(annotation, config=ConfigDict(allow_inf_nan=False))


def _readings(value: Any) -> Iterator[Any]:
    """List what a value may mean, the most literal first."""
    yield value
    if isinstance(value, bool):
        yield "on" if value else "off"  # what YAML makes of these words
    if not isinstance(value, str):
        return
    text = value.strip()
    if text.lower() in _NONE:
        yield None
    with suppress(ValueError):
        yield float(text)  # 4e5 is how steps are written in papers
    inside = text.removeprefix("[").removesuffix("]").removeprefix("(").removesuffix(")")
    yield [item.strip() for item in inside.split(",") if item.strip()]


def _is_truth_as_number(value: Any, found: Any) -> bool:
    """Tell whether a truth value became a number, which no setting means."""
    if isinstance(value, (list, tuple)) and isinstance(found, (list, tuple)):
        return any(_is_truth_as_number(*pair) for pair in zip(value, found, strict=True))
    return isinstance(value, bool) and isinstance(found, (int, float)) and not isinstance(found, bool)


def _has_nul(found: Any) -> bool:
    """Tell whether a text holds the character that ends a path for the operating system."""
    if isinstance(found, (list, tuple)):
        return any(_has_nul(item) for item in found)
    return isinstance(found, str) and "\0" in found


def check_fields(settings: Any, *, prefix: str = "", leave_out: Iterable[str] = ()) -> None:
    """Hold the fields of a dataclass that was made in code to their annotations.

    Args:
        settings: instance of a dataclass.
        prefix: as of `from_mapping`.
        leave_out: names of fields that have checks of their own.

    Raises:
        RepaError: a value of another type or out of its bounds.
    """
    kind: Any = type(settings)
    annotations = _hints(kind)
    for item in fields(settings):
        if item.name in leave_out:
            continue
        value, key = getattr(settings, item.name), prefix + item.name
        if coerce(value, annotations[item.name], key) != value:
            raise RepaError(
                f"{key}={shortened(value)} is not valid",
                f"expected {describe(annotations[item.name])}",
                field=key,
            )


def nearest(key: str, known: Iterable[str]) -> str:
    """Return a clause that names the known keys closest to a mistyped one."""
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
    """Return a dataclass made of plain values.

    Args:
        kind: the dataclass; its annotations give the types and the bounds.
        values: field → value, as text or as YAML read it.
        prefix: what stands before the field's name in errors, for example ``method.``.

    Raises:
        RepaError: an unknown field, with the nearest names, or a value of another type.
    """
    if not is_dataclass(kind):
        raise TypeError(f"{kind} is not a dataclass")
    annotations = _hints(kind)
    names = [item.name for item in fields(kind) if item.init]
    for key in values:
        if key not in names:
            raise unknown_setting(prefix + key, [prefix + name for name in names])
    return kind(**{key: coerce(value, annotations[key], prefix + key) for key, value in values.items()})


def unknown_setting(key: str, known: Iterable[str]) -> RepaError:
    """Return the error of a key that is none, with the keys that come nearest."""
    shown = shortened(key)
    return RepaError(f"unknown setting {shown}", nearest(shown, known), field=printable(key))


def plain(value: Any) -> Any:
    """Return dataclasses as dicts and tuples as lists, which YAML and JSON can hold."""
    if is_dataclass(value) and not isinstance(value, type):
        return {item.name: plain(getattr(value, item.name)) for item in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def parse_assignment(text: str) -> tuple[str, str]:
    """Return ``(key, value)`` of ``key=value``.

    Raises:
        RepaError: there is no ``=`` or no key.
    """
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise RepaError(
            f"--set {text!r} is not of the form key=value", "write for example --set lr=2e-4", field="--set"
        )
    return key.strip(), value.strip()
