"""DiT: golden output, its steps of time, names, sizes, what it shares with SiT and what it refuses."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import small_dit as small
import torch
from repa.data.errors import RepaError
from repa.trainer.models import registry
from repa.trainer.models.capture import Capture
from repa.trainer.models.dit import DiT, DiTConfig
from repa.trainer.models.sit import SiT, SiTConfig
from repa.trainer.models.timesteps import time_of
from torch.testing import assert_close

if TYPE_CHECKING:
    from pathlib import Path


def test_golden_output_at_every_time_of_a_step(shared: Path) -> None:
    reference = small.load(shared)
    numbers, network = reference.numbers, reference.student
    steps = numbers["t"].double()
    for t in (time_of(steps), (steps + 0.01) / 1000, (steps + 0.99) / 1000):
        found = network(numbers["x_t"], t, numbers["y"]).prediction
        assert_close(found, numbers["out"], **small.TOLERANCE)
    captured = network(numbers["x_t"], time_of(steps), numbers["y"], Capture(hidden=(5,), stop_after=5))
    assert captured.prediction is None
    assert captured.grids == {5: (8, 8)}


@pytest.mark.parametrize(("size", "millions"), [("S", 33.0), ("B", 130.5), ("L", 458.1), ("XL", 675.1)])
def test_published_sizes(size: str, millions: float) -> None:
    """Without the fixed table of positions, as the paper counts."""
    with torch.device("meta"):
        network = registry.build(
            registry.config_of(f"DiT-{size}/2", input_size=32, in_channels=4, num_classes=1000)
        )
    count = sum(each.numel() for name, each in network.named_parameters() if name != "pos_embed")
    assert count / 1e6 == pytest.approx(millions, abs=0.35)


def test_names() -> None:
    assert registry.family_of("DiT-XL/8").objective == "ddpm"
    assert type(registry.config_of("DiT-B/2", input_size=32, in_channels=4, num_classes=10)) is DiTConfig
    for name in ("DiT-B", "DiT-H/2", "DiT-B/3", "dit-B/2"):
        with pytest.raises(RepaError):
            registry.family_of(name)
    assert not SiTConfig.knows("DiT-B/2")
    assert not DiTConfig.knows("SiT-B/2")
    with pytest.raises(RepaError) as caught:
        DiTConfig.named("DiT-B/8", input_size=12)
    assert "patch" in caught.value.what
    facts = DiTConfig.named("DiT-B/2", input_size=32).facts
    assert all(name.startswith("DiT-B/") for _, name in facts.siblings)
    assert (facts.family, facts.stepped_time) == ("DiT", True)
    assert not SiTConfig.named("SiT-B/2", input_size=32).facts.stepped_time


def test_the_weights_it_shares_with_a_sit_are_drawn_alike() -> None:
    """So that the two are compared from the same start."""
    networks = []
    for build, config in ((SiT, SiTConfig), (DiT, DiTConfig)):
        torch.manual_seed(0)
        networks.append(build(config(depth=2, width=32, heads=2, patch_size=2, input_size=8, num_classes=3)))
    first, second = (each.state_dict() for each in networks)
    assert first.keys() == second.keys()
    different = {key for key in first if first[key].shape != second[key].shape}
    assert different == {"final_layer.linear.weight", "final_layer.linear.bias"}
    # all but what is drawn after the output layer exists: the order of the blocks is the same
    assert torch.equal(first["pos_embed"], second["pos_embed"])
    x, t, y = torch.randn(2, 4, 8, 8), torch.rand(2), torch.tensor([0, 1])
    assert not networks[1](x, t, y).prediction.any()
    assert networks[1](x, t, y).prediction.shape == (2, 8, 8, 8)


def test_architectures_are_written_and_read() -> None:
    config = DiTConfig.named("DiT-T/2", input_size=8, num_classes=3)
    assert registry.from_plain(registry.to_plain(config)) == config
    assert registry.to_plain(config)["family"] == "DiT"
    with pytest.raises(RepaError) as caught:
        registry.with_tokens(config, "DiT-T/2", (24,))
    assert caught.value.field == "--model"


def test_labels_are_dropped_and_null_is_the_last_row() -> None:
    network = DiT(DiTConfig(depth=1, width=16, heads=1, patch_size=2, input_size=4, num_classes=3))
    null = network.y_embedder.null(2)
    assert null.tolist() == [3, 3]
    dropped = network.y_embedder.condition(torch.tensor([0, 1]), torch.tensor([True, False]))
    assert dropped.tolist() == [3, 1]
