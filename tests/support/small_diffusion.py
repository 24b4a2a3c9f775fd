"""The small denoisers of diffusers that tests of SoftREPA run, as the golden numbers are of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from repa.trainer.models.denoiser_facts import read_denoiser
from repa.trainer.models.stable_diffusion import Denoiser

if TYPE_CHECKING:
    from collections.abc import Mapping

_UNET: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "cross_attention_dim": 12,
    "norm_num_groups": 4,
}
SETTINGS: dict[str, dict[str, Any]] = {
    "sd15": {
        **_UNET,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "attention_head_dim": 2,
    },
    "sdxl": {
        **_UNET,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": (2, 4),
        "transformer_layers_per_block": (1, 2),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 34,
    },
    "sd3": {
        "sample_size": 8,
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 4,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": 24,
        "caption_projection_dim": 16,
        "pooled_projection_dim": 20,
        "pos_embed_max_size": 8,
    },
}


def small_model(kind: str, weights: Mapping[str, torch.Tensor] | None = None) -> Any:
    """A small denoiser of a kind, with weights drawn from seed 0 or with those given."""
    from diffusers import SD3Transformer2DModel, UNet2DConditionModel

    build: Any = SD3Transformer2DModel if kind == "sd3" else UNet2DConditionModel
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build(**SETTINGS[kind])
    if weights is not None:
        model.load_state_dict(weights, strict=True)
    return model


def save_model(folder: Path, kind: str) -> Path:
    """The folder of a pipeline that holds a small denoiser and its schedule."""
    model = small_model(kind)
    model.save_pretrained(folder / ("transformer" if kind == "sd3" else "unet"))
    (folder / "scheduler").mkdir()
    if kind == "sd3":
        schedule: dict[str, Any] = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
    else:
        schedule = {"_class_name": "PNDMScheduler", "beta_start": 0.00085, "beta_end": 0.012}
        schedule |= {"beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
        schedule |= {"set_alpha_to_one": False, "steps_offset": 1}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(schedule))
    return folder


def denoiser_of(folder: Path, weights: Mapping[str, torch.Tensor] | None = None) -> Denoiser:
    """The denoiser of a folder of `save_model` in float64, with other weights where they are given."""
    facts = read_denoiser(str(folder))
    return Denoiser(small_model(facts.kind, weights).double(), facts)
