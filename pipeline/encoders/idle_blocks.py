"""The blocks of a ViT of timm, with channel-idle feed-forward networks in place of their own.

A block keeps its shortcut. One with BatchNorms has nothing in place of its second norm, whose work they do.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from timm.layers.mlp import Mlp
from timm.models.eva import EvaBlock
from timm.models.vision_transformer import Block
from torch import nn

from ...data.errors import RepaError
from .channel_idle import IdleFeedForward, MergedFeedForward, active_channels
from .idle_teacher import BATCH_NORM

if TYPE_CHECKING:
    from torch import Tensor


def require_idle_fits(model: Any, name: str) -> None:
    """Refuse a teacher whose blocks no channel-idle network can stand in.

    Raises:
        RepaError: says what its blocks have.
    """
    for block in model.blocks:
        mlp, what = getattr(block, "mlp", None), ""
        if type(block) not in (Block, EvaBlock):
            kind = type(block)  # others are called Block too
            what = f"blocks of another kind ({kind.__module__}.{kind.__name__})"
        elif type(mlp) is not Mlp or not isinstance(mlp.fc1, nn.Linear) or mlp.fc1.bias is None:
            what = f"gated or other feed-forward networks ({type(mlp).__name__})"
        elif not isinstance(mlp.norm, nn.Identity) or not isinstance(block.norm2, nn.LayerNorm):
            what = f"another norm than LayerNorm before them ({type(block.norm2).__name__})"
        if what:
            raise RepaError(
                f"encoder {name} has {what}, which no idle channels fit in",
                "take a teacher with two layers and an activation between, as dinov2-b or dinov3-b",
                field="--encoder",
            )


def layer_scale(block: Any) -> Tensor | None:
    """Return the factor γ ``[D]`` of what a block's feed-forward network gives, or None without one."""
    scale = getattr(block, "ls2", None)
    found: Tensor | None = getattr(block, "gamma_2", None) if scale is None else getattr(scale, "gamma", None)
    return found


def make_idle(model: Any, idle: float, norm: str) -> Any:
    """Return a copy of a ViT that has channel-idle networks, their weights as they are drawn.

    Args:
        model: of timm, that `require_idle_fits` lets through.
        idle: θ.
        norm: one of `NORMS`.
    """
    student = copy.deepcopy(model)
    for block in student.blocks:
        fc1 = block.mlp.fc1
        width, hidden = fc1.in_features, fc1.out_features
        made = IdleFeedForward(
            width,
            hidden,
            active_channels(hidden, idle),
            block.mlp.act,
            batch_norms=norm == BATCH_NORM,
        )
        block.mlp = made.to(fc1.weight)
        _drop_norm(block, norm)
    return student.eval()


def merged(student: Any, norm: str) -> Any:
    """Return a copy of a ViT of `make_idle` without idle channels, and without the factors of its blocks.

    Raises:
        RepaError: it is in training mode.
    """
    found = copy.deepcopy(student)
    for block, own in zip(found.blocks, student.blocks, strict=True):
        block.mlp = own.mlp.merge(layer_scale(own))
        _drop_norm(block, norm)
        _drop_layer_scale(block)
    return found


def shape_merged(model: Any, idle: float, norm: str) -> None:
    """Give a ViT blocks of the shapes that `merged` has, their weights as they are drawn."""
    for block in model.blocks:
        fc1 = block.mlp.fc1
        width, hidden = fc1.in_features, fc1.out_features
        block.mlp = MergedFeedForward(width, active_channels(hidden, idle), block.mlp.act)
        _drop_norm(block, norm)
        _drop_layer_scale(block)


def _drop_norm(block: Any, norm: str) -> None:
    if norm == BATCH_NORM:
        block.norm2 = nn.Identity()


def _drop_layer_scale(block: Any) -> None:
    if isinstance(block, EvaBlock):
        block.gamma_2 = None
    else:
        block.ls2 = nn.Identity()
