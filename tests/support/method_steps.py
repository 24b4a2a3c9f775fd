"""A step as a method sees it, of a backbone of four blocks on a 4×4 grid and a teacher ``a``."""

from __future__ import annotations

import torch
from repa.trainer.methods.base import Step
from repa.trainer.models.capture import BackboneFacts, Captured
from repa.trainer.models.sit import SiTConfig

GRIDS = {"sd-vae": (8, 8), "a": (4, 4), "b": (4, 4)}


def facts_of() -> BackboneFacts:
    config = SiTConfig(depth=4, width=32, heads=2, patch_size=2, input_size=8, num_classes=5)
    return config.facts


def student_of(hidden: torch.Tensor, block: int = 2) -> Captured:
    return Captured(prediction=None, hidden={block: hidden}, grids={block: (4, 4)})


def make_step(
    columns: dict[str, torch.Tensor], student: Captured, index: int = 0, batch_size: int = 1
) -> Step:
    blank = torch.zeros(1)
    return Step(
        index=index,
        columns=columns,
        x0=blank,
        noise=blank,
        t=blank,
        condition=blank,
        student=student,
        interpolate=lambda t: t,
        generator=torch.Generator(),
        batch_size=batch_size,
    )
