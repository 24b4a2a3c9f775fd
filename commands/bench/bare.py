"""A plain training loop on constant tensors, and the clock that lets it take turns with a run's steps."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback

from ...trainer.compiling import chosen, compiled_losses
from ...trainer.methods.base import Step
from ...trainer.objectives.base import require_prediction

if TYPE_CHECKING:
    from collections.abc import Callable

    from lightning.pytorch import LightningModule, Trainer
    from torch import Tensor

    from ...data.reading.loader import Batch
    from ...trainer.methods.base import Phase
    from ...trainer.step.module import TrainingModule


def can_be_bare(module: TrainingModule, phase: Phase) -> bool:
    """Return whether a phase is a forward pass, its losses and a backward pass, and nothing else.

    What is denoised beside the latent, times of tokens, passes of the averaged weights and stopping early
    are not in the bare loop.

    Args:
        module: of the run.
        phase: one of its method's.
    """
    method = module.method
    flags = method.flags(phase)
    return (
        module.objective.has_target
        and flags.objective_loss
        and not flags.ema_forward
        and method.token_times(phase) is None
        and not method.denoised()
    )


class BareLoop:
    """Steps of forward pass, backward pass and AdamW, as anybody would write them, on tensors that stay.

    Nothing of a run is in them: no loader, posterior, draws, norm of the gradient, averaged weights, means,
    metrics or Lightning. The network, the method's projector and losses, all compiled if they are there, and
    AdamW with its state are the run's own, so that both loops compute on the same memory and a large network
    is there once.

    Args:
        module: of the run, on its device.
        optimizer: of the run.
        batch: whose columns and labels are the constant ones, on the device.
        precision: makes the context of the forward pass, as of the run.

    Raises:
        ValueError: the phase of the batch cannot be computed so.
    """

    def __init__(
        self,
        module: TrainingModule,
        optimizer: torch.optim.Optimizer,
        batch: Batch,
        precision: Callable[[], Any],
    ) -> None:
        self._module = module
        self._optimizer = optimizer
        self._precision = precision
        phase = module.method.phase_at(batch.step)
        if not can_be_bare(module, phase):
            raise ValueError(f"phase {phase.name} is more than a forward and a backward pass")
        self._compiled = chosen(module.config.compile, module.device.type) != "off"
        self._capture = module.method.capture(phase)
        self._index = batch.step
        self._columns = batch.columns
        count, device = len(batch.label), module.device
        self._generator = torch.Generator(device).manual_seed(0)
        x0, noise = (self._normal(count, *module.latent_shape) for _ in range(2))
        t = torch.rand(count, generator=self._generator, device=device)
        self._noised = module.objective.noised(x0, noise, t)
        self._target = module.objective.target(self._noised)
        embedder = module.backbone.y_embedder
        kept = torch.zeros_like(embedder.dropped(count, self._generator))
        self._condition = embedder.condition(embedder.values(batch.columns, batch.label), kept)
        self._own = module.method.draws(phase, count, self._generator)

    def step(self) -> None:
        """Compute one step."""
        self._optimizer.zero_grad()
        with self._precision():
            loss = self._loss()
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()

    def _loss(self) -> Tensor:
        noised = self._noised
        student = self._module.backbone(noised.x_t, noised.t, self._condition, self._capture)
        loss = F.mse_loss(require_prediction(student).float(), self._target)
        step = Step(
            index=self._index,
            columns=self._columns,
            x0=noised.x0,
            noise=noised.noise,
            t=noised.t,
            condition=self._condition,
            student=student,
            interpolate=lambda times: self._module.objective.interpolate(noised.x0, noised.noise, times),
            target=lambda: self._target,
            draws=self._own,
            generator=self._generator,
            batch_size=self._module.config.batch_size,
        )
        with compiled_losses(self._compiled):
            terms = self._module.method.losses(step)
        for term in terms.values():
            if term.weight is not None:
                loss = loss + term.weight * term.value
        return loss

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator, device=self._generator.device)


@dataclass
class Seconds:
    """What a number of steps took.

    Attributes:
        wall: seconds of each turn.
        cpu: seconds of this process on all cores, of each turn.
    """

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)


class StepClock(Callback):
    """Times the steps of a run after its warm-up, and as many of a bare loop between them.

    On the CPU they take turns step by step, so that both have the same share of a machine that does other
    things too. A GPU is not waited for within a turn: there all steps of the run come first.

    Args:
        warm_up: steps that do not count.
        bare: whether the bare loop runs too.

    Attributes:
        own: what the steps of the run took.
        bare: what those of the bare loop took; empty without.
    """

    def __init__(self, *, warm_up: int, bare: bool) -> None:
        self.own = Seconds()
        self.bare = Seconds()
        self._warm_up = warm_up
        self._wants_bare = bare
        self._loop: BareLoop | None = None
        self._since = (0.0, 0.0)
        self._steps = 0

    def ratios(self) -> list[tuple[float, float]]:
        """Return what a turn of the bare loop took of the run's, on the wall and of all cores, for each."""
        pairs = zip(self.bare.wall, self.own.wall, self.bare.cpu, self.own.cpu, strict=False)
        return [(wall / own_wall, cpu / own_cpu) for wall, own_wall, cpu, own_cpu in pairs]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take the time of a turn, and let the bare loop have its own."""
        del outputs, batch_idx
        step, device = trainer.global_step, pl_module.device
        if step < self._warm_up:
            return
        if step == self._warm_up:
            if self._wants_bare:
                module = cast("TrainingModule", pl_module)
                context = trainer.precision_plugin.forward_context
                self._loop = BareLoop(module, trainer.optimizers[0], batch, context)
                self._loop.step()
            self._since = _now(device)
            return
        self._steps += 1
        if device.type == "cuda" and step < trainer.max_steps:
            return
        self._since = _add(self.own, self._since, device)
        if self._loop is not None:
            for _ in range(self._steps):
                self._loop.step()
            self._since = _add(self.bare, self._since, device)
        self._steps = 0


def _now(device: torch.device) -> tuple[float, float]:
    """Return the time on the wall and that of this process, once the device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter(), time.process_time()


def _add(seconds: Seconds, since: tuple[float, float], device: torch.device) -> tuple[float, float]:
    now = _now(device)
    seconds.wall.append(now[0] - since[0])
    seconds.cpu.append(now[1] - since[1])
    return now
