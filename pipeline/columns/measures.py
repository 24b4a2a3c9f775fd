"""How far what is stored lies from what the teacher computed."""

from __future__ import annotations

import math
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from .slabs import head_slabs

PREDICTION_COSINE = 0.5
PREDICTION_SEED = 0


def attention_divergence(
    exact: tuple[Tensor, Tensor], stored: tuple[Tensor, Tensor], logit_scale: float
) -> Tensor:
    """Compute KL(teacher ‖ stored) of each query's attention over the patch keys, in nats and in float64.

    Args:
        exact: queries and keys as computed, each float32 ``[B, L, H, T, Dh]``.
        stored: queries and keys as read back, each float32 ``[B, L, H, T, r]``.
        logit_scale: of both.

    Returns:
        float64 ``[B, L, H, T]``.
    """
    images, blocks, heads, tokens, _ = exact[0].shape
    result = torch.empty((images, blocks, heads, tokens), dtype=torch.float64, device=exact[0].device)
    # all maps at once would be as large as what the cache avoids to hold
    for image, block, some in product(range(images), range(blocks), head_slabs(heads, tokens)):
        chosen = image, block, some
        teacher, kept = (
            torch.log_softmax(q[chosen].double() @ k[chosen].double().mT * logit_scale, dim=-1)
            for q, k in (exact, stored)
        )
        result[chosen] = (teacher.exp() * (teacher - kept)).sum(dim=-1)
    return result


class TokenErrors:
    """What storing tokens changes in their direction and in the loss of REPA.

    The loss is measured on predictions at cosine 0.5 to the exact tokens, in directions drawn once: as far as
    a trained projector comes, roughly. What a prediction p loses or gains is
    cos(p, z) − cos(p, ẑ) ≤ ‖z/‖z‖ − ẑ/‖ẑ‖‖ = √(2 − 2·cos(z, ẑ)).

    Args:
        tokens: T.
        width: D.
    """

    def __init__(self, tokens: int, width: int) -> None:
        generator = torch.Generator().manual_seed(PREDICTION_SEED)
        self._drawn = torch.randn((tokens, width), dtype=torch.float64, generator=generator)

    def __call__(self, exact: Tensor, stored: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the errors of each token.

        Args:
            exact: tokens as computed, float32 ``[B, T, D]``.
            stored: tokens as read back, of the same shape.

        Returns:
            1 − cos(z, ẑ) and cos(p, z) − cos(p, ẑ), each float64 ``[B, T]``.
        """
        truth, kept = (F.normalize(each.double(), dim=-1) for each in (exact, stored))
        drawn = self._drawn.to(truth.device)
        across = F.normalize(drawn - (drawn * truth).sum(-1, keepdim=True) * truth, dim=-1)
        prediction = PREDICTION_COSINE * truth + (1 - PREDICTION_COSINE**2) ** 0.5 * across
        # ½‖z − ẑ‖² of unit vectors is 1 − cos, without its cancellation
        error = (truth - kept).square().sum(-1) / 2
        return error, (prediction * (truth - kept)).sum(-1)


STUDENT_TURN = 15.0
STUDENT_SEED = 0


class GradientErrors:
    """What storing attention changes in the loss that aligns a student's attention, and in its gradient.

    Two students are looked at. The *initial* one has queries and keys of independent normal numbers, as a
    network has before its first step. The *near* one has the teacher's queries and centred keys, each turned
    by 15° in a direction drawn once: there the loss is close to its minimum, and what is stored wrongly is no
    longer small beside what is left to learn. With P the attention and s the student's logit scale, the
    gradient of the cross entropy is s·(P_S − P_T)·k for the queries and s·(P_S − P_T)ᵀ·q for the keys.

    Args:
        heads: H.
        tokens: T.
        width: Dh.
        logit_scale: of both.
    """

    STUDENTS = ("initial", "near")

    def __init__(self, heads: int, tokens: int, width: int, logit_scale: float) -> None:
        generator = torch.Generator().manual_seed(STUDENT_SEED)
        shape = (2, heads, tokens, width)
        self._drawn = torch.randn(shape, dtype=torch.float64, generator=generator)
        self._scale = logit_scale

    def __call__(
        self, exact: tuple[Tensor, Tensor], stored: tuple[Tensor, Tensor]
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Compare the losses with exact and with stored targets.

        Args:
            exact: queries and keys as computed, each float32 ``[B, L, H, T, Dh]``.
            stored: queries and keys as read back, each float32 ``[B, L, H, T, r]``.

        Returns:
            Student → the cosine of the two gradients of all queries and keys of a block, and the change of
            the block's loss in nats, each float64 ``[B, L]``.
        """
        images, blocks = exact[0].shape[:2]
        empty = torch.empty((2, images, blocks), dtype=torch.float64, device=exact[0].device)
        result = {name: empty.clone() for name in self.STUDENTS}
        for image in range(images):
            for block in range(blocks):
                true, kept = (
                    (q[image, block].double(), k[image, block].double()) for q, k in (exact, stored)
                )
                for values, found in zip(result.values(), self._compare(true, kept), strict=True):
                    values[:, image, block] = found
        return {name: (values[0], values[1]) for name, values in result.items()}

    def _student(self, name: str, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        first, second = self._drawn.to(queries.device)
        if name == "initial":
            return first, second
        return _turned(queries, first), _turned(keys - keys.mean(-2, keepdim=True), second)

    def _compare(self, true: tuple[Tensor, Tensor], kept: tuple[Tensor, Tensor]) -> list[Tensor]:
        """Return cosine and change of loss of each student, float64 ``[2]``."""
        shape = true[0].shape
        students = [self._student(name, *true) for name in self.STUDENTS]
        losses = true[0].new_empty(len(students), 2, *shape[:2])
        gradients = true[0].new_empty(len(students), 2, 2, *shape)
        for some in head_slabs(*shape[:2]):
            targets = [torch.softmax(q[some] @ k[some].mT * self._scale, dim=-1) for q, k in (true, kept)]
            for loss, gradient, student in zip(losses, gradients, students, strict=True):
                queries, keys = (each[some] for each in student)
                log = torch.log_softmax(queries @ keys.mT * self._scale, dim=-1)
                for number, target in enumerate(targets):
                    loss[number, some] = -(target * log).sum(-1)
                    off = log.exp() - target
                    gradient[number, 0, some] = off @ keys
                    gradient[number, 1, some] = off.mT @ queries
        cosines = F.cosine_similarity(gradients[:, 0].flatten(1), gradients[:, 1].flatten(1), dim=-1)
        changes = [each[1].mean() - each[0].mean() for each in losses]
        return [torch.stack(each) for each in zip(cosines, changes, strict=True)]


def _turned(values: Tensor, drawn: Tensor) -> Tensor:
    """Turn each vector by `STUDENT_TURN` degrees towards a drawn one, keeping its length."""
    direction = F.normalize(values, dim=-1)
    across = F.normalize(drawn - (drawn * direction).sum(-1, keepdim=True) * direction, dim=-1)
    angle = math.radians(STUDENT_TURN)
    length = values.norm(dim=-1, keepdim=True)
    turned: Tensor = math.cos(angle) * values + math.sin(angle) * length * across
    return turned
