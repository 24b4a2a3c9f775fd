"""Which frozen denoiser soft tokens are trained for, as diffusers' folders say it before a weight is read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...data.edge import printable, read_json, shortened
from ...data.errors import RepaError
from ...data.storage.files import os_errors

if TYPE_CHECKING:
    from collections.abc import Mapping

SD15, SDXL, SD3 = "sd15", "sdxl", "sd3"
KINDS = (SD15, SDXL, SD3)

WEIGHTS = "diffusion_pytorch_model"
"""What the names of weight files begin with."""

REMEDY = "give a folder or a name on the hub of Stable Diffusion 1.5, XL or 3, as diffusers saves it"

_UNET, _TRANSFORMER = "unet", "transformer"
_CLASSES = {"UNet2DConditionModel": _UNET, "SD3Transformer2DModel": _TRANSFORMER}
_SIX = 6  # numbers that SDXL is told of an image's size and crop
_TIMEOUT_SECONDS = 10


@dataclass(frozen=True, kw_only=True)
class DenoiserFacts:
    """A denoiser as its configuration says it, before any weight is read.

    Attributes:
        name: folder or hub name that it was asked for by.
        kind: one of `KINDS`.
        folder: of its configuration and weights.
        channels: of its latents.
        text_width: channels of the text states that it takes.
        token_width: channels of a soft token, D.
        pooled_width: channels of the pooled text; 0 where it takes none.
        blocks: transformer blocks of Stable Diffusion 3; 0 of a U-Net.
        scheduler: its scheduler's configuration, empty where the folder has none.
    """

    name: str
    kind: str
    folder: Path
    channels: int
    text_width: int
    token_width: int
    pooled_width: int
    blocks: int
    scheduler: Mapping[str, Any]

    @property
    def is_unet(self) -> bool:
        """Whether it is a U-Net, which predicts the noise."""
        return self.kind != SD3


def read_denoiser(name: str) -> DenoiserFacts:
    """Read what a denoiser is.

    Args:
        name: folder of a pipeline, of its denoiser alone, or a name on the hub, whose files are fetched.

    Raises:
        RepaError: it is none of Stable Diffusion 1.5, XL or 3, predicts something else than the noise, or
            cannot be had.
    """
    path = Path(name)
    if not path.is_dir():
        if path.is_absolute() or name.startswith((".", "~")) or path.exists() or name.count("/") != 1:
            raise RepaError(f"model {shortened(name)} is not a folder", REMEDY, field="--model")
        path = _from_hub(name)
    inside = [path / part for part in (_UNET, _TRANSFORMER) if (path / part).is_dir()]
    folder, pipeline = (inside[0], path) if inside else (path, path.parent)
    config = _read_config(folder / "config.json")
    file = pipeline / "scheduler" / "scheduler_config.json"
    return _facts(name, folder, config, _read_config(file) if file.is_file() else {})


def _facts(name: str, folder: Path, config: Mapping[str, Any], scheduler: Mapping[str, Any]) -> DenoiserFacts:
    kind = kind_of(config, where=str(folder))
    try:
        if kind == SD3:
            sizes = {
                "text_width": int(config["joint_attention_dim"]),
                "token_width": int(config["caption_projection_dim"]),
                "pooled_width": int(config["pooled_projection_dim"]),
                "blocks": int(config["num_layers"]),
            }
        else:
            width, pooled = int(config["cross_attention_dim"]), 0
            if kind == SDXL:
                pooled = int(config["projection_class_embeddings_input_dim"])
                pooled -= _SIX * int(config["addition_time_embed_dim"])
            sizes = {"text_width": width, "token_width": width, "pooled_width": pooled, "blocks": 0}
        channels = int(config["in_channels"])
    except (KeyError, TypeError, ValueError) as error:
        raise RepaError(
            f"{folder}/config.json does not say {printable(str(error))}", REMEDY, field="--model"
        ) from error
    predicts = scheduler.get("prediction_type", "epsilon")
    if kind != SD3 and predicts != "epsilon":
        raise RepaError(
            f"{name} predicts {shortened(predicts)}, and soft tokens are trained on models that predict the "
            "noise",
            "give another --model",
            field="--model",
        )
    return DenoiserFacts(
        name=name, kind=kind, folder=folder, channels=channels, scheduler=dict(scheduler), **sizes
    )


def kind_of(config: Mapping[str, Any], *, where: str) -> str:
    """Return which of `KINDS` a configuration of diffusers describes.

    Raises:
        RepaError: none of them.
    """
    name = config.get("_class_name")
    if name not in _CLASSES:
        raise RepaError(
            f"{where} describes {shortened(name or 'no model')}, which soft tokens are not made for",
            REMEDY,
            field="--model",
        )
    if _CLASSES[name] == _TRANSFORMER:
        return SD3
    return SDXL if config.get("addition_embed_type") == "text_time" else SD15


def _read_config(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise RepaError(f"there is no {file}", REMEDY, field="--model")
    with os_errors("read", file):
        raw = file.read_bytes()
    values = read_json(raw, str(file), remedy=REMEDY, error=RepaError)
    return dict(values) if isinstance(values, dict) else {}


def _from_hub(name: str) -> Path:
    """Fetch a denoiser and its schedule, nothing else of the pipeline.

    Raises:
        RepaError: it is neither here nor reachable.
    """
    from huggingface_hub import snapshot_download

    wanted = [
        f"{part}/{file}"
        for part in (_UNET, _TRANSFORMER)
        for file in (
            "config.json",
            f"{WEIGHTS}.safetensors",
            f"{WEIGHTS}-*-of-*.safetensors",
            f"{WEIGHTS}.safetensors.index.json",
        )
    ]
    try:
        return Path(
            snapshot_download(
                name, allow_patterns=[*wanted, "scheduler/*.json"], etag_timeout=_TIMEOUT_SECONDS
            )
        )
    except Exception as error:  # the hub's client raises many kinds, by version
        reason = printable(" ".join(str(error).split()))[:200]
        raise RepaError(
            f"{name} is neither here nor can be fetched ({reason})",
            f"bring unet or transformer of https://huggingface.co/{name} in a folder, and give that",
            field="--model",
        ) from error
