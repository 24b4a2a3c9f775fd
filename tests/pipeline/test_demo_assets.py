"""The shipped material of the demo: the drawn images, the autoencoder and the teacher."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from repa.pipeline import demo
from repa.pipeline.demo.shapes import CLASS_NAMES, DemoImages, coverage, render
from repa.pipeline.demo.train_teacher import DrawnSet, build_teacher, normalise
from repa.pipeline.demo.train_vae import draw_images, held_out_psnr, load, measure_scale, to_unit_range
from safetensors import safe_open
from safetensors.torch import load_file


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def vae() -> Any:
    return load(demo.VAE_FOLDER)


@pytest.fixture(scope="module")
def teacher() -> Any:
    model = build_teacher()
    stored = {name: weight.float() for name, weight in load_file(demo.TEACHER_WEIGHTS).items()}
    model.load_state_dict(stored, strict=True)
    return model.eval()


@pytest.fixture(scope="module")
def tokens(teacher: Any) -> dict[str, tuple[torch.Tensor, DrawnSet]]:
    sets = {"training": DrawnSet(240, seed=0), "held out": DrawnSet(240, seed=1)}
    with torch.no_grad():
        return {name: (teacher.forward_features(normalise(s.images)), s) for name, s in sets.items()}


def test_an_image_is_a_pure_function_of_index_and_seed() -> None:
    in_order = [render(index, seed=3) for index in range(24)]
    for index in (17, 4, 23, 0):
        assert np.array_equal(render(index, seed=3), in_order[index])
        assert not np.array_equal(render(index, seed=4), in_order[index])
    assert in_order[0].dtype == np.uint8
    assert in_order[0].shape == (64, 64, 3)
    assert len({image.tobytes() for image in in_order}) == 24


@pytest.mark.parametrize("label", range(len(CLASS_NAMES)), ids=CLASS_NAMES)
def test_every_shape_lies_inside_the_image_and_stands_out(label: int) -> None:
    for index in range(label, len(CLASS_NAMES) * 20, len(CLASS_NAMES)):
        covered = coverage(index, seed=0)
        assert covered.min() == 0.0
        assert covered.max() == 1.0
        assert 0.05 < covered.mean() < 0.5
        border = np.concatenate([covered[0], covered[-1], covered[:, 0], covered[:, -1]])
        assert border.max() == 0.0
        brightness = render(index, seed=0).max(axis=2).astype(float)
        assert brightness[covered == 1.0].min() > brightness[covered == 0.0].max() + 60


@pytest.mark.parametrize(("index", "seed"), [(-1, 0), (0, -1)])
def test_negative_index_or_seed_is_refused(index: int, seed: int) -> None:
    with pytest.raises(ValueError, match="must not be negative"):
        render(index, seed)


def test_source_is_sorted_grouped_and_balanced() -> None:
    source = DemoImages(count=84, seed=0)
    assert len(source) == len(source.keys) == len(source.labels) == 84
    assert source.keys == sorted(source.keys)
    assert len(set(source.keys)) == 84
    assert source.labels.dtype == np.int32
    assert np.all(np.diff(source.labels) >= 0)
    assert set(np.bincount(source.labels, minlength=10).tolist()) == {8, 9}
    assert source.class_names == list(CLASS_NAMES) == sorted(CLASS_NAMES)
    for key, label in zip(source.keys, source.labels, strict=True):
        assert key.split("/")[0] == source.class_names[label]


def test_source_loads_rows_in_any_order_and_a_longer_set_contains_a_shorter() -> None:
    short, long = DemoImages(count=24, seed=5), DemoImages(count=60, seed=5)
    images = {key: np.asarray(long.load(row)) for row, key in enumerate(long.keys)}
    for row in (23, 0, 11):
        image = short.load(row)
        assert image.mode == "RGB"
        assert image.size == (short.resolution, short.resolution) == (64, 64)
        assert np.array_equal(np.asarray(image), images[short.keys[row]])


def test_fingerprint_names_seed_and_count() -> None:
    fingerprint = DemoImages(count=24, seed=0).fingerprint
    assert fingerprint.startswith("sha256:")
    assert len(fingerprint) == len("sha256:") + 64
    assert fingerprint == DemoImages(count=24, seed=0).fingerprint
    assert fingerprint != DemoImages(count=24, seed=1).fingerprint
    assert fingerprint != DemoImages(count=25, seed=0).fingerprint


@pytest.mark.parametrize("count", [0, 1_200_001])
def test_a_count_out_of_range_is_refused(count: int) -> None:
    with pytest.raises(ValueError, match="count must be at"):
        DemoImages(count=count)


def test_constants_need_neither_torch_nor_numpy() -> None:
    code = "import sys, repa.pipeline.demo; sys.exit(bool({'torch', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_shipped_weights_are_small_and_float16() -> None:
    files = [demo.TEACHER_WEIGHTS, *demo.VAE_FOLDER.glob("*.safetensors")]
    assert len(files) == 2
    assert sum(file.stat().st_size for file in files) < 4_000_000
    for file in files:
        with safe_open(file, framework="pt") as opened:
            assert {opened.get_slice(name).get_dtype() for name in opened.keys()} == {"F16"}  # noqa: SIM118


def test_vae_config_holds_the_measured_scale_and_no_path(vae: Any) -> None:
    config = json.loads((demo.VAE_FOLDER / "config.json").read_text())
    assert "_name_or_path" not in config
    assert config["scaling_factor"] == pytest.approx(measure_scale(vae, count=240), rel=0.03)


def test_vae_reconstructs_held_out_images(vae: Any) -> None:
    assert held_out_psnr(vae, count=60) > 31.0


def test_vae_latents_are_small_smooth_and_mirror_well(vae: Any) -> None:
    images = to_unit_range(draw_images(24, seed=1))
    with torch.no_grad():
        posterior = vae.encode(images).latent_dist
        mirrored = vae.decode(vae.encode(images.flip(-1)).latent_dist.mode()).sample
    scaled = posterior.mode() * vae.config.scaling_factor
    assert scaled.shape == (24, 4, 8, 8)
    assert scaled.dtype == torch.float32
    assert scaled.mean().abs() < 0.5
    assert scaled.abs().max() < 8.0
    assert (mirrored - images.flip(-1)).abs().mean() < 0.05


def test_teacher_has_the_grid_of_the_latents_and_heads_of_64(teacher: Any) -> None:
    assert teacher.patch_embed.grid_size == (8, 8)
    assert teacher.num_prefix_tokens == 1
    assert teacher.blocks[0].attn.head_dim == 64


def test_teacher_class_token_separates_held_out_classes(
    tokens: dict[str, tuple[torch.Tensor, DrawnSet]],
) -> None:
    (training, training_set), (held_out, held_out_set) = tokens["training"], tokens["held out"]
    centroids = torch.stack(
        [training[training_set.labels == label, 0].mean(0) for label in range(len(CLASS_NAMES))]
    )
    nearest = torch.cdist(held_out[:, 0], centroids).argmin(1)
    assert (nearest == held_out_set.labels).float().mean() > 0.93


def test_teacher_patch_tokens_tell_shape_from_background(
    tokens: dict[str, tuple[torch.Tensor, DrawnSet]],
) -> None:
    (training, training_set), (held_out, held_out_set) = tokens["training"], tokens["held out"]
    inputs = torch.nn.functional.pad(training[:, 1:].flatten(0, 1), (0, 1), value=1.0)
    probe = torch.linalg.lstsq(inputs, training_set.covered.flatten()[:, None]).solution
    guessed = torch.nn.functional.pad(held_out[:, 1:].flatten(0, 1), (0, 1), value=1.0) @ probe
    assert (guessed[:, 0] - held_out_set.covered.flatten()).abs().mean() < 0.05
