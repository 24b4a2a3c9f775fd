"""What a distillation is asked to do."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path  # noqa: TC003 — dataclasses read it

from ...data.errors import RepaError
from ..encoders.idle_teacher import NORMS


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """A `repa distill` as asked for.

    Attributes:
        cache: folder of the cache, or its address in a bucket.
        teacher: name of the teacher; None: the cache's only one.
        idle: θ, the share of the hidden channels that stay linear.
        norm: one of `NORMS`.
        data: the images of the cache.
        may_import: whether ``data`` may name a module.
        weights: file of the teacher's weights; None: the hub's.
        fit_images: images of the closed-form start; None: 384, or all that there are.
        steps: of the training end to end; 0 leaves the start as it is; None: 400, or 0 where there are fewer
            than five times as many images to train on as ``fit_images``.
        batch_size: images of a step, and of a forward pass.
        learning_rate: of AdamW.
        held_out: images that are measured on and not trained on; None: 200, or a fifth.
        seed: of the order of the images.
        save_every: steps after which the state is kept.
        out: the file to write; None: ``encoders/NAME.safetensors``.
        device: where it computes.
    """

    cache: str
    teacher: str | None
    idle: float
    norm: str
    data: str
    may_import: bool
    weights: Path | None
    fit_images: int | None
    steps: int | None
    batch_size: int
    learning_rate: float
    held_out: int | None
    seed: int
    save_every: int
    out: Path | None
    device: str


def check_numbers(config: DistillConfig) -> None:
    """Refuse numbers that are out of their range.

    Raises:
        RepaError: the first of them.
    """
    for flag, value, least, most in (
        ("--fit-images", config.fit_images, 1, 10**6),
        ("--steps", config.steps, 0, 10**9),
        ("--batch-size", config.batch_size, 2 if config.norm == NORMS[1] else 1, 1 << 16),
        ("--held-out", config.held_out, 2, 10**6),
        ("--seed", config.seed, 0, 2**63 - 1),
        ("--save-every", config.save_every, 1, 10**9),
    ):
        if value is not None and not least <= value <= most:
            raise RepaError(f"{flag} {value} is not valid", f"give {least} to {most:,}", field=flag)
    if not 0 < config.learning_rate < 1:
        raise RepaError(
            f"--learning-rate {config.learning_rate:g} is not valid",
            "give a small one above 0, as 2e-6",
            field="--learning-rate",
        )
    if config.norm not in NORMS:
        raise RepaError(
            f"--norm {config.norm!r} is unknown", f"the choices are {' and '.join(NORMS)}", field="--norm"
        )
