"""Rotary positions, RMSNorm and the gated MLP as options of SiT: golden numbers, equations, names."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from repa.data.errors import RepaError
from repa.trainer.methods.alignment import projector
from repa.trainer.models import registry
from repa.trainer.models.capture import Capture
from repa.trainer.models.gated_mlp import PackedSwiGlu
from repa.trainer.models.layers import Attention, Block, gated_mlp
from repa.trainer.models.rotary import axial_rotation, rotate
from repa.trainer.models.sit import SiT, SiTConfig
from safetensors.torch import load_file
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

GOLDEN = SiTConfig(depth=5, width=48, heads=4, patch_size=2, input_size=16, num_classes=10, rope=True)
SMALL = SiTConfig(
    depth=2,
    width=32,
    heads=2,
    patch_size=2,
    input_size=8,
    num_classes=5,
    qk_norm=True,
    rope=True,
    rms_norm=True,
    swiglu=True,
)


@pytest.fixture(scope="module")
def golden(shared: Path) -> dict[str, torch.Tensor]:
    with np.load(shared / "golden" / "erw.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file if file[key].dtype.kind in "fi"}


@pytest.fixture(scope="module")
def weights(shared: Path) -> dict[str, torch.Tensor]:
    return {key: value.double() for key, value in load_file(shared / "golden" / "erw.safetensors").items()}


@pytest.fixture
def double() -> Iterator[None]:
    """Tables in float64, as they are only rounded to the dtype in which the network is built."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def built(config: SiTConfig, weights: dict[str, torch.Tensor]) -> tuple[SiT, nn.Module]:
    model, mlp = SiT(config), projector(48, 40, 24)
    model.load_state_dict({key: each for key, each in weights.items() if not key.startswith("projectors.")})
    prefix = "projectors.0."
    mlp.load_state_dict(
        {key.removeprefix(prefix): each for key, each in weights.items() if key.startswith(prefix)}
    )
    return model, mlp


def randomised(config: SiTConfig) -> SiT:
    """A SiT with no zero layer, so that every input and parameter counts."""
    torch.manual_seed(0)
    model = SiT(config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.2)
    return model


def inputs(config: SiTConfig, count: int = 2) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    side, dtype = config.input_size, torch.get_default_dtype()
    x = torch.randn(count, config.in_channels, side, side, generator=generator, dtype=dtype)
    t = torch.rand(count, generator=generator, dtype=dtype)
    return x, t, torch.arange(count) % config.num_classes


def test_golden_rotation(golden: dict[str, torch.Tensor]) -> None:
    rotation = axial_rotation(12, (8, 8), pairs="halves")
    angles = golden["rope_angles"].double()
    torch.testing.assert_close(rotation, torch.stack([angles.cos(), angles.sin()]), rtol=0, atol=1e-9)
    turned = rotate(golden["rope_in"].double(), rotation)
    torch.testing.assert_close(turned, golden["rope_out64"], rtol=0, atol=1e-9)


@pytest.mark.usefixtures("double")
def test_golden_velocity(golden: dict[str, torch.Tensor], weights: dict[str, torch.Tensor]) -> None:
    model, mlp = built(GOLDEN, weights)
    captured = model(golden["x_t"].double(), golden["t"], golden["y"], Capture(hidden=(4,)))
    torch.testing.assert_close(captured.prediction, golden["full_rope_velocity64"], rtol=0, atol=1e-9)
    torch.testing.assert_close(mlp(captured.hidden[4]), golden["full_rope_projected64"], rtol=0, atol=1e-9)
    # as released, with tables in float32
    torch.testing.assert_close(captured.prediction, golden["full_rope_velocity"], rtol=0, atol=1e-6)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize(("rope", "key", "tolerance"), [(True, "warmup_rope", 1e-6), (False, "warmup", 1e-9)])
