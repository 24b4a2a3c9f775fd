"""The sampler, which integrates the learned flow from noise (t = 1) to data (t = 0).

The state is float64 whatever the model's dtype. With v the velocity, s the score and h = t_i − t_{i+1} > 0:

- Euler: x ← x − h·v(x, t_i), on steps + 1 equidistant times from 1 to 0.
- Heun: x' as Euler, then x ← x − h·(v(x, t_i) + v(x', t_{i+1})) / 2; the last step is Euler's.
- SDE (Euler–Maruyama): the reverse SDE with diffusion w_t = 2t (REPA's choice), drift d = v − ½·w_t·s:
  x ← x − h·d(x, t_i) + √(w_t·h)·ε, on `steps` equidistant times from 1 to 0.04; then one step without noise,
  x ← x − 0.04·d(x, 0.04), to t = 0.
- Stochastic Heun of the same SDE, see `stochastic_heun`, on `steps` equidistant times from 1 to 0.004.

The times of Euler and Heun may be shifted: with s = 1 − t, s' = a·s / (1 + (a − 1)·s) for a `shift` a
(LightningDiT's and GMem's 0.3), so that t' = t / (a + (1 − a)·t).

Guidance replaces a prediction by uncond + w·(cond − uncond) where low ≤ t ≤ high, for the SDE on the drift;
elsewhere only the conditional pass runs. Heun's second evaluation is guided when its step began in the
interval, stochastic Heun's when its own time is in it. Vectors that are denoised beside the latent (REG's
class token) go the same way with noises of their own, and may have another w.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ..compiling import uncompiled
from ..models.capture import NOTHING
from ..objectives.base import require_prediction
from ..objectives.ddpm import Ddpm
from ..objectives.path_objective import PathObjective
from ..objectives.paths import Interpolant, Linear
from . import stochastic_heun
from .ancestral import reverse_chain
from .settings import STOCHASTIC
from .state import StateShape, state_of

if TYPE_CHECKING:
    from ..models.base import Backbone
    from ..models.capture import Captured
    from ..objectives.base import Objective
    from .settings import SamplerConfig

LINEAR = Linear()

Velocity: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x ``[B, C, h, w]`` float64, t ``[B]`` float64, condition ``[B, …]``) → velocity of x's shape.

With vectors beside the latent x is ``[B, F]``, see `StateShape`.
"""


