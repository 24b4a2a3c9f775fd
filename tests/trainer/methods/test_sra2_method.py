"""SRA 2: the loss by loops over pixels, no loss at the latent itself, what gradient reaches, its head."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from repa.data.format.columns import MOMENTS, ColumnSpec
from repa.trainer.methods.base import Step
from repa.trainer.methods.sra2 import Sra2, Sra2Config
from repa.trainer.models.capture import BlockFacts, Captured
from repa.trainer.models.sit import SiT, SiTConfig

CONFIG = SiTConfig(depth=4, width=16, heads=2, patch_size=2, input_size=8, num_classes=5)
COLUMNS = {MOMENTS: ColumnSpec(shape=(8, 8, 8), dtype="float32")}


def make(facts: Any = CONFIG.facts, **settings: Any) -> Sra2:
    torch.manual_seed(0)
    return Sra2(Sra2Config(**{"depth": 2, **settings}), facts, COLUMNS, {}).double()


def step_of(x0: torch.Tensor, hidden: torch.Tensor) -> Step:
    return Step(
        index=0,
        columns={},
        x0=x0,
        noise=x0,
        t=torch.zeros(len(x0)),
        condition=torch.zeros(len(x0)),
        student=Captured(prediction=None, hidden={2: hidden}),
        interpolate=lambda t: t,
        generator=torch.Generator(),
    )


def test_the_loss_by_loops() -> None:
    """Each token's head says its patch, channels last, as the network's own final layer."""
    method = make(layers=3, head_width=8)
    x0, hidden = torch.randn(2, 4, 8, 8).double(), torch.randn(2, 16, 16).double()
    term = method.losses(step_of(x0, hidden))["sra2"]
    first, second, third = (each for each in method.head if isinstance(each, torch.nn.Linear))
    losses = []
    for image in range(2):
        for token in range(16):
            inner = torch.nn.functional.silu(first(hidden[image, token]))
            patch = third(torch.nn.functional.silu(second(inner))).tolist()
            row, column = divmod(token, 4)
            for index, value in enumerate(patch):
                within, channel = divmod(index, 4)
                y, x = 2 * row + within // 2, 2 * column + within % 2
                distance = abs(value - x0[image, channel, y, x].item())
                losses.append(distance**2 / 0.1 if distance < 0.05 else distance - 0.025)
    assert term.value.item() == pytest.approx(math.fsum(losses) / len(losses), rel=1e-12)
    assert len(losses) == 2 * 4 * 8 * 8
    assert term.weight == 1.0


def test_no_loss_where_the_head_says_the_latent() -> None:
    method = make()
    hidden = torch.randn(2, 16, 16).double()
    assert method.losses(step_of(method.latent_of(hidden).detach(), hidden))["sra2"].value.item() == 0


def test_gradient_reaches_every_token_and_the_blocks_up_to_the_depth() -> None:
    method, network = make(), SiT(CONFIG).double()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x0, t = torch.randn(3, 4, 8, 8).double(), torch.rand(3).double()
    captured = network(x0, t, torch.tensor([0, 1, 5]), method.capture(method.phase_at(0)))
    hidden = captured.hidden[2]
    loss = method.losses(step_of(x0, hidden))["sra2"].value
    names, parameters = zip(
        *((name, each) for name, each in network.named_parameters() if each.requires_grad), strict=True
    )
    (of_tokens, *found) = torch.autograd.grad(loss, [hidden, *parameters], allow_unused=True)
    assert of_tokens.abs().amax(-1).min() > 0
    for name, gradient in zip(names, found, strict=True):
        assert (gradient is None) == name.startswith(("blocks.2.", "blocks.3.", "final_layer.")), name


@pytest.mark.parametrize(("size", "depth"), [("T", 1), ("B", 2), ("L", 8), ("XL", 8)])
def test_blocks_and_head_by_size(size: str, depth: int) -> None:
    config = SiTConfig.named(f"SiT-{size}/2", input_size=32)
    method = Sra2(Sra2Config(), config.facts, {MOMENTS: ColumnSpec(shape=(8, 32, 32), dtype="float32")}, {})
    assert method.config.depth == depth
    assert method.problems() == []
    layers = [(each.in_features, each.out_features) for each in method.head if hasattr(each, "in_features")]
    width = config.width
    assert layers == [(width, 2 * width), *[(2 * width, 2 * width)] * 3, (2 * width, 16)]
    assert method.columns(method.phase_at(0)) == ()


def test_a_block_on_a_coarser_grid_says_larger_patches() -> None:
    outer, inner = (BlockFacts(width=16, heads=2, grid=(side, side)) for side in (4, 2))
    method = make(replace(CONFIG.facts, blocks=(outer, inner, outer, outer)))
    assert method.latent_of(torch.randn(3, 4, 16).double()).shape == (3, 4, 8, 8)


def test_without_preset_or_block_it_is_refused() -> None:
    facts = SiTConfig.named("SiT-S/2", input_size=8).facts
    for depth in (None, 13):
        (problem,) = Sra2(Sra2Config(depth=depth), facts, COLUMNS, {}).problems()
        assert problem.field == "method.depth"
