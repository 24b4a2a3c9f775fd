"""The cache's tokens beside those of diffusers' AutoencoderRAE, and its decoder."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from repa.data.errors import RepaError
from repa.pipeline.encoders import TEACHERS, load_encoder
from repa.pipeline.encoders.rae import FinalNorm, TokenDecoder, final_norm
from safetensors.torch import load_file, save_file
from small_rae import DINOV2, WIDTH, dinov2_weights, rae_of_dinov2, save_rae_of_demo

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    return dinov2_weights()


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    smooth = torch.rand(2, 3, 8, 8, generator=generator)
    large = torch.nn.functional.interpolate(smooth, size=(256, 256), mode="bicubic").clamp(0, 1)
    return (255 * large).to(torch.uint8)


@pytest.fixture(scope="module")
def norm(weights: dict[str, torch.Tensor]) -> FinalNorm:
    return FinalNorm(
        gain=weights["norm.weight"],
        bias=weights["norm.bias"],
        weights_sha256="0" * 64,
        prefix_tokens=5,
        kernel=weights["patch_embed.proj.weight"],
    )


@pytest.fixture(scope="module")
def tokens(
    weights: dict[str, torch.Tensor], images: torch.Tensor, tmp_path_factory: pytest.TempPathFactory
) -> torch.Tensor:
    """As a cache of 256² images has them, by timm at 224 pixels, on their grid."""
    file = tmp_path_factory.mktemp("teacher") / "small.safetensors"
    save_file(weights, file)
    encoder = load_encoder(DINOV2, resolution=256, weights=file)
    patch = encoder.encode(images)["patch"]
    assert patch.shape == (2, 256, WIDTH)
    return patch.mT.reshape(2, WIDTH, 16, 16)


def saved(folder: Path, made: Any) -> Path:
    made.save_pretrained(folder)
    return folder


def test_the_tokens_of_the_cache_are_those_of_the_autoencoder(
    weights: dict[str, torch.Tensor], images: torch.Tensor, tokens: torch.Tensor, norm: FinalNorm
) -> None:
    """But for gain and bias: cropping aside, both scale, normalise, place and cut in the same way."""
    made = rae_of_dinov2(weights)
    with torch.no_grad():
        expected = made.encode(images.float() / 255).latent
    found = (tokens - norm.bias.view(-1, 1, 1)) / norm.gain.view(-1, 1, 1)
    assert float(expected.std()) > 0.5
    assert float((found - expected).abs().max()) < 1e-3
    assert float((tokens - expected).abs().max()) > 0.1
    # a token without gain and bias has mean 0 and mean square 1, but for the norm's epsilon
    assert float(found.mean(1).abs().max()) < 1e-5
    assert float((found.square().mean(1) - 1).abs().max()) < 1e-3


def test_they_decode_as_the_autoencoder_decodes_its_own(
    weights: dict[str, torch.Tensor],
    images: torch.Tensor,
    tokens: torch.Tensor,
    norm: FinalNorm,
    tmp_path: Path,
) -> None:
    """Whatever its statistics and factor are, which its own latents are scaled by."""
    generator = torch.Generator().manual_seed(4)
    made = rae_of_dinov2(
        weights,
        latents_mean=torch.randn(WIDTH, 16, 16, generator=generator),
        latents_std=0.5 + torch.rand(WIDTH, 16, 16, generator=generator),
        scaling_factor=0.7,
    )
    decoder = TokenDecoder.load(str(saved(tmp_path / "rae", made)), norm)
    assert (decoder.side, decoder.width, decoder.stride) == (16, WIDTH, 16)
    found = decoder.decode(tokens)
    with torch.no_grad():
        expected = made.decode(made.encode(images.float() / 255).latent).sample
    assert found.shape == (2, 3, 256, 256)
    assert 20 < float(found.float().mean()) < 235
    assert float((found.float() - (255 * expected).clamp(0, 255)).abs().max()) < 1.1
    with pytest.raises(RepaError):
        decoder.decode(torch.full_like(tokens, torch.nan))


def test_another_teachers_decoder_is_refused(
    weights: dict[str, torch.Tensor], norm: FinalNorm, tmp_path: Path
) -> None:
    folder = str(saved(tmp_path / "rae", rae_of_dinov2(weights)))
    for other in (
        norm._replace(kernel=norm.kernel + 0.01),
        norm._replace(prefix_tokens=1),
        norm._replace(gain=torch.ones(WIDTH + 1)),
    ):
        with pytest.raises(RepaError) as caught:
            TokenDecoder.load(folder, other)
        assert caught.value.field == "--vae"
    # weights that were rounded to float16 on the way are the same ones
    TokenDecoder.load(folder, norm._replace(kernel=norm.kernel.half().float()))


def test_what_is_no_such_autoencoder_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "rae"
    made = save_rae_of_demo(folder)
    norm = final_norm("demo", resolution=64)
    assert (
        TokenDecoder.load(str(folder), norm).weights_sha256
        == TokenDecoder.load(str(folder), norm).weights_sha256
    )
    config, file = folder / "config.json", folder / "diffusion_pytorch_model.safetensors"
    said, state = json.loads(config.read_text()), load_file(file)

    def refused(**changes: Any) -> RepaError:
        config.write_text(json.dumps({**said, **changes}))
        with pytest.raises(RepaError) as caught:
            TokenDecoder.load(str(folder), norm)
        assert caught.value.remedy
        return caught.value

    assert refused(_class_name="AutoencoderKL").field == "--vae"
    assert refused(encoder_type="dinov9").field == "--vae"
    assert refused(encoder_patch_size=0).field == "--vae"
    assert refused(encoder_hidden_size="wide").what
    assert refused(decoder_num_attention_heads=5).what
    assert refused(decoder_num_hidden_layers=2).what
    config.write_text(json.dumps(said))
    save_file({name: each for name, each in state.items() if not name.startswith("decoder.")}, file)
    assert refused().what
    # without its encoder nothing tells whose tokens it decodes
    save_file({name: each for name, each in state.items() if not name.startswith("encoder.")}, file)
    assert refused().field == "--vae"
    file.unlink()
    assert refused().field == "--vae"
    assert len(made.decoder.decoder_layers) == 1
    for name in (str(tmp_path / "nowhere"), "rae", str(tmp_path)):
        with pytest.raises(RepaError) as caught:
            TokenDecoder.load(name, norm)
        assert caught.value.field == "--vae"


def test_without_transformers_it_says_what_to_install(
    weights: dict[str, torch.Tensor], norm: FinalNorm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved(tmp_path / "rae", rae_of_dinov2(weights))
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(RepaError) as caught:
        TokenDecoder.load(str(folder), norm)
    assert caught.value.field == "--vae"
    assert "[rae]" in caught.value.remedy


def test_a_teacher_without_a_norm_to_undo_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TEACHERS, "demo", replace(TEACHERS["demo"], patch_feature="last block"))  # type: ignore[arg-type]
    with pytest.raises(RepaError) as caught:
        final_norm("demo", resolution=64)
    assert caught.value.field == "latents"
