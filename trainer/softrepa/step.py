"""The training step, in which all pairs of a batch go through the frozen denoiser."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor

from ...data.format.columns import MOMENTS
from ...data.format.int8 import dequantise
from ...data.reading.latents import sample_posterior, scale_latent
from ..models.stable_diffusion import STEPS
from ..step.checkpoints import SOFTREPA_KEY
from ..step.means import Means
from ..step.randomness import generator_for
from .contrast import found, rows_of_pairs

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch.optim import Optimizer

    from ...data.reading.latents import LatentScale
    from ...data.reading.loader import Batch
    from ..models.stable_diffusion import Denoiser
    from .checks import TextColumns
    from .contrast import RowsOfPairs
    from .settings import SoftConfig
    from .tokens import SoftTokens

RANGES = 10
"""Ranges of time whose retrieval accuracy is told apart, each ten bins."""


class Draws(NamedTuple):
    """What is random in the pairs of a batch, on the CPU, so that every device sees the same numbers.

    Attributes:
        posterior: of each image's latent, ``[B, C, h, w]``.
        noise: ε of all of them, ``[1, C, h, w]``.
        t: time of all of them, in steps of the chain.
    """

    posterior: Tensor
    noise: Tensor
    t: int


class Pairs:
    """The pairs of a batch of images and captions.

    Args:
        denoiser: frozen.
        soft: trained.
        scale: of the latents.
        text: columns of the captions.
        size: side in pixels of the images.
    """

    def __init__(
        self, denoiser: Denoiser, soft: SoftTokens, scale: LatentScale, text: TextColumns, size: int
    ) -> None:
        self.denoiser = denoiser
        self.soft = soft
        self.scale = scale
        self.text = text
        self.size = size

    def rows(
        self,
        columns: Mapping[str, Tensor],
        same: Tensor,
        draws: Draws,
        *,
        rows: int,
        matched_weight: float,
    ) -> Iterator[RowsOfPairs]:
        """Yield the pairs of a batch, some images at a time.

        Args:
            columns: moments and text columns of the batch, as stored, ``[B, …]``, on the device.
            same: which captions are equal, bool ``[B, B]``.
            draws: what is random.
            rows: images at a time.
            matched_weight: d of `contrast.contrastive_loss`.
        """
        moments = columns[MOMENTS].float()
        device = moments.device
        latent = sample_posterior(moments, draws.posterior.to(device))
        t = torch.tensor([draws.t], device=device)
        noisy, target = self.denoiser.noised(scale_latent(latent, *self.scale), draws.noise.to(device), t)
        states, pooled = text_of(columns, self.text)

        def predict(images: Tensor, captions: Tensor) -> Tensor:
            times = t.expand(len(images))
            return self.denoiser.predict(
                noisy[images],
                times,
                states[captions],
                None if pooled is None else pooled[captions],
                self.soft(times),
                self.size,
            )

        return rows_of_pairs(predict, target, same, rows=rows, matched_weight=matched_weight)


class SoftModule(LightningModule):
    """The soft tokens as Lightning trains them. The denoiser is no part of it, nor of a checkpoint.

    Args:
        config: of the run, filled in.
        pairs: what is trained and on what.
        identity: plain values that a checkpoint must share with the run that resumes it.
    """

    def __init__(self, config: SoftConfig, pairs: Pairs, identity: Mapping[str, Any]) -> None:
        super().__init__()
        self.config = config
        self.soft = pairs.soft
        self.pairs = pairs
        self.identity = dict(identity)
        self.means = Means()
        self.best: dict[str, float] = {}
        # the memory of some pairs is freed before the next are made
        self.automatic_optimization = False

    def predicts_after(self, steps: int) -> bool:
        """Say that there is always something to evaluate."""
        del steps
        return True

    def fresh_starts(self) -> frozenset[int]:
        """Say that no phase begins afresh."""
        return frozenset()

    def columns_at(self, step: int) -> tuple[str, ...]:
        """Name the columns of the cache that a step reads."""
        del step
        return (MOMENTS, *self.pairs.text.names)

    def on_fit_start(self) -> None:
        """Move the denoiser, which Lightning does not know of."""
        self.pairs.denoiser.to(self.device)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Hold the loader against the trainer."""
        del batch_idx
        if batch.step != self.global_step:
            raise RuntimeError(f"the loader is at step {batch.step}, the trainer at {self.global_step}")

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """Make one step on all pairs of a batch."""
        del batch_idx
        assert batch.captions is not None, "columns of captions are read"
        config, optimizer = self.config, self.optimizers()
        assert isinstance(optimizer, LightningOptimizer), "there is one"
        rate = cycled_rate(config, batch.step)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        same = (batch.captions[:, None] == batch.captions[None]).to(self.device)
        shape = (batch.columns[MOMENTS].shape[1] // 2, *batch.columns[MOMENTS].shape[2:])
        draws = draw(config.seed, batch.step, len(same), shape)
        weight = config.matched_weight or 0.0
        parts, loss = [], torch.zeros((), device=self.device)
        for part in self.pairs.rows(batch.columns, same, draws, rows=config.rows, matched_weight=weight):
            self.manual_backward(part.loss)
            parts.append(part.errors.detach())
            loss = loss + part.loss.detach()
        optimizer.step()
        self._record(torch.cat(parts), same, loss, draws.t)
        self.means.add("lr", rate)

    def _record(self, errors: Tensor, same: Tensor, loss: Tensor, t: int) -> None:
        matched = errors.diagonal().mean()
        others = errors.masked_fill(same, 0).sum() / (~same).sum().clamp(min=1)
        retrieval = found(errors, same).float().mean()
        self.means.add("loss", loss)
        self.means.add("contrast", loss - (self.config.matched_weight or 0.0) * matched)
        self.means.add("error_matched", matched)
        self.means.add("error_others", others)
        self.means.add("retrieval", retrieval)
        self.means.add(f"retrieval_t{t * RANGES // STEPS}", retrieval)

    def configure_optimizers(self) -> Optimizer:
        """Make AdamW over the tokens and their table alone."""
        config = self.config
        return torch.optim.AdamW(
            self.soft.parameters(), lr=config.lr, betas=config.betas, weight_decay=config.weight_decay
        )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what the run is, the means since the last row and the best evaluation."""
        checkpoint[SOFTREPA_KEY] = {
            **self.identity,
            "means": self.means.state_dict(),
            "best": dict(self.best),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Continue the means and the evaluations."""
        saved = checkpoint[SOFTREPA_KEY]
        self.means.load_state_dict(saved["means"])
        self.best = dict(saved["best"])

    def fetch_means(self) -> None:
        """Bring the recorded values to the host."""
        self.means.fetch()

    def take_means(self) -> dict[str, float]:
        """Return means since the last call."""
        return self.means.take()

    def over_ranks(self, values: Tensor) -> Tensor:
        """Return values as they are, for there is one process."""
        return values

    def sum_over_ranks(self, value: float) -> float:
        """Return a value as it is, for there is one process."""
        return value


def draw(seed: int, step: int, count: int, shape: tuple[int, ...]) -> Draws:
    """Draw what is random in a step, a function of seed and step alone.

    Args:
        seed: of the run.
        step: from 0.
        count: images.
        shape: ``(C, h, w)`` of a latent.
    """
    generator = generator_for(seed, "softrepa", step)
    return Draws(
        posterior=torch.randn(count, *shape, generator=generator),
        noise=torch.randn(1, *shape, generator=generator),
        t=int(torch.randint(STEPS, (), generator=generator)),
    )


def text_of(columns: Mapping[str, Tensor], text: TextColumns) -> tuple[Tensor, Tensor | None]:
    """Return the states ``[B, S, E]`` and the pooled text ``[B, P]`` of columns as stored."""
    states = columns[text.states]
    if text.scale:
        states = dequantise(states, columns[text.scale])
    return states, columns[text.pooled] if text.pooled else None


def cycled_rate(config: SoftConfig, step: int) -> float:
    """Return the learning rate of a step, counted from 0.

    It falls from ``lr`` to ``lr_min`` on half a cosine in ``cycle`` steps and begins again (Loshchilov &
    Hutter, arXiv 1608.03983, eq. 5).
    """
    passed = step % config.cycle / config.cycle
    return config.lr_min + (config.lr - config.lr_min) * (1 + math.cos(math.pi * passed)) / 2
