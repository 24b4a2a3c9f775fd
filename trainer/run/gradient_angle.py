"""The angle between what alignment and the objective's loss ask of a block (HASTE, arXiv 2505.16792).

The paper ends alignment where the cosine of the two gradients, over the parameters of one block and averaged
over four times, falls below −0.05; all its published results use a fixed step instead, and its own curve for
SiT-XL does not reach that threshold. So the angle is something to look at: logged, and acted on by nobody.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, cast

import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from ..methods.base import Problem
from ..step.draws import StepDraws
from ..step.gradients import cosine
from ..step.randomness import derived_seed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lightning.pytorch import LightningModule, Trainer

    from ...data.reading.loader import Batch
    from ..config import TrainConfig
    from ..methods.base import Method, Phase
    from ..models.capture import BackboneFacts
    from ..step.draws import Draws
    from ..step.module import TrainingModule

NAME = "gradient_angle"
TIMES = (0.02, 0.1, 0.5, 0.8)
"""The paper's."""


def angle_block(config: TrainConfig, method: Method, phase: Phase) -> int | None:
    """Choose the block whose parameters are looked at, counted from 1, or None if the phase aligns nothing.

    It is the configured one, else the last block whose activations the phase captures: the last that
    alignment reaches.
    """
    capture = method.capture(phase)
    captured = (*capture.hidden, *capture.attention)
    if not captured or not method.flags(phase).objective_loss:
        return None
    return config.gradient_angle_block or max(captured)


def angle_problems(config: TrainConfig, method: Method, backbone: BackboneFacts) -> list[Problem]:
    """Check whether the configured block exists and alignment reaches it."""
    block = config.gradient_angle_block
    if not config.gradient_angle_every or block is None:
        return []
    captures = [method.capture(phase) for phase in method.phases()]
    reached = max((each for capture in captures for each in (*capture.hidden, *capture.attention)), default=0)
    last = min(reached or backbone.depth, backbone.depth)
    if 1 <= block <= last:
        return []
    return [
        Problem(
            what=f"gradient_angle_block is {block}, alignment reaches blocks 1 to {last}",
            remedy=f"set a block from 1 to {last}, or none for block {last}",
            field="gradient_angle_block",
        )
    ]


class GradientAngle(Callback):
    """Measures the angle before the first micro-batch of every so many steps.

    It is part of the row of the step that ends with this batch.

    Args:
        config: of the run.
    """

    def __init__(self, config: TrainConfig) -> None:
        self._every = config.gradient_angle_every

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        """Add the angle to the means of the step if it is due."""
        del trainer, batch_idx
        if not self._every or batch.micro or (batch.step + 1) % self._every:
            return
        module = cast("TrainingModule", pl_module)
        angle = gradient_angle(module, batch)
        if angle is not None:
            module.means.add(NAME, angle)


def gradient_angle(module: TrainingModule, batch: Batch) -> Tensor | None:
    """Cosine between the gradients of the weighted alignment terms and of the objective's loss.

    A method's terms that ask the prediction for the objective's target, as GMem's cosine, align nothing and
    count with the objective's.

    Over all parameters of one block, for the images of one micro-batch, mean over `TIMES`, each the time of
    all tokens; noise and dropped
    labels are drawn from streams of their own. Leaves nothing behind: parameters, their gradients and the
    draws of training are as before. Computed in the precision of training, but for float16, whose gradients
    would need their loss scaled: then in float32.

    Args:
        module: of the run, within its trainer.
        batch: on the module's device.

    Returns:
        A scalar, 0 where one of the gradients is zero, as at the first step; None if nothing is aligned.
    """
    phase = module.method.phase_at(batch.step)
    block = angle_block(module.config, module.method, phase)
    if block is None:
        return None
    parameters = [each for each in module.backbone.blocks[block - 1].parameters() if each.requires_grad]
    draws = StepDraws(
        seed=derived_seed(module.config.seed, NAME),
        rank=module.global_rank,
        device=module.device,
    ).of_step(
        batch.step,
        len(batch.label),
        module.latent_shape,
        module.objective.times,
        module.backbone.y_embedder,
        module.beside.widths,
        partial(module.method.draws, phase),
    )
    half = module.config.precision == "16-mixed"
    cosines = []
    for time in TIMES:
        at_time = replace(draws, t=torch.full_like(draws.t, time))
        with nullcontext() if half else module.trainer.precision_plugin.forward_context():
            # one forward pass each: a compiled network's graph can be walked back only once
            gradients = [_gradient(module, batch, at_time, parameters, own=each) for each in (True, False)]
        cosines.append(cosine(*gradients))
    return torch.stack(cosines).mean()


def _gradient(
    module: TrainingModule, batch: Batch, draws: Draws, parameters: Sequence[Tensor], *, own: bool
) -> Sequence[Tensor]:
    """Compute the gradient of what the prediction is trained by, or of all other weighted terms."""
    objective = module.objective_terms | module.method.target_terms
    weighted = [
        term.weight * term.value
        for name, term in module.terms(batch, draws).items()
        if term.weight is not None and (name in objective) == own
    ]
    total = torch.stack(weighted).sum()
    return torch.autograd.grad(total, parameters, materialize_grads=True)