def model_velocity(backbone: Backbone, objective: PathObjective) -> Velocity:
    """Return a backbone as a velocity.

    Inputs are in its parameters' dtype; the objective turns the prediction, in float64, into a velocity.
    """
    dtype = next(backbone.parameters()).dtype
    shape = state_of(backbone.config)

    def velocity(x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        latents, beside = shape.unpack(x)
        vectors = (NOTHING, tuple(each.to(dtype) for each in beside)) if beside else ()
        # a teacher's compiled average would compile again for this batch size
        with uncompiled():
            captured: Captured = backbone(latents.to(dtype), t.to(dtype), condition, *vectors)
        predictions = (require_prediction(captured), *captured.tokens)
        found, *others = (
            objective.velocity(prediction.double(), part, t)
            for prediction, part in zip(predictions, (latents, *beside), strict=True)
        )
        return shape.pack(found, others)

    return velocity


def state_noises(seed: int, samples: Sequence[int], shape: StateShape) -> Iterator[Tensor]:
    """Yield standard normal noises of a state, those of the latent as `sample_noises` yields them.

    Args:
        seed: the run's seed.
        samples: index of each sample of the batch.
        shape: the state's parts; each vector beside the latent has a stream of its own.

    Yields:
        float64 ``[B, C, h, w]``, or ``[B, F]``, on the CPU, without end; take the first as initial state.
    """
    latents = sample_noises(seed, samples, shape.latent)
    # a stream of number 0 would be the latent's: trailing zeros do not change a seed sequence
    beside = [
        sample_noises(seed, samples, (width,), stream=number)
        for number, width in enumerate(shape.widths, start=1)
    ]
    for parts in zip(latents, *beside, strict=True):
        yield shape.pack(parts[0], parts[1:])


def sample_noises(
    seed: int, samples: Sequence[int], shape: Sequence[int], *, stream: int | None = None
) -> Iterator[Tensor]:
    """Yield standard normal noises that depend on seed and sample alone, not on the batch a sample is in.

    Args:
        seed: the run's seed.
        samples: index of each sample of the batch.
        shape: shape of one latent ``(C, h, w)``.
        stream: number from 1 of another stream of the same samples.

    Yields:
        float64 ``[B, C, h, w]`` on the CPU, without end; take the first as initial latents.
    """
    generators = []
    for index in samples:
        key = [seed, index] if stream is None else [seed, index, stream]
        state = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
        generators.append(torch.Generator().manual_seed(int(state >> np.uint64(1))))
    while True:
        yield torch.stack(
            [torch.randn(tuple(shape), generator=generator, dtype=torch.float64) for generator in generators]
        )


def sample(
    backbone: Backbone,
    objective: Objective,
    latents: Tensor,
    condition: Tensor,
    settings: SamplerConfig,
    *,
    noises: Iterable[Tensor] | None = None,
    generator: torch.Generator | None = None,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """Sample a backbone from initial noise, by a solver that its objective offers.

    Args:
        backbone: in eval mode; its conditioner gives the null condition.
        objective: what the backbone was trained to predict.
        latents: standard normal noise ``[B, C, h, w]`` on the backbone's device; ``[B, F]`` as of
            `state_noises` for one that denoises vectors beside the latent.
        condition: condition of each sample ``[B, …]``.
        settings: solver, steps and guidance.
        noises: of a solver that adds noise, see `integrate`.
        generator: draws them when none are given.
        progress: called with the number of finished steps after each.

    Returns:
        float64 ``[B, C, h, w]``: scaled latents, without what was denoised beside them.

    Raises:
        RepaError: the objective offers no such solver.
    """
    settings = settings.of(objective)
    if isinstance(objective, Ddpm):
        return reverse_chain(
            backbone,
            objective,
            latents,
            condition,
            settings,
            noises=noises,
            generator=generator,
            progress=progress,
        )
    assert isinstance(objective, PathObjective), "no other offers a solver that integrates a velocity"
    shape = state_of(backbone.config)
    state = integrate(
        model_velocity(backbone, objective),
        latents,
        condition,
        backbone.y_embedder.null(len(latents)),
        settings,
        path=objective.path,
        shape=shape,
        noises=noises,
        generator=generator,
        progress=progress,
    )
    return shape.unpack(state)[0]


@torch.no_grad()
def integrate(
    velocity: Velocity,
    latents: Tensor,
    condition: Tensor,
    null: Tensor,
    config: SamplerConfig,
    *,
    path: Interpolant = LINEAR,
    shape: StateShape | None = None,
    noises: Iterable[Tensor] | None = None,
    generator: torch.Generator | None = None,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """Carry noise at t = 1 to data at t = 0 along a velocity.

    Args:
        velocity: any function of state, times and condition, for example `model_velocity` of a backbone.
        latents: standard normal noise ``[B, C, h, w]`` or ``[B, F]``, the state at t = 1.
        condition: condition of each sample ``[B, …]``.
        null: the unconditional pass's condition ``[B, …]``.
        config: solver, steps and guidance.
        path: the path behind the velocity; the SDE's score depends on it.
        shape: the state's parts; None for the latent alone.
        noises: noises of the SDE, each of the state's shape, taken in order, one less than `steps`.
        generator: draws them when none are given.
        progress: called with the number of finished steps after each.

    Returns:
        float64, of the state's shape.

    Raises:
        ValueError: the SDE has neither noises nor generator, or too few noises.
    """
    low, high = config.interval
    field = _drift(velocity, path) if config.solver in STOCHASTIC else velocity

    weights = config.weights(shape or StateShape(latent=tuple(latents.shape[1:])))
    if isinstance(weights, Tensor):
        weights = weights.to(latents.device)

    def evaluate(x: Tensor, t: float, guided: bool) -> Tensor:
        return _guided(field, x, t, condition, null, weights if guided else 1.0)

    times = config.times()
    x = latents.double()
    draws = _draws(config, x, noises, generator)
    for step, (t, t_next) in enumerate(pairwise(times)):
        if config.solver == stochastic_heun.NAME and t_next > 0:
            x = stochastic_heun.stochastic_heun_step(
                lambda state, time: evaluate(state, time, low <= time <= high), x, t, t_next, next(draws)
            )
            if progress is not None:
                progress(step + 1)
            continue
        guided = low <= t <= high
        slope = evaluate(x, t, guided)
        if config.solver == "heun" and t_next > 0:
            slope = (slope + evaluate(x + (t_next - t) * slope, t_next, guided)) / 2
        x = x + (t_next - t) * slope
        if config.solver == "sde" and t_next > 0:
            x = x + math.sqrt(2 * t * (t - t_next)) * next(draws)
        if progress is not None:
            progress(step + 1)
    return x


def _drift(velocity: Velocity, path: Interpolant) -> Velocity:
    """Return the reverse SDE's drift v − ½·2t·s as a field."""

    def drift(x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        v = velocity(x, t, condition)
        return v - t.reshape(-1, *(1,) * (x.ndim - 1)) * path.score(v, x, t)

    return drift


def _guided(
    field: Velocity, x: Tensor, t: float, condition: Tensor, null: Tensor, weight: float | Tensor
) -> Tensor:
    """Return the field under guidance, both passes as one of twice the batch.

    It is one pass when the weight is 1.
    """
    B = len(x)
    if not isinstance(weight, Tensor) and weight == 1:
        return field(x, torch.full((B,), t, dtype=x.dtype, device=x.device), condition)
    times = torch.full((2 * B,), t, dtype=x.dtype, device=x.device)
    with_condition, without = field(torch.cat([x, x]), times, torch.cat([condition, null])).chunk(2)
    return without + weight * (with_condition - without)


def _draws(
    config: SamplerConfig, x: Tensor, noises: Iterable[Tensor] | None, generator: torch.Generator | None
) -> Iterator[Tensor]:
    """Yield the SDE's noises on the state's device."""
    if config.solver not in STOCHASTIC:
        return
    if noises is not None:
        for noise in noises:
            yield noise.to(x)
        raise ValueError(f"too few noises were given: {config.steps} SDE steps take {config.steps - 1}")
    if generator is None:
        raise ValueError("the SDE needs noises or a generator")
    while True:
        yield torch.randn(x.shape, generator=generator, dtype=x.dtype, device=generator.device).to(x.device)
