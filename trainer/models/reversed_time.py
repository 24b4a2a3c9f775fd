"""Weights of networks whose time runs from noise at 0 to data at 1, as weights of networks as ours.

Such a network û predicts data − noise, ours noise − data, v(x, t) = −û(x, 1 − t). Both turns are linear maps
at an end of the network, so they go into its first and last linear layers and nothing is left of them: what
is loaded can be trained on, sampled and looked into as any other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .layers import time_frequencies

if TYPE_CHECKING:
    from collections.abc import Mapping

FIRST = "t_embedder.mlp.0.weight"
LAST = ("final_layer.linear.weight", "final_layer.linear.bias")


def reverse_time(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the state dict of the same network with time and sign reversed.

    With angles f of t = 1, cos((1 − t)·f) = cos f·cos tf + sin f·sin tf and
    sin((1 − t)·f) = sin f·cos tf − cos f·sin tf: the linear layer after the sinusoids takes the turn.
    It is computed in float64, and the layer is float32 at least.

    Args:
        state: of a transformer of `layers`, with `FIRST` ``[D, 256]`` and `LAST`.
    """
    weight = state[FIRST]
    frequencies = time_frequencies(weight.device).double()
    cosines, sines = frequencies.cos(), frequencies.sin()
    of_cosines, of_sines = weight.double().chunk(2, dim=1)
    turned = torch.cat(
        [of_cosines * cosines + of_sines * sines, of_cosines * sines - of_sines * cosines], dim=1
    )
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return {**state, FIRST: turned.to(dtype), **{name: -state[name] for name in LAST}}
