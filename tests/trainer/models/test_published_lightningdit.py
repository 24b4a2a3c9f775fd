"""Published checkpoints of LightningDiT and GMem: read with time and sign reversed, sampled, refused."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from repa.commands.sample import SampleFlags, sample
from repa.data.errors import RepaError
from repa.data.format.columns import MOMENTS, ColumnSpec
from repa.data.reading.latents import LatentScale
from repa.data.testing import synthetic_cache
from repa.trainer.models import registry
from repa.trainer.models.conditioning import ClassTokenConditioner
from repa.trainer.models.lightningdit import LightningDiT, LightningDiTConfig
from repa.trainer.models.published_lightningdit import load_lightningdit
from repa.trainer.models.reversed_time import reverse_time
from repa.trainer.models.rotary import axial_rotation
from repa.trainer.models.sit import SIT_SIZES, SiT, SiTConfig, SiTSize
from repa.trainer.sampling.generate import model_of_file
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

if TYPE_CHECKING:
    from pathlib import Path

CONFIG = LightningDiTConfig(
    depth=2, width=32, heads=2, patch_size=1, input_size=4, in_channels=6, num_classes=5
)
TRANSPORT = {"path_type": "Linear", "prediction": "velocity", "use_cosine_loss": True}


def network(config: LightningDiTConfig = CONFIG, seed: int = 0) -> LightningDiT:
    torch.manual_seed(seed)
    model = LightningDiT(config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.2)
    return model


def tables(config: LightningDiTConfig = CONFIG) -> dict[str, Tensor]:
    rotation = axial_rotation(config.width // config.heads, config.grid, pairs="halves").float()
    both = rotation.repeat_interleave(2, dim=-1)
    return {"feat_rope.freqs_cos": both[0], "feat_rope.freqs_sin": both[1]}


def published(seed: int = 0, **model: Any) -> dict[str, Any]:
    """A file as the authors' training writes it, whose raw weights are those of a wrapped module."""
    ema = {**network(seed=seed).state_dict(), **tables()}
    raw = {**network(seed=seed + 1).state_dict(), **tables()}
    config = {"model": {"use_rope": True, **model}, "transport": TRANSPORT, "ckpt_path": None}
    return {
        "model": {f"module.{key}": each for key, each in raw.items()},
        "ema": ema,
        "opt": {},
        "config": config,
    }


def inputs(count: int = 3) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 6, 4, 4, generator=generator)
    # multiples of 1/1024, so that 1 − t is exact
    return x, torch.randint(1025, (count,), generator=generator) / 1024, torch.arange(count)


@pytest.mark.parametrize(("weights", "seed"), [("ema", 0), ("model", 1)])
def test_it_is_read_with_time_and_sign_reversed(tmp_path: Path, weights: str, seed: int) -> None:
    torch.save(published(), tmp_path / "lightningdit.pt")
    found = load_lightningdit(tmp_path / "lightningdit.pt", weights=weights, heads=2)
    assert found.config == CONFIG
    assert (found.weights, found.scale, found.condition) == (weights, None, None)
    x, t, y = inputs()
    theirs, ours = network(seed=seed), found.build()
    torch.testing.assert_close(ours(x, t, y).prediction, -theirs(x, 1 - t, y).prediction, rtol=0, atol=1e-5)
    assert (ours(x, t, y).prediction + theirs(x, t, y).prediction).abs().max() > 1e-2


def test_reversing_twice_is_nothing() -> None:
    state = network().state_dict()
    twice = reverse_time(reverse_time(state))
    for key, each in state.items():
        torch.testing.assert_close(twice[key], each, rtol=0, atol=1e-6)


def golden_gmem(shared: Path, folder: Path) -> Path:
    """The golden network in a file as GMem releases it, with its own names."""
    state = load_file(shared / "golden" / "gmem.safetensors")
    prefix = "lightningdit."
    own = {key.removeprefix(prefix): each.float() for key, each in state.items() if key.startswith(prefix)}
    torch.save({"ema": own, "model": own}, folder / "gmem.pt")
    return folder / "gmem.pt"


