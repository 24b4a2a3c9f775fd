"""The autoencoder: moments, decoding, provenance, and folders that are not one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from diffusers import AutoencoderKL
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from repa.data.errors import RepaError
from repa.data.reading.latents import scale_latent, unscale_latent
from repa.pipeline.encoders.vae import (
    CONFIG,
    DEFAULT_VAE,
    STABLE_DIFFUSION,
    WEIGHTS,
    Autoencoder,
    latent_shape,
)
from repa.pipeline.encoders.weights import weights_sha256
from safetensors.torch import load_file, save_file

SMALL: dict[str, Any] = {
    **STABLE_DIFFUSION,
    "block_out_channels": (8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "sample_size": 16,
    "latent_channels": 3,
    "scaling_factor": 0.25,
    "shift_factor": 0.125,
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A small autoencoder, in a folder and in memory."""
    folder = tmp_path_factory.mktemp("small-vae")
    build: Any = AutoencoderKL
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = build(**SMALL).eval()
        # log-variances away from zero, so that a forgotten exponent shows
        torch.nn.init.normal_(model.quant_conv.bias, std=2.0)
    model.save_pretrained(folder)
    return folder, model


@pytest.fixture
def folder(saved: tuple[Path, Any], tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(saved[0], tmp_path / "vae"))


def images(count: int = 2, side: int = 16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=generator)


def test_moments_are_mean_and_standard_deviation(saved: tuple[Path, Any]) -> None:
    path, model = saved
    moments = Autoencoder.load(str(path)).encode_moments(images())
    assert moments.dtype == torch.float32
    assert moments.shape == (2, 6, 8, 8)
    assert not moments.requires_grad
    with torch.no_grad():
        hidden = model.quant_conv(model.encoder(images().float() / 127.5 - 1))
    mean, log_variance = hidden.chunk(2, dim=1)
    assert torch.equal(moments[:, :3], mean)
    assert torch.equal(moments[:, 3:], torch.exp(0.5 * log_variance.clamp(-30, 20)))
    assert (moments[:, 3:] > 0).all()


def test_decoding_is_the_references(saved: tuple[Path, Any]) -> None:
    path, model = saved
    latents = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    decoded = Autoencoder.load(str(path)).decode(latents)
    with torch.no_grad():
        expected = (model.decode(latents.float()).sample + 1) / 2
    assert decoded.dtype == torch.uint8
    assert torch.equal(decoded, (255 * expected).clamp(0, 255).to(torch.uint8))


def test_lower_precision_still_gives_float32(saved: tuple[Path, Any]) -> None:
    exact = Autoencoder.load(str(saved[0])).encode_moments(images())
    lower = Autoencoder.load(str(saved[0]), "cpu", "bfloat16")
    moments = lower.encode_moments(images())
    assert moments.dtype == torch.float32
    assert not torch.equal(moments, exact)
    assert torch.allclose(moments, exact, rtol=0.1, atol=0.1)
    assert lower.decode(moments[:, :3]).dtype == torch.uint8
    assert lower.provenance(2, 16).compute_dtype == "bfloat16"


def test_provenance(saved: tuple[Path, Any]) -> None:
    path, model = saved
    provenance = Autoencoder.load(str(path)).provenance(batch_size=4, resolution=32)
    assert provenance.model == path.name
    assert provenance.weights_sha256 == weights_sha256(model.state_dict())
    assert not provenance.random_weights
    assert (provenance.input_size, provenance.grid, provenance.batch_size) == (32, (16, 16), 4)
    assert provenance.mean == provenance.std == (0.5, 0.5, 0.5)
    assert provenance.compute_dtype == "float32"
    assert set(provenance.libraries) == {"repa", "torch", "diffusers", "pillow"}
    assert provenance.notes == {
        "scaling_factor": 0.25,
        "shift_factor": 0.125,
        "location": str(path.resolve()),
    }


def test_a_resolution_that_is_no_multiple_of_the_stride(saved: tuple[Path, Any]) -> None:
    autoencoder = Autoencoder.load(str(saved[0]))
    assert autoencoder.stride == 2
    with pytest.raises(RepaError, match=r"resolution 33 is not a multiple of 2, .* --resolution"):
        autoencoder.grid(33)


