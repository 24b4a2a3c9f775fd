"""Published checkpoints of 2C channels: DiT's, DiT-SRA's and the first SiT's, whose time runs back."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

import pytest
import small_dit as small
import torch
from repa.data.errors import RepaError
from repa.trainer.models import registry
from repa.trainer.models.dit import DiT, DiTConfig
from repa.trainer.models.published import load_published
from repa.trainer.models.published_dit import load_dit
from repa.trainer.models.sit import SIT_SIZES, SiT, SiTConfig, SiTSize
from repa.trainer.models.timesteps import time_of
from repa.trainer.sampling.generate import model_of_file
from repa.trainer.sampling.sampler import sample
from repa.trainer.sampling.settings import SamplerConfig
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

if TYPE_CHECKING:
    from pathlib import Path

CONFIG = DiTConfig(depth=2, width=32, heads=2, patch_size=2, input_size=8, num_classes=5, size_name="T")


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SIT_SIZES, "T", SiTSize(depth=2, width=32, heads=2))


def state_of(seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    state = {key: 0.3 * torch.randn_like(value) for key, value in DiT(CONFIG).state_dict().items()}
    state["pos_embed"] = DiT(CONFIG).state_dict()["pos_embed"]
    return state


def save(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def nested(**flags: Any) -> dict[str, Any]:
    head = {f"ap_head.linear{number}.weight": torch.randn(4, 4) for number in (1, 2)}
    return {
        "model": state_of(1) | head,
        "ema": state_of(2) | head,
        "opt": {"state": {}, "param_groups": [{"lr": 1e-4}]},
        "args": argparse.Namespace(**flags),
        "epoch": 79,
        "steps": 400_000,
    }


@pytest.mark.parametrize("name", ["DiT-XL-2-256x256.pt", "my-DiT-B-2.safetensors"])
def test_a_bare_dit_named_as_published(tmp_path: Path, name: str) -> None:
    path, state = tmp_path / name, state_of()
    if name.endswith("pt"):
        save(path, state)
    else:
        save_file(state, path)
    model = model_of_file(path)
    assert isinstance(model.backbone, DiT)
    assert model.backbone.config == CONFIG
    assert type(model.objective).__name__ == "Ddpm"
    assert (model.steps, model.guidable, model.autoencoder) == (None, True, None)
    for key, value in model.backbone.state_dict().items():
        assert torch.equal(value, state[key]), key


@pytest.mark.parametrize(("weights", "seed"), [("ema", 2), ("model", 1)])
def test_a_nested_one_of_dit_sra(tmp_path: Path, weights: str, seed: int) -> None:
    """What its flags say goes without a name."""
    path = save(tmp_path / "0400000.pt", nested(model="DiT-B/2"))
    objective, found = registry.load_any_published(path, weights=weights)
    assert (objective, found.config, found.steps, found.weights) == ("ddpm", CONFIG, 400_000, weights)
    assert set(found.projectors) == {"linear1.weight", "linear2.weight"}
    expected = state_of(seed)
    assert all(torch.equal(value, expected[key]) for key, value in found.build().state_dict().items())


def test_the_golden_file(shared: Path, tmp_path: Path) -> None:
    reference = small.load(shared)
    path = tmp_path / "DiT-small.safetensors"
    save_file(load_file(shared / "golden" / "dit.safetensors"), path)
    found = load_dit(path, heads=4)
    assert found.config == small.CONFIG
    assert {"linear1.weight", "0.4.bias"} <= set(found.projectors)
    numbers, network = reference.numbers, found.build().double()
    out = network(numbers["x_t"], time_of(numbers["t"].double()), numbers["y"]).prediction
    assert_close(out, numbers["out"], **small.TOLERANCE)


def first_sit(state: dict[str, torch.Tensor]) -> Any:
    """The first SiT as published: its velocity at its time s, data at 1, without the half it leaves out."""
    network = DiT(CONFIG).double().eval()
    network.load_state_dict(state)

    @torch.no_grad()
    def velocity(x: torch.Tensor, s: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        # the blocks of both are alike; DiT alone would make a step of the time
        prediction = SiT.forward(network, x, s, y).prediction
        assert prediction is not None
        return prediction.chunk(2, dim=1)[0]

    return velocity


def test_the_first_sit_in_our_time(tmp_path: Path) -> None:
    state = {key: value.double() for key, value in state_of().items()}
    theirs = first_sit(state)
    found = load_published(save(tmp_path / "SiT-XL-2-256x256.pt", state))
    assert found.config == SiTConfig(**{**vars(CONFIG)})
    ours = found.build()
    x, y = torch.randn(5, 4, 8, 8, dtype=torch.float64), torch.arange(5)
    t = torch.tensor([0.0, 0.125, 0.5, 0.71875, 1.0], dtype=torch.float64)
    with torch.no_grad():
        assert_close(ours(x, t, y).prediction, -theirs(x, 1 - t, y), rtol=0, atol=1e-5)
    # all but two layers are the file's own
    changed = [key for key in found.backbone if not torch.equal(found.backbone[key], state[key])]
    assert changed == ["t_embedder.mlp.0.weight", "final_layer.linear.weight", "final_layer.linear.bias"]


def test_the_first_sit_is_sampled_as_its_authors_do(tmp_path: Path) -> None:
    """From noise at their 0 to data at their 1, by Euler's steps."""
    state = state_of()
    theirs = first_sit({key: value.double() for key, value in state.items()})
    model = model_of_file(save(tmp_path / "SiT-XL-2-256x256.pt", state))
    assert type(model.objective).__name__ == "Flow"
    noise, y = torch.randn(3, 4, 8, 8, dtype=torch.float64), torch.tensor([0, 3, 5])
    x = noise
    for step in range(8):
        x = x + theirs(x, torch.full((3,), step / 8, dtype=torch.float64), y) / 8
    found = sample(model.backbone.double(), model.objective, noise, y, SamplerConfig(solver="euler", steps=8))
    assert_close(found, x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("flags", "path"), [({}, "linear"), ({"path_type": "Linear"}, "linear"), ({"path_type": "GVP"}, "cosine")]
)
def test_paths_of_the_first_sit(tmp_path: Path, flags: dict[str, str], path: str) -> None:
    file = save(tmp_path / "0400000.pt", nested(model="SiT-XL/2", **flags))
    model = model_of_file(file)
    assert isinstance(model.backbone, SiT)
    assert not isinstance(model.backbone, DiT)
    assert (model.objective.path.name, model.steps) == (path, 400_000)


