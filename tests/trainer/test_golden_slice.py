"""The backbone, its file and two losses against a published program's numbers, which are beside the tests."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from method_steps import make_step
from repa.data.format.columns import ColumnSpec
from repa.trainer.methods.alignment import cosine_similarity
from repa.trainer.methods.irepa import Irepa, IrepaConfig
from repa.trainer.models.capture import Capture
from repa.trainer.models.published import load_published
from repa.trainer.models.sit import SiT, SiTConfig
from repa.trainer.objectives.base import squared_error
from repa.trainer.objectives.paths import interpolant
from safetensors.torch import save_file

if TYPE_CHECKING:
    from repa.trainer.models.capture import Captured

FILE = Path(__file__).resolve().parents[1] / "golden" / "sit.npz"
CONFIG = SiTConfig(depth=4, width=48, heads=4, patch_size=2, input_size=16, num_classes=10)
PATH = interpolant("linear")


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    """Every array, numbers in float64, which is exact."""
    with np.load(FILE) as file:
        arrays = {key: torch.from_numpy(file[key]) for key in file}
    return {key: value.double() if value.is_floating_point() else value for key, value in arrays.items()}


@pytest.fixture(scope="module")
def backbone(golden: dict[str, torch.Tensor]) -> SiT:
    weights = {key.removeprefix("weights/"): value for key, value in golden.items() if "/" in key}
    model = SiT(CONFIG).double()
    model.load_state_dict({key: value for key, value in weights.items() if not key.startswith("conv1.")})
    return model.eval()


@pytest.fixture(scope="module")
@torch.no_grad()
def captured(golden: dict[str, torch.Tensor], backbone: SiT) -> Captured:
    x_t = PATH.interpolate(golden["x0"], golden["noise"], golden["t"])
    return backbone(x_t, golden["t"], golden["y"], Capture(hidden=(2,)))


def test_the_prediction(golden: dict[str, torch.Tensor], captured: Captured) -> None:
    assert captured.prediction is not None
    torch.testing.assert_close(captured.prediction[:1], golden["velocity"], rtol=0, atol=1e-9)


def test_the_velocity_loss(golden: dict[str, torch.Tensor], captured: Captured) -> None:
    assert captured.prediction is not None
    loss = squared_error(captured.prediction, PATH.velocity(golden["x0"], golden["noise"], golden["t"]))
    torch.testing.assert_close(loss, golden["loss_velocity"], rtol=0, atol=1e-9)


def test_the_alignment_loss(golden: dict[str, torch.Tensor], captured: Captured) -> None:
    """A 1×1 convolution is a linear map of each token."""
    weight, bias = golden["weights/conv1.weight"].flatten(1), golden["weights/conv1.bias"]
    projected = torch.nn.functional.linear(captured.hidden[2], weight, bias)
    loss = -cosine_similarity(projected, golden["z"]).mean()
    torch.testing.assert_close(loss, golden["loss_projected"], rtol=0, atol=1e-9)


def test_irepas_loss(golden: dict[str, torch.Tensor], captured: Captured) -> None:
    """Of the same program, with its 1×1 convolution and γ = 0.6; the number is its own."""
    columns = {"teacher/patch": ColumnSpec(shape=(64, 24), dtype="float32")}
    config = IrepaConfig(depth=2, kernel=1, gamma=0.6)
    method = Irepa(config, CONFIG.facts, columns, {"teacher": (8, 8)}).double()
    state = {part: golden[f"weights/conv1.{part}"] for part in ("weight", "bias")}
    method.projectors[0].projection_layer.load_state_dict(state)
    (term,) = method.losses(make_step({"teacher/patch": golden["z"]}, captured)).values()
    assert term.value.item() == pytest.approx(0.012358394003184057, abs=1e-9)


def test_the_position_table_bit_for_bit(golden: dict[str, torch.Tensor]) -> None:
    assert torch.equal(SiT(CONFIG).pos_embed.double(), golden["weights/pos_embed"])


def test_the_weights_as_a_published_file(tmp_path: Path, backbone: SiT) -> None:
    state = {key: value.contiguous() for key, value in backbone.state_dict().items()}
    save_file(state, tmp_path / "sit.safetensors")
    found = load_published(tmp_path / "sit.safetensors", heads=4)
    assert found.config == CONFIG
    assert all(torch.equal(found.backbone[key], value) for key, value in state.items())
