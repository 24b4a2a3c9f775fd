"""Samplers that carry a vector beside the latent: REG's golden samples, parts apart, streams of noise."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from repa.trainer.models.sit import SiT, SiTConfig
from repa.trainer.objectives.flow import Flow, FlowConfig
from repa.trainer.sampling.sampler import (
    integrate,
    model_velocity,
    sample,
    sample_noises,
    state_noises,
)
from repa.trainer.sampling.settings import SamplerConfig
from repa.trainer.sampling.state import StateShape, state_of
from safetensors.torch import load_file

FLOW = Flow(FlowConfig())
CONFIG = SiTConfig(
    depth=4, width=48, heads=4, patch_size=2, input_size=16, num_classes=10, token_widths=(24,)
)
SHAPE = state_of(CONFIG)


@pytest.fixture(scope="module")
def golden(shared: Path) -> dict[str, torch.Tensor]:
    with np.load(shared / "golden" / "reg.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file}


@pytest.fixture(scope="module")
def backbone(shared: Path) -> SiT:
    state = load_file(shared / "golden" / "reg.safetensors")
    model = SiT(CONFIG).double()
    model.load_state_dict({key: value for key, value in state.items() if not key.startswith("projectors.")})
    return model.eval()


@pytest.mark.parametrize(
    ("name", "guidance", "guidance_cls"),
    [("sde", 1.0, None), ("sde_cfg", 2.3, None), ("sde_cfg", 2.3, 2.3), ("sde_cfg_cls_free", 2.3, 1.0)],
)
def test_golden_sde(
    golden: dict[str, torch.Tensor], backbone: SiT, name: str, guidance: float, guidance_cls: float | None
) -> None:
    """A weight of 1 for the class token is what the released code calls 0, the conditional drift."""
    settings = SamplerConfig(
        solver="sde", steps=7, guidance=guidance, guidance_cls=guidance_cls, interval=(0.0, 0.85)
    )
    pairs = zip(golden["sde_noise"], golden["sde_cls_noise"], strict=True)
    found = integrate(
        model_velocity(backbone, FLOW),
        SHAPE.pack(golden["sample_noise"], [golden["sample_cls"]]),
        golden["sample_y"],
        backbone.y_embedder.null(2),
        settings,
        shape=SHAPE,
        noises=[SHAPE.pack(latent, [cls]) for latent, cls in pairs],
    )
    latent, (cls,) = SHAPE.unpack(found)
    torch.testing.assert_close(latent, golden[name], rtol=0, atol=1e-9)
    torch.testing.assert_close(cls, golden[f"{name}_cls"], rtol=0, atol=1e-9)


@pytest.mark.parametrize("solver", ["euler", "heun", "sde"])
@pytest.mark.parametrize("weights", [(1.0, None), (2.0, None), (2.0, 1.0), (1.0, 3.0)])
def test_every_solver_carries_both_as_one_alone_would(
    backbone: SiT, solver: str, weights: tuple[float, float | None]
) -> None:
    """The network is called with both parts of the state; each part moves by its own prediction."""
    settings = SamplerConfig(
        solver=solver, steps=4, guidance=weights[0], guidance_cls=weights[1], interval=(0.2, 0.9)
    )
    seeds = range(2)
    labels = torch.tensor([1, 4])
    noises = state_noises(3, seeds, SHAPE)
    found = sample(backbone, FLOW, next(noises), labels, settings, noises=noises)
    # the same by hand
    latents, vectors = sample_noises(3, seeds, SHAPE.latent), sample_noises(3, seeds, (24,), stream=1)
    x, c = next(latents), next(vectors)
    null = backbone.y_embedder.null(2)

    def drifts(x: torch.Tensor, c: torch.Tensor, t: float, condition: torch.Tensor) -> list[torch.Tensor]:
        at = torch.full((2,), t, dtype=torch.float64)
        with torch.no_grad():
            captured = backbone(x, at, condition, beside=(c,))
        assert captured.prediction is not None
        velocities = [captured.prediction, captured.tokens[0]]
        if solver != "sde":
            return velocities
        parts = zip(velocities, (x, c), strict=True)
        return [v - t * FLOW.path.score(v, part, at) for v, part in parts]

    def slopes(x: torch.Tensor, c: torch.Tensor, t: float, guided: bool) -> list[torch.Tensor]:
        plain = drifts(x, c, t, labels)
        if not guided:
            return plain
        free = drifts(x, c, t, null)
        both = (weights[0], weights[0] if weights[1] is None else weights[1])
        return [u + w * (v - u) for u, v, w in zip(free, plain, both, strict=True)]

    times = settings.times()
    for t, later in pairwise(times):
        guided = 0.2 <= t <= 0.9
        first = slopes(x, c, t, guided)
        if solver == "heun" and later > 0:
            second = slopes(x + (later - t) * first[0], c + (later - t) * first[1], later, guided)
            first = [(one + two) / 2 for one, two in zip(first, second, strict=True)]
        x, c = x + (later - t) * first[0], c + (later - t) * first[1]
        if solver == "sde" and later > 0:
            spread = (2 * t * (t - later)) ** 0.5
            x, c = x + spread * next(latents), c + spread * next(vectors)
    torch.testing.assert_close(found, x, rtol=0, atol=1e-9)


def test_noises_of_the_latent_stay_those_without_a_vector() -> None:
    """So that samples of `none` and of a method with a vector start from the same noise."""
    shape = StateShape(latent=(2, 3, 3), widths=(5, 4))
    alone, whole = sample_noises(1, [0, 7], (2, 3, 3)), state_noises(1, [0, 7], shape)
    for _ in range(3):
        latent, (first, second) = shape.unpack(next(whole))
        assert torch.equal(latent, next(alone))
        assert (first.shape, second.shape) == ((2, 5), (2, 4))
        assert not torch.equal(first[:, :4], second)
    one = state_noises(1, [7], shape)
    expected = state_noises(1, [0, 7], shape)
    for _ in range(2):
        assert torch.equal(next(one)[0], next(expected)[1])
    # a latent's stream is no vector's
    latent, (vector, _) = shape.unpack(next(state_noises(1, [0], shape)))
    assert not torch.equal(latent.flatten()[:5], vector[0])


def test_a_state_of_one_part_is_that_part() -> None:
    shape = StateShape(latent=(2, 3, 3))
    latent = torch.randn(4, 2, 3, 3)
    assert shape.pack(latent) is latent
    assert shape.unpack(latent) == (latent, ())
    assert shape.weights(2.0, 5.0) == 2.0
    weights = StateShape(latent=(1, 1, 2), widths=(3,)).weights(2.0, 5.0)
    assert isinstance(weights, torch.Tensor)
    assert weights.tolist() == [2, 2, 5, 5, 5]
