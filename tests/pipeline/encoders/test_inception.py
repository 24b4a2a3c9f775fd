"""The Inception network of FID, with weights that this test draws: no figure of it means anything."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from random_inception import write_random_inception
from repa.data.errors import RepaError
from repa.pipeline.encoders.inception import Inception
from repa.pipeline.encoders.weights import weights_sha256

inception = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")


@pytest.fixture(scope="module")
def random_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of RANDOM weights."""
    return write_random_inception(tmp_path_factory.mktemp("inception") / "random.pth")


def test_features(random_weights: Path) -> None:
    network = Inception(random_weights)
    assert network.weights_sha256 == weights_sha256(torch.load(random_weights, weights_only=True))
    images = torch.randint(0, 256, (2, 3, 20, 20), dtype=torch.uint8, generator=torch.manual_seed(0))
    found = network.features(images)
    assert {name: tuple(values.shape) for name, values in found.items()} == {
        name: (2, width) for name, width in network.widths.items()
    }
    # by torch-fidelity itself, and sFID's layer by the blocks in their order, channels last
    own = inception.FeatureExtractorInceptionV3(
        "x", ["2048", "logits_unbiased"], feature_extractor_weights_path=random_weights
    )
    pool, logits = own(images)
    assert torch.equal(found["pool"], pool)
    assert torch.equal(found["logits"], logits)
    resized = inception.interpolate_bilinear_2d_like_tensorflow1x(
        images.float(), size=(299, 299), align_corners=False
    )
    x = (resized - 128) / 128
    for name, block in own.named_children():
        if name == "Mixed_6d":
            x = block.branch1x1(x)
            break
        x = block(x)
    assert x.shape == (2, 192, 17, 17)
    assert torch.equal(found["spatial"].reshape(2, 17, 17, 7), x[:, :7].permute(0, 2, 3, 1))


@pytest.mark.parametrize("kind", ["another network", "pickle", "absent"])
def test_files_that_are_not_its_weights(random_weights: Path, tmp_path: Path, kind: str) -> None:
    file = tmp_path / "x.pth"
    if kind == "another network":
        state = torch.load(random_weights, weights_only=True)
        state["fc.weight"] = state["fc.weight"][:1000]  # torchvision's has 1,000 classes
        torch.save(state, file)
    if kind == "pickle":
        torch.save({"a": Path("x")}, file)
    with pytest.raises(RepaError) as caught:
        Inception(file)
    assert caught.value.remedy
