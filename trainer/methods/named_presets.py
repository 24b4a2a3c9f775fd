"""Presets by name, several settings of a method under the word that ``--set method.preset=`` takes.

A preset stands between the defaults and what the user sets. So does one of a configuration file, and a preset
that the command line names stands between the file and the rest of the command line.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ...data.edge import shortened
from ...data.errors import RepaError
from ..typed import from_mapping

if TYPE_CHECKING:
    from collections.abc import Collection

    from .base import Method

KEY = "method.preset"
_NONE = (None, "", "none")


def with_preset(
    method: type[Method],
    settings: Mapping[str, Any],
    *,
    before: Mapping[str, Any],
    given: Collection[str],
) -> tuple[str, dict[str, Any]]:
    """Return the preset's name, empty without one, and the settings with what it sets and the user does not.

    Args:
        method: whose preset it is.
        settings: of the method, among them ``preset``, as a file and the command line say together.
        before: what the file alone says of this method.
        given: names of the settings that the command line says.

    Raises:
        RepaError: the method has no such preset; the remedy lists those it has.
    """
    settings = dict(settings)
    chosen = settings.pop("preset", None)
    preset = _preset(method, chosen)
    earlier = before.get("preset")
    if earlier != chosen:
        of_earlier = method.named_presets.get(earlier, {}) if isinstance(earlier, str) else {}
        replaced = {*of_earlier, *preset} - set(given)
        settings = {key: value for key, value in settings.items() if key not in replaced}
    return "" if chosen in _NONE else str(chosen), {**preset, **settings}


def describe_presets(method: type[Method]) -> str:
    """Return what each preset sets, in one line."""
    said = (
        f"{name} is {' '.join(f'{key}={value}' for key, value in preset.items()) or 'the defaults'}"
        for name, preset in method.named_presets.items()
    )
    return "; ".join(said)


def unusable_presets(method: type[Method]) -> str:
    """Say what is wrong with the presets that a class declares, nothing if all can be used."""
    declared: Any = method.named_presets
    if not isinstance(declared, Mapping):
        return "named_presets is no mapping"
    for name, preset in declared.items():
        if not isinstance(name, str) or name in _NONE or not isinstance(preset, Mapping):
            return f"{shortened(name)} is no name with settings"
        try:
            from_mapping(method.config_class, preset, prefix=f"{name}: ")
        except RepaError as error:
            return error.what
    return ""


def _preset(method: type[Method], chosen: Any) -> Mapping[str, Any]:
    if chosen in _NONE:
        return {}
    if isinstance(chosen, str) and chosen in method.named_presets:
        return method.named_presets[chosen]
    names = ", ".join(method.named_presets)
    raise RepaError(
        f"preset {shortened(chosen)} of {method.__name__} is unknown",
        f"the presets are {names}" if names else f"it has none: leave {KEY} out",
        field=KEY,
    )
