"""Groups of tokens: values, times and masks by loops; what a compiled network makes of them."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from repa.trainer.models.sit import SiT, SiTConfig
from repa.trainer.models.token_groups import TokenGroups

CONFIG = SiTConfig(depth=2, width=16, heads=2, patch_size=2, input_size=8, num_classes=3)


@given(st.integers(1, 3), st.integers(0, 2**31))
def test_spread_by_loops(number: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    of_token = torch.randint(number, (2, 6), generator=generator)
    values = torch.randn(2, number, 5, generator=generator)
    found = TokenGroups(of_token=of_token, separate=False).spread(values)
    assert found.shape == (2, 6, 5)
    for image in range(2):
        for token in range(6):
            assert torch.equal(found[image, token], values[image, of_token[image, token]])


def test_times_on_the_latent_by_loops() -> None:
    of_token = torch.tensor([[0, 1, 1, 0, 1, 0]])
    found = TokenGroups(of_token=of_token, separate=False).on_latent(torch.tensor([[0.25, 0.75]]), (2, 3), 2)
    assert found.shape == (1, 1, 4, 6)
    for row in range(4):
        for column in range(6):
            token = row // 2 * 3 + column // 2
            assert found[0, 0, row, column] == (0.25, 0.75)[of_token[0, token]]


def test_the_mask_by_loops() -> None:
    of_token = torch.tensor([[0, 1, 1], [2, 2, 0]])
    assert TokenGroups(of_token=of_token, separate=False).mask() is None
    mask = TokenGroups(of_token=of_token, separate=True).mask()
    assert mask is not None
    assert mask.shape == (2, 1, 3, 3)
    for image in range(2):
        for one in range(3):
            for other in range(3):
                assert mask[image, 0, one, other] == (of_token[image, one] == of_token[image, other])


def test_a_compiled_network_is_the_plain_one() -> None:
    """With the ``eager`` backend, which leaves what dynamo captures, in one graph."""
    torch.manual_seed(0)
    network = SiT(CONFIG)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x, t, labels = torch.randn(2, 4, 8, 8), torch.rand(2, 2), torch.tensor([0, 3])
    groups = TokenGroups(of_token=torch.randint(2, (2, 16)), separate=True)
    plain = network(x, t, labels, groups=groups).prediction
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x, t, labels, groups=groups).prediction, plain)
    assert torch.equal(compiled(x, t[:, 0], labels).prediction, network(x, t[:, 0], labels).prediction)
