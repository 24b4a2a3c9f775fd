"""The backbone: golden numbers, independent layer computations, captures, initialisation, names."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from repa.data.errors import RepaError
from repa.trainer.models.capture import BackboneFacts, Capture
from repa.trainer.models.conditioning import LabelConditioner
from repa.trainer.models.layers import (
    Attention,
    Block,
    TimestepEmbedding,
    position_table,
    time_frequencies,
    unpatchify,
)
from repa.trainer.models.sit import SIT_SIZES, SiT, SiTConfig
from safetensors.torch import load_file

if TYPE_CHECKING:
    from pathlib import Path

GOLDEN = SiTConfig(depth=4, width=48, heads=4, patch_size=2, input_size=16)
SMALL = SiTConfig(depth=3, width=32, heads=2, patch_size=2, input_size=8, num_classes=5)


@pytest.fixture(scope="module")
def golden(shared: Path) -> dict[str, torch.Tensor]:
    with np.load(shared / "golden" / "repa.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file}


@pytest.fixture(scope="module")
def golden_sit(shared: Path) -> SiT:
    state = load_file(shared / "golden" / "repa_sit.safetensors")
    model = SiT(GOLDEN).double()
    model.load_state_dict({key: value for key, value in state.items() if not key.startswith("projectors.")})
    return model.eval()


def randomised(config: SiTConfig, dtype: torch.dtype = torch.float64) -> SiT:
    """A SiT with no zero layer, so that every input and parameter counts."""
    torch.manual_seed(0)
    model = SiT(config).to(dtype)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def inputs(config: SiTConfig, count: int = 2, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    side = config.input_size
    x = torch.randn(count, config.in_channels, side, side, generator=generator, dtype=dtype)
    t = torch.rand(count, generator=generator, dtype=dtype)
    return x, t, torch.arange(count) % config.num_classes


def test_golden_forward(golden: dict[str, torch.Tensor], golden_sit: SiT) -> None:
    captured = golden_sit(golden["fwd_x"], golden["t"], golden["y"])
    assert captured.prediction is not None
    torch.testing.assert_close(captured.prediction, golden["fwd_out"], rtol=0, atol=1e-9)


def test_golden_position_table_is_the_published_one_bit_for_bit(shared: Path) -> None:
    stored = load_file(shared / "golden" / "repa_sit.safetensors")["pos_embed"]
    assert torch.equal(SiT(GOLDEN).pos_embed.double(), stored)


def test_position_table_by_hand() -> None:
    table = position_table(8, (2, 3))
    for row in range(2):
        for column in range(3):
            expected = []
            for position in (column, row):
                angles = [position * 10_000 ** (-i / 2) for i in range(2)]
                expected += [*np.sin(angles), *np.cos(angles)]
            np.testing.assert_allclose(table[3 * row + column].numpy(), expected, rtol=0, atol=1e-15)
    with pytest.raises(ValueError, match="multiple of 4"):
        position_table(6, (2, 2))


def test_time_frequencies_are_within_a_unit_in_the_last_place() -> None:
    exact = 10_000.0 ** (-np.arange(128) / 128)
    ours = time_frequencies(torch.device("cpu")).numpy()
    assert ours.dtype == np.float32
    # the exponent is rounded to float32 before exp, as in the published code: |exponent| · 2^-24 · 2 relative
    np.testing.assert_allclose(ours, exact, rtol=9.3 * 2 * 2**-24)


def test_time_embedding_has_cosines_before_sines() -> None:
    layer = TimestepEmbedding(256)
    with torch.no_grad():
        layer.mlp[0].weight.copy_(torch.eye(256))
        layer.mlp[0].bias.fill_(10.0)  # SiLU is the identity to 5e-4 there
        layer.mlp[2].weight.copy_(torch.eye(256))
        layer.mlp[2].bias.fill_(-10.0)
    t = torch.tensor([0.0, 0.25, 1.0])
    angles = t[:, None] * 10_000.0 ** (-torch.arange(128) / 128)
    expected = torch.cat([angles.cos(), angles.sin()], dim=1)
    torch.testing.assert_close(layer(t), expected, rtol=0, atol=2e-3)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_attention_is_the_softmax_over_the_keys(qk_norm: bool) -> None:
    torch.manual_seed(0)
    layer = Attention(12, 3, qk_norm=qk_norm).double()
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    output, queries, keys = layer(x)
    weight, bias = layer.qkv.weight, layer.qkv.bias
    for b in range(2):
        heads = []
        for h in range(3):
            part = [
                x[b] @ weight[o + 4 * h : o + 4 * h + 4].T + bias[o + 4 * h : o + 4 * h + 4]
                for o in (0, 12, 24)
            ]
            q, k, v = part
            if qk_norm:
                q, k = F.layer_norm(q, (4,)), F.layer_norm(k, (4,))
            torch.testing.assert_close(queries[b, h], q)
            torch.testing.assert_close(keys[b, h], k)
            heads.append(torch.softmax(q @ k.T / 4**0.5, dim=-1) @ v)
        torch.testing.assert_close(output[b], layer.proj(torch.cat(heads, dim=1)))


def test_block_by_its_equations() -> None:
    torch.manual_seed(0)
    block = Block(8, 2, qk_norm=False).double()
    x, c = torch.randn(2, 3, 8, dtype=torch.float64), torch.randn(2, 8, dtype=torch.float64)
    s1, m1, g1, s2, m2, g2 = (part[:, None] for part in block.adaLN_modulation(c).split(8, dim=1))

    def norm(tokens: torch.Tensor) -> torch.Tensor:
        centred = tokens - tokens.mean(-1, keepdim=True)
        return centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + 1e-6)

    after = x + g1 * block.attn(norm(x) * (1 + m1) + s1)[0]
    hidden = block.mlp.fc1(norm(after) * (1 + m2) + s2)
    gelu = 0.5 * hidden * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (hidden + 0.044715 * hidden**3)))
    torch.testing.assert_close(block(x, c)[0], after + g2 * block.mlp.fc2(gelu))


def test_patches_go_back_to_their_place() -> None:
    """A model whose tokens are their patches returns its input: patchify and unpatchify are inverse."""
    config = SiTConfig(depth=1, width=16, heads=1, patch_size=2, input_size=6, in_channels=4)
    model = SiT(config).double()
    x = inputs(config)[0]
    # channels-last inside a patch: output p, q, c; the convolution's weight is c, p, q
    pick = torch.eye(16, dtype=torch.float64).reshape(2, 2, 4, 16).permute(3, 2, 0, 1)
    with torch.no_grad():
        model.x_embedder.proj.weight.copy_(pick)
        tokens = model.x_embedder(x)
    torch.testing.assert_close(unpatchify(tokens, model.facts.grid, 2), x)


def test_initialisation() -> None:
    torch.manual_seed(0)
    model = SiT(SiTConfig(depth=2, width=64, heads=2, patch_size=2, input_size=8, num_classes=300))
    state = model.state_dict()
    zero = [key for key, value in state.items() if not value.any()]
    assert {key for key in state if "adaLN_modulation" in key} <= set(zero)
    assert {"final_layer.linear.weight", "final_layer.linear.bias"} <= set(zero)
    biases = {key for key in state if key.endswith(".bias")}
    assert biases <= set(zero)
    assert set(zero) == biases | {key for key in state if key.endswith("adaLN_modulation.1.weight")} | {
        "final_layer.linear.weight"
    }
    for key, fan_in, fan_out in (
        ("blocks.0.attn.qkv.weight", 64, 192),
        ("blocks.1.mlp.fc2.weight", 256, 64),
        ("x_embedder.proj.weight", 16, 64),
    ):
        bound = (6 / (fan_in + fan_out)) ** 0.5
        assert 0.95 * bound < state[key].abs().max() <= bound
        assert state[key].std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
    for key in ("t_embedder.mlp.0.weight", "t_embedder.mlp.2.weight", "y_embedder.embedding_table.weight"):
        assert state[key].std().item() == pytest.approx(0.02, rel=0.05)
    x, t, y = inputs(model.config, dtype=torch.float32)
    velocity = model(x, t, y).prediction
    assert velocity is not None
    assert not velocity.any()
    torch.manual_seed(0)
    again = SiT(model.config).state_dict()
    assert all(torch.equal(state[key], again[key]) for key in state)


def test_state_dict_keys_are_the_published_ones(shared: Path) -> None:
    published = load_file(shared / "golden" / "repa_sit.safetensors")
    expected = {key: value.shape for key, value in published.items() if not key.startswith("projectors.")}
    assert {key: value.shape for key, value in SiT(GOLDEN).state_dict().items()} == expected
    assert not SiT(GOLDEN).pos_embed.requires_grad


def test_capture_returns_what_was_asked_and_changes_nothing() -> None:
    model = randomised(SMALL)
    x, t, y = inputs(SMALL)
    plain = model(x, t, y)
    assert (plain.hidden, plain.grids, plain.queries, plain.keys) == ({}, {}, {}, {})
    captured = model(x, t, y, Capture(hidden=(1, 3), attention=(2,)))
    assert torch.equal(captured.prediction, plain.prediction)
    assert set(captured.hidden) == {1, 3}
    assert captured.grids == {1: (4, 4), 3: (4, 4)}
    assert captured.hidden[1].shape == (2, 16, 32)
    assert set(captured.queries) == set(captured.keys) == {2}
    # recomputed from the hidden state before block 2
    embedding = model.t_embedder(t) + model.y_embedder(y)
    _, (queries, keys) = model.blocks[1](captured.hidden[1], embedding, look=True)
    assert torch.equal(captured.queries[2], queries)
    assert torch.equal(captured.keys[2], keys)
    assert queries.shape == (2, 2, 16, 16)
    last = unpatchify(model.final_layer(captured.hidden[3], embedding), (4, 4), 2)
    assert torch.equal(last, plain.prediction)


def test_stop_after_runs_no_later_block() -> None:
    model = randomised(SMALL)
    x, t, y = inputs(SMALL)
    stopped = model(x, t, y, Capture(hidden=(2,), stop_after=2))
    assert stopped.prediction is None
    assert torch.equal(stopped.hidden[2], model(x, t, y, Capture(hidden=(2,))).hidden[2])
    stopped.hidden[2].sum().backward()
    assert all(parameter.grad is None for parameter in model.blocks[2].parameters())
    assert all(parameter.grad is None for parameter in model.final_layer.parameters())


@pytest.mark.parametrize(
    "capture",
    [
        Capture(hidden=(0,)),
        Capture(attention=(4,)),
        Capture(stop_after=4),
        Capture(hidden=(3,), stop_after=2),
    ],
)
def test_capture_of_a_block_that_does_not_run_is_refused(capture: Capture) -> None:
    with pytest.raises(ValueError, match="block"):
        SiT(SMALL)(*inputs(SMALL, dtype=torch.float32), capture)


def test_qk_norm_gives_normalised_queries() -> None:
    config = SiTConfig(depth=1, width=32, heads=2, patch_size=2, input_size=8, num_classes=5, qk_norm=True)
    model = SiT(config).double()
    assert {"blocks.0.attn.q_norm.weight", "blocks.0.attn.k_norm.bias"} <= set(model.state_dict())
    captured = model(*inputs(config), Capture(attention=(1,)))
    for tokens in (captured.queries[1], captured.keys[1]):
        torch.testing.assert_close(tokens.mean(-1), torch.zeros_like(tokens[..., 0]), rtol=0, atol=1e-12)
        assert (tokens.square().mean(-1) <= 1).all()


def test_half_precision_attention_under_autocast_with_qk_norm() -> None:
    config = SiTConfig(depth=1, width=32, heads=2, patch_size=2, input_size=8, num_classes=5, qk_norm=True)
    model = randomised(config, torch.float32)
    x, t, y = inputs(config, dtype=torch.float32)
    full = model(x, t, y).prediction
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = model(x, t, y).prediction
    assert full is not None
    assert half is not None
    assert half.dtype == torch.bfloat16
    assert (half.float() - full).norm() < 0.05 * full.norm()


def test_compiled_forward_is_one_graph_per_distinct_capture() -> None:
    model = randomised(SMALL, torch.float32)
    graphs = 0

    def backend(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> torch.fx.GraphModule:
        nonlocal graphs
        graphs += 1
        return graph

    torch.compiler.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    x, t, y = inputs(SMALL, dtype=torch.float32)
    for captures, expected in ((2, 1), (3, 2)):
        for _ in range(captures):
            capture = Capture(hidden=(2,), attention=(1,)) if expected == 1 else Capture()
            ours, theirs = compiled(x, t, y, capture), model(x, t, y, capture)
            torch.testing.assert_close(ours.prediction, theirs.prediction)
            assert set(ours.hidden) == set(theirs.hidden)
            assert ours.grids == theirs.grids
            assert set(ours.queries) == set(theirs.queries)
        assert graphs == expected
    torch.compiler.reset()


def test_label_conditioner() -> None:
    conditioner = LabelConditioner(10, 8)
    labels = torch.arange(10).repeat(2000).int()
    generator = torch.Generator().manual_seed(0)
    condition = conditioner.draw(labels, generator)
    dropped = condition == 10
    assert condition.dtype == torch.int64
    assert dropped.float().mean().item() == pytest.approx(0.1, abs=0.01)
    assert torch.equal(condition[~dropped], labels[~dropped].long())
    again = conditioner.condition(labels, conditioner.dropped(len(labels), torch.Generator().manual_seed(0)))
    assert torch.equal(condition, again)
    assert conditioner.null(3).tolist() == [10, 10, 10]
    drawn = conditioner.sampling(5000, generator)
    assert set(drawn.tolist()) == set(range(10))
    assert torch.equal(conditioner(torch.tensor([10])), conditioner.embedding_table.weight[10:])


def test_facts() -> None:
    config = SiTConfig.named("SiT-B/2", input_size=32)
    assert config.facts == BackboneFacts(
        depth=12,
        width=768,
        heads=12,
        grid=(16, 16),
        patch_size=2,
        size_name="B",
        family="SiT",
        siblings=(
            ((32, 32), "SiT-B/1"),
            ((16, 16), "SiT-B/2"),
            ((8, 8), "SiT-B/4"),
            ((4, 4), "SiT-B/8"),
        ),
        token_times=True,
        channels=4,
    )
    facts = config.facts
    assert (facts.width_of(12), facts.heads_of(1), facts.grid_of(1)) == (768, 12, (16, 16))
    for block in (0, 13):
        with pytest.raises(ValueError, match="blocks 1 to 12"):
            config.facts.grid_of(block)


def test_published_sizes() -> None:
    assert {
        name: (size.depth, size.width, size.heads) for name, size in SIT_SIZES.items() if name != "T"
    } == {
        "S": (12, 384, 6),
        "B": (12, 768, 12),
        "L": (24, 1024, 16),
        "XL": (28, 1152, 16),
    }
    with torch.device("meta"):
        model = SiT(SiTConfig.named("SiT-XL/2", input_size=32))
    # DiT-XL/2 as released has 675,129,632; it predicts 16 numbers a token more, of 1,153 parameters each
    assert sum(parameter.numel() for parameter in model.parameters()) == 675_129_632 - 16 * 1153


@pytest.mark.parametrize(
    "name", ["SiT-B", "SiT-B/3", "sit-b/2", "SiT-XXL/2", "SiT-B/2 ", "SiT-B/02", "B/2", ""]
)
def test_unknown_names_are_refused_with_the_names_there_are(name: str) -> None:
    with pytest.raises(RepaError, match=r"S, B, L, XL and patch 1, 2, 4, 8"):
        SiTConfig.parse(name)


def test_a_patch_that_does_not_divide_the_latent_is_refused() -> None:
    assert SiTConfig.parse("SiT-XL/8") == ("XL", 8)
    with pytest.raises(RepaError, match="patch 8 does not divide the latent's side 12; choose patch 1, 2, 4"):
        SiTConfig.named("SiT-B/8", input_size=12)
