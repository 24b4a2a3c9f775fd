"""The denoisers of Stable Diffusion: what is read of them, what is loaded, what is refused."""

from __future__ import annotations

import ast
import inspect
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from repa.data.errors import RepaError
from repa.trainer.models import stable_diffusion
from repa.trainer.models.denoiser_facts import KINDS, read_denoiser
from repa.trainer.models.soft_inputs import take_soft_tokens
from repa.trainer.models.stable_diffusion import Denoiser, alphas_cumprod, load_denoiser, make_scheduler
from small_diffusion import denoiser_of, save_model, small_model


def test_diffusers_gives_the_trainer_denoisers_and_schedules_alone() -> None:
    """No autoencoder, no pipeline, no text encoder can be reached from the one module that may import it."""
    tree = ast.parse(inspect.getsource(stable_diffusion))
    imported = [
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
        if "diffusers" in (getattr(node, "module", None) or alias.name)
    ]
    assert set(imported) == {"diffusers"}
    taken = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "diffusers"
    }
    assert taken == {
        "SD3Transformer2DModel",
        "UNet2DConditionModel",
        "DDIMScheduler",
        "FlowMatchEulerDiscreteScheduler",
        "utils",
    }


@pytest.mark.parametrize("kind", KINDS)
def test_a_pipelines_folder_and_its_denoisers_folder_are_read_and_loaded_alike(
    kind: str, tmp_path: Path
) -> None:
    folder = save_model(tmp_path / "model", kind)
    facts = read_denoiser(str(folder))
    assert (facts.kind, facts.channels) == (kind, 4)
    assert facts.text_width == (24 if kind == "sd3" else 12)
    assert facts.token_width == (16 if kind == "sd3" else 12)
    assert facts.pooled_width == {"sd15": 0, "sdxl": 10, "sd3": 20}[kind]
    assert facts.blocks == (4 if kind == "sd3" else 0)
    alone = read_denoiser(str(facts.folder))
    assert (alone.kind, alone.folder, alone.scheduler) == (kind, facts.folder, facts.scheduler)
    assert facts.scheduler["steps_offset" if kind != "sd3" else "shift"] == (1 if kind != "sd3" else 3.0)

    first, second = (load_denoiser(each, torch.float32) for each in (facts, alone))
    assert first.weights_sha256 == second.weights_sha256
    assert len(first.weights_sha256) == 64
    expected = small_model(kind).state_dict()
    assert all(torch.equal(each, expected[name]) for name, each in first.model.state_dict().items())
    assert not any(each.requires_grad for each in first.model.parameters())
    assert load_denoiser(facts, torch.bfloat16).dtype == torch.bfloat16


def changed(folder: Path, file: str, **values: Any) -> None:
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_what_is_no_such_model_is_refused(tmp_path: Path) -> None:
    def field_of(name: Path | str) -> str:
        with pytest.raises(RepaError) as error:
            read_denoiser(str(name))
        return error.value.field

    folder = save_model(tmp_path / "model", "sd15")
    assert field_of(tmp_path / "nothing") == field_of("nothing") == field_of(tmp_path) == "--model"
    velocity = shutil.copytree(folder, tmp_path / "velocity")
    changed(velocity, "scheduler/scheduler_config.json", prediction_type="v_prediction")
    assert field_of(velocity) == "--model"
    other = shutil.copytree(folder, tmp_path / "other")
    changed(other, "unet/config.json", _class_name="AutoencoderKL")
    assert field_of(other) == "--model"
    changed(other, "unet/config.json", _class_name="UNet2DConditionModel", cross_attention_dim=None)
    assert field_of(other) == "--model"


def test_weights_that_are_damaged_or_of_another_model_are_refused(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "sd15")
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(RepaError) as error:
        load_denoiser(read_denoiser(str(folder)), torch.float32)
    assert error.value.field == "--model"
    shutil.copy(save_model(tmp_path / "other", "sdxl") / "unet" / file.name, file)
    with pytest.raises(RepaError) as error:
        load_denoiser(read_denoiser(str(folder)), torch.float32)
    assert error.value.field == "--model"


def test_another_schedule_is_refused() -> None:
    for scheduler in ({"beta_schedule": "linear"}, {"num_train_timesteps": 100}):
        with pytest.raises(RepaError):
            alphas_cumprod(scheduler)


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_taken_anew_without_wrapping_twice(kind: str, tmp_path: Path) -> None:
    made = denoiser_of(save_model(tmp_path / "model", kind))
    for _ in range(2):
        take_soft_tokens(made.model, kind, blocks=("down",), text_length=7)
    names = [type(each).__name__ for each in made.model.modules()]
    assert names.count("SoftBlock") == (4 if kind == "sd3" else 0)
    if kind != "sd3":
        wrapped = [each for each in made.model.attn_processors.values() if type(each).__name__ == "TextAlone"]
        assert all(type(each.inner).__name__ != "TextAlone" for each in wrapped)
        crossed = [name for name in made.model.attn_processors if ".attn2." in name]
        assert len(wrapped) == sum(not name.startswith("down_block") for name in crossed)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing_changes_no_gradient(kind: str, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", kind)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 8, 8, generator=generator, dtype=torch.float64)
    text = torch.randn(2, 7, 24 if kind == "sd3" else 12, generator=generator, dtype=torch.float64)
    pooled = torch.randn(2, 20 if kind == "sd3" else 10, generator=generator, dtype=torch.float64)
    shape = (2, 3, 4, 16) if kind == "sd3" else (2, 4, 12)
    first = torch.randn(shape, generator=generator, dtype=torch.float64)

    def gradient(made: Denoiser) -> torch.Tensor:
        soft = first.clone().requires_grad_()
        made.predict(x, torch.tensor([5, 900]), text, pooled, soft, 64).square().sum().backward()
        assert soft.grad is not None
        return soft.grad

    made = denoiser_of(folder)
    take_soft_tokens(made.model, kind, blocks=("down", "mid"), text_length=7)
    plain = gradient(made)
    made.model.enable_gradient_checkpointing()
    torch.testing.assert_close(gradient(made), plain, rtol=0, atol=1e-12)
    assert plain.abs().max() > 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_the_schedule_of_samples_ends_at_the_image(kind: str, tmp_path: Path) -> None:
    facts = read_denoiser(str(save_model(tmp_path / "model", kind)))
    scheduler = make_scheduler(facts)
    scheduler.set_timesteps(4)
    times = scheduler.timesteps.tolist()
    assert times == sorted(times, reverse=True)
    assert len(times) == 4
    assert max(times) <= 1000
    if kind != "sd3":
        torch.testing.assert_close(scheduler.alphas_cumprod, alphas_cumprod(facts.scheduler))
