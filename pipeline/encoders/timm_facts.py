"""The facts that timm has of a ViT without its weights, as ``--encoder timm:NAME`` needs them.

Needs timm and torch.

The model is built on the meta device, where nothing is computed or held, and asked.
"""

from __future__ import annotations

import difflib
from typing import Any, Literal

import timm
import torch
from timm.layers.patch_embed import PatchEmbed
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer

from ...data.errors import RepaError
from .teachers import FIXED
from .timm_teacher import TimmTeacher
from .weights import one_line

_NAMES = 3  # shown of those that come near


def timm_teacher(timm_name: str, column_name: str, flag: str) -> TimmTeacher:
    """Return the facts of a ViT of timm.

    Args:
        timm_name: architecture, and after a point the tag of its weights; without one timm's own choice.
        column_name: what stands for ``timm:`` and the name in a cache, formatted with the name and its tag.
        flag: that named it, for errors.

    Raises:
        RepaError: timm has no such model, or it is no plain ViT.
    """
    architecture = timm_name.partition(".")[0]
    if not timm.is_model(architecture):
        names = timm.list_models()
        near = difflib.get_close_matches(architecture, names, n=_NAMES)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise RepaError(
            f"timm has no model {timm_name!r}", f"{hint}`timm.list_models('vit*')` lists its ViTs", field=flag
        )
    try:
        with torch.device("meta"):
            model: Any = timm.create_model(timm_name, pretrained=False, num_classes=0)
    # an unknown tag is a RuntimeError, an option that the model lacks a TypeError, …
    except Exception as error:
        raise RepaError(
            f"timm cannot build {timm_name!r} ({one_line(error)})",
            f"`timm.list_models('{architecture}*', pretrained=True)` lists its weights",
            field=flag,
        ) from error
    reason = _not_plain(model, architecture)
    if reason:
        raise RepaError(
            f"timm's model {timm_name} {reason}: it cannot be a teacher",
            "choose a plain ViT, as timm:vit_base_patch14_dinov2.lvd142m",
            field=flag,
        )
    settings = model.pretrained_cfg
    full = f"{architecture}.{settings['tag']}" if settings.get("tag") else architecture
    attention = model.blocks[0].attn
    return TimmTeacher(
        name=column_name.format(full),
        timm_name=full,
        hub=settings.get("hf_hub_id") or None,
        patch_size=model.patch_embed.patch_size[0],
        width=model.embed_dim,
        depth=len(model.blocks),
        heads=attention.num_heads,
        prefix_tokens=model.num_prefix_tokens,
        class_feature=_class_feature(model),
        patch_feature="last block" if isinstance(model.norm, torch.nn.Identity) else "final norm",
        normalisation=(tuple(settings["mean"]), tuple(settings["std"])),
        largest_resolution=_largest_resolution(model),
        source=f"timm {timm.__version__}",
    )


def _largest_resolution(model: Any) -> int | None:
    """Return the side of images whose tokens are as many as the model's own table of positions has.

    256 at least, whose 16×16 tokens the reference has tables of 14×14 resampled to.
    """
    if model.pos_embed is None and not isinstance(model, Beit):
        return None  # rotary positions
    return max(FIXED, TimmTeacher.pixels_per_token * int(model.patch_embed.grid_size[0]))


def _class_feature(model: Any) -> Literal["token", "attention-pool", "mean"]:
    if getattr(model, "attn_pool", None) is not None:
        return "attention-pool"
    # without a norm before pooling a class token that is not pooled is as the last block left it
    normed = model.global_pool == "token" or not isinstance(model.norm, torch.nn.Identity)
    return "token" if model.cls_token is not None and normed else "mean"


def _not_plain(model: Any, architecture: str) -> str:
    """Say what makes a model none whose tokens lie on a grid of patches. It is empty if nothing does."""
    if not isinstance(model, VisionTransformer | Eva | Beit):
        return f"is a {type(model).__name__} and not a plain ViT"
    attentions: list[Any] = [getattr(block, "attn", None) for block in model.blocks]
    reasons = {
        # timm has filters of their own for these two
        "has weights that are resampled in a way of their own": "flexivit" in architecture
        or "radio" in architecture,
        "does not cut the image itself into patches": type(model.patch_embed) is not PatchEmbed,
        "has patches that are not square": len(set(model.patch_embed.patch_size)) > 1,
        "has blocks without one attention": not all(hasattr(each, "num_heads") for each in attentions),
        "has heads that are not a share of its width": any(
            getattr(each, "head_dim", model.embed_dim // each.num_heads) * each.num_heads != model.embed_dim
            for each in attentions
            if hasattr(each, "num_heads")
        ),
    }
    return next((reason for reason, applies in reasons.items() if applies), "")
