"""Activation checkpointing: the same gradients to the bit from fewer kept bytes, in every family."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from repa.trainer.models.capture import Capture
from repa.trainer.models.dit import DiT, DiTConfig
from repa.trainer.models.lightningdit import LightningDiT, LightningDiTConfig
from repa.trainer.models.mmdit import MMDiT, MMDiTConfig
from repa.trainer.models.registry import BACKBONES
from repa.trainer.models.sit import SiT, SiTConfig
from repa.trainer.models.sit_down import SiTDown, SiTDownConfig
from repa.trainer.models.text_conditioning import TextConditioner
from repa.trainer.models.token_groups import TokenGroups
from torch import nn

if TYPE_CHECKING:
    from repa.trainer.models.base import Backbone
    from torch import Tensor

BATCH, WIDTH, DEPTH, TOKENS = 4, 32, 4, 16
SIZE = {"width": WIDTH, "heads": 2, "patch_size": 2, "input_size": 8, "num_classes": 5}


def networks() -> dict[str, Backbone]:
    torch.manual_seed(0)
    text = TextConditioner("clip-l/text", (3, 6), WIDTH)
    return {
        "SiT": SiT(SiTConfig(depth=DEPTH, qk_norm=True, **SIZE)),
        "DiT": DiT(DiTConfig(depth=DEPTH, **SIZE)),
        "LightningDiT": LightningDiT(LightningDiTConfig(depth=DEPTH, **SIZE)),
        "SiT-down": SiTDown(SiTDownConfig(outer=1, middle=2, mlp_width=48, **SIZE)),
        "MMDiT": MMDiT(MMDiTConfig(depth=DEPTH, qk_norm=True, **SIZE), text),
    }


CAPTURES = {
    "hidden and attention": Capture(hidden=(1, 2, DEPTH), attention=(2, 3)),
    "early stop": Capture(hidden=(2,), attention=(1, 2), stop_after=2),
}


def randomised(network: Backbone) -> Backbone:
    for parameter in network.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.2)
    return network


def inputs(network: Backbone) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(BATCH, *network.config.latent_shape, generator=generator)
    t = torch.rand(BATCH, generator=generator)
    if network.y_embedder.sequence:
        return x, t, torch.randn(BATCH, 3, 6, generator=generator)
    return x, t, torch.randint(5, (BATCH,), generator=generator)


def loss_of(captured: Any) -> Tensor:
    """A number that everything which was returned moves."""
    made = [*captured.hidden.values(), *captured.queries.values(), *captured.keys.values()]
    if captured.prediction is not None:
        made.append(captured.prediction)
    return torch.stack([each.square().mean() for each in made]).sum()


def gradients(
    network: Backbone, every: int, *arguments: Any, **named: Any
) -> tuple[Tensor, list[Tensor | None]]:
    network.recompute_every = every
    network.zero_grad()
    loss = loss_of(network(*arguments, **named))
    loss.backward()
    return loss, [None if each.grad is None else each.grad.clone() for each in network.parameters()]


def same(one: list[Tensor | None], other: list[Tensor | None]) -> bool:
    return all(
        (first is None) == (second is None) and (first is None or torch.equal(first, second))
        for first, second in zip(one, other, strict=True)
    )


@pytest.fixture(params=list(BACKBONES))
def network(request: pytest.FixtureRequest) -> Backbone:
    return randomised(networks()[request.param])


@pytest.mark.parametrize("capture", CAPTURES.values(), ids=CAPTURES)
@pytest.mark.parametrize("every", [1, 2])
def test_gradients_are_the_same_to_the_bit(network: Backbone, capture: Capture, every: int) -> None:
    plain = gradients(network, 0, *inputs(network), capture)
    again = gradients(network, every, *inputs(network), capture)
    assert torch.equal(plain[0], again[0])
    assert same(plain[1], again[1])
    assert any(each is not None and each.abs().sum() > 0 for each in again[1])


def kept_bytes(network: Backbone, every: int, capture: Capture) -> int:
    """Count what a forward pass keeps for the backward pass, each storage once, without the parameters."""
    network.recompute_every = every
    weights = {each.untyped_storage().data_ptr() for each in network.parameters()}
    storages: dict[int, int] = {}
    held = []  # so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        held.append(tensor)
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss_of(network(*inputs(network), capture))
    return sum(storages.values())


def test_far_fewer_bytes_are_kept(network: Backbone) -> None:
    """Of a block its inputs are left, with every second block of one in two."""
    capture = Capture(hidden=(2,))
    none, half, all_of_them = (kept_bytes(network, every, capture) for every in (0, 2, 1))
    blocks = len(network.blocks)
    of_a_block = (none - all_of_them) / blocks
    assert of_a_block * blocks > 0.6 * none
    # hardly more than tokens, an embedding and what surrounds the blocks
    tokens = BATCH * TOKENS * WIDTH * 4
    assert all_of_them < (3 * blocks + 14) * tokens
    assert abs((none - half) - of_a_block * blocks / 2) < 0.25 * of_a_block * blocks


def test_random_numbers_inside_a_block_are_drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    network = randomised(networks()["SiT"])
    forward = network.blocks[1].forward

    def dropping(*arguments: Any, **named: Any) -> Any:
        tokens, looked = forward(*arguments, **named)
        return nn.functional.dropout(tokens, 0.5), looked

    monkeypatch.setattr(network.blocks[1], "forward", dropping)
    found = []
    for every in (0, 1):
        torch.manual_seed(3)
        found.append((*gradients(network, every, *inputs(network)), torch.rand(1)))
    assert torch.equal(found[0][0], found[1][0])
    assert same(found[0][1], found[1][1])
    assert torch.equal(found[0][2], found[1][2])


def test_groups_of_tokens_and_vectors_beside_the_latent_go_through() -> None:
    network = randomised(networks()["SiT"])
    x, _, labels = inputs(network)
    generator = torch.Generator().manual_seed(2)
    groups = TokenGroups(of_token=torch.randint(2, (BATCH, TOKENS), generator=generator), separate=True)
    t = torch.rand(BATCH, 2, generator=generator)
    plain, again = (gradients(network, every, x, t, labels, groups=groups) for every in (0, 1))
    assert same(plain[1], again[1])
    network = randomised(SiT(SiTConfig(depth=DEPTH, token_widths=(7,), **SIZE)))
    beside = (torch.randn(BATCH, 7, generator=generator),)
    capture = Capture(hidden=(2,))
    plain, again = (gradients(network, every, *inputs(network), capture, beside) for every in (0, 1))
    assert same(plain[1], again[1])


def test_without_gradient_nothing_is_prepared_to_be_computed_again(
    network: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError

    monkeypatch.setattr("repa.trainer.models.base.checkpoint", never)
    network.recompute_every = 1
    with torch.no_grad():
        network(*inputs(network))
    with pytest.raises(AssertionError):
        network(*inputs(network))


@pytest.mark.parametrize(
    "whole", [pytest.param(False, id="blocks"), pytest.param(True, id="whole", marks=pytest.mark.thorough)]
)
def test_compiled_it_keeps_as_little(whole: bool) -> None:
    """Compiled blocks are checkpointed from outside, a compiled network checkpoints inside; none breaks."""
    torch._dynamo.reset()
    network = randomised(SiT(SiTConfig(depth=2, **SIZE)))
    capture = Capture(hidden=(1,), attention=(2,))
    plain, kept = gradients(network, 0, *inputs(network), capture), kept_bytes(network, 1, capture)
    for each in (network,) if whole else network.blocks:
        each.compile(backend="aot_eager", fullgraph=True)
    again = gradients(network, 1, *inputs(network), capture)
    torch.testing.assert_close(again[1], plain[1], rtol=1e-4, atol=1e-6)
    assert kept_bytes(network, 1, capture) < 1.3 * kept
