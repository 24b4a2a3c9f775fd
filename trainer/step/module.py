"""The training step, a Lightning module that joins objective, backbone and method and knows none by name."""

from __future__ import annotations

import copy
import math
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from ..compiling import chosen, compile_backbone, compile_children, compiled_losses
from ..input.datamodule import columns_of_phase
from ..methods.base import Method, Phase, Step, Term
from ..models.conditioning import LabelConditioner
from ..models.token_groups import TokenGroups
from ..objectives.registry import make_objective
from .beside import Beside, Statistics, tokens_of
from .clipping import clip, forget
from .draws import Draws, StepDraws
from .idle import IdleParameters, zero_of
from .means import Means
from .randomness import derived_seed
from .schedule import is_constant, learning_rate
from .sharding import Shards, own_part

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch.distributed.device_mesh import DeviceMesh
    from torch.optim import Optimizer

    from ...data.reading.loader import Batch
    from ..config import TrainConfig
    from ..models.base import Backbone
    from ..models.capture import Captured
    from ..objectives.base import Noised
    from .latents import Latents

CHECKPOINT_KEY = "repa"


class TrainingModule(LightningModule):
    """Backbone, its averaged copy and the method.

    The averaged weights are a registered submodule, so that checkpoints, devices and DDP's first broadcast
    have them. Lightning's ``EMAWeightAveraging`` does not fit: it copies this whole module, swaps the weights
    when training ends, and its first update takes the weights after step 1, where REPA averages from a hard
    copy of the initial ones. `torch.optim.swa_utils.AveragedModel` would, but waits for the device in every
    step to read its counter; its averaging function alone does not.

    Args:
        config: of the run.
        backbone: the network to train.
        method: adds the terms beside the objective's own.
        latents: what the backbone learns to make.
        identity: plain values that a checkpoint must share with the run that resumes it.
        statistics: name → mean and deviation of what is standardised before it is denoised beside the latent.

    Raises:
        ValueError: the method denoises vectors beside a latent whose tokens have times of their own.
    """

    def __init__(
        self,
        config: TrainConfig,
        backbone: Backbone,
        method: Method,
        latents: Latents,
        identity: Mapping[str, Any],
        statistics: Mapping[str, Statistics] | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.backbone = backbone
        if isinstance(backbone.y_embedder, LabelConditioner):
            backbone.y_embedder.drop_probability = config.label_dropout
        self.ema = copy.deepcopy(backbone).requires_grad_(False)
        if config.activation_checkpointing != "off":
            backbone.recompute_every = config.activation_checkpointing
        self.method = method
        self.latents = latents
        self.identity = dict(identity)
        self.objective = make_objective(config.objective)
        self.beside = Beside(method.denoised(), statistics or {})
        if self.beside.vectors and any(method.token_times(phase) for phase in method.phases()):
            raise ValueError("a vector beside the latent is in no group of tokens")
        self.means = Means()
        self.shards = Shards()
        self._average = get_ema_multi_avg_fn(config.ema_decay)  # type: ignore[no-untyped-call]
        self._averaged: tuple[Sequence[Tensor], Sequence[Tensor]] | None = None
        self._compiled = False
        self._draws: StepDraws | None = None
        self._method_generator: torch.Generator | None = None
        self._idle = IdleParameters()

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Shape ``(C, h, w)`` of one latent."""
        return self.backbone.config.latent_shape

    @property
    def objective_terms(self) -> frozenset[str]:
        """Names of the terms that the objective makes, of the latent and of what is denoised beside it."""
        return frozenset((*self.objective.terms, *self.beside.terms_of(self.objective.terms)))

    def predicts_after(self, steps: int) -> bool:
        """Return whether the prediction has been trained once so many steps are done."""
        return self.method.predicts_after(steps)

    def fresh_starts(self) -> frozenset[int]:
        """Return the steps at which a phase begins with fresh optimiser and averaged weights."""
        return frozenset(
            phase.start
            for phase in self.method.phases()
            if phase.start and self.method.flags(phase).fresh_start
        )

    def columns_at(self, step: int) -> tuple[str, ...]:
        """Name the columns of the cache that a step reads, without the label."""
        phase, condition = self.method.phase_at(step), self.backbone.y_embedder.columns
        return columns_of_phase(self.method, phase, condition, self.latents.columns)

    def on_fit_start(self) -> None:
        """Compile what the settings say, and the averaged weights where they teach."""
        how = chosen(self.config.compile, self.trainer.strategy.root_device.type)
        self._compiled = how != "off"
        if not self._compiled:
            return
        teaches = any(self.method.flags(phase).ema_forward for phase in self.method.phases())
        for network in (self.backbone, self.ema) if teaches else (self.backbone,):
            compile_backbone(network, network.blocks, how)
        compile_children(self.method)

    def shard(self, mesh: DeviceMesh) -> None:
        """Cut every parameter over the devices, see `sharding`.

        Args:
            mesh: the devices, one axis.
        """
        self.shards.cut(self, (self.backbone, self.ema), mesh)
        # parameters that are cut are other ones
        self._averaged, self._idle = None, IdleParameters()

    def on_train_start(self) -> None:
        """Give the optimiser the configuration's settings, in place of those that a checkpoint brings."""
        for optimizer in self.trainer.optimizers:
            for group in optimizer.param_groups:
                group |= {"betas": self.config.betas, "weight_decay": self.config.weight_decay}

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Start a step without the last one's gradients, and afresh where a phase that asks for it begins."""
        del batch_idx
        if batch.micro:
            return
        for optimizer in self.trainer.optimizers:
            # Lightning would do it after the forward pass, which would have to take memory beside them
            optimizer.zero_grad()
        if batch.step != self.global_step:
            raise RuntimeError(f"the loader is at step {batch.step}, the trainer at {self.global_step}")
        phase = self.method.phase_at(batch.step)
        if batch.step == phase.start > 0 and self.method.flags(phase).fresh_start:
            self._start_afresh()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Compute the loss of a micro-batch from the objective's, if the phase has it, and the method's."""
        del batch_idx
        total = self._total(self.terms(batch))
        if self.trainer.world_size == 1 or self.shards.cut_up:
            return total
        return total + zero_of(self.idle_parameters(self.method.phase_at(batch.step)), self.device)

    def terms(self, batch: Batch, draws: Draws | None = None) -> dict[str, Term]:
        """Compute the named parts of a micro-batch's loss.

        None of them is recorded, and no trainer is needed.

        Args:
            batch: on this module's device.
            draws: of the micro-batch; by default those of its step.

        Raises:
            RuntimeError: the phase wants the objective's loss of a backbone that it stops early.
        """
        phase = self.method.phase_at(batch.step)
        flags = self.method.flags(phase)
        draws = draws or self._draw(batch, phase)
        x0 = self.latents.x0(batch.columns, draws.posterior)
        groups = self._groups(phase, draws)
        noised = self.objective.noised(x0, draws.noise, self._on_latent(draws.t, groups))
        beside = self.beside.noised(batch.columns, draws.beside, draws.t, self.objective)
        condition = self.backbone.y_embedder.condition(self._condition_values(batch), draws.dropped)
        capture = self.method.capture(phase)
        tokens = (tuple(each.x_t for each in beside.values()),) if beside else ()
        student: Captured = self.backbone(
            noised.x_t, draws.t, condition, capture, *tokens, **_given(groups, draws.t)
        )

        terms: dict[str, Term] = {}
        if flags.objective_loss:
            if student.prediction is None:
                raise RuntimeError(f"phase {phase.name} wants the prediction but stops the backbone early")
            for name, values in self.objective.losses(student, noised).items():
                terms[name] = Term(value=values.mean(), weight=1.0)
            terms |= self.beside.terms(student, beside, self.objective)
        step = Step(
            index=batch.step,
            columns=batch.columns,
            x0=noised.x0,
            noise=noised.noise,
            t=draws.t,
            condition=condition,
            student=student,
            interpolate=lambda times: self.objective.interpolate(
                noised.x0, noised.noise, self._on_latent(times, groups)
            ),
            target=lambda: self.objective.target(noised),
            draws=draws.own,
            generator=self._seed_method(batch),
            batch_size=self.config.batch_size,
            beside=beside,
            ema_forward=self._ema_forward(condition, beside, groups) if flags.ema_forward else None,
        )
        with compiled_losses(self._compiled):
            return terms | self.method.losses(step)

    def _total(self, terms: Mapping[str, Term]) -> Tensor:
        """Sum weight · value. The sum, every value and every weight but the objective's are recorded."""
        weighted = [term.weight * term.value for term in terms.values() if term.weight is not None]
        total = torch.stack(weighted).sum()
        self.means.add("loss", total)
        for name, term in terms.items():
            self.means.add(name, term.value)
            if name not in self.objective.terms and term.weight is not None:
                self.means.add(f"{name}_weight", term.weight)
        return total

    def configure_optimizers(self) -> Optimizer:
        """Make AdamW over everything that trains."""
        config = self.config
        return torch.optim.AdamW(
            [parameter for parameter in self.parameters() if parameter.requires_grad],
            lr=config.lr,
            betas=config.betas,
            weight_decay=config.weight_decay,
            # one kernel for all parameters; gradient scaling of float16 needs to see the gradients before it
            fused=config.precision != "16-mixed",
        )

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip to the configured norm, and record the norm before."""
        del gradient_clip_val, gradient_clip_algorithm
        for parameter in self.idle_parameters(self.method.phase_at(self.global_step)):
            # the zeros that kept DDP's buckets whole must not let AdamW's momentum or decay move it
            parameter.grad = None
        norm = clip(optimizer, self.config.clip, cut_up=self.shards.cut_up)
        self.means.add("gradient_norm", norm)

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Any,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """Step at the step's learning rate, then average the weights once."""
        rate = learning_rate(self.config, self.global_step)
        for group in optimizer.param_groups:
            group["lr"] = rate
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        for each in self.trainer.optimizers:
            forget(each)
        if not is_constant(self.config):
            self.means.add("lr", rate)
        self.update_ema()

    @torch.no_grad()
    def update_ema(self) -> None:
        """Compute EMA ← decay·EMA + (1 − decay)·backbone, for every parameter of the backbone."""
        if self._averaged is None:
            # walking the modules costs more than a small network's average
            self._averaged = list(self.ema.parameters()), list(self.backbone.parameters())
        averaged, weights = self._averaged
        if self.shards.cut_up:
            averaged, weights = ([own_part(each) for each in some] for some in (averaged, weights))
        self._average(averaged, weights, 1)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what the run is, and the means since the last row."""
        checkpoint[CHECKPOINT_KEY] = {
            **self.identity,
            "predicts": self.predicts_after(self.global_step),
            "means": self.means.state_dict(),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Continue the means."""
        self.means.load_state_dict(checkpoint[CHECKPOINT_KEY]["means"])

    def fetch_means(self) -> None:
        """Bring the recorded values to the host, averaged over the ranks. Every rank must call it."""
        self.means.fetch(self.over_ranks)

    def take_means(self) -> dict[str, float]:
        """Return means since the last call, over steps and ranks. Every rank must call it."""
        return self.means.take(self.over_ranks)

    def over_ranks(self, values: Tensor) -> Tensor:
        """Return the mean of values over the ranks. Every rank must call it."""
        if self.trainer.world_size == 1:
            return values
        reduced: Tensor = self.trainer.strategy.reduce(values.to(self.device), reduce_op="mean")
        return reduced

    def sum_over_ranks(self, value: float) -> float:
        """Return the sum of a value over the ranks. Every rank must call it."""
        if self.trainer.world_size == 1:
            return value
        one = torch.tensor(value, dtype=torch.float64)
        return float(self.over_ranks(one)) * self.trainer.world_size

    def _condition_values(self, batch: Batch) -> Tensor:
        return self.backbone.y_embedder.values(batch.columns, batch.label)

    def _draw(self, batch: Batch, phase: Phase) -> Draws:
        if self._draws is None:
            self._draws = StepDraws(seed=self.config.seed, rank=self.global_rank, device=self.device)
        size = len(batch.label)
        law, token_times = self.method.time_law(phase), self.method.token_times(phase)
        draws = self._draws.of_step(
            batch.step,
            size * self.config.accumulate,
            self.latent_shape,
            lambda count, generator: self.objective.times(count, generator, law),
            self.backbone.y_embedder,
            self.beside.widths,
            partial(self.method.draws, phase),
            None if token_times is None else (token_times, math.prod(self.backbone.facts.grid)),
            posterior=self.latents.drawn,
        )
        return draws.micro_batch(batch.micro, size)

    def _seed_method(self, batch: Batch) -> torch.Generator:
        """Seed a stream of the method's, one for each micro-batch.

        How much a method takes from it is not known here, so that it cannot be drawn for the whole step:
        what must not depend on the micro-batches is asked for by `Method.draws`.
        """
        if self._method_generator is None:
            self._method_generator = torch.Generator(self.device)
        key = (self.config.seed, "method", self.global_rank, batch.step, batch.micro)
        return self._method_generator.manual_seed(derived_seed(*key))

    def _groups(self, phase: Phase, draws: Draws) -> TokenGroups | None:
        """Return the groups of the tokens, None where each image has one time."""
        law = self.method.token_times(phase)
        if law is None or draws.groups is None:
            return None
        return TokenGroups(of_token=draws.groups, separate=law.separate)

    def _on_latent(self, t: Tensor, groups: TokenGroups | None) -> Tensor:
        """Return the times of groups ``[B, G]`` on the latent ``[B, 1, h, w]``, and others as they are."""
        if groups is None or t.ndim == 1:
            return t
        return groups.on_latent(t, self.backbone.facts.grid, self.backbone.facts.patch_size)

    def _ema_forward(
        self, condition: Tensor, beside: Mapping[str, Noised], groups: TokenGroups | None
    ) -> Callable[..., Captured]:
        @torch.no_grad()
        def forward(x_t: Tensor, t: Tensor, capture: Any) -> Captured:
            tokens = (tokens_of(beside, t, self.objective),) if beside else ()
            captured: Captured = self.ema(x_t, t, condition, capture, *tokens, **_given(groups, t))
            return captured

        return forward

    def idle_parameters(self, phase: Phase) -> list[nn.Parameter]:
        """List the parameters that no loss of a phase reaches."""
        return self._idle.of_phase(phase, self.method, self.backbone, self)

    def _start_afresh(self) -> None:
        """Forget the optimiser's moments and average from a hard copy of the weights as they are."""
        for optimizer in self.trainer.optimizers:
            optimizer.state.clear()
        self.ema.load_state_dict(self.backbone.state_dict())


def _given(groups: TokenGroups | None, t: Tensor) -> dict[str, TokenGroups]:
    """Return the backbone's argument for groups, none where the times are of whole images."""
    return {} if groups is None or t.ndim == 1 else {"groups": groups}
