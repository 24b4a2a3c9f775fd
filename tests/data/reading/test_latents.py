from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from repa.data.errors import CacheError, RepaError
from repa.data.format.manifest import Manifest, Provenance
from repa.data.reading.latents import (
    LatentScale,
    latent_scale,
    sample_posterior,
    scale_latent,
    scale_of,
    unscale_latent,
)


def make_manifest(notes: dict[str, object] | None) -> Manifest:
    manifest = Manifest(
        num_rows=4,
        resolution=64,
        crop="adm-center",
        exif_orientation="ignored",
        source_kind="demo",
        source_fingerprint="sha256:0",
        keys_sha256="0",
        class_names=("a",),
    )
    if notes is None:
        return manifest
    provenance = Provenance(
        model="vae",
        weights_sha256="0",
        random_weights=False,
        input_size=64,
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
        compute_dtype="float32",
        batch_size=1,
        grid=(8, 8),
        libraries={},
        notes=notes,
    )
    return replace(manifest, sources={"sd-vae": provenance})


def test_posterior_sample_is_mean_plus_std_times_noise() -> None:
    mean = torch.tensor([1.0, -2.0]).view(1, 2, 1, 1).expand(3, 2, 4, 5)
    std = torch.tensor([0.5, 4.0]).view(1, 2, 1, 1).expand(3, 2, 4, 5)
    noise = torch.arange(120, dtype=torch.float32).view(3, 2, 4, 5)
    sample = sample_posterior(torch.cat([mean, std], dim=1), noise)
    assert sample.dtype == torch.float32
    # every value is exact in float32
    assert torch.equal(sample[:, 0], 1.0 + 0.5 * noise[:, 0])
    assert torch.equal(sample[:, 1], -2.0 + 4.0 * noise[:, 1])


def test_posterior_sample_has_the_moments_it_was_given() -> None:
    moments = torch.tensor([3.0, 2.0], dtype=torch.float64).view(1, 2, 1, 1).expand(1, 2, 300, 300)
    noise = torch.randn(1, 1, 300, 300, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sample = sample_posterior(moments, noise)
    # five standard errors: 2/300 of the mean, 2/(300·√2) of the deviation
    assert abs(sample.mean().item() - 3.0) < 5 * 2 / 300
    assert abs(sample.std().item() - 2.0) < 5 * 2 / (300 * 2**0.5)


def test_zero_noise_gives_the_mean_and_gradient_reaches_both() -> None:
    moments = torch.randn(2, 8, 3, 3, generator=torch.Generator().manual_seed(1), requires_grad=True)
    assert torch.equal(sample_posterior(moments, torch.zeros(2, 4, 3, 3)), moments[:, :4])
    noise = torch.full((2, 4, 3, 3), 1.5)
    sample_posterior(moments, noise).sum().backward()
    assert moments.grad is not None
    assert torch.equal(moments.grad[:, :4], torch.ones(2, 4, 3, 3))
    assert torch.equal(moments.grad[:, 4:], noise)


@pytest.mark.parametrize("shape", [(2, 6, 3, 3), (1, 8, 3, 3), (2, 8, 3, 4)])
def test_shapes_that_do_not_fit_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="do not fit"):
        sample_posterior(torch.zeros(shape), torch.zeros(2, 4, 3, 3))


def test_scaling_and_back() -> None:
    latent = torch.tensor([-3.0, 0.0, 1.0, 10.0], dtype=torch.float64)
    assert torch.equal(scale_latent(latent, 0.18215), latent * 0.18215)
    # Stable Diffusion 3's convention, both factors
    scaled = scale_latent(latent, 1.5305, 0.0609)
    torch.testing.assert_close(scaled[2].item(), (1 - 0.0609) * 1.5305, rtol=1e-15, atol=0)
    torch.testing.assert_close(unscale_latent(scaled, 1.5305, 0.0609), latent, rtol=1e-15, atol=1e-15)
    assert unscale_latent(torch.tensor(0.18215), 0.18215).item() == 1.0


