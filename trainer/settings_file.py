"""YAML that others may have written, bounded before and after it is read.

PyYAML's safe loader runs no code, but it recurses into brackets without end, expands aliases of aliases, and
leaves an integer of thousands of digits to Python, which refuses it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import yaml

from ..data.edge import printable
from ..data.errors import RepaError

if TYPE_CHECKING:
    from pathlib import Path

MOST_BYTES = 1 << 20
MOST_DEPTH = 16
MOST_ALIASES = 16  # doubled at every level, they make 65,536 values at most

_OPENS = (yaml.MappingStartEvent, yaml.SequenceStartEvent)
_CLOSES = (yaml.MappingEndEvent, yaml.SequenceEndEvent)


def load_yaml(path: Path) -> dict[str, Any]:
    """Return the values of a configuration file, as ``--config`` takes it.

    Raises:
        RepaError: the file cannot be read, or is no YAML mapping of a reasonable size.
    """
    where = f"the configuration {printable(path)}"
    mend = "mend it, or name another with --config"
    try:
        if path.exists() and not path.is_file():
            raise RepaError(f"{where} is no file", "name the config.yaml of a run", field="--config")
        with path.open("rb") as file:
            raw = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise RepaError(
            f"cannot read {where}: {error.strerror}", "name one that can be read", field="--config"
        ) from error
    if len(raw) > MOST_BYTES:
        raise RepaError(f"{where} is larger than {MOST_BYTES:,} bytes", mend, field="--config")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RepaError(f"{where} is not YAML: it is not UTF-8 text", mend, field="--config") from error
    values = parse_yaml(text, where=where, remedy=mend, field="--config")
    if not isinstance(values, dict):
        raise RepaError(
            f"{where} is not a mapping of settings", "see config.yaml of any run", field="--config"
        )
    return values


def parse_yaml(text: str, *, where: str, remedy: str, field: str) -> Any:
    """Return the plain values of a YAML text.

    Args:
        text: the document.
        where: its name, for the error.
        remedy: what to do about one that is none.
        field: flag or setting that gave it.

    Raises:
        RepaError: it is no YAML, nested deeper than 16 levels, uses more than 16 aliases, or holds what no
            setting can be.
    """
    try:
        _check_events(text)
        values = yaml.safe_load(text)
        _check_depth(values)
    # ValueError: of Python, for thousands of digits or a 30th of February
    except (yaml.YAMLError, ValueError) as error:
        line = printable(" ".join(str(error).split()))
        raise RepaError(f"{where} is not YAML: {line}", remedy, field=field) from error
    return values


def _check_events(text: str) -> None:
    """Refuse depth and aliases before anything is built of them. The events come one by one, unnested."""
    depth = aliases = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        depth += isinstance(event, _OPENS) - isinstance(event, _CLOSES)
        aliases += isinstance(event, yaml.AliasEvent)
        if depth > MOST_DEPTH:
            raise ValueError(f"it is nested deeper than {MOST_DEPTH} levels")
        if aliases > MOST_ALIASES:
            raise ValueError(f"it has more than {MOST_ALIASES} aliases")


def _check_depth(values: Any) -> None:
    """Refuse what aliases made deep, as a value may hold itself."""
    level = [values]
    for _ in range(MOST_DEPTH * MOST_ALIASES):
        level = [
            item
            for each in level
            if isinstance(each, (dict, list))
            for item in (each.values() if isinstance(each, dict) else each)
        ]
        if not level:
            return
        if len(level) > MOST_BYTES:
            raise ValueError("its aliases make too many values")
    raise ValueError("a value holds itself")