def test_the_golden_network_of_gmem_backwards(shared: Path, tmp_path: Path) -> None:
    """The golden output is theirs, data − noise at their time; ours at 1 − s is its negative."""
    with np.load(shared / "golden" / "gmem.npz") as file:
        golden = {
            key: torch.from_numpy(file[key]).double()
            for key in ("x_t", "lightningdit_t", "condition", "lightningdit_out64")
        }
    found = load_lightningdit(golden_gmem(shared, tmp_path), heads=4)
    assert found.config == LightningDiTConfig(depth=2, width=48, heads=4, patch_size=2, input_size=16)
    assert found.condition is not None
    assert (found.condition.column, found.condition.shape) == ("dinov2-b/cls", (24,))
    assert {key.partition(".")[0] for key in found.projectors} == {"0"}
    model = found.build().double()
    assert isinstance(model.y_embedder, ClassTokenConditioner)
    velocity = model(golden["x_t"], 1 - golden["lightningdit_t"], golden["condition"]).prediction
    # the published programs keep the embedding of the time in float32, as ours
    torch.testing.assert_close(velocity, -golden["lightningdit_out64"], rtol=0, atol=2e-6)


def test_gmem_is_sampled_with_vectors_of_a_cache(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SIT_SIZES, "T", SiTSize(depth=2, width=48, heads=4))
    columns = {
        MOMENTS: ColumnSpec(shape=(8, 16, 16), dtype="float32"),
        "dinov2-b/cls": ColumnSpec(shape=(24,), dtype="float16"),
    }
    synthetic_cache(tmp_path / "cache", num_rows=8, columns=columns, resolution=128)
    file = golden_gmem(shared, tmp_path)
    assert not model_of_file(file).guidable
    decoder = Latents(LatentScale(1.0, 0.0, (0.0,) * 4, (1.0,) * 4))
    monkeypatch.setattr("repa.commands.shared.prepared.decoder_of", lambda *_: decoder)
    flags: dict[str, Any] = {"checkpoint": file, "num": 2, "steps": 3, "npz": True}
    with pytest.raises(RepaError) as caught:
        sample(SampleFlags(**flags, out=tmp_path / "none"))
    assert caught.value.field == "--bank"
    images = []
    for row in ("1", "2"):
        out = tmp_path / f"out-{row}"
        sample(SampleFlags(**flags, bank=str(tmp_path / "cache"), like=[row], out=out))
        with np.load(out / "samples.npz") as arrays:
            images.append(arrays["arr_0"])
    assert images[0].shape == (2, 16, 16, 3)
    assert not np.array_equal(*images)


def test_bare_state_dicts_and_options(tmp_path: Path) -> None:
    config = replace(CONFIG, qk_norm=True)
    save_file(network(config).state_dict(), tmp_path / "bare.safetensors")
    found = load_lightningdit(tmp_path / "bare.safetensors")
    assert (found.config, found.weights) == (config, None)
    content = published(use_rope=False)
    content["ema"] = {key: each for key, each in content["ema"].items() if "feat_rope" not in key}
    torch.save(content, tmp_path / "no-rope.pt")
    assert load_lightningdit(tmp_path / "no-rope.pt", heads=2).config == replace(CONFIG, rope=False)


def test_released_size_needs_no_heads(tmp_path: Path) -> None:
    config = LightningDiTConfig.named("LightningDiT-XL/1", input_size=16, in_channels=32)
    with torch.device("meta"):
        shapes = {key: each.shape for key, each in LightningDiT(config).state_dict().items()}
    state = {key: torch.zeros(1).expand(shape) for key, shape in shapes.items()}
    torch.save({"ema": state | tables(config)}, tmp_path / "xl.pt")
    assert load_lightningdit(tmp_path / "xl.pt").config == config


