"""The FLOP/s that steps of training reach, beside the most that the device is known or seen to reach."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch

from ...trainer.run.arithmetic import float32_products, resolve_precision
from ...trainer.run.utilisation import image_flops

if TYPE_CHECKING:
    from ...trainer.config import TrainConfig
    from ...trainer.methods.base import Phase
    from ...trainer.step.module import TrainingModule

SIDE = {"cpu": 2048, "cuda": 8192}
"""Kind of device → side of the square matrices whose product is timed."""
HALVES = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
"""Precision of a run → the dtype that it multiplies in, where that is not float32."""
_PRODUCTS = 3


def counted_flops(module: TrainingModule, phase: Phase) -> float:
    """Return the FLOPs of a step for each image, as of MFU, 0 where PyTorch cannot count them.

    Args:
        module: of the run, not compiled.
        phase: one of its method's.
    """
    try:
        return image_flops(module, phase)
    except (RuntimeError, NotImplementedError, ValueError):
        return 0.0


def product_flops(device: torch.device, config: TrainConfig) -> float:
    """Measure the FLOP/s of a large matrix product, the most that a step could reach.

    The product is of two square matrices of normal numbers, in the dtype that a step multiplies in, by as
    many threads. The fastest of a few counts.

    Args:
        device: that trains.
        config: of the run.
    """
    with float32_products(config):
        return _product_flops(device, HALVES.get(resolve_precision(config), torch.float32))


def _product_flops(device: torch.device, dtype: torch.dtype) -> float:
    side = SIDE.get(device.type, SIDE["cpu"])
    generator = torch.Generator(device).manual_seed(0)
    left, right = (torch.randn(side, side, generator=generator, device=device).to(dtype) for _ in range(2))
    torch.mm(left, right)
    seconds = []
    for _ in range(_PRODUCTS):
        _wait(device)
        started = time.perf_counter()
        torch.mm(left, right)
        _wait(device)
        seconds.append(time.perf_counter() - started)
    return float(2 * side**3 / min(seconds))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
