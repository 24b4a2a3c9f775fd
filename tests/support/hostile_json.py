"""JSON documents that others changed: any value anywhere becomes another, or goes, or gets another name."""

from __future__ import annotations

import copy
from typing import Any

from hypothesis import strategies as st

DELETED = object()

NUMBERS: list[Any] = [True, -1, 0, 1, 2, 7, 1.5, -0.0, 1e308, 2**31 - 1, 2**31, 2**63, 10**400]
TEXTS = ["", "x", "24", "../../x", "a/b", "/etc/x", ".", "..", "[/x]", "\x1b[2J", "\u202e", "\x00", "0" * 64]
LISTS: list[Any] = [[], [0], [-1, 2**40], [[[]]], ["x", None]]
OBJECTS: list[Any] = [{}, {"x": 1}, {"99999": "x"}, {"": {}}, {"../x": {}}]
VALUES: list[Any] = [None, False, *NUMBERS, *TEXTS, "é" * 300, *LISTS, *OBJECTS]
DEEP: Any = 1
for _ in range(60):
    DEEP = [DEEP]
VALUES.append(DEEP)


def places(document: Any) -> list[tuple[Any, ...]]:
    """The path of every value of a document but the whole."""
    found: list[tuple[Any, ...]] = []
    items = document.items() if isinstance(document, dict) else enumerate(document)
    for key, value in items:
        found.append((key,))
        if isinstance(value, (dict, list)):
            found += [(key, *rest) for rest in places(value)]
    return found


def changed(document: Any, path: tuple[Any, ...], value: Any, name: str | None = None) -> Any:
    """A copy with another value at a path; `DELETED` removes it, a name renames it where it has one."""
    copied = copy.deepcopy(document)
    inside = copied
    for key in path[:-1]:
        inside = inside[key]
    if name is not None and isinstance(inside, dict):
        inside[name] = inside.pop(path[-1])
    elif value is DELETED:
        del inside[path[-1]]
    else:
        inside[path[-1]] = value
    return copied


@st.composite
def hostile(draw: st.DrawFn, document: Any) -> Any:
    """The document with one to three changes."""
    for _ in range(draw(st.integers(1, 3))):
        there = places(document)
        if not there:
            break
        path = draw(st.sampled_from(there))
        value = draw(st.sampled_from([*VALUES, DELETED]))
        name = draw(st.one_of(st.none(), st.sampled_from(["../x", "x", "", "[/x]", "commits", "A" * 300])))
        document = changed(document, path, value, name if draw(st.integers(0, 4)) == 0 else None)
    return document
