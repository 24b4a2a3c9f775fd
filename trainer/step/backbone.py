"""The backbone of a run with its conditioner, by the seed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ...data.format.columns import LABEL
from ..models import registry as backbones
from ..models.conditions import build_conditioner
from .randomness import derived_seed

if TYPE_CHECKING:
    from ..methods.base import Method
    from ..models.base import Backbone, BackboneConfig
    from ..models.conditioning import ConditionColumn


def build_backbone(
    config: BackboneConfig, method: Method, seed: int, condition: ConditionColumn | None = None
) -> Backbone:
    """Return the backbone with its conditioner. Its weights depend on the seed, not on the method.

    Args:
        config: architecture.
        method: may bring its own conditioner.
        seed: of the run.
        condition: what the conditioner is built from where the method has none; None for the label.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derived_seed(seed, "conditioner"))
        conditioner = method.make_conditioner(config.num_classes)
        if conditioner is None and condition is not None and condition.column != LABEL:
            conditioner = build_conditioner(condition)
        torch.manual_seed(derived_seed(seed, "backbone"))
        return backbones.build(config, conditioner)
