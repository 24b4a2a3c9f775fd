"""The backbones by family, one line each.

Nothing else in the package names a family: who trains, samples, plans or checks a model asks here.
"""

from __future__ import annotations

from dataclasses import MISSING, asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch

from ...data.edge import shortened
from ...data.errors import RepaError
from ...data.units import counted
from ..typed import from_mapping
from .base import with_weights
from .dit import DiT, DiTConfig
from .lightningdit import LightningDiT, LightningDiTConfig
from .mmdit import MMDiT, MMDiTConfig
from .published import FAMILY, OtherFamilyError, PublishedCheckpoint, load_published
from .published_dit import load_dit
from .published_lightningdit import load_lightningdit
from .sit import SiT, SiTConfig
from .sit_down import SiTDown, SiTDownConfig

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from torch import Tensor

    from .base import Backbone, BackboneConfig
    from .conditioning import Conditioner

SETTINGS = {
    "qk_norm": "norm of queries and keys",
    "rope": "rotary positions",
    "rms_norm": "RMSNorm",
    "swiglu": "gated MLP",
    "adaln_zero": "first weights with gates and output at zero",
}
"""Settings of a run that are fields of an architecture, where it has the choice, and what each is."""

FLOW, DDPM = "flow", "ddpm"
FIRST = "SiT"
"""Family of the checkpoints that were written before there was another."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """What makes a family of backbones.

    Attributes:
        config: its architecture; knows the family's names.
        build: its network.
        objective: name of what it learns to predict where the run does not say.
        published: reads a published checkpoint, given the file, ``weights`` and whether somebody says that it
            is one of this family (``certain``); None if there is none.
    """

    config: type[BackboneConfig]
    build: type[Backbone]
    objective: str = FLOW
    published: Callable[..., PublishedCheckpoint] | None = None


BACKBONES: dict[str, Family] = {
    FIRST: Family(config=SiTConfig, build=SiT, published=load_published),
    "DiT": Family(config=DiTConfig, build=DiT, objective=DDPM, published=load_dit),
    "SiT-down": Family(config=SiTDownConfig, build=SiTDown),
    "LightningDiT": Family(config=LightningDiTConfig, build=LightningDiT, published=load_lightningdit),
    "MMDiT": Family(config=MMDiTConfig, build=MMDiT),
}


def family_of(model: str) -> Family:
    """Return the family that a model's name belongs to.

    Raises:
        RepaError: none knows the name; the remedy says what each family's names look like.
    """
    for family in BACKBONES.values():
        if family.config.knows(model):
            return family
    names = "; or ".join(family.config.names for family in BACKBONES.values())
    raise RepaError(f"model {model!r} is unknown", f"a name is {names}", field="--model")


def config_of(
    model: str, *, input_size: int, in_channels: int, num_classes: int, **settings: bool | None
) -> BackboneConfig:
    """Return the architecture of a model's name.

    Args:
        model: name, as ``SiT-B/2``.
        input_size: side of the latent.
        in_channels: channels of the latent.
        num_classes: classes, without the null class.
        settings: of `SETTINGS`; None leaves what the family has.

    Raises:
        RepaError: the name is unknown, the latent does not fit it, or it has no such choice; ``field`` is
            then the setting.
    """
    config = family_of(model).config
    choices = {item.name for item in fields(config)}
    # qk_norm is off where nobody has said anything, so off is no wish for a choice
    chosen = {name: value for name, value in settings.items() if value is not None}
    for name, value in tuple(chosen.items()):
        if name in choices:
            continue
        if name != "qk_norm" or value:
            raise RepaError(
                f"model {model} has no choice of {name}, {SETTINGS[name]}",
                f"leave {name} out, or take another --model",
                field=name,
            )
        del chosen[name]
    return config.named(
        model, input_size=input_size, in_channels=in_channels, num_classes=num_classes, **chosen
    )


def choices_of(config: BackboneConfig) -> dict[str, Any]:
    """Return the settings of `SETTINGS` that an architecture has, with what it chose."""
    return {name: getattr(config, name) for name in SETTINGS if hasattr(config, name)}


def with_tokens(config: BackboneConfig, model: str, widths: tuple[int, ...]) -> BackboneConfig:
    """Return an architecture that denoises vectors beside the latent.

    Args:
        config: architecture.
        model: its name, for the error.
        widths: channels of each vector; none leaves it as it is.

    Raises:
        RepaError: such a backbone denoises none, or fewer.
    """
    if len(widths) > config.most_tokens:
        able = ", ".join(name for name, each in BACKBONES.items() if each.config.most_tokens >= len(widths))
        raise RepaError(
            f"model {model} denoises {counted(config.most_tokens, 'vector')} beside the latent, the method "
            f"wants {len(widths)}",
            f"take a model of {able}" if able else "take another --method",
            field="--model",
        )
    return replace(config, token_widths=widths)


def build(config: BackboneConfig, conditioner: Conditioner | None = None) -> Backbone:
    """Return a network of an architecture.

    Args:
        config: architecture.
        conditioner: embeds the condition; None for class labels.
    """
    return _family(config)[1].build(config, conditioner)


def load(
    config: BackboneConfig, state: Mapping[str, Tensor], conditioner: Conditioner | None = None
) -> Backbone:
    """Return a network with the weights of a state dict, which it shares.

    Args:
        config: architecture.
        state: parameters and buffers, all of them.
        conditioner: embeds the condition; None for class labels.

    Raises:
        RepaError: the state dict is not of such a network.
    """
    with torch.device("meta"):
        expected = build(config, conditioner).state_dict().keys()
    if state.keys() != expected:
        raise RepaError(
            "the weights are not those of the backbone, or it has a condition of its method's",
            "it cannot be sampled",
        )
    return with_weights(lambda: build(config, conditioner), state)


def to_plain(config: BackboneConfig) -> dict[str, Any]:
    """Return plain values from which `from_plain` makes the architecture again, for checkpoints."""
    return {"family": _family(config)[0], **asdict(config)}


def from_plain(values: Mapping[str, Any]) -> BackboneConfig:
    """Return the architecture of `to_plain`, or of a checkpoint from before there were families.

    Raises:
        RepaError: the family is unknown, or its architecture is incomplete or has other fields.
    """
    settings = dict(values)
    name = settings.pop("family", FIRST)
    if name not in BACKBONES:
        raise RepaError(f"backbone {name!r} is unknown", f"this repa has {', '.join(BACKBONES)}")
    config = BACKBONES[name].config
    needed = {item.name for item in fields(config) if item.default is MISSING}
    if needed - settings.keys():
        missing = ", ".join(sorted(needed - settings.keys()))
        raise RepaError(f"the backbone {name} lacks {missing}", "take another checkpoint", field="backbone")
    return from_mapping(config, settings, prefix="backbone.")


def load_any_published(
    path: Path, *, weights: str, family: str | None = None
) -> tuple[str, PublishedCheckpoint]:
    """Read a published checkpoint of whichever family it is of.

    Args:
        path: the file.
        weights: which of its weights, ``ema`` or ``model``.
        family: name of the one that somebody says it is of; None tries all.

    Returns:
        Name of the family's objective, and the checkpoint.

    Raises:
        RepaError: it is of none of them, or not of that.
    """
    readers = {
        name: (each.objective, each.published)
        for name, each in BACKBONES.items()
        if each.published is not None
    }
    if family is not None:
        if family not in readers:
            raise RepaError(
                f"family {shortened(family)} has no published checkpoints that are read here",
                f"say {' or '.join(readers)}",
                field=FAMILY,
            )
        objective, read = readers[family]
        return objective, read(path, weights=weights, certain=True)
    refusals: list[RepaError] = []
    for objective, read in readers.values():
        try:
            return objective, read(path, weights=weights, certain=False)
        except RepaError as error:
            refusals.append(error)
    # who knows the file for one of its own says best what is wrong with it
    own = {each.what: each for each in refusals if not isinstance(each, OtherFamilyError)}
    if len(own) == 1:
        raise next(iter(own.values()))
    reasons = "; ".join(own)
    raise RepaError(f"{path} is of no known backbone: {reasons}", "give a published checkpoint")


def family_name(config: BackboneConfig) -> str:
    """Return the name of the family of an architecture."""
    return _family(config)[0]


def _family(config: BackboneConfig) -> tuple[str, Family]:
    return next(item for item in BACKBONES.items() if type(config) is item[1].config)
