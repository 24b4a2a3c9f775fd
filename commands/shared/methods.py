"""The methods that a command runs one after another, and the backbone of each."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...data.errors import RepaError

if TYPE_CHECKING:
    from ...trainer.methods.base import Method

FLAG = "--methods"
EXAMPLE = "none,repa,haste"


def chosen_methods(text: str) -> dict[str, type[Method]]:
    """Return the classes of methods by name, in the order given.

    Args:
        text: names between commas.

    Raises:
        RepaError: no name, one that is unknown, or one given twice.
    """
    from ...trainer.methods.outside import find_method

    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise RepaError(f"{FLAG} names no method", f"give some, as {EXAMPLE}", field=FLAG)
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise RepaError(f"{FLAG} names {', '.join(twice)} twice", "name each once", field=FLAG)
    try:
        return {name: find_method(name) for name in names}
    except RepaError as error:
        raise RepaError(error.what, error.remedy, field=FLAG) from error


def backbone_for(method: type[Method], model: str) -> str:
    """Return the backbone that a method is run on beside others, in the size and patch of theirs.

    Args:
        method: the method; one whose paper has another family of backbones is run on that.
        model: name of the others' backbone, ``SiT-T/1``.
    """
    from ...trainer.methods.base import Method

    family = method.default_model.rpartition("-")[0]
    if method.default_model == Method.default_model or model.startswith(f"{family}-"):
        return model
    return f"{family}-{model.rpartition('-')[2]}"


def ends_by_itself(method: type[Method], size: str) -> bool:
    """Return whether the preset of a size of backbone ends a method's alignment at a step, as HASTE's do."""
    return getattr(method.presets.get(size), "stop", None) is not None
