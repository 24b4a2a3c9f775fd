"""The identity that a checkpoint shares with the run that resumes it, from the cache to the objective."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ...data.errors import CacheError, RepaError
from ...data.format.columns import AUTOENCODER, LABEL, source_of
from ...data.format.foreign import autoencoder_of
from ...data.reading.latents import LatentScale
from ...data.reading.reader import CacheReader
from ..models import registry as backbones
from ..objectives import registry as objectives
from ..step.checkpoints import load_checkpoint, objective_said
from ..step.latents import TOKENS
from ..step.module import CHECKPOINT_KEY

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from ...data.format.manifest import Manifest, Provenance
    from ..config import TrainConfig
    from .checked import Checked

IDENTITY_VERSION = 1


def identity_of(checked: Checked, config: TrainConfig) -> dict[str, Any]:
    """Return what a checkpoint shares with the run that resumes it, and what sampling needs.

    It holds plain values only.

    Raises:
        RuntimeError: the checks have not passed.
    """
    reader, backbone = checked.reader, checked.backbone
    if reader is None or backbone is None:
        raise RuntimeError("the checks have not passed")
    manifest = reader.manifest
    used = dict.fromkeys(source_of(column) for column in reader.columns if column != LABEL)

    def digest(provenance: Provenance) -> str:
        return hashlib.sha256(json.dumps(provenance.identity(), sort_keys=True).encode()).hexdigest()

    return {
        "version": IDENTITY_VERSION,
        "backbone": backbones.to_plain(backbone),
        "objective": objectives.to_plain(config.objective),
        **_condition_of(checked, manifest),
        "settings": config.to_dict(),
        "class_names": list(manifest.class_names),
        **_latents_of(checked, config, manifest),
        "cache": {
            "source": manifest.source_fingerprint,
            "keys": manifest.keys_sha256,
            "views": list(manifest.views),
            "valid rows": hashlib.sha256(reader.valid_rows.astype("<i8").tobytes()).hexdigest(),
            **_order_of(checked, config),
            **{source: digest(manifest.sources[source]) for source in used},
        },
        "live": {source: digest(provenance) for source, provenance in checked.live_sources.items()},
    }


def _order_of(checked: Checked, config: TrainConfig) -> dict[str, str]:
    """Return what the order of images depends on besides rows and seed.

    It is nothing for a full permutation.
    """
    reader = checked.reader
    if reader is None or (isinstance(reader, CacheReader) and config.order == "full"):
        return {}
    kind = "blocks" if isinstance(reader, CacheReader) else "tars"
    return {"order": f"{kind} of {reader.manifest.shard_rows} rows"}


def _latents_of(checked: Checked, config: TrainConfig, manifest: Manifest) -> dict[str, Any]:
    """Return what sampling needs to make images of latents."""
    if checked.tokens is not None:
        latent = {
            **LatentScale(1.0).notes(),
            "autoencoder": config.decoder or None,
            "weights_sha256": None,
            "random_weights": False,
        }
        return {"latent": latent, TOKENS: asdict(checked.tokens)}
    if checked.scale is None:
        raise RuntimeError("the checks have not passed")
    autoencoder = manifest.sources[AUTOENCODER]
    latent = {
        **checked.scale.notes(),
        "autoencoder": autoencoder_of(autoencoder),
        "weights_sha256": autoencoder.weights_sha256 or None,
        "random_weights": autoencoder.random_weights,
    }
    return {"latent": latent}


def _condition_of(checked: Checked, manifest: Manifest) -> dict[str, Any]:
    """Return what sampling needs to build the conditioner.

    It is nothing for labels, or for a method's own that does not say.
    """
    condition = checked.condition
    if condition is None or condition.column == LABEL:
        return {}
    source = manifest.sources[source_of(condition.column)]
    return {
        "condition": asdict(condition),
        "condition_weights_sha256": source.weights_sha256,
        "condition_random_weights": source.random_weights,
    }


def check_resumable(path: Path, identity: Mapping[str, Any]) -> None:
    """Hold a checkpoint against the run that would go on from it.

    Args:
        path: the checkpoint.
        identity: of the run, see `identity_of`.

    Raises:
        RepaError: it cannot be read, is of another version, cache, live teacher, backbone or objective.
    """
    saved = load_checkpoint(path)[CHECKPOINT_KEY]
    if saved["version"] != IDENTITY_VERSION:
        raise RepaError(
            f"{path} is of checkpoint version {saved['version']}, this repa writes {IDENTITY_VERSION}",
            "start another run with --run",
        )
    for key, what in (("cache", "cache"), ("live", "live teacher")):
        # checkpoints from before there were live teachers say nothing of them
        before, now = saved.get(key, {}), identity[key]
        changed = [each for each in dict.fromkeys((*before, *now)) if before.get(each) != now.get(each)]
        if changed:
            raise CacheError(
                f"the {what} is not the one {path} was trained on ({', '.join(changed)} changed)",
                f"restore that {what}, or start another run with --run",
            )
    was = {"backbone": {"family": backbones.FIRST, **saved["backbone"]}, "objective": objective_said(saved)}
    if "settings" not in saved:
        factors = ("scaling_factor", "shift_factor")
        was["latent"] = {name: saved["latent"][name] for name in factors}
    for key, before in was.items():
        # settings that a checkpoint from before does not tell are in the configuration of its run
        if any(identity[key].get(name) != value for name, value in before.items()):
            raise CacheError(
                f"the {key} that this cache gives differs from that of {path}", "start another run with --run"
            )
