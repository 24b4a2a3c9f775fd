"""LightningDiT: golden numbers, the published count of parameters, names, options, methods' facts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from repa.data.errors import RepaError
from repa.trainer.methods.alignment import projector
from repa.trainer.models import registry
from repa.trainer.models.capture import Capture
from repa.trainer.models.conditioning import Conditioner
from repa.trainer.models.lightningdit import LightningDiT, LightningDiTConfig
from repa.trainer.models.sit import SIT_SIZES
from safetensors.torch import load_file
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

GOLDEN = LightningDiTConfig(depth=2, width=48, heads=4, patch_size=2, input_size=16, num_classes=10)


class Vector(Conditioner):
    """A vector of 24 numbers through one linear map, as GMem's condition."""

    column, drop_probability = "demo/cls", 0.0

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(24, 48)

    def condition(self, values: Tensor, dropped: Tensor) -> Tensor:
        del dropped
        return values

    def null(self, count: int) -> Tensor:
        return torch.zeros(count, 24)

    def sampling(self, count: int, generator: torch.Generator) -> Tensor:
        raise NotImplementedError

    def forward(self, condition: Tensor) -> Tensor:
        embedding: Tensor = self.linear(condition)
        return embedding


@pytest.fixture(scope="module")
def golden(shared: Path) -> dict[str, Tensor]:
    with np.load(shared / "golden" / "gmem.npz") as file:
        return {key: torch.from_numpy(file[key]).double() for key in file if file[key].dtype.kind == "f"}


@pytest.fixture(scope="module")
def weights(shared: Path) -> dict[str, Tensor]:
    state = load_file(shared / "golden" / "gmem.safetensors")
    prefix = "lightningdit."
    return {key.removeprefix(prefix): each.double() for key, each in state.items() if key.startswith(prefix)}


@pytest.fixture
def double() -> Iterator[None]:
    """Tables in float64, as they are only rounded to the dtype in which the network is built."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("double")
def test_golden_forward(golden: dict[str, Tensor], weights: dict[str, Tensor]) -> None:
    """At their time, from noise to data, and with their sign, as the published weights have it."""
    model, mlp = LightningDiT(GOLDEN, Vector()), projector(48, 40, 24)
    renamed = {key.replace("condition_projection", "y_embedder"): each for key, each in weights.items()}
    model.load_state_dict({key: each for key, each in renamed.items() if not key.startswith("projector.")})
    mlp.load_state_dict(
        {
            key.removeprefix("projector.0."): each
            for key, each in weights.items()
            if key.startswith("projector.0.")
        }
    )
    inputs = golden["x_t"], golden["lightningdit_t"], golden["condition"]
    exact = model(*inputs).prediction
    # what is rounded there is not here: tables of cosines and sines, and in the last one also RMSNorm
    torch.testing.assert_close(exact, golden["lightningdit_out64"], rtol=0, atol=1e-7)
    torch.testing.assert_close(exact, golden["lightningdit_out"], rtol=0, atol=1e-6)
    model.rotation = rotation_in_float32()
    captured = model(*inputs, Capture(hidden=(1,), attention=(2,)))
    torch.testing.assert_close(captured.prediction, golden["lightningdit_out64"], rtol=0, atol=1e-9)
    torch.testing.assert_close(mlp(captured.hidden[1]), golden["lightningdit_projected64"], rtol=0, atol=1e-9)
    assert captured.queries[2].shape == (3, 4, 64, 12)


def rotation_in_float32() -> Tensor:
    """The rotation of `GOLDEN` with every step rounded, as in the published program."""
    frequencies = 1 / 10_000 ** (torch.arange(0, 6, 2, dtype=torch.float32) / 6)
    angles = torch.arange(8, dtype=torch.float32)[:, None] * frequencies
    both = torch.cat([angles.repeat_interleave(8, dim=0), angles.repeat(8, 1)], dim=1)
    return torch.stack([both.cos(), both.sin()]).double()


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        # the authors' training log says 675.26 M of XL/1; of the others nothing is printed
        ("LightningDiT-XL/1", 675_256_736),
        ("LightningDiT-L/1", 458_152_960),
        ("LightningDiT-B/1", 130_556_192),
    ],
)
def test_published_sizes(name: str, parameters: int) -> None:
    config = registry.config_of(name, input_size=16, in_channels=32, num_classes=1000)
    with torch.device("meta"):
        model = registry.build(config)
    assert sum(each.numel() for each in model.parameters()) == parameters
    size = SIT_SIZES[config.size_name]
    assert (config.depth, config.width, config.heads) == (size.depth, size.width, size.heads)
    assert model.blocks[0].mlp.w3.weight.shape == (size.width, int(8 * size.width / 3))


def test_state_dict_keys_are_the_published_ones(weights: dict[str, Tensor]) -> None:
    published = {key for key in weights if not key.startswith(("projector", "condition"))}
    own = {key for key in LightningDiT(GOLDEN).state_dict() if not key.startswith("y_embedder")}
    assert own == published


def test_initialisation() -> None:
    torch.manual_seed(0)
    model = LightningDiT(GOLDEN)
    zero = {key for key, value in model.state_dict().items() if not value.any()}
    assert zero == {key for key in model.state_dict() if key.endswith(".bias")} | {
        key for key in model.state_dict() if key.endswith("adaLN_modulation.1.weight")
    } | {"final_layer.linear.weight"}
    x, t = torch.randn(2, 4, 16, 16), torch.rand(2)
    assert not model(x, t, torch.zeros(2, dtype=torch.int64)).prediction.any()


def test_options_may_be_left_out_one_by_one() -> None:
    latent = {"input_size": 16, "in_channels": 32, "num_classes": 10}
    config = registry.config_of("LightningDiT-T/1", **latent, qk_norm=False, rope=None, swiglu=False)
    assert registry.choices_of(config) == {
        "qk_norm": False, "rope": True, "rms_norm": True, "swiglu": False,
    }  # fmt: skip
    assert registry.from_plain(registry.to_plain(config)) == config
    assert registry.to_plain(config)["family"] == "LightningDiT"


def test_facts() -> None:
    facts = registry.config_of("LightningDiT-B/1", input_size=16, in_channels=32, num_classes=10).facts
    assert (facts.grid, facts.size_name, facts.token_times) == ((16, 16), "B", True)
    assert {name for _, name in facts.siblings} == {"LightningDiT-B/1", "LightningDiT-B/2"}


@pytest.mark.parametrize("name", ["LightningDiT-S/1", "LightningDiT-B/4", "lightningdit-B/1", "LightningDiT"])
def test_names_that_there_are_not(name: str) -> None:
    with pytest.raises(RepaError) as caught:
        registry.config_of(name, input_size=16, in_channels=32, num_classes=10)
    assert caught.value.field == "--model"


def test_a_patch_that_does_not_divide_the_latent_is_refused() -> None:
    with pytest.raises(RepaError) as caught:
        registry.config_of("LightningDiT-B/2", input_size=7, in_channels=32, num_classes=10)
    assert (caught.value.field, caught.value.remedy) == ("--model", "choose patch 1")


def test_a_network_of_a_state_dict_has_its_tables() -> None:
    torch.manual_seed(0)
    model = LightningDiT(GOLDEN)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    x, t, y = torch.randn(2, 4, 16, 16), torch.rand(2), torch.tensor([1, 2])
    again = registry.load(GOLDEN, model.state_dict())
    assert isinstance(again, LightningDiT)
    assert torch.equal(again(x, t, y).prediction, model(x, t, y).prediction)