def test_scale_comes_from_the_manifest() -> None:
    scale = latent_scale(make_manifest({"scaling_factor": 0.18215}), where="c")
    assert scale == LatentScale(0.18215, 0.0)
    shifted = {"scaling_factor": 2, "shift_factor": None}
    assert latent_scale(make_manifest(shifted), where="c") == LatentScale(2.0)
    shifted["shift_factor"] = 0.5
    assert latent_scale(make_manifest(shifted), where="c") == LatentScale(2.0, 0.5)


@pytest.mark.parametrize("notes", [None, {}, {"scaling_factor": None}, {"scaling_factor": 0}])
def test_a_cache_without_a_scale_is_refused(notes: dict[str, object] | None) -> None:
    with pytest.raises(CacheError, match="repa preprocess"):
        latent_scale(make_manifest(notes), where="cache")


STATISTICS = {"scaling_factor": 0.5, "latents_mean": [-1.5, 2.0], "latents_std": [4.0, 0.25]}


def test_statistics_of_the_channels_and_back() -> None:
    scale = scale_of(STATISTICS, where="it", remedy="mend it")
    assert scale == LatentScale(0.5, 0.0, (-1.5, 2.0), (4.0, 0.25))
    latent = torch.tensor([[[[2.5]], [[3.0]]]], dtype=torch.float64)
    assert scale_latent(latent, *scale).flatten().tolist() == [4.0 * 0.5 / 4.0, 1.0 * 0.5 / 0.25]
    assert torch.equal(unscale_latent(scale_latent(latent, *scale), *scale), latent)
    assert scale_latent(latent.float(), *scale).dtype == torch.float32


def test_what_is_recorded_is_read_again() -> None:
    for scale in (
        LatentScale(0.18215),
        LatentScale(1.5, 0.06),
        LatentScale(0.5, 0.0, (1.0, 2.0), (0.1, 3.0)),
    ):
        assert scale_of(json.loads(json.dumps(scale.notes())), where="it", remedy="mend it") == scale
    assert LatentScale(0.18215).notes() == {"scaling_factor": 0.18215, "shift_factor": 0.0}


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"scaling_factor": 0}, "scaling_factor"),
        ({"scaling_factor": "much"}, "scaling_factor"),
        ({"scaling_factor": True}, "scaling_factor"),
        ({"shift_factor": [1.0]}, "shift_factor"),
        ({"shift_factor": 0.1}, "shift_factor"),
        ({"latents_mean": None}, "latents_mean"),
        ({"latents_std": None}, "latents_std"),
        ({"latents_std": []}, "latents_std"),
        ({"latents_mean": [1.0]}, "latents_mean"),
        ({"latents_mean": [1.0, 2.0, 3.0], "latents_std": [1.0, 2.0, 3.0]}, "latents_mean"),
        ({"latents_std": [1.0, 0.0]}, "latents_std"),
        ({"latents_mean": 3}, "latents_mean"),
        ({"latents_std": ["1", "2"]}, "latents_std.0"),
    ],
)
def test_what_describes_no_map_is_refused(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(RepaError) as caught:
        scale_of({**STATISTICS, **changes}, where="it", remedy="mend it", channels=2)
    assert caught.value.field == field
    assert caught.value.remedy


def test_settings_replace_the_factor_and_the_shift() -> None:
    assert LatentScale(0.5, 0.25).replaced(None, None) == LatentScale(0.5, 0.25)
    assert LatentScale(0.5, 0.25).replaced(2.0, 0.0) == LatentScale(2.0, 0.0)
    scale = scale_of(STATISTICS, where="it", remedy="mend it")
    assert scale.replaced(1.0, None) == scale._replace(scaling_factor=1.0)
    with pytest.raises(RepaError) as caught:
        scale.replaced(None, 0.0)
    assert caught.value.field == "latent_shift"
