"""Small representation autoencoders of diffusers, with the encoders of small teachers of timm."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from repa.pipeline.encoders.timm_teacher import TimmTeacher
from repa.pipeline.encoders.timm_vit import build

if TYPE_CHECKING:
    from pathlib import Path

WIDTH = 64
DINOV2 = TimmTeacher(
    name="small-reg",
    timm_name="vit_small_patch14_reg4_dinov2.lvd142m",
    hub=None,
    patch_size=14,
    width=WIDTH,
    depth=2,
    heads=1,
    prefix_tokens=5,
    options={"embed_dim": WIDTH, "depth": 2, "num_heads": 1},
    source="a small one",
)
DECODER = {
    "decoder_hidden_size": 32,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 48,
}


def drawn(model: Any, seed: int = 0) -> Any:
    """Draw all weights anew, so that none is 0 or 1, and gains lie in [0.5, 1.5]."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, each in model.named_parameters():
            each.copy_(0.05 * torch.randn(each.shape, generator=generator))
            if "norm" in name and name.endswith("weight"):
                each.copy_(0.5 + torch.rand(each.shape, generator=generator))
    return model


def dinov2_weights() -> dict[str, torch.Tensor]:
    """Weights of `DINOV2` at the size that DINOv2 was trained at, 37×37 positions."""
    return dict(drawn(build(DINOV2, 518)).state_dict())


def rae(**settings: Any) -> Any:
    """Build an autoencoder whose decoder has drawn weights."""
    from diffusers import AutoencoderRAE

    made: Any = AutoencoderRAE(**{**DECODER, **settings})
    drawn(made.decoder, seed=1)
    return made.eval()


def rae_of_dinov2(weights: dict[str, torch.Tensor], **settings: Any) -> Any:
    """Build the autoencoder whose encoder has the weights of `DINOV2`, under its own names."""
    made = rae(encoder_hidden_size=WIDTH, encoder_num_hidden_layers=2, **settings)
    own = made.encoder.state_dict()
    first, positions = weights["cls_token"], weights["pos_embed"]
    state = {
        # timm has the class token's position in the token itself
        "embeddings.cls_token": first,
        "embeddings.position_embeddings": torch.cat([torch.zeros_like(first), positions], dim=1),
        "embeddings.register_tokens": weights["reg_token"],
        "embeddings.mask_token": torch.zeros(1, WIDTH),
        "embeddings.patch_embeddings.projection.weight": weights["patch_embed.proj.weight"],
        "embeddings.patch_embeddings.projection.bias": weights["patch_embed.proj.bias"],
    }
    for name in own.keys() - state.keys():
        _, _, block, *rest = name.split(".")
        state[name] = _of_block(weights, f"blocks.{block}.", ".".join(rest))
    made.encoder.load_state_dict(state)
    return made


def _of_block(weights: dict[str, torch.Tensor], block: str, name: str) -> torch.Tensor:
    """Return what transformers calls `name`; its releases differ in what they call the attention's maps."""
    last = name.rpartition(".")[2]
    for number, words in enumerate((("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value"))):
        if any(word in name for word in words):
            return weights[f"{block}attn.qkv.{last}"].chunk(3)[number]
    if name.startswith("layer_scale"):
        return weights[f"{block}ls{name.removeprefix('layer_scale')[0]}.gamma"]
    if "attention" in name:
        return weights[f"{block}attn.proj.{last}"]
    return weights[f"{block}{name}"]


def save_rae_of_demo(folder: Path, **settings: Any) -> Any:
    """Save an autoencoder for the tokens of the demo's teacher, 8×8 of 64 pixels."""
    from repa.pipeline.encoders.rae import final_norm

    made = rae(
        encoder_type="mae",
        encoder_hidden_size=128,
        encoder_num_hidden_layers=1,
        encoder_patch_size=8,
        encoder_input_size=64,
        patch_size=8,
        **settings,
    )
    with torch.no_grad():
        made.encoder.embeddings.patch_embeddings.projection.weight.copy_(
            final_norm("demo", resolution=64).kernel
        )
    made.save_pretrained(folder)
    return made
