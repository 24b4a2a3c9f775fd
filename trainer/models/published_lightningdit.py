"""Published checkpoints of LightningDiT and of GMem, which is one conditioned on class tokens.

Both have their time from noise to data, so they are read with it reversed. Their latents are normalised by
mean and standard deviation of each channel, which neither file holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from ...data.edge import shortened
from ...data.errors import RepaError
from .conditioning import ConditionColumn
from .lightningdit import LightningDiT, LightningDiTConfig
from .published import OtherFamilyError, PublishedCheckpoint, check_strictly, infer
from .published_file import KNOWN, PublishedFile, read_published
from .reversed_time import reverse_time
from .rotary import axial_rotation

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

PROJECTOR = "projector."
TABLES = "feat_rope.freqs_"
CONDITION, CONDITIONER = "condition_projection.", "y_embedder."
CLASS_TOKEN = "dinov2-b/cls"
"""What GMem's released networks are conditioned on."""

_NEAR = 1e-3


def load_lightningdit(
    path: Path, *, weights: str = "ema", certain: bool = False, heads: int | None = None
) -> PublishedCheckpoint:
    """Read a published checkpoint of LightningDiT or GMem.

    Args:
        path: ``.safetensors``, or any other name for a file of `torch.save`.
        weights: which of the two sets of a nested file, ``ema`` or ``model``.
        certain: whether somebody says that it is one of these, which its blocks say themselves.
        heads: attention heads of a size that is not in `SIT_SIZES`; known sizes need none.

    Raises:
        RepaError: unreadable, of another family, keys missing or too many, another path or prediction, or a
            size of unknown heads.
    """
    del certain
    file = read_published(path, weights=weights)
    state = file.state
    if not file.is_gated:
        raise OtherFamilyError(f"{path} has no blocks with a gated MLP", f"give one of {KNOWN}")
    _check_transport(file)
    tables = {key: each for key, each in state.items() if key.startswith(TABLES)}
    projectors = {
        key.removeprefix(PROJECTOR): each for key, each in state.items() if key.startswith(PROJECTOR)
    }
    backbone = {
        key.replace(CONDITION, CONDITIONER, 1) if key.startswith(CONDITION) else key: each
        for key, each in state.items()
        if not key.startswith((TABLES, PROJECTOR))
    }
    condition = _condition(backbone)
    config = infer(
        LightningDiTConfig,
        backbone,
        path,
        heads,
        labels=condition is None,
        rope=bool(tables) or _said(file, "model").get("use_rope") is not False,
        rms_norm="blocks.0.norm1.weight" in backbone,
    )
    _check_tables(config, tables, path)
    published = PublishedCheckpoint(
        config=config,
        network=LightningDiT,
        backbone=backbone,
        projectors=projectors,
        weights=file.weights,
        objective={"path": "linear"},
        steps=file.steps,
        scale=None,
        condition=condition,
    )
    check_strictly(published, path)
    return replace(published, backbone=reverse_time(backbone))


def _condition(backbone: Mapping[str, Tensor]) -> ConditionColumn | None:
    """Return what GMem's conditioner is built from, None for a network with labels.

    Its null condition was never trained, so nothing of it is dropped.
    """
    weight = backbone.get(f"{CONDITIONER}linear.weight")
    if weight is None or weight.ndim != 2:
        return None
    width, channels = weight.shape
    return ConditionColumn(column=CLASS_TOKEN, shape=(channels,), num_classes=0, width=width, drop=0.0)


def _said(file: PublishedFile, section: str) -> Mapping[str, Any]:
    """Return a section of the training configuration, empty where the file keeps none."""
    said = file.content.get("config")
    values = said.get(section) if isinstance(said, Mapping) else None
    return values if isinstance(values, Mapping) else {}


def _check_transport(file: PublishedFile) -> None:
    """Refuse what was trained on another path, or to predict something else, as far as the file tells.

    Raises:
        RepaError: it was.
    """
    said = _said(file, "transport")
    for name, expected in (("path_type", "Linear"), ("prediction", "velocity")):
        if (found := said.get(name, expected)) != expected:
            raise RepaError(
                f"{file.path} was trained with {name} {shortened(found)}", f"only {name} {expected} is read"
            )


def _check_tables(config: LightningDiTConfig, tables: Mapping[str, Tensor], path: Path) -> None:
    """Compare the stored tables of rotary positions with ours.

    Raises:
        RepaError: they turn by other angles, or are of another grid.
    """
    rotation = axial_rotation(config.width // config.heads, config.grid, pairs="halves")
    for name, ours in zip(("cos", "sin"), rotation, strict=True):
        theirs = tables.get(f"{TABLES}{name}")
        # a pair of channels has one angle, which they store twice
        expected = ours.repeat_interleave(2, dim=1)
        if theirs is not None and not (
            theirs.shape == expected.shape and torch.allclose(theirs.double(), expected, rtol=0, atol=_NEAR)
        ):
            raise RepaError(
                f"{path} has rotary positions of other angles or of another grid ({TABLES}{name})",
                f"only checkpoints of {KNOWN} load",
            )