def test_golden_first_blocks_of_a_clean_latent(
    golden: dict[str, torch.Tensor],
    weights: dict[str, torch.Tensor],
    rope: bool,
    key: str,
    tolerance: float,
) -> None:
    config = SiTConfig(depth=5, width=48, heads=4, patch_size=2, input_size=16, num_classes=10, rope=rope)
    model, mlp = built(config, weights)
    zero = torch.zeros_like(golden["t"])
    captured = model(golden["x0"].double(), zero, golden["y"], Capture(hidden=(2,), stop_after=2))
    torch.testing.assert_close(mlp(captured.hidden[2]), golden[f"{key}_projected"], rtol=0, atol=tolerance)


def test_the_two_orders_turn_by_the_same_angles() -> None:
    alternating, halves = (axial_rotation(16, (3, 2), pairs=pairs) for pairs in ("alternating", "halves"))
    # pairs 0, 2, … of the one turn by column, pairs 4 … 7 of the other do
    torch.testing.assert_close(alternating[..., 0::2], halves[..., 4:])
    torch.testing.assert_close(alternating[..., 1::2], halves[..., :4])


def test_a_token_ahead_is_not_turned() -> None:
    torch.manual_seed(0)
    rotation = axial_rotation(8, (2, 2), pairs="halves", ahead=1)
    heads = torch.randn(1, 2, 5, 8, dtype=torch.float64)
    turned = rotate(heads, rotation)
    assert torch.equal(turned[:, :, 0], heads[:, :, 0])
    torch.testing.assert_close(
        turned[:, :, 1:], rotate(heads[:, :, 1:], axial_rotation(8, (2, 2), pairs="halves"))
    )
    config = SiTConfig(
        depth=1, width=16, heads=2, patch_size=2, input_size=4, num_classes=3, rope=True, token_widths=(6,)
    )
    model = randomised(config)
    captured = model(*inputs(config), Capture(attention=(1,)), (torch.randn(2, 6),))
    assert captured.queries[1].shape == (2, 2, 4, 8)
    assert captured.tokens[0].shape == (2, 6)


@pytest.mark.usefixtures("double")
def test_captured_queries_are_those_that_the_network_compares() -> None:
    """The attention of the captured ones is the attention of the block."""
    torch.manual_seed(0)
    layer, x = Attention(16, 2, qk_norm=True, rms_norm=True), torch.randn(2, 6, 16)
    output, queries, keys = layer(x, axial_rotation(8, (2, 3), pairs="halves"))
    values = layer.qkv(x)[..., 32:].unflatten(-1, (2, 8)).transpose(1, 2)
    attended = torch.softmax(queries @ keys.mT / 8**0.5, dim=-1) @ values
    torch.testing.assert_close(output, layer.proj(attended.transpose(1, 2).flatten(2)))


@pytest.mark.usefixtures("double")
def test_block_by_its_equations() -> None:
    torch.manual_seed(0)
    block = Block(8, 2, qk_norm=False, rms_norm=True, mlp=gated_mlp)
    for norm in (block.norm1, block.norm2):
        nn.init.normal_(norm.weight)
    x, c = torch.randn(2, 3, 8), torch.randn(2, 8)
    s1, m1, g1, s2, m2, g2 = (part[:, None] for part in block.adaLN_modulation(c).split(8, dim=1))

    def rms(tokens: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
        return tokens / torch.sqrt(tokens.square().mean(-1, keepdim=True) + 1e-6) * gain

    after = x + g1 * block.attn(rms(x, block.norm1.weight) * (1 + m1) + s1)[0]
    hidden = block.mlp.w12(rms(after, block.norm2.weight) * (1 + m2) + s2)
    gate, value = hidden[..., :21], hidden[..., 21:]  # int(2/3 · 4 · 8)
    expected = after + g2 * block.mlp.w3(gate / (1 + torch.exp(-gate)) * value)
    torch.testing.assert_close(block(x, c)[0], expected)


def test_rms_norm_of_half_precision_is_computed_in_float32() -> None:
    norm = randomised(SMALL).blocks[0].norm1
    # squares whose sum no half of 8 bits could hold
    x = (torch.arange(64, dtype=torch.float32).reshape(2, 32) + 100).to(torch.bfloat16)
    exact = x.double() / x.double().square().mean(-1, keepdim=True).sqrt() * norm.weight.double()
    found = norm.to(torch.bfloat16)(x)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), exact, rtol=2**-7, atol=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert randomised(SMALL).blocks[0].norm1(x.float()).dtype == torch.float32


