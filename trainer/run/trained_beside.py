"""What a checkpoint's network denoises beside the latent, once training is over."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...data.errors import RepaError
from ..config import build
from ..step.beside import Beside
from ..step.checkpoints import load_checkpoint
from ..step.module import CHECKPOINT_KEY
from .checks import make_method

if TYPE_CHECKING:
    from pathlib import Path

    from ...data.format.manifest import Manifest
    from ..models.base import Backbone


def beside_of(checkpoint: Path, backbone: Backbone, manifest: Manifest, *, where: str) -> Beside:
    """Return what a run's network denoises beside the latent, with the statistics of its training.

    Args:
        checkpoint: file of the run, which holds its settings and statistics.
        backbone: its network.
        manifest: of the cache that has the vectors' columns.
        where: name of that cache, for messages.

    Raises:
        RepaError: the checkpoint is damaged, or the cache has no such columns.
    """
    widths = backbone.config.token_widths
    if not widths:
        return Beside((), {})
    saved = load_checkpoint(checkpoint)
    config = build(saved[CHECKPOINT_KEY].get("settings", {}), {"cache": where})
    vectors = make_method(config, backbone.facts, manifest).denoised()
    columns = manifest.columns
    if tuple(each.width for each in vectors) != widths or any(each.column not in columns for each in vectors):
        raise RepaError(
            f"cache {where} has no vectors of {', '.join(map(str, widths))} channels for method "
            f"{config.method_name}, which denoises them beside the latent",
            "give the cache that the run was trained on with --cache",
            field="--cache",
        )
    weights = saved["state_dict"]
    try:
        statistics = {
            each.name: (weights[f"beside.{each.name}_mean"], weights[f"beside.{each.name}_std"])
            for each in vectors
            if each.standardised
        }
    except KeyError as error:
        raise RepaError(
            f"{checkpoint} does not hold {error.args[0]}", "name another with --step", field="--step"
        ) from error
    return Beside(vectors, statistics)
