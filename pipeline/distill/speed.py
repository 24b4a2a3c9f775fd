"""Images a second of an encoder beside its teacher's, in turn on one device."""

from __future__ import annotations

import time
from statistics import median
from typing import TYPE_CHECKING

import torch

from ..encoders.distilled import Speed

if TYPE_CHECKING:
    from torch import Tensor

    from ..encoders.timm_vit import TimmEncoder

ROUNDS = 5


def compare_speed(teacher: TimmEncoder, encoder: TimmEncoder, images: Tensor) -> Speed:
    """Encode the same images by both, in turn.

    Args:
        teacher: the original.
        encoder: the copy.
        images: uint8 ``[B, 3, R, R]``, on their device.

    Returns:
        What was measured.
    """
    rates: list[tuple[float, float]] = []
    for number in range(ROUNDS + 1):
        found = tuple(len(images) / _seconds(each, images) for each in (teacher, encoder))
        if number:  # in the first much is done for the first time
            rates.append((found[0], found[1]))
    cuda = teacher.device.type == "cuda"
    return Speed(
        device=torch.cuda.get_device_name(teacher.device) if cuda else "CPU",
        threads=0 if cuda else torch.get_num_threads(),
        compute_dtype=teacher.compute_dtype,
        batch_size=len(images),
        teacher=median(each for each, _ in rates),
        copy=median(each for _, each in rates),
        ratio=median(copy / original for original, copy in rates),
    )


def _seconds(encoder: TimmEncoder, images: Tensor) -> float:
    # of one thread the processor's time can be told, whatever else the machine does
    alone = images.device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.thread_time if alone else time.perf_counter
    _wait(images.device)
    began = clock()
    encoder.encode(images)
    _wait(images.device)
    return clock() - began


def _wait(device: torch.device) -> None:
    # computing on a GPU has only begun when the call returns
    if device.type == "cuda":
        torch.cuda.synchronize(device)