def wrong(kind: str) -> dict[str, Any]:
    content = published()
    if kind == "path":
        content["config"] = {"transport": TRANSPORT | {"path_type": "GVP"}}
    elif kind == "prediction":
        content["config"] = {"transport": TRANSPORT | {"prediction": "noise"}}
    elif kind == "angles":
        content["ema"]["feat_rope.freqs_cos"] = content["ema"]["feat_rope.freqs_cos"] * 0.9
    elif kind == "grid":
        content["ema"]["feat_rope.freqs_sin"] = torch.zeros(9, 16)
    elif kind == "missing":
        del content["ema"]["blocks.1.norm2.weight"]
    elif kind == "no shift":
        content["ema"]["blocks.0.adaLN_modulation.1.weight"] = torch.zeros(4 * 32, 32)
    return content


@pytest.mark.parametrize("kind", ["path", "prediction", "angles", "grid", "missing", "no shift"])
def test_what_is_refused(tmp_path: Path, kind: str) -> None:
    torch.save(wrong(kind), tmp_path / "other.pt")
    with pytest.raises(RepaError) as caught:
        load_lightningdit(tmp_path / "other.pt", heads=2)
    assert caught.value.remedy
    assert "\n" not in str(caught.value)


def test_each_family_reads_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SIT_SIZES, "T", SiTSize(depth=2, width=32, heads=2))
    sit = SiTConfig(depth=2, width=32, heads=2, patch_size=2, input_size=8, num_classes=5, size_name="T")
    files = {"lightningdit": published(), "sit": SiT(sit).state_dict()}
    for name, content in files.items():
        torch.save(content, tmp_path / f"{name}.pt")
        objective, found = registry.load_any_published(tmp_path / f"{name}.pt", weights="ema")
        assert objective == "flow"
        assert found.network.__name__.lower() == name
    # who knows the file for its own says what is wrong, and nobody else
    del files["lightningdit"]["ema"]["blocks.1.norm2.weight"]
    torch.save(files["lightningdit"], tmp_path / "damaged.pt")
    with pytest.raises(RepaError) as caught:
        registry.load_any_published(tmp_path / "damaged.pt", weights="ema")
    assert "norm2" in caught.value.what
    assert "SiT" not in caught.value.what


class Latents:
    """An autoencoder whose images are its latents."""

    name, weights_sha256, latent_channels = "latents", "0", 6

    def __init__(self, scale: LatentScale) -> None:
        self.scale = scale

    def decode(self, latent: Tensor) -> Tensor:
        return (128 + 20 * latent[:, :3]).clamp(0, 255).to(torch.uint8)


def test_it_is_sampled_with_the_statistics_of_the_autoencoder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SIT_SIZES, "T", SiTSize(depth=2, width=32, heads=2))
    file = tmp_path / "lightningdit.pt"
    torch.save(published(), file)
    assert model_of_file(file).scale is None
    images = []
    for mean in ((), (0.0,) * 6, (1.5,) * 6):
        scale = LatentScale(1.0, 0.0, mean, tuple(1.0 for _ in mean))
        monkeypatch.setattr("repa.commands.shared.prepared.decoder_of", lambda *_, s=scale: Latents(s))
        out = tmp_path / f"out-{len(images)}-{bool(mean)}"
        flags = SampleFlags(checkpoint=file, num=2, steps=4, npz=True, out=out)
        if not mean:
            with pytest.raises(RepaError) as caught:
                sample(flags)
            assert caught.value.field == "--vae"
            continue
        sample(flags)
        with np.load(out / "samples.npz") as arrays:
            images.append(arrays["arr_0"].astype(int))
    inside = (images[0] > 0) & (images[1] < 255)
    assert inside.any()
    assert np.abs((images[1] - images[0])[inside] - 30).max() <= 1
