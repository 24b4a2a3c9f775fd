"""Whether method, backbone, objective and condition of a run fit each other."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch

from ...data.format.columns import LABEL, TEXT_STATES, split_column
from ...data.units import counted
from ..models import registry as backbones
from ..models.conditioning import DROP_PROBABILITY, ConditionColumn
from ..models.conditions import build_conditioner
from ..objectives.registry import make_objective, name_of

if TYPE_CHECKING:
    from ...data.format.manifest import Manifest
    from ..config import TrainConfig
    from ..methods.base import Method
    from ..models.base import BackboneConfig
    from .checked import Checked


def check_prediction(config: TrainConfig, backbone: BackboneConfig, found: Checked) -> None:
    """Check whether the backbone predicts what the objective trains, by its channels.

    Args:
        config: of the run.
        backbone: its architecture.
        found: takes the problems.
    """
    name = name_of(config.objective)
    wanted = make_objective(config.objective).channels(backbone.in_channels)
    if backbone.prediction_channels != wanted:
        able = [each for each, family in backbones.BACKBONES.items() if family.objective == name]
        own = backbones.family_of(config.model).objective
        found.add(
            f"objective {name} wants {counted(wanted, 'channel')} of a latent of {backbone.in_channels}, and "
            f"{config.model} predicts {backbone.prediction_channels}",
            f"take a model of {' or '.join(able)}, or objective={own}" if able else f"take objective={own}",
            field="objective",
        )


def check_recomputed(config: TrainConfig, backbone: BackboneConfig, found: Checked) -> None:
    """Check whether activation checkpointing reaches a block.

    Args:
        config: of the run.
        backbone: its architecture.
        found: takes the problems.
    """
    every, depth = config.activation_checkpointing, backbone.facts.depth
    if every != "off" and every > depth:
        found.add(
            f"activation_checkpointing is {every}, and {config.model} has {counted(depth, 'block')}",
            f"set it to at most {depth}, 1 for every block, or off",
            field="activation_checkpointing",
        )


def check_denoised(config: TrainConfig, backbone: BackboneConfig, method: Method, found: Checked) -> None:
    """Give the backbone what the method denoises beside the latent, where backbone and objective take it.

    Args:
        config: of the run.
        backbone: its architecture.
        method: its method.
        found: takes the problems, and the architecture with those vectors.
    """
    widths = tuple(each.width for each in method.denoised())
    if widths and not make_objective(config.objective).vectors:
        found.add(
            f"method {config.method_name} denoises a vector beside the latent, and objective "
            f"{name_of(config.objective)} takes latents alone",
            "take a --model of another objective, or another --method",
            field="objective",
        )
    found.backbone = found.attempt(lambda: backbones.with_tokens(backbone, config.model, widths))


def check_times(config: TrainConfig, method: Method, found: Checked) -> None:
    """Check whether the times that the objective is to draw are drawn in any phase.

    Args:
        config: of the run.
        method: its method.
        found: takes the problems.
    """
    if not all(method.time_law(phase) for phase in method.phases()):
        return
    for key in ("times", "shift"):
        value, default = (getattr(each, key, None) for each in (config.objective, type(config.objective)()))
        if value != default:
            found.add(
                f"objective.{key}={value} has no effect: method {config.method_name} draws times by a law of "
                "its own",
                "leave it out",
                field=f"objective.{key}",
            )


def check_token_times(config: TrainConfig, backbone: BackboneConfig, method: Method, found: Checked) -> None:
    """Check whether backbone and objective take a time of each token, where the method asks for it.

    Args:
        config: of the run.
        backbone: its architecture.
        method: its method.
        found: takes the problems.
    """
    if not any(method.token_times(phase) for phase in method.phases()):
        return
    if not backbone.facts.token_times:
        found.add(
            f"method {config.method_name} groups the tokens of an image, and {config.model} has one time for "
            "all",
            "take another --model, or leave the tokens ungrouped",
            field="--model",
        )
    if not make_objective(config.objective).token_times:
        found.add(
            f"method {config.method_name} groups the tokens of an image, and objective "
            f"{name_of(config.objective)} has one time for all",
            "take another objective, or leave the tokens ungrouped",
            field="objective",
        )


def check_condition(
    config: TrainConfig, manifest: Manifest, backbone: BackboneConfig, method: Method, found: Checked
) -> None:
    """Check whether the backbone can be conditioned on what the run, or its method, asks for.

    Args:
        config: of the run.
        manifest: of its cache.
        backbone: its architecture.
        method: its method.
        found: takes the problems, and what the conditioner is built from.
    """
    with torch.random.fork_rng(devices=[]):
        conditioner = method.make_conditioner(backbone.num_classes)
        if conditioner is None:
            found.condition = found.attempt(lambda: _condition_column(config, manifest, backbone))
            conditioner = (
                None
                if found.condition is None
                else found.attempt(partial(build_conditioner, found.condition))
            )
        elif config.condition == LABEL:
            found.condition = conditioner.built_from
        else:
            found.add(
                f"method {config.method_name} chooses the condition itself, {conditioner.column}, and "
                f"condition is {config.condition}",
                "leave condition out",
                field="condition",
            )
    if conditioner is None:
        return
    found.condition_columns = conditioner.columns
    if conditioner.column != LABEL and config.label_dropout != DROP_PROBABILITY:
        found.add(
            f"label_dropout={config.label_dropout:g} is of labels, and the network is conditioned on "
            f"{conditioner.column}",
            "leave label_dropout out",
            field="label_dropout",
        )
    if backbone.takes_sequences and not conditioner.sequence:
        there = [name for name in manifest.columns if split_column(name)[1] == TEXT_STATES]
        found.add(
            f"{config.model} reads text, and {conditioner.column} is none",
            f"take --set condition={there[0]}" if there else "add captions with `repa preprocess --captions`",
            field="condition",
        )
    if conditioner.sequence and not backbone.takes_sequences:
        found.add(
            f"the condition {conditioner.column} is a sequence, and {config.model} takes one vector",
            "take another condition or another --model",
            field="condition",
        )


def _condition_column(config: TrainConfig, manifest: Manifest, backbone: BackboneConfig) -> ConditionColumn:
    """Return the configured column, from which a conditioner is built.

    Raises:
        RepaError: its name is not of the grammar, or the cache has no such column.
    """
    column = config.condition
    if column != LABEL:
        manifest.require((column,), where=config.cache)
    return ConditionColumn(
        column=column,
        shape=() if column == LABEL else manifest.columns[column].shape,
        scaled=column != LABEL and manifest.columns[column].dtype == "int8",
        num_classes=backbone.num_classes,
        width=backbone.facts.width,
    )
