"""The objective's loss on rows that were held out of training, with draws that never change.

The same rows see the same posterior noise, ε and times at every evaluation, so two numbers of a run, or of
two runs, differ by the weights alone.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ...data.format.columns import LABEL
from ..compiling import uncompiled
from ..models.capture import NOTHING
from ..step.beside import Beside
from ..step.randomness import generator_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from numpy.typing import NDArray

    from ...data.reading.reader import CacheReader
    from ..models.base import Backbone
    from ..objectives.base import Objective
    from ..step.latents import Latents

CHUNK = 64
_GOLDEN = (5**0.5 - 1) / 2


@dataclass(frozen=True, kw_only=True)
class HeldOutBatch:
    """A chunk of the held-out rows.

    Attributes:
        first: number of its first row among the held-out rows.
        columns: those of the latents and the conditioner's, as stored.
        label: int64 ``[B]``.
    """

    first: int
    columns: Mapping[str, Tensor]
    label: Tensor


def held_out_batches(
    reader: CacheReader, rows: NDArray[np.int64], columns: tuple[str, ...], *, rank: int = 0, world: int = 1
) -> Iterator[HeldOutBatch]:
    """Yield the held-out rows in chunks of `CHUNK`. Of several ranks each takes every ``world``-th chunk.

    The first view is read.
    """
    for first in range(rank * CHUNK, len(rows), world * CHUNK):
        chunk = rows[first : first + CHUNK]
        out = {
            name: np.empty(
                (len(chunk), *reader.manifest.columns[name].shape), reader.manifest.columns[name].numpy_dtype
            )
            for name in columns
            if name != LABEL
        }
        reader.read_rows(chunk, tuple(out), out)
        yield HeldOutBatch(
            first=first,
            columns={name: torch.from_numpy(array) for name, array in out.items()},
            label=torch.from_numpy(reader.labels[chunk].astype(np.int64)),
        )


def held_out_times(first: int, count: int) -> Tensor:
    """Return times float32 ``[B]`` of rows ``first, first + 1, …`` by the golden ratio, even on [0, 1).

    Our choice: any number of consecutive rows covers the times evenly, so a few hundred rows give a steady
    number.
    """
    middles = torch.arange(first, first + count, dtype=torch.float64) + 0.5
    return (middles * _GOLDEN).frac().float()


@torch.no_grad()
def held_out_sums(
    networks: Mapping[str, Backbone],
    batches: Iterator[HeldOutBatch],
    *,
    objective: Objective,
    latents: Latents,
    seed: int,
    device: torch.device,
    beside: Beside | None = None,
    context: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> tuple[dict[str, float], int]:
    """Sum over rows the objective's loss of several networks on the same draws.

    Args:
        networks: name → network; the condition is each row's own, never dropped.
        batches: the held-out rows.
        objective: what the networks predict.
        latents: what the networks learn to make, and of which shape.
        seed: of the draws.
        device: of the networks.
        beside: what the networks denoise beside the latent, whose columns the batches have; None for nothing.
        context: makes the context of a forward pass, for example autocast; float32 by default.

    Returns:
        Name → sum, ``<name>_<vector>`` → unweighted sum of each vector beside the latent, and the number of
        rows.
    """
    beside = beside or Beside((), {})
    sums = dict.fromkeys((*networks, *(f"{name}_{each}" for name in networks for each in beside.widths)), 0.0)
    rows = 0
    for batch in batches:
        shape = latents.shape(batch.columns)
        generator = generator_for(seed, "held out", batch.first)
        # on the CPU, so that every device sees the same numbers
        posterior = torch.randn(shape, generator=generator) if latents.drawn else None
        noise = torch.randn(shape, generator=generator).to(device)
        t = held_out_times(batch.first, shape[0]).to(device)
        x0 = latents.x0(batch.columns, posterior).to(device)
        noised = objective.noised(x0, noise, t)
        columns = {name: batch.columns[name].to(device) for name in beside.columns}
        # draws of their own, so that those of the latent are the same for every method
        noises = {
            each: torch.randn(len(t), width, generator=generator_for(seed, "held out", each, batch.first))
            for each, width in beside.widths.items()
        }
        noises = {each: values.to(device) for each, values in noises.items()}
        vectors = beside.noised(columns, noises, t, objective)
        tokens = (NOTHING, tuple(each.x_t for each in vectors.values())) if vectors else ()
        for name, network in networks.items():
            conditioner = network.y_embedder
            named = {each: batch.columns[each].to(device) for each in conditioner.columns}
            condition = conditioner.whole(conditioner.values(named, batch.label.to(device)))
            # a compiled network would compile again for this batch size
            with context(), uncompiled():
                captured = network(noised.x_t, noised.t, condition, *tokens)
            sums[name] += _sum(objective.losses(captured, noised))
            for each, losses in beside.losses(captured, vectors, objective).items():
                sums[f"{name}_{each}"] += _sum(losses)
        rows += shape[0]
    return sums, rows


def _sum(losses: Mapping[str, Tensor]) -> float:
    return sum(values.double().sum().item() for values in losses.values())
