"""The golden DiT: its networks, its numbers and its heads, in float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from repa.trainer.models.dit import DiT, DiTConfig
from safetensors.torch import load_file

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

CONFIG = DiTConfig(depth=6, width=48, heads=4, patch_size=2, input_size=16, num_classes=10)
TOLERANCE = {"rtol": 0, "atol": 1e-9}
HEADS = ("ap_head.", "projectors.")


@dataclass(frozen=True)
class Reference:
    """The reference's arrays in float64, its networks, and what the alignment alone uses."""

    numbers: dict[str, Tensor]
    student: DiT
    teacher: DiT
    heads: dict[str, Tensor]


def load(shared: Path) -> Reference:
    with np.load(shared / "golden" / "dit.npz") as file:
        arrays = {key: torch.from_numpy(file[key]) for key in file}
    numbers = {key: value.double() if value.is_floating_point() else value for key, value in arrays.items()}
    networks, heads = [], []
    for name in ("dit", "dit_ema"):
        state = load_file(shared / "golden" / f"{name}.safetensors")
        state = {key: value.double() for key, value in state.items()}
        network = DiT(CONFIG).double()
        network.load_state_dict({key: value for key, value in state.items() if not key.startswith(HEADS)})
        networks.append(network.eval())
        heads.append({key: value for key, value in state.items() if key.startswith(HEADS)})
    return Reference(numbers, networks[0], networks[1].requires_grad_(False), heads[0])
