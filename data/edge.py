"""The edge where what others wrote comes in and stays plain data until it is parsed.

There is one parse. `read_json` bounds size and depth of a document, `parse` turns plain values into a typed
model or says in one line which of them is wrong. `printable` is for the way out, to a terminal or a page.
"""

from __future__ import annotations

import json
from contextlib import suppress
from functools import cache
from math import isfinite
from typing import TYPE_CHECKING, Any, TypeVar

from .errors import CacheError, RepaError

if TYPE_CHECKING:
    from pydantic import TypeAdapter, ValidationError

T = TypeVar("T")

MOST_BYTES = 64 << 20
MOST_DEPTH = 32
RESTORE = "restore it, or write it again"

_SHOWN = 60  # characters of a wrong value in an error


def read_json(
    raw: bytes,
    where: str,
    *,
    most_bytes: int = MOST_BYTES,
    most_depth: int = MOST_DEPTH,
    remedy: str = RESTORE,
    error: type[RepaError] = CacheError,
) -> Any:
    """Return the plain values of a JSON document (RFC 8259) that others may have written.

    Args:
        raw: its bytes, UTF-8.
        where: its name, for the error.
        most_bytes: longest document that is looked at.
        most_depth: deepest nesting of arrays and objects.
        remedy: what to do about a document that is none.
        error: class of what is raised.

    Raises:
        RepaError: it is no JSON, too long or too deep, or holds a number that no float64 holds.
    """
    from pydantic_core import from_json

    _check_length(raw, where, most_bytes, remedy, error)
    try:
        # bounded in depth and in digits by itself, and without lone surrogates
        values = from_json(raw, allow_inf_nan=False)
    except ValueError as reason:
        raise error(f"{where} is no JSON ({reason})", remedy) from None
    if problem := _unfit(values, most_depth):
        raise error(f"{where} {problem}", remedy)
    return values


def parse(
    model: type[T],
    value: Any,
    *,
    where: str,
    remedy: str = RESTORE,
    error: type[RepaError] = CacheError,
    most_depth: int = MOST_DEPTH,
) -> T:
    """Return plain values as a typed model, nothing converted that JSON tells apart.

    A list is a tuple where the model wants one; a number is no text, a bool no number, and a field that the
    model does not know is an error where the model forbids extra ones.

    Args:
        model: a pydantic model, a dataclass, or any type that pydantic knows.
        value: what JSON, YAML or a checkpoint gave: None, bool, int, float, str, list, tuple, dict.
        where: the document, for the error.
        remedy: what to do about it.
        error: class of what is raised.
        most_depth: deepest nesting.

    Raises:
        RepaError: ``field`` is the dotted path of the first value that is wrong.
    """
    if problem := _unfit(value, most_depth):
        raise error(f"{where} {problem}", remedy)
    try:
        raw = json.dumps(value).encode()
    except (ValueError, RecursionError) as reason:  # an integer of thousands of digits
        raise error(f"{where} holds what no JSON can hold ({reason})", remedy) from None
    return _validated(model, raw, where, remedy, error)


def parse_json(
    model: type[T],
    raw: bytes,
    *,
    where: str,
    remedy: str = RESTORE,
    error: type[RepaError] = CacheError,
    most_bytes: int = MOST_BYTES,
) -> T:
    """Return a JSON document as a typed model, without plain values between.

    Args:
        model: as of `parse`.
        raw: the document's bytes, UTF-8.
        where: its name, for the error.
        remedy: what to do about it.
        error: class of what is raised.
        most_bytes: longest document that is looked at.

    Raises:
        RepaError: as `parse`.
    """
    _check_length(raw, where, most_bytes, remedy, error)
    return _validated(model, raw, where, remedy, error)


def printable(text: object) -> str:
    """Return text that does to a terminal, a CSV file or a page nothing but appear.

    Control characters, line breaks, marks that turn the direction of writing and lone surrogates are written
    as escapes, as ``\\x1b`` and ``\\u202e``. Rich's markup is not its business (`rich.markup.escape`).
    """
    shown = str(text)
    if shown.isprintable():
        return shown
    return "".join(each if each.isprintable() else _escape(each) for each in shown)


def shortened(value: object) -> str:
    """Return a value as an error shows it, escaped and at most 60 characters long."""
    try:
        shown = printable(value if isinstance(value, str) else json.dumps(value, default=str))
    except (ValueError, RecursionError):
        shown = f"a value of type {type(value).__name__}"
    return shown if len(shown) <= _SHOWN else f"{shown[: _SHOWN - 1]}…"


def _escape(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")


def _check_length(raw: bytes, where: str, most: int, remedy: str, error: type[RepaError]) -> None:
    if len(raw) > most:
        raise error(f"{where} has {len(raw):,} bytes, and at most {most:,} are looked at", remedy)


def _unfit(value: Any, most_depth: int) -> str | None:
    """Say what keeps a value from being plain, finite and shallow, or None where nothing does."""
    todo = [(value, 0)]
    while todo:
        each, depth = todo.pop()
        if isinstance(each, (dict, list, tuple)):
            if depth >= most_depth:
                return f"is nested deeper than {most_depth} levels"
            if isinstance(each, dict):
                if wrong := [key for key in each if not isinstance(key, str)]:
                    return f"has {shortened(wrong[0])} as a name, which is no text"
                each = each.values()
            todo += [(item, depth + 1) for item in each]
        elif isinstance(each, float) and not isfinite(each):
            return f"holds {each}, which is no number"
        elif each is not None and not isinstance(each, (str, int, float)):
            return f"holds a {type(each).__name__}, which is no plain value"
    return None


@cache
def _adapter(model: Any) -> TypeAdapter[Any]:
    from pydantic import TypeAdapter

    return TypeAdapter(model)


def _validated(model: type[T], raw: bytes, where: str, remedy: str, error: type[RepaError]) -> T:
    from pydantic import ValidationError

    schema: Any = model
    try:
        # strict as JSON is: arrays become tuples, and nothing else changes its type
        found: T = _adapter(schema).validate_json(raw, strict=True)
    except ValidationError as wrong:
        what, field = _first(wrong)
        raise error(f"{where}: {what}", remedy, field=field) from None
    except RepaError as wrong:  # of a check that a model makes of itself
        raise error(f"{where}: {wrong.what}", wrong.remedy or remedy, field=wrong.field) from None
    return found


def _first(wrong: ValidationError) -> tuple[str, str]:
    """Turn the first of pydantic's findings into a sentence and the field that it is about."""
    found = wrong.errors(include_url=False, include_context=False)
    first = found[0]
    field = printable(".".join(str(part) for part in first["loc"]))
    message = printable(first["msg"][:1].lower() + first["msg"][1:])
    if first["type"] == "missing":
        what = f"{field} is missing"
    elif first["type"] == "json_invalid":
        what = f"it is no JSON ({message})"
    elif first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        what = f"{field} is not known"
    else:
        what = f"{field or 'it'} is {_told_apart(first['input'])} ({message})"
    more = len(found) - 1
    return (f"{what}, and {more} more are wrong" if more else what), field


def _told_apart(value: object) -> str:
    """Return a wrong value as an error shows it, in quotation marks a text that reads like another value."""
    if isinstance(value, str):
        with suppress(ValueError, RecursionError):
            json.loads(value or "null")
            return f'"{shortened(value)}"'
    return shortened(value)
