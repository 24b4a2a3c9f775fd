"""How much of a GPU's arithmetic a run uses, the model FLOPs utilisation (MFU).

MFU = images/s · FLOPs of an image / (devices · peak FLOP/s), as of PaLM (Chowdhery et al., arXiv 2204.02311,
appendix B): what the model needs, whatever is computed for it. FLOPs of an image are

    3 · F + 6 · P · T

with F the FLOPs of the backbone's forward pass of one image, of which the backward pass takes twice as many,
P the parameters of the method that train in the phase, such as projectors, and T the tokens of the backbone,
with each of which each of them is multiplied. PyTorch counts F: matrix products, convolutions and attention,
a multiplication and an addition each. What else a method does is left out (maps of attention, passes of the
averaged weights, a live teacher), so that MFU is rather too low than too high.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING

import torch
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from .arithmetic import products_of, resolve_precision

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..config import TrainConfig
    from ..methods.base import Phase
    from ..step.module import TrainingModule

TERA = 1e12

PEAKS: Mapping[str, tuple[float, float, float]] = {
    "B200": (2250, 1125, 75),
    "GH200": (989.4, 494.7, 66.9),
    "H200 NVL": (835, 417.5, 60),
    "H200": (989.4, 494.7, 66.9),
    "H100 HBM3": (989.4, 494.7, 66.9),
    "H100 NVL": (835, 417.5, 60),
    "H100 PCIe": (756, 378, 51.2),
    "A100": (312, 156, 19.5),
    "L40S": (362, 183, 91.6),
    "L4": (121, 60, 30.3),
    "RTX 4090": (165.2, 82.6, 82.6),
    "A10": (125, 62.5, 31.2),
    "V100 SXM2": (125, 15.7, 15.7),
    "T4": (65, 8.1, 8.1),
}
"""Words of a device's name → its peaks in 10¹² FLOP/s, dense, as its maker states them.

They are those of bfloat16 or float16 with sums in float32, of TF32, and of float32, which stands for TF32
where there is none."""


def peak_flops(device_name: str, precision: str, *, tf32: bool) -> float | None:
    """Return the peak FLOP/s of a device, None of one that is not in the table.

    Args:
        device_name: as the driver says it.
        precision: of the run, as of the setting.
        tf32: whether float32 products may be computed in TF32.
    """
    words = set(re.split(r"[\s-]+", device_name))
    if words & {"MIG", "Laptop"}:
        # a slice of a GPU, or another one, under the name of the whole
        return None
    for name, (half, tensor, single) in PEAKS.items():
        if words >= set(name.split()):
            peak = half if precision in ("bf16-mixed", "16-mixed") else tensor if tf32 else single
            return peak * TERA
    return None


def known_peak(config: TrainConfig, device: torch.device) -> float | None:
    """Return the peak FLOP/s of a device at a run's precision, None of the CPU and of what no table has.

    Args:
        config: of the run.
        device: that trains.
    """
    if device.type != "cuda":
        return None
    tf32 = products_of(config) == "high"
    return peak_flops(torch.cuda.get_device_name(device), resolve_precision(config), tf32=tf32)


def image_flops(module: TrainingModule, phase: Phase) -> float:
    """Count the FLOPs of a training step for each image, by the formula above.

    Nothing is computed: PyTorch runs the shapes alone.

    Args:
        module: of the run, not compiled.
        phase: one of its method's.
    """
    backbone, method = module.backbone, module.method
    state = {**dict(backbone.named_parameters()), **dict(backbone.named_buffers())}
    shapes = {name: torch.empty_like(values, device="meta") for name, values in state.items()}
    condition = backbone.y_embedder.null(1).to("meta")
    x = torch.empty(1, *module.latent_shape, device="meta")
    t = torch.empty(1, device="meta")
    widths = module.beside.widths.values()
    tokens = (tuple(torch.empty(1, width, device="meta") for width in widths),) if widths else ()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        functional_call(backbone, shapes, (x, t, condition, method.capture(phase), *tokens))
    idle = method.flags(phase).idle
    training = sum(
        parameter.numel()
        for name, parameter in method.named_parameters()
        if parameter.requires_grad and not f"method.{name}".startswith(idle or ("-",))
    )
    forward: int = counter.get_total_flops()
    return 3.0 * forward + 6.0 * training * math.prod(backbone.facts.grid)


class Utilisation:
    """MFU of a run, from its images a second.

    Args:
        module: of the run, not compiled.
        peak: FLOP/s of one device.
        devices: how many train.
    """

    def __init__(self, module: TrainingModule, *, peak: float, devices: int) -> None:
        self._method = module.method
        self._flops = {phase.name: image_flops(module, phase) for phase in module.method.phases()}
        self._peak = peak * devices

    def at(self, step: int, images_per_second: float) -> float:
        """Return the MFU of the step that ends when `step` are done, as a fraction."""
        phase = self._method.phase_at(step - 1)
        return images_per_second * self._flops[phase.name] / self._peak


def utilisation_of(
    config: TrainConfig, module: TrainingModule, device: torch.device, devices: int
) -> Utilisation | None:
    """Return what tells a run's MFU, None on the CPU, on a GPU that is not in the table, or uncounted.

    A backbone from outside whose shapes alone PyTorch cannot run is not counted.
    """
    peak = known_peak(config, device)
    if peak is None:
        return None
    try:
        return Utilisation(module, peak=peak, devices=devices)
    except (RuntimeError, NotImplementedError, ValueError):
        return None
