"""Every setting of a training run with its type, its default and what it is, as the classes say it."""

from __future__ import annotations

import inspect
import re
from dataclasses import MISSING, Field, dataclass, fields
from typing import TYPE_CHECKING, Any, get_type_hints

from .config import OF_METHOD, SECTIONS, TrainConfig
from .methods.named_presets import KEY as PRESET
from .methods.named_presets import describe_presets
from .methods.outside import find_method, method_names
from .objectives.registry import OBJECTIVES
from .typed import describe

if TYPE_CHECKING:
    from collections.abc import Iterator

_ENTRY = re.compile(r"^(\w+): ")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One setting.

    Attributes:
        section: ``train``, ``objective NAME`` or ``method NAME``.
        key: what stands before ``=`` in ``--set``.
        type: in words, with bounds.
        default: as ``--set`` would write it.
        help: one line.
    """

    section: str
    key: str
    type: str
    default: str
    help: str


def list_settings() -> list[Setting]:
    """Return all settings, those of the run first, then of each objective and of each method.

    Raises:
        RepaError: a method that an installed package offers cannot be had.
    """
    found = [
        each for each in settings_of(TrainConfig, "train", "") if each.key not in (*SECTIONS, *OF_METHOD)
    ]
    found += [
        Setting(
            section="train", key="method", type="text", default="repa", help=_help(TrainConfig)["method_name"]
        ),
        Setting(
            section="train",
            key="objective",
            type=f"one of {', '.join(OBJECTIVES)}",
            default="that of the model's family",
            help="what the backbone learns to predict.",
        ),
        Setting(
            section="train", key="trainer.KEY", type="as YAML", default="", help=_help(TrainConfig)["trainer"]
        ),
    ]
    for name, objective in OBJECTIVES.items():
        found += settings_of(objective.config_class, f"objective {name}", "objective.")
    for name in method_names():
        method = find_method(name)
        if method.named_presets:
            found.append(
                Setting(
                    section=f"method {name}",
                    key=PRESET,
                    type=f"one of {', '.join(method.named_presets)} or none",
                    default="none",
                    help=f"several settings at once: {describe_presets(method)}.",
                )
            )
        found += settings_of(method.config_class, f"method {name}", "method.")
    return found


def settings_of(kind: Any, section: str, prefix: str) -> Iterator[Setting]:
    """Yield the settings that are the fields of a dataclass.

    Args:
        kind: the dataclass, whose docstring says what each is.
        section: of the settings.
        prefix: of their keys.
    """
    hints, said = get_type_hints(kind, include_extras=True), _help(kind)
    for item in fields(kind):
        yield Setting(
            section=section,
            key=prefix + item.name,
            type=describe(hints[item.name]),
            default=_default(item),
            help=said.get(item.name, ""),
        )


def _default(item: Field[Any]) -> str:
    value = item.default_factory() if item.default_factory is not MISSING else item.default
    if value is MISSING:
        return ""
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _help(kind: type) -> dict[str, str]:
    """Field → what the docstrings of a class and of those before it say of it, in one line."""
    found: dict[str, str] = {}
    for each in reversed(kind.__mro__):
        _, _, attributes = inspect.cleandoc(each.__doc__ or "").partition("Attributes:\n")
        name = ""
        for line in inspect.cleandoc(attributes).splitlines():
            entry = _ENTRY.match(line)
            if entry is not None:
                name = entry[1]
                found[name] = line.partition(": ")[2]
            elif name and line.startswith(" "):
                found[name] += f" {line.strip()}"
            else:
                name = ""
    return {name: text.replace("``", "'") for name, text in found.items()}
