"""What stored attention changes in HASTE's loss and gradient, against autograd of the loss itself."""

from __future__ import annotations

import math

import pytest
import torch
from repa.pipeline.columns.measures import STUDENT_TURN, GradientErrors
from repa.trainer.methods.attention import attention_alignment

IMAGES, BLOCKS, HEADS, TOKENS, WIDTH, SCALE = 2, 3, 2, 7, 4, 0.4


def drawn(seed: int, width: int = WIDTH) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (IMAGES, BLOCKS, HEADS, TOKENS, width)
    first, second = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return first, second


def test_against_autograd_of_the_loss() -> None:
    exact, stored = drawn(5), drawn(6, 3)
    errors = GradientErrors(HEADS, TOKENS, WIDTH, SCALE)
    found = errors(exact, stored)
    assert set(found) == {"initial", "near"}
    for image in range(IMAGES):
        for block in range(BLOCKS):
            true = exact[0][image, block], exact[1][image, block]
            for name, (cosine, change) in found.items():
                assert cosine.shape == change.shape == (IMAGES, BLOCKS)
                student = [each.clone().requires_grad_() for each in errors._student(name, *true)]
                losses, gradients = [], []
                for target in (true, (stored[0][image, block], stored[1][image, block])):
                    loss, _ = attention_alignment(
                        *(each[None] for each in (*student, *target)), scale=SCALE, teacher_scale=SCALE
                    )
                    losses.append(loss.item())
                    found_gradients = torch.autograd.grad(loss, student)
                    gradients.append(torch.cat([each.flatten() for each in found_gradients]))
                expected = float(gradients[0] @ gradients[1] / gradients[0].norm() / gradients[1].norm())
                assert float(cosine[image, block]) == pytest.approx(expected, abs=1e-12)
                assert float(change[image, block]) == pytest.approx(losses[1] - losses[0], abs=1e-12)


def test_exact_targets_change_nothing() -> None:
    exact = drawn(5)
    queries, keys = exact
    # nor does what softmax does not see
    for stored in (exact, (2 * queries, keys / 2), (queries, keys + 3)):
        for cosine, change in GradientErrors(HEADS, TOKENS, WIDTH, SCALE)(exact, stored).values():
            torch.testing.assert_close(cosine, torch.ones_like(cosine), atol=1e-12, rtol=0)
            assert change.abs().max() < 1e-12


def test_the_students_are_what_they_are_called() -> None:
    errors = GradientErrors(HEADS, TOKENS, WIDTH, SCALE)
    queries, keys = (each[0, 0] for each in drawn(5))
    near = errors._student("near", queries, keys)
    for turned, straight in zip(near, (queries, keys - keys.mean(-2, keepdim=True)), strict=True):
        angle = torch.nn.functional.cosine_similarity(turned, straight, dim=-1)
        torch.testing.assert_close(angle, torch.full_like(angle, math.cos(math.radians(STUDENT_TURN))))
        torch.testing.assert_close(turned.norm(dim=-1), straight.norm(dim=-1))
    again = GradientErrors(HEADS, TOKENS, WIDTH, SCALE)
    for name in errors.STUDENTS:
        for mine, other in zip(
            errors._student(name, queries, keys), again._student(name, queries, keys), strict=True
        ):
            assert torch.equal(mine, other)