@pytest.mark.parametrize("flags", [{"path_type": "VP"}, {"prediction": "noise"}, {"prediction": "score"}])
def test_other_objectives_of_the_first_sit_are_refused(tmp_path: Path, flags: dict[str, str]) -> None:
    file = save(tmp_path / "0400000.pt", nested(model="SiT-XL/2", **flags))
    with pytest.raises(RepaError) as caught:
        load_published(file)
    assert caught.value.field == "--ckpt"


def test_a_file_that_does_not_say_what_it_is(tmp_path: Path) -> None:
    file = save(tmp_path / "edited-model.pt", state_of())
    with pytest.raises(RepaError) as caught:
        model_of_file(file)
    assert caught.value.field == "--family"
    assert caught.value.remedy
    assert isinstance(model_of_file(file, family="DiT").backbone, DiT)
    assert type(model_of_file(file, family="SiT").backbone) is SiT


@pytest.mark.parametrize(
    ("name", "content", "family"),
    [
        ("DiT-XL-2-256x256.pt", state_of, "SiT"),
        ("SiT-XL-2-256x256.pt", state_of, "DiT"),
        ("0400000.pt", lambda: nested(model="DiT-B/2"), "SiT"),
        ("x.pt", state_of, "SiT-down"),
        ("x.pt", state_of, "dit"),
    ],
)
def test_a_family_that_it_is_not(tmp_path: Path, name: str, content: Any, family: str) -> None:
    file = save(tmp_path / name, content())
    with pytest.raises(RepaError) as caught:
        model_of_file(file, family=family)
    assert caught.value.field == "--family"
    assert caught.value.remedy


def test_flags_go_before_the_name(tmp_path: Path) -> None:
    file = save(tmp_path / "SiT-XL-2.pt", nested(model="DiT-B/2"))
    assert isinstance(model_of_file(file).backbone, DiT)


def test_repas_form_is_no_dit(tmp_path: Path) -> None:
    plain = SiTConfig(**vars(CONFIG))
    file = save(tmp_path / "repa.pt", SiT(plain).state_dict())
    assert type(model_of_file(file).backbone) is SiT
    with pytest.raises(RepaError) as caught:
        model_of_file(file, family="DiT")
    assert caught.value.remedy


@pytest.mark.parametrize("missing", ["blocks.1.attn.proj.weight", "final_layer.linear.bias", "pos_embed"])
def test_it_loads_strictly(tmp_path: Path, missing: str) -> None:
    state = state_of()
    del state[missing]
    with pytest.raises(RepaError) as caught:
        model_of_file(save(tmp_path / "DiT-B-2.pt", state))
    assert missing in caught.value.what
