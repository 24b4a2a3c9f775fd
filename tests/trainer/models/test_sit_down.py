"""SiT↓: the paper's counts, golden numbers, its stages and skips, captures, names."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from repa.data.errors import RepaError
from repa.trainer.methods.alignment import projector
from repa.trainer.models import registry
from repa.trainer.models.capture import Capture
from repa.trainer.models.conditioning import LabelConditioner
from repa.trainer.models.gated_mlp import SwiGlu
from repa.trainer.models.layers import Block
from repa.trainer.models.sit import SIT_SIZES
from repa.trainer.models.sit_down import SIT_DOWN_SIZES, Down, SiTDown, SiTDownConfig, Up
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

GOLDEN = SiTDownConfig(
    outer=2, middle=3, width=32, heads=4, mlp_width=88, patch_size=2, input_size=16, num_classes=10
)
SMALL = SiTDownConfig(
    outer=2, middle=1, width=32, heads=2, mlp_width=48, patch_size=2, input_size=8, num_classes=5
)


@pytest.fixture(scope="module")
def golden(shared: Path) -> dict[str, torch.Tensor]:
    with np.load(shared / "golden" / "urepa.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file}


@pytest.fixture(scope="module")
def weights(shared: Path) -> dict[str, torch.Tensor]:
    state = load_file(shared / "golden" / "urepa.safetensors")
    return {key: value.double() for key, value in state.items()}


@pytest.fixture
def double() -> Iterator[None]:
    """Tables in float64, as they are only rounded to the dtype in which the network is built."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def randomised(config: SiTDownConfig) -> SiTDown:
    """A SiT↓ with no zero layer, so that every input and parameter counts."""
    torch.manual_seed(0)
    model = SiTDown(config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def inputs(config: SiTDownConfig, count: int = 2) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    side, dtype = config.input_size, torch.get_default_dtype()
    x = torch.randn(count, config.in_channels, side, side, generator=generator, dtype=dtype)
    t = torch.rand(count, generator=generator, dtype=dtype)
    return x, t, torch.arange(count) % config.num_classes


@pytest.mark.usefixtures("double")
def test_golden_forward(golden: dict[str, torch.Tensor], weights: dict[str, torch.Tensor]) -> None:
    model = SiTDown(GOLDEN)
    own = {
        key: value for key, value in weights.items() if key.startswith("model.") and "projector" not in key
    }
    model.load_state_dict({key.removeprefix("model."): value for key, value in own.items()})
    blocks = tuple(range(1, 8))
    captured = model(golden["fwd_x"], golden["t"], golden["y"], Capture(hidden=blocks))
    torch.testing.assert_close(captured.prediction, golden["fwd_out"], rtol=0, atol=1e-9)
    for block in blocks:
        torch.testing.assert_close(captured.hidden[block], golden[f"hidden_{block}"], rtol=0, atol=1e-9)


def test_golden_resampling(golden: dict[str, torch.Tensor], weights: dict[str, torch.Tensor]) -> None:
    """Of U-DiT, whose own down- and up-sampling double and halve the width."""
    for name, layer in (("down", Down(16, 32)), ("up", Up(16, 8))):
        layer.double().load_state_dict({"weight": weights[f"udit.{name}.body.0.weight"]})
        out = layer(golden[f"udit_{name}_x"])
        torch.testing.assert_close(out, golden[f"udit_{name}_out"], rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("size", "parameters", "operations", "printed"),
    [
        ("B", 199_692_048, 24_124_850_176, (199.7, 24.1)),
        ("L", 686_627_600, 79_268_675_584, (686.6, 79.3)),
        ("XL", 954_369_168, 109_283_639_296, (954.4, 109.3)),
    ],
)
def test_the_counts_of_the_paper(
    size: str, parameters: int, operations: int, printed: tuple[float, float]
) -> None:
    """Table 2, with projector (to 768 channels) and position table, without the products of attention."""
    config = SiTDownConfig.named(f"SiT-down-{size}/2", input_size=32)
    with torch.device("meta"):
        model, mlp = SiTDown(config), projector(config.width, 2048, 768)
        counter = FlopCounterMode(display=False)
        with counter, torch.no_grad():
            tap = config.facts.depth // 2
            captured = model(
                *inputs(config, 1)[:2], torch.zeros(1, dtype=torch.int64), Capture(hidden=(tap,))
            )
            mlp(captured.hidden[tap])
    count = sum(each.numel() for each in chain(model.parameters(), mlp.parameters()))
    assert count == parameters
    assert round(count / 1e6, 1) == printed[0]
    found = counter.get_flop_counts()["Global"]
    linear = sum(
        flops for name, flops in found.items() if str(name) in ("aten.addmm", "aten.mm", "aten.convolution")
    )
    assert linear // 2 == operations
    assert round(linear / 2e9, 1) == printed[1]


def test_the_demo_size_costs_what_that_of_sit_costs() -> None:
    operations = {}
    for name in ("SiT-T/1", "SiT-down-T/1"):
        config = registry.config_of(name, input_size=8, in_channels=4, num_classes=10)
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            registry.build(config)(*inputs(config, 1)[:2], torch.zeros(1, dtype=torch.int64))
        operations[name] = counter.get_total_flops()
    assert operations["SiT-down-T/1"] == pytest.approx(operations["SiT-T/1"], rel=0.1)
    assert SIT_DOWN_SIZES["T"].width == SIT_SIZES["T"].width


def test_gated_mlp_by_its_equation() -> None:
    torch.manual_seed(0)
    layer, x = SwiGlu(6, 10).double(), torch.randn(2, 3, 6, dtype=torch.float64)
    gate, value = x @ layer.fc1_g.weight.T, x @ layer.fc1_x.weight.T
    expected = (gate / (1 + torch.exp(-gate)) * value) @ layer.fc2.weight.T
    torch.testing.assert_close(layer(x), expected)
    assert {name for name, _ in layer.named_parameters()} == {"fc1_g.weight", "fc1_x.weight", "fc2.weight"}


@pytest.mark.usefixtures("double")
def test_a_pass_by_its_stages() -> None:
    """Block for block by hand: two encoder blocks, one in the middle, two that take the skips in reverse."""
    model, (x, t, y) = randomised(SMALL), inputs(SMALL)
    outer = model.t_embedder(t) + model.y_embedder(y)
    middle = model.mid_t_embedder(t) + model.mid_y_embedder(y)

    def image(tokens: torch.Tensor, side: int) -> torch.Tensor:
        return tokens.transpose(1, 2).unflatten(2, (side, side))

    first = model.blocks[0](model.x_embedder(x) + model.pos_embed, outer, model.rotation)[0]
    second = model.blocks[1](first, outer, model.rotation)[0]
    shrunk = F.pixel_unshuffle(F.conv2d(image(second, 4), model.down.weight, padding=1), 2)
    inside = model.blocks[2](shrunk.flatten(2).transpose(1, 2), middle, model.mid_rotation)[0]
    grown = F.pixel_shuffle(F.conv2d(image(inside, 2), model.up.weight, padding=1), 2)
    tokens = grown.flatten(2).transpose(1, 2)
    for block, skip in ((model.blocks[3], second), (model.blocks[4], first)):
        joined = block.skip_linear(torch.cat([tokens, skip], -1))
        tokens = Block.forward(block, joined, outer, model.rotation)[0]
    captured = model(x, t, y, Capture(hidden=(3, 5)))
    torch.testing.assert_close(captured.hidden[3], inside)
    torch.testing.assert_close(captured.hidden[5], tokens)
    patches = model.final_layer(tokens, outer).reshape(2, 4, 4, 2, 2, 4).permute(0, 5, 1, 3, 2, 4)
    torch.testing.assert_close(captured.prediction, patches.reshape(2, 4, 8, 8))


def test_facts_differ_by_stage() -> None:
    facts = SiTDownConfig.named("SiT-down-B/2", input_size=32).facts
    assert (facts.depth, facts.grid, facts.size_name) == (15, (16, 16), "B")
    assert [facts.grid_of(block) for block in (1, 5, 6, 10, 11, 15)] == [
        (16, 16), (16, 16), (8, 8), (8, 8), (16, 16), (16, 16),
    ]  # fmt: skip
    assert {facts.width_of(block) for block in range(1, 16)} == {768}
    assert {facts.heads_of(block) for block in range(1, 16)} == {12}
    grids = {name: grid for grid, name in facts.siblings}
    assert grids == {f"SiT-down-B/{patch}": (32 // patch, 32 // patch) for patch in (1, 2, 4, 8)}


def test_captures_of_every_stage_change_nothing() -> None:
    model, (x, t, y) = randomised(SMALL), inputs(SMALL)
    plain = model(x, t, y)
    assert (plain.hidden, plain.grids, plain.queries, plain.keys) == ({}, {}, {}, {})
    captured = model(x, t, y, Capture(hidden=(1, 3, 4), attention=(2, 3, 5)))
    assert torch.equal(captured.prediction, plain.prediction)
    assert captured.grids == {1: (4, 4), 3: (2, 2), 4: (4, 4)}
    assert {block: tokens.shape for block, tokens in captured.hidden.items()} == {
        1: (2, 16, 32), 3: (2, 4, 32), 4: (2, 16, 32),
    }  # fmt: skip
    shapes = {2: (2, 2, 16, 16), 3: (2, 2, 4, 16), 5: (2, 2, 16, 16)}
    assert {block: each.shape for block, each in captured.queries.items()} == shapes
    assert {block: each.shape for block, each in captured.keys.items()} == shapes


@pytest.mark.parametrize("stop", [2, 3, 4])
def test_stop_after_runs_no_later_block(stop: int) -> None:
    model, (x, t, y) = randomised(SMALL), inputs(SMALL)
    stopped = model(x, t, y, Capture(hidden=(stop,), stop_after=stop))
    assert stopped.prediction is None
    assert torch.equal(stopped.hidden[stop], model(x, t, y, Capture(hidden=(stop,))).hidden[stop])
    stopped.hidden[stop].sum().backward()
    reached = {name for name, each in model.named_parameters() if each.grad is not None}
    blocks = {int(name.split(".")[1]) + 1 for name in reached if name.startswith("blocks.")}
    assert blocks == set(range(1, stop + 1))
    assert not any(name.startswith("final_layer") for name in reached)
    assert ("down.weight" in reached, "up.weight" in reached) == (stop > 2, stop > 3)


@pytest.mark.parametrize(
    "capture", [Capture(hidden=(0,)), Capture(attention=(6,)), Capture(hidden=(3,), stop_after=2)]
)
def test_a_capture_of_a_block_that_does_not_run_is_refused(capture: Capture) -> None:
    with pytest.raises(ValueError, match="block"):
        SiTDown(SMALL)(*inputs(SMALL), capture)


def test_both_embeddings_see_the_same_condition() -> None:
    model, (x, t, _) = randomised(SMALL), inputs(SMALL)
    seen: dict[str, torch.Tensor] = {}
    for name in ("y_embedder", "mid_y_embedder"):
        model.get_submodule(name).register_forward_hook(
            lambda _, condition, __, name=name: seen.update({name: condition[0]})
        )
    generator = torch.Generator().manual_seed(0)
    model.y_embedder.drop_probability = 0.5
    condition = model.y_embedder.draw(torch.arange(2).repeat(10), generator)
    assert {5} < set(condition.tolist())
    model(x.repeat(10, 1, 1, 1), t.repeat(10), condition)
    assert torch.equal(seen["y_embedder"], condition)
    assert torch.equal(seen["mid_y_embedder"], condition)
    # a change of either table at the null class is seen in the prediction
    null = model.y_embedder.null(2)
    before = model(x, t, null).prediction
    for table in (model.y_embedder, model.mid_y_embedder):
        with torch.no_grad():
            table.embedding_table.weight[5] += 1
        after = model(x, t, null).prediction
        assert not torch.equal(after, before)
        before = after


def test_a_conditioner_of_its_own_is_copied() -> None:
    conditioner = LabelConditioner(7, 32)
    model = SiTDown(SMALL, conditioner)
    assert model.y_embedder is conditioner
    assert model.mid_y_embedder is not conditioner
    assert model.mid_y_embedder.embedding_table.weight.shape == (8, 32)


def test_initialisation() -> None:
    torch.manual_seed(0)
    model = SiTDown(SMALL)
    state = model.state_dict()
    zero = {key for key, value in state.items() if not value.any()}
    assert zero == {key for key in state if key.endswith(".bias")} | {
        key for key in state if key.endswith("adaLN_modulation.1.weight")
    } | {"final_layer.linear.weight"}
    for key, fan_in, fan_out in (
        ("down.weight", 9 * 32, 9 * 8),
        ("up.weight", 9 * 32, 9 * 128),
        ("blocks.4.skip_linear.weight", 64, 32),
        ("blocks.0.mlp.fc1_g.weight", 32, 48),
        ("x_embedder.proj.weight", 16, 32),
    ):
        bound = (6 / (fan_in + fan_out)) ** 0.5
        assert 0.95 * bound < state[key].abs().max() <= bound
    for key in ("t_embedder.mlp.0.weight", "mid_t_embedder.mlp.2.weight"):
        assert state[key].std().item() == pytest.approx(0.02, rel=0.1)
    tables = [state[f"{name}.embedding_table.weight"] for name in ("y_embedder", "mid_y_embedder")]
    assert not torch.equal(*tables)
    assert not model(*inputs(SMALL)).prediction.any()
    torch.manual_seed(0)
    again = SiTDown(SMALL).state_dict()
    assert all(torch.equal(state[key], again[key]) for key in state)


def test_the_middle_is_heard_at_once() -> None:
    """The blocks after the up-sampling get what comes through the middle from the first step."""
    torch.manual_seed(0)
    model, (x, t, y) = SiTDown(SMALL), inputs(SMALL)
    before = model(x, t, y, Capture(hidden=(4,))).hidden[4]
    with torch.no_grad():
        model.up.weight.zero_()
    assert (model(x, t, y, Capture(hidden=(4,))).hidden[4] - before).abs().max() > 0.1


def test_tables_are_in_no_state_dict() -> None:
    model = randomised(SMALL)
    assert {name for name, _ in model.named_buffers()} == {"rotation", "mid_rotation"}
    assert not {"rotation", "mid_rotation"} & model.state_dict().keys()
    loaded = registry.load(SMALL, model.state_dict())
    assert torch.equal(loaded.rotation, model.rotation)
    batch = inputs(SMALL)
    assert torch.equal(loaded(*batch).prediction, model(*batch).prediction)
    assert registry.from_plain(registry.to_plain(SMALL)) == SMALL


def test_qk_norm() -> None:
    config = registry.config_of("SiT-down-T/1", input_size=4, in_channels=4, num_classes=3, qk_norm=True)
    model = registry.build(config)
    assert "blocks.6.attn.k_norm.bias" in model.state_dict()
    queries = model(*inputs(config), Capture(attention=(4,))).queries[4]
    # a rotation keeps the length that the norm gave
    torch.testing.assert_close(queries.norm(dim=-1), torch.full(queries.shape[:-1], 8.0), rtol=1e-3, atol=0)


def test_half_precision_under_autocast() -> None:
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
        capture = Capture(hidden=(3,), attention=(1, 5))
        ours, theirs = compiled(x, t, y, capture), model(x, t, y, capture)
        torch.testing.assert_close(ours.prediction, theirs.prediction)
        torch.testing.assert_close(ours.hidden[3], theirs.hidden[3])
        assert ours.grids == theirs.grids
    assert len(graphs) == 1
    torch.compiler.reset()


@pytest.mark.parametrize("name", ["SiT-down-B/2", "SiT-down-T/1", "SiT-down-XL/8"])
def test_names(name: str) -> None:
    config = registry.config_of(name, input_size=32, in_channels=4, num_classes=10)
    assert isinstance(config, SiTDownConfig)
    assert name == f"SiT-down-{config.size_name}/{config.patch_size}"


@pytest.mark.parametrize("name", ["SiT-down-S/2", "SiT-down-B/3", "SiT-down/2", "sit-down-B/2", "SiT-down-B"])
def test_names_that_there_are_not(name: str) -> None:
    with pytest.raises(RepaError) as caught:
        registry.config_of(name, input_size=32, in_channels=4, num_classes=10)
    assert caught.value.field == "--model"


@pytest.mark.parametrize(
    ("side", "patch", "remedy"), [(32, 8, None), (12, 4, "1, 2"), (8, 8, "1, 2, 4"), (7, 1, "SiT")]
)
def test_odd_grids_are_refused(side: int, patch: int, remedy: str | None) -> None:
    if remedy is None:
        assert SiTDownConfig.named(f"SiT-down-B/{patch}", input_size=side).middle_grid == (2, 2)
        return
    with pytest.raises(RepaError) as caught:
        SiTDownConfig.named(f"SiT-down-B/{patch}", input_size=side)
    assert caught.value.field == "--model"
    assert remedy in caught.value.remedy


def test_vectors_beside_the_latent_are_refused() -> None:
    with pytest.raises(RepaError) as caught:
        registry.with_tokens(SMALL, "SiT-down-T/2", (24,))
    assert caught.value.field == "--model"
    assert registry.with_tokens(SMALL, "SiT-down-T/2", ()) == SMALL


def test_no_published_checkpoint_is_read(tmp_path: Path) -> None:
    save_file(randomised(SMALL).state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(RepaError) as caught:
        registry.load_any_published(tmp_path / "model.safetensors", weights="ema")
    assert "\n" not in str(caught.value)
