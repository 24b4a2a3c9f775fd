"""iREPA against the published program's numbers, loops, and closed forms where it departs from them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from method_steps import GRIDS, facts_of, make_step, student_of
from repa.data.errors import RepaError
from repa.data.format.columns import ColumnSpec
from repa.data.format.int8 import quantise
from repa.trainer.config import build
from repa.trainer.methods.alignment import STD_FLOOR, GridConvolution, normalise_in_space
from repa.trainer.methods.irepa import Irepa, IrepaConfig
from repa.trainer.methods.repa import Repa, RepaConfig
from repa.trainer.models.capture import Capture
from repa.trainer.models.sit import SIT_SIZES, SiT, SiTConfig
from repa.trainer.objectives.paths import interpolant
from safetensors.torch import load_file

if TYPE_CHECKING:
    from pathlib import Path

COLUMNS = {"a/patch": ColumnSpec(shape=(16, 24), dtype="float32")}


def make(columns: dict[str, ColumnSpec] = COLUMNS, **settings: object) -> Irepa:
    torch.manual_seed(0)
    config = IrepaConfig(**{"depth": 2} | settings)  # type: ignore[arg-type]
    return Irepa(config, facts_of(), columns, GRIDS)


@pytest.mark.parametrize(("kernel", "name"), [(3, "projectors.0."), (1, "conv1.")])
@torch.no_grad()
def test_golden(shared: Path, kernel: int, name: str) -> None:
    with np.load(shared / "golden" / "irepa.npz") as file:
        golden = {key: torch.from_numpy(file[key]) for key in file}
    state = {key: value.double() for key, value in load_file(shared / "golden" / "irepa.safetensors").items()}
    config = SiTConfig(depth=4, width=48, heads=4, patch_size=2, input_size=16, num_classes=10)
    model = SiT(config).double().eval()
    aside = ("projectors.", "conv1.")
    model.load_state_dict({key: value for key, value in state.items() if not key.startswith(aside)})
    conv = {key.rpartition(".")[2]: value for key, value in state.items() if key.startswith(name)}
    columns = {"teacher/patch": ColumnSpec(shape=(64, 24), dtype="float32")}
    x_t = interpolant("linear").interpolate(golden["x0"], golden["noise"], golden["t"])
    student = model(x_t, golden["t"], golden["y"], Capture(hidden=(2,)))
    for gamma in (0.6, 1.0):
        settings = IrepaConfig(depth=2, kernel=kernel, gamma=gamma)
        method = Irepa(settings, config.facts, columns, {"teacher": (8, 8)}).double()
        assert method.problems() == []
        method.load_state_dict({f"projectors.0.projection_layer.{key}": each for key, each in conv.items()})
        projected = method.projectors[0](student.hidden[2])
        torch.testing.assert_close(projected, golden[f"projected_conv{kernel}"], rtol=0, atol=1e-9)
        z = method.make_target(golden["z"])
        torch.testing.assert_close(z, golden[f"zscore_{gamma}"], rtol=0, atol=1e-9)
        (term,) = method.losses(make_step({"teacher/patch": golden["z"]}, student)).values()
        expected = golden[f"loss_conv{kernel}_zscore_{gamma}"]
        torch.testing.assert_close(term.value, expected, rtol=0, atol=1e-9)
        if (kernel, gamma) == (3, 0.6):
            assert term.weight == 1.0
            total = golden["loss_velocity"].mean() + term.weight * term.value
            torch.testing.assert_close(total, golden["loss_total"], rtol=0, atol=1e-9)


def test_golden_but_for_the_constant_channel(shared: Path) -> None:
    with np.load(shared / "golden" / "irepa.npz") as file:
        golden = {key: torch.from_numpy(file[key]) for key in file if key.startswith("constant")}
    others = [channel for channel in range(24) if channel != 5]
    for gamma, constant in ((0.6, 0.4 / STD_FLOOR), (1.0, 0.0)):
        found = normalise_in_space(golden["constant_in"], gamma)
        theirs = golden[f"constant_zscore_{gamma}"]
        torch.testing.assert_close(found[..., others], theirs[..., others], rtol=0, atol=1e-9)
        torch.testing.assert_close(found[0, :, 5], torch.full((64,), constant).double(), rtol=1e-4, atol=1e-9)


def test_slow_loop_over_images_channels_and_tokens() -> None:
    tokens = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    tokens[..., 2] += 100  # its std is less than a twentieth of its mean
    found = normalise_in_space(tokens, 0.7)
    for image in range(2):
        for channel in range(3):
            values = tokens[image, :, channel].tolist()
            mean = math.fsum(values) / 5
            std = math.sqrt(math.fsum((each - mean) ** 2 for each in values) / 4)
            assert (std < 0.05 * abs(mean)) == (channel == 2)
            for token, value in enumerate(values):
                expected = (value - 0.7 * mean) / (max(std, 0.05 * abs(mean)) + 1e-6)
                assert found[image, token, channel].item() == pytest.approx(expected, abs=1e-12)


@given(
    value=st.floats(-1e4, 1e4, allow_subnormal=False, width=32),
    gamma=st.floats(0, 1),
    tokens=st.sampled_from([1, 2, 16]),
)
def test_a_constant_channel_does_not_own_the_cosine(value: float, gamma: float, tokens: int) -> None:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(1, tokens, 768, generator=generator)
    z[..., 7] = value
    found = normalise_in_space(z, gamma)
    assert found.isfinite().all()
    assert found[..., 7].abs().max() <= (1 - gamma) / STD_FLOOR + 1e-3
    if gamma == 0.6 and tokens == 16:
        share = found[..., 7].square().sum() / found.square().sum()
        assert share < 0.09


def test_int8_targets_make_constant_channels() -> None:
    """A channel far from zero varies by less than a step of int8: the loss stays near that of floats."""
    generator = torch.Generator().manual_seed(3)
    z = torch.randn(2, 16, 24, generator=generator)
    z[..., 4] = 50 + 0.01 * z[..., 4]
    stored, scale = quantise(z)
    assert (stored[..., 4] == stored[:, :1, 4]).all()
    specs = {
        "a/patch": ColumnSpec(shape=(16, 24), dtype="int8"),
        "a/patch-scale": ColumnSpec(shape=(24,), dtype="float32"),
    }
    student = student_of(torch.randn(2, 16, 32, generator=generator))
    cached = make(specs).losses(make_step({"a/patch": stored, "a/patch-scale": scale}, student))["repa"].value
    floats = make().losses(make_step({"a/patch": z}, student))["repa"].value
    assert cached.item() == pytest.approx(floats.item(), abs=5e-3)
    # without a floor the channel would be all there is to a target
    free = (z - 0.6 * z.mean(1, keepdim=True)) / (z.std(1, keepdim=True) + 1e-6)
    for targets, owns in ((free, True), (make().make_target(z), False)):
        share = targets[..., 4].square().sum() / targets.square().sum()
        assert (share > 0.99) == owns


def test_half_precision_targets_are_normalised_in_float32() -> None:
    z = torch.randn(2, 16, 24, generator=torch.Generator().manual_seed(0)).half()
    z[..., 0] = 6e4
    found = normalise_in_space(z, 0.6)
    assert found.dtype == torch.float32
    assert torch.equal(found, normalise_in_space(z.float(), 0.6))
    assert found.isfinite().all()


def test_the_convolution_sees_neighbours_on_the_grid_and_zeros_beside_it() -> None:
    """Row-major: token r·columns + c is in row r, column c, of a grid that is not square."""
    layer = GridConvolution(2, 3, (2, 3), 3).double()
    tokens = torch.randn(1, 6, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = layer(tokens)
    weight, bias = layer.projection_layer.weight, layer.projection_layer.bias
    assert bias is not None
    for row in range(2):
        for column in range(3):
            expected = bias.clone()
            for down in (-1, 0, 1):
                for right in (-1, 0, 1):
                    if 0 <= row + down < 2 and 0 <= column + right < 3:
                        neighbour = tokens[0, 3 * (row + down) + column + right]
                        expected = expected + weight[:, :, 1 + down, 1 + right] @ neighbour
            torch.testing.assert_close(found[0, 3 * row + column], expected, rtol=0, atol=1e-12)


def test_torchs_own_initialisation() -> None:
    layer = make(columns={"a/patch": ColumnSpec(shape=(16, 400), dtype="float32")}).projectors[0]
    bound = (9 * 32) ** -0.5
    for parameter in layer.parameters():
        assert 0.97 * bound < parameter.abs().max() <= bound


def test_the_answers_are_repas() -> None:
    method = make(stop=5)
    repa = Repa(RepaConfig(depth=2, projector_width=8, stop=5), facts_of(), COLUMNS, GRIDS)
    assert method.phases() == repa.phases()
    for phase in method.phases():
        assert method.columns(phase) == repa.columns(phase)
        assert method.capture(phase) == repa.capture(phase)
        assert method.flags(phase) == repa.flags(phase)
    assert not hasattr(method.config, "projector_width")


def test_presets() -> None:
    assert {size: preset.depth for size, preset in Irepa.presets.items()} == {
        **{"T": 2, "S": 8, "B": 4, "L": 8, "XL": 8},
    }
    assert Irepa.presets.keys() == SIT_SIZES.keys()
    chosen = build(flags={"method": "irepa"}).method
    assert (chosen.weight, chosen.kernel, chosen.gamma) == (1.0, 3, 0.6)  # type: ignore[attr-defined]
    released = build(flags={"method": "irepa"}, assignments=["method.preset=released"]).method
    assert (released.weight, released.kernel, released.gamma) == (1.0, 1, 0.6)  # type: ignore[attr-defined]


@pytest.mark.parametrize(("setting", "value"), [("kernel", 2), ("kernel", 0), ("gamma", 1.5), ("weight", -1)])
def test_settings_that_cannot_be(setting: str, value: float) -> None:
    with pytest.raises(RepaError) as caught:
        build(flags={"method": "irepa", f"method.{setting}": value})
    assert caught.value.field == f"method.{setting}"


def test_gradient_reaches_every_token_and_sample() -> None:
    hidden = torch.randn(3, 16, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
    z = torch.randn(3, 16, 24, generator=torch.Generator().manual_seed(2))
    method = make()
    method.losses(make_step({"a/patch": z}, student_of(hidden)))["repa"].value.backward()
    assert hidden.grad is not None
    assert (hidden.grad.abs().amax(-1) > 0).all()
    assert all(each.grad is not None and each.grad.abs().max() > 0 for each in method.parameters())