def test_weights_of_the_older_format_load_too(saved: tuple[Path, Any], folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS[0]), folder / WEIGHTS[1])
    (folder / WEIGHTS[0]).unlink()
    old, new = Autoencoder.load(str(folder)), Autoencoder.load(str(saved[0]))
    assert old.provenance(1, 16).weights_sha256 == new.provenance(1, 16).weights_sha256


def damage(folder: Path, how: str) -> None:
    weights = folder / WEIGHTS[0]
    state = load_file(weights)
    name = "decoder.conv_in.weight"
    if how == "no config":
        (folder / CONFIG).unlink()
    elif how == "nested":
        shutil.move(folder / CONFIG, folder / "x.json")
        (folder / "vae").mkdir()
        shutil.move(folder / "x.json", folder / "vae" / CONFIG)
    elif how == "not json":
        (folder / CONFIG).write_text("{")
    elif how == "another class":
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({**config, "_class_name": "VQModel"}))
    elif how == "no weights":
        weights.unlink()
    elif how == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif how == "text":
        weights.write_text("version https://git-lfs.github.com/spec/v1\n")
    elif how == "missing tensor":
        save_file({key: value for key, value in state.items() if key != name}, weights)
    elif how == "unexpected tensor":
        save_file({**state, "stranger": torch.zeros(1)}, weights)
    else:
        save_file({**state, name: torch.zeros(1, 2, 3, 4)}, weights)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("no config", r"has no config\.json; give --vae a folder"),
        ("nested", r"its sub-folder vae has one: --vae .*vae/vae"),
        ("not json", r"config\.json is no JSON"),
        ("another class", "describes VQModel, not an AutoencoderKL"),
        ("no weights", r"has no diffusion_pytorch_model\.safetensors"),
        ("truncated", "do not fit its config"),
        ("text", "do not fit its config"),
        ("missing tensor", r"1 tensor missing \(decoder\.conv_in\.weight\)"),
        ("unexpected tensor", r"1 tensor unexpected \(stranger\)"),
        ("another shape", "do not fit its config"),
    ],
)
def test_folders_that_are_no_autoencoder(
    folder: Path, how: str, message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    damage(folder, how)
    with pytest.raises(RepaError, match=message) as error:
        Autoencoder.load(str(folder))
    assert "\n" not in str(error.value)
    assert str(folder) in str(error.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["nowhere", "./nowhere/vae", "/nowhere/vae"])
def test_a_folder_that_is_not_there(name: str) -> None:
    with pytest.raises(RepaError, match=f"autoencoder {name} is not a folder; give --vae"):
        Autoencoder.load(name)


class Hub:
    """A hub that is not there, or that has some files."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, reachable: bool, files: dict[str, Path]) -> None:
        self.reachable = reachable
        self.files = files
        self.downloads: list[str] = []
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", self.download)
        monkeypatch.setattr(huggingface_hub, "get_session", lambda: self)

    def head(self, url: str, *, timeout: float) -> None:
        assert timeout <= 10
        if not self.reachable:
            raise ConnectionError(f"no route to {url}")

    def download(self, repository: str, filename: str, local_files_only: bool = False) -> str:
        if local_files_only:
            raise LocalEntryNotFoundError("not here")
        self.downloads.append(f"{repository}/{filename}")
        if filename not in self.files:
            raise EntryNotFoundError("not there")
        return str(self.files[filename])


def test_an_unreachable_hub_is_one_line_and_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(monkeypatch, reachable=False, files={})
    with pytest.raises(RepaError) as error:
        Autoencoder.load(DEFAULT_VAE)
    assert hub.downloads == []
    for part in ("no route", CONFIG, WEIGHTS[0], DEFAULT_VAE, "--vae FOLDER", "--random-weights"):
        assert part in str(error.value)
    assert "\n" not in str(error.value)


def test_a_hub_name_with_a_folder(monkeypatch: pytest.MonkeyPatch, saved: tuple[Path, Any]) -> None:
    path, model = saved
    hub = Hub(
        monkeypatch, reachable=True, files={f"vae/{name}": path / name for name in (CONFIG, WEIGHTS[0])}
    )
    provenance = Autoencoder.load("owner/name/vae").provenance(1, 16)
    assert hub.downloads == [f"owner/name/vae/{CONFIG}", f"owner/name/vae/{WEIGHTS[0]}"]
    assert (provenance.model, provenance.notes["location"]) == ("owner/name/vae", "owner/name/vae")
    assert provenance.weights_sha256 == weights_sha256(model.state_dict())
    with pytest.raises(RepaError, match=r"owner/name has none of config\.json"):
        Autoencoder.load("owner/name")


def test_random_weights_are_reproducible(saved: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("repa.pipeline.encoders.vae.STABLE_DIFFUSION", SMALL)
    before = torch.random.get_rng_state()
    first = Autoencoder.load(DEFAULT_VAE, random_weights=True)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.rand(1)
    second = Autoencoder.load(DEFAULT_VAE, random_weights=True)
    assert first.random_weights
    assert first.provenance(1, 16).random_weights
    assert first.provenance(1, 16).weights_sha256 == second.provenance(1, 16).weights_sha256
    assert first.provenance(1, 16).notes["location"] == DEFAULT_VAE
    # what is at hand is not drawn
    at_hand = Autoencoder.load(str(saved[0]), random_weights=True)
    assert not at_hand.random_weights
    assert at_hand.provenance(1, 16).weights_sha256 == weights_sha256(saved[1].state_dict())


def test_the_architecture_drawn_is_stable_diffusions() -> None:
    build: Any = AutoencoderKL
    with torch.device("meta"):
        model = build(**STABLE_DIFFUSION)
    # of the published model: 83.65 million parameters
    assert sum(value.numel() for value in model.parameters()) == 83_653_863
    assert model.encoder.down_blocks[3].resnets[1].conv2.weight.shape == (512, 512, 3, 3)
    assert model.config.scaling_factor == 0.18215


def test_statistics_of_the_channels_are_those_of_diffusers(tmp_path: Path) -> None:
    statistics = {"latents_mean": [-1.6, 1.9, -1.4], "latents_std": [8.5, 5.9, 6.5], "shift_factor": None}
    build: Any = AutoencoderKL
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = build(**{**SMALL, **statistics}).eval()
    model.save_pretrained(tmp_path / "vae")
    autoencoder = Autoencoder.load(str(tmp_path / "vae"))
    notes = autoencoder.provenance(2, 16).notes
    assert (notes["latents_mean"], notes["latents_std"]) == ([-1.6, 1.9, -1.4], [8.5, 5.9, 6.5])
    moments = autoencoder.encode_moments(images())
    scaled = scale_latent(moments[:, :3], *autoencoder.scale)
    # what diffusers' pipelines for Stable Diffusion XL do, before and after the network
    mean, std = (torch.tensor(model.config[key]).view(1, 3, 1, 1) for key in ("latents_mean", "latents_std"))
    with torch.no_grad():
        latent = model.encode(images().float() / 127.5 - 1).latent_dist.mode()
    assert torch.equal(scaled, (latent - mean) * model.config.scaling_factor / std)
    unscaled = scaled * std / model.config.scaling_factor + mean
    assert torch.equal(unscale_latent(scaled, *autoencoder.scale), unscaled)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"latents_mean": [0.0, 0.0, 0.0]}, "latents_std"),
        ({"latents_mean": [0.0], "latents_std": [1.0], "shift_factor": None}, "latents_mean"),
        ({"latents_mean": [0.0] * 3, "latents_std": [1.0] * 3}, "shift_factor"),
        ({"scaling_factor": None}, "scaling_factor"),
    ],
)
def test_statistics_without_a_meaning_are_refused(folder: Path, changes: dict[str, Any], field: str) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **changes}))
    for look in (lambda: latent_shape(str(folder), 16), lambda: Autoencoder.load(str(folder))):
        with pytest.raises(RepaError) as caught:
            look()
        assert caught.value.field == field


def test_numbers_that_are_not_finite_are_no_black_image(saved: tuple[Path, Any]) -> None:
    autoencoder = Autoencoder.load(str(saved[0]))
    for bad in (float("nan"), float("inf"), 1e38):
        latents = torch.zeros(2, 3, 8, 8)
        latents[1, 0, 0, 0] = bad
        with pytest.raises(RepaError):
            autoencoder.decode(latents)