def test_names_and_first_weights() -> None:
    torch.manual_seed(0)
    state = SiT(SMALL).state_dict()
    names = {key for key in state if key.startswith("blocks.0.")}
    assert {
        f"blocks.0.{name}" for name in ("norm1.weight", "norm2.weight", "mlp.w12.weight", "mlp.w3.bias")
    } <= (names)
    assert {"final_layer.norm_final.weight", "blocks.1.attn.q_norm.weight"} <= state.keys()
    assert not any("rotation" in key or "fc1" in key for key in state)
    assert all((value == 1).all() for key, value in state.items() if "norm" in key)
    bound = (6 / (32 + 2 * 85)) ** 0.5
    assert 0.9 * bound < state["blocks.0.mlp.w12.weight"].abs().max() <= bound
    assert not state["blocks.0.mlp.w12.bias"].any()
    assert PackedSwiGlu(1152, 3072).w3.weight.shape == gated_mlp(1152).w3.weight.shape


def test_without_options_nothing_has_changed_its_draw() -> None:
    plain = {"depth": 2, "width": 32, "heads": 2, "patch_size": 2, "input_size": 8}
    torch.manual_seed(0)
    first = SiT(SiTConfig(**plain)).state_dict()
    torch.manual_seed(0)
    turned = SiT(SiTConfig(**plain, rope=True)).state_dict()
    assert first.keys() == turned.keys()
    assert all(torch.equal(first[key], turned[key]) for key in first)


def test_rotary_positions_change_the_prediction() -> None:
    config = replace(SMALL, qk_norm=False)
    model, (x, t, y) = randomised(config), inputs(config)
    plain = SiT(replace(config, rope=False))
    plain.load_state_dict(model.state_dict())
    assert (model(x, t, y).prediction - plain(x, t, y).prediction).abs().max() > 1e-2


def test_half_precision_stays_close() -> None:
    model, (x, t, y) = randomised(SMALL), inputs(SMALL)
    full = model(x, t, y).prediction
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = model(x, t, y).prediction
    assert half.dtype == torch.bfloat16
    assert (half.float() - full).norm() < 0.05 * full.norm()


def test_compiled_forward_is_one_graph() -> None:
    model, graphs = randomised(SMALL), []

    def backend(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    torch.compiler.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    x, t, y = inputs(SMALL)
    for _ in range(2):
        capture = Capture(hidden=(1,), attention=(2,))
        torch.testing.assert_close(compiled(x, t, y, capture).prediction, model(x, t, y, capture).prediction)
    assert len(graphs) == 1
    torch.compiler.reset()


def test_a_network_of_a_state_dict_has_its_tables() -> None:
    model = randomised(SMALL)
    again = registry.load(registry.from_plain(registry.to_plain(SMALL)), model.state_dict())
    assert torch.equal(again(*inputs(SMALL)).prediction, model(*inputs(SMALL)).prediction)


def test_settings_reach_the_architecture() -> None:
    latent = {"input_size": 8, "in_channels": 4, "num_classes": 3}
    config = registry.config_of("SiT-T/2", **latent, rope=True, rms_norm=None, swiglu=False, qk_norm=False)
    assert registry.choices_of(config) == {
        "qk_norm": False, "rope": True, "rms_norm": False, "swiglu": False,
    }  # fmt: skip
    assert config.facts == registry.config_of("SiT-T/2", **latent).facts


@pytest.mark.parametrize("name", ["rope", "rms_norm", "swiglu"])
@pytest.mark.parametrize("value", [True, False])
def test_a_family_without_the_choice_refuses_it(name: str, value: bool) -> None:
    with pytest.raises(RepaError) as caught:
        registry.config_of("SiT-down-T/1", input_size=8, in_channels=4, num_classes=3, **{name: value})
    assert caught.value.field == name
    assert caught.value.remedy
