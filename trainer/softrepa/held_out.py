"""The rows that were held out of training, with draws that never change, and the run's end by them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ...data.format.columns import MOMENTS
from ..models.stable_diffusion import STEPS
from ..run.callbacks import StepCallback
from ..step.randomness import generator_for
from .contrast import found
from .step import RANGES, Draws

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lightning.pytorch import Trainer
    from numpy.typing import NDArray
    from torch import Tensor

    from ...data.reading.reader import CacheReader
    from .settings import SoftConfig
    from .step import SoftModule

HELD_OUT = "held_out"


def held_out_batches(
    reader: CacheReader, rows: NDArray[np.int64], columns: tuple[str, ...], size: int
) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Yield whole batches of held-out rows, their columns and which of their captions are equal.

    A batch is spread over all rows, whose neighbours may be alike, and has the first caption of each image.

    Args:
        reader: of the columns.
        rows: held out, int64 ``[H]``.
        columns: to read.
        size: images of a batch, B.
    """
    batches = len(rows) // size
    assert reader.captions is not None, "columns of captions are read"
    for number in range(batches):
        chosen = np.sort(rows[: batches * size][number::batches])
        specs = reader.manifest.columns
        out = {name: np.empty((size, *specs[name].shape), specs[name].numpy_dtype) for name in columns}
        reader.read_rows(chosen, columns, out)
        captions = torch.from_numpy(reader.captions.rows_of(chosen))
        yield (
            {name: torch.from_numpy(array) for name, array in out.items()},
            captions[:, None] == captions[None],
        )


@torch.no_grad()
def held_out_values(
    module: SoftModule, batches: Iterator[tuple[dict[str, Tensor], Tensor]]
) -> dict[str, float]:
    """Return the means over held-out batches and the middles of ten ranges of time.

    Args:
        module: with its denoiser.
        batches: of `held_out_batches`.

    Returns:
        ``held_out``, the contrastive loss alone; ``held_out_matched``, the error of matched pairs; and
        ``held_out_retrieval``, how often an image's own caption has the least error, of all times and, with
        ``_t0`` to ``_t9``, of each range.
    """
    seed, device = module.config.seed, module.device
    losses: list[float] = []
    matched: list[float] = []
    hits: list[list[float]] = [[] for _ in range(RANGES)]
    for number, (columns, same) in enumerate(batches):
        moments = columns[MOMENTS]
        shape = (moments.shape[1] // 2, *moments.shape[2:])
        generator = generator_for(seed, "softrepa held out", number)
        posterior = torch.randn(len(same), *shape, generator=generator)
        there = {name: values.to(device) for name, values in columns.items()}
        for each in range(RANGES):
            t = (2 * each + 1) * STEPS // (2 * RANGES)
            draws = Draws(posterior, torch.randn(1, *shape, generator=generator), t)
            parts = list(
                module.pairs.rows(there, same.to(device), draws, rows=module.config.rows, matched_weight=0.0)
            )
            errors = torch.cat([part.errors for part in parts])
            losses.append(sum(float(part.loss) for part in parts))
            matched.append(float(errors.diagonal().mean()))
            hits[each].append(float(found(errors, same.to(device)).float().mean()))
    return {
        HELD_OUT: float(np.mean(losses)),
        f"{HELD_OUT}_matched": float(np.mean(matched)),
        f"{HELD_OUT}_retrieval": float(np.mean(hits)),
        **{f"{HELD_OUT}_retrieval_t{each}": float(np.mean(of)) for each, of in enumerate(hits)},
    }


def evaluation(
    config: SoftConfig, reader: CacheReader, rows: NDArray[np.int64]
) -> Callable[[Trainer, Any], dict[str, float]]:
    """Return what measures the held-out rows and remembers the best of the run.

    Args:
        config: of the run.
        reader: of the columns.
        rows: held out.
    """

    def evaluate(trainer: Trainer, module: SoftModule) -> dict[str, float]:
        batches = held_out_batches(reader, rows, module.columns_at(0), config.batch_size)
        values = held_out_values(module, batches)
        best = module.best
        if not best or values[HELD_OUT] < best["value"]:
            module.best = {"value": values[HELD_OUT], "step": trainer.global_step, "worse": 0}
        else:
            module.best = {**best, "worse": best["worse"] + 1}
        return values

    return evaluate


def ended_early(config: SoftConfig, best: dict[str, float]) -> bool:
    """Return whether the held-out loss has been no lower for long enough."""
    return bool(config.patience and best.get("worse", 0) >= config.patience)


class Best(StepCallback):
    """Keeps the tokens of the lowest held-out loss, and ends a run whose loss falls no more.

    Must stand behind the evaluation and before the checkpoints.

    Args:
        config: of the run.
        save: writes the tokens as they are, the best so far.
    """

    def __init__(self, config: SoftConfig, save: Callable[[SoftModule, int], None]) -> None:
        super().__init__(config.as_run())
        self._soft = config
        self._save = save

    def on_step(self, trainer: Trainer, module: Any, step: int) -> None:
        """Look at the last evaluation."""
        if module.best.get("step") == step:
            self._save(module, step)
        if ended_early(self._soft, module.best):
            trainer.should_stop = True
