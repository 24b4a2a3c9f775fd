"""What a run measures beside its training values, as the loss of held-out rows and figures of samples."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ...data.reading.reader import CacheReader
from .evaluations import Evaluations, Evaluator
from .held_out import held_out_batches, held_out_sums

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from lightning.pytorch import Trainer

    from ..config import TrainConfig
    from ..step.module import TrainingModule
    from .callbacks import Evaluate
    from .checked import Checked
    from .previews import LatentDecoder


def evaluations_of(
    config: TrainConfig,
    run: Path,
    checked: Checked,
    evaluator: Evaluator | None,
    decoder: LatentDecoder | None,
    say: Callable[[str], None],
) -> list[tuple[int, Evaluate]]:
    """Return what is measured beside training values, each with the steps between its values.

    Args:
        config: of the run.
        run: its folder.
        checked: its checks.
        evaluator: measures samples; None measures none.
        decoder: latents to images; None where there is none.
        say: prints a line.
    """
    evaluations: list[tuple[int, Evaluate]] = []
    held_out = _held_out_evaluation(config, checked)
    if held_out is not None:
        evaluations.append((config.eval_every, held_out))
    if evaluator is not None and decoder is not None:
        evaluations.append((config.evaluate_every, Evaluations(config, run, evaluator, decoder, say)))
    elif config.evaluate_every:
        say("no evaluations: no networks or no decoder were given")
    return evaluations


def _held_out_evaluation(
    config: TrainConfig, checked: Checked
) -> Callable[[Trainer, TrainingModule], dict[str, float]] | None:
    reader, rows = checked.reader, checked.held_out_rows
    if not isinstance(reader, CacheReader) or rows is None or not len(rows):
        return None

    def evaluate(trainer: Trainer, module: TrainingModule) -> dict[str, float]:
        names = (*module.latents.columns, *module.backbone.y_embedder.columns, *module.beside.columns)
        columns = tuple(dict.fromkeys(names))
        with module.shards.whole(module.ema) as averaged, module.shards.whole(module.backbone) as backbone:
            sums, count = held_out_sums(
                {"held_out_ema": averaged, "held_out": backbone},
                held_out_batches(reader, rows, columns, rank=trainer.global_rank, world=trainer.world_size),
                objective=module.objective,
                latents=module.latents,
                seed=config.seed,
                device=module.device,
                beside=module.beside,
                context=trainer.precision_plugin.forward_context,
            )
        totals = [*sums.values(), float(count)]
        if trainer.world_size > 1:
            vector = torch.tensor(totals, dtype=torch.float64, device=module.device)
            totals = trainer.strategy.reduce(vector, reduce_op="sum").tolist()
        return {name: total / totals[-1] for name, total in zip(sums, totals[:-1], strict=True)}

    return evaluate
