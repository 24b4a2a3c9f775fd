"""Published checkpoints of SiT, REPA, REG and SRA, whose shapes give the architecture before a strict load.

A published file is ``{"model", "ema", "opt", "args", "steps"}``, or a bare state dict, as ``.pt`` or
``.safetensors``. Nothing in it is executed: `torch.load` reads tensors and plain values only, and of classes
only the `argparse.Namespace` in which the released training script keeps its flags.
"""

from __future__ import annotations

import argparse
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from math import isqrt
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from ...data.edge import shortened
from ...data.errors import RepaError
from ...data.storage.files import os_errors
from ...data.units import counted
from .sit import SIT_SIZES, SiT, SiTConfig

if TYPE_CHECKING:
    from pathlib import Path

    from .base import Backbone, BackboneConfig

WEIGHTS = ("ema", "model")
# REPA's projectors and those after it, SRA's head
_PROJECTORS = re.compile(r"projectors\.|ap_head\.")
_LISTED = 4


@dataclass(frozen=True, kw_only=True)
class PublishedCheckpoint:
    """A published model.

    Attributes:
        config: architecture, inferred from the shapes.
        network: the class of such a backbone.
        backbone: state dict of a network of that architecture.
        projectors: state dict of what the alignment alone uses, keys without ``projectors.`` or, in SRA's
            files, ``ap_head.``; may be empty.
        weights: ``ema`` or ``model``; None for a bare state dict.
        objective: settings of the family's objective that the file tells, the ``path`` or nothing.
        steps: training steps it had, None if the file does not say.
    """

    config: BackboneConfig
    network: type[Backbone]
    backbone: Mapping[str, Tensor]
    projectors: Mapping[str, Tensor]
    weights: str | None
    objective: Mapping[str, str]
    steps: int | None

    def build(self) -> Backbone:
        """Return the model, in the dtype of the file, in eval mode."""
        with torch.device("meta"):
            model = self.network(self.config)
        model.load_state_dict(self.backbone, strict=True, assign=True)
        return model.eval()


def load_published(path: Path, *, weights: str = "ema", heads: int | None = None) -> PublishedCheckpoint:
    """Read a published checkpoint.

    Args:
        path: ``.safetensors``, or any other name for a file of `torch.save`.
        weights: which of the two sets of a nested file, ``ema`` or ``model``.
        heads: attention heads of a size that is not in `SIT_SIZES`; known sizes need none.

    Raises:
        RepaError: unreadable, no checkpoint of a SiT, keys missing or too many, or a size of unknown heads.
    """
    if weights not in WEIGHTS:
        raise RepaError(f"weights {weights!r} are unknown", f"choose {' or '.join(WEIGHTS)}")
    content = _read(path)
    nested = [name for name in WEIGHTS if isinstance(content.get(name), Mapping)]
    if nested and weights not in nested:
        raise RepaError(f"{path} holds no {weights!r} weights, only {nested[0]!r}", "ask for those")
    state = _tensors(content[weights] if nested else content, path)
    state = _rename_legacy(state)
    projectors = {key[found.end() :]: state[key] for key in state if (found := _PROJECTORS.match(key))}
    backbone = {key: value for key, value in state.items() if not _PROJECTORS.match(key)}
    config = _infer(backbone, path, heads)
    _check_strictly(config, backbone, path)
    path_type = _said(content, "path_type", str)
    return PublishedCheckpoint(
        config=config,
        network=SiT,
        backbone=backbone,
        projectors=projectors,
        weights=weights if nested else None,
        objective={} if not nested or path_type is None else {"path": path_type},
        steps=content["steps"] if nested and isinstance(content.get("steps"), int) else None,
    )


def _read(path: Path) -> Mapping[str, Any]:
    """Read the file's tensors and plain values, on the CPU, memory-mapped where the format allows."""
    with os_errors("read", path), path.open("rb"):
        pass
    try:
        content = load_file(path) if path.suffix == ".safetensors" else _unpickle(path)
    except Exception as error:  # a damaged pickle fails in as many ways as its unpickler has lines
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if isinstance(error, pickle.UnpicklingError | LookupError):
            # torch's own words are a bare code, or recommend reading it unsafely
            reason = "it holds other objects, or is damaged"
        raise RepaError(
            f"{path} is no checkpoint of tensors and plain values ({reason})",
            "give a published .pt of SiT, REPA, REG or SRA, or its state dict as .safetensors",
        ) from error
    if not isinstance(content, Mapping):
        raise RepaError(
            f"{path} holds a {type(content).__name__}", "a published checkpoint is a dict of weights"
        )
    return content


def _unpickle(path: Path) -> Any:
    with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
        # a damaged file first warns of its protocol; the error that follows says enough
        warnings.filterwarnings("ignore", "Detected pickle protocol", UserWarning)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))


def _tensors(state: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        others = [str(key) for key, value in state.items() if not isinstance(value, Tensor)]
        raise RepaError(
            f"{path} holds no weights of a SiT (it has {_some(others) or 'nothing'})",
            'a published checkpoint has "ema" and "model", or is a state dict',
        )
    if wrong := [key for key in state if not isinstance(key, str)]:
        raise RepaError(
            f"{path} names a tensor {shortened(wrong[0])}, which is no text",
            "give a state dict, or a checkpoint that repa train wrote",
            field="--ckpt",
        )
    return {key: value.detach() for key, value in state.items()}


def _said(content: Mapping[str, Any], flag: str, kind: type[str]) -> str | None:
    """Return a flag of the training script, where the file keeps them."""
    flags = content.get("args")
    value = vars(flags).get(flag) if isinstance(flags, argparse.Namespace) else None
    return value if isinstance(value, kind) else None


def _rename_legacy(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename ``decoder_blocks``, the blocks after the aligned one in REPA's first files, from 0 again."""
    shift = _count_blocks(state)
    return {
        re.sub(r"^decoder_blocks\.(\d+)\.", lambda match: f"blocks.{int(match[1]) + shift}.", key): value
        for key, value in state.items()
    }


def _count_blocks(state: Mapping[str, Tensor]) -> int:
    return len({match[1] for key in state if (match := re.match(r"blocks\.(\d+)\.", key))})


def _infer(state: Mapping[str, Tensor], path: Path, heads: int | None) -> SiTConfig:
    """Infer the architecture that has the state dict's shapes."""
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    needed = {
        "x_embedder.proj.weight": 4,
        "pos_embed": 3,
        "y_embedder.embedding_table.weight": 2,
        "final_layer.linear.weight": 2,
    }
    lacking = [key for key, rank in needed.items() if len(shapes.get(key, ())) != rank]
    if lacking:
        raise RepaError(
            f"{path} holds no weights of a SiT (no {_some(lacking)} of the right rank; "
            f"it has {_some(list(state))})",
            "give a published checkpoint of SiT, REPA, REG or SRA",
        )
    width, channels, patch_size, _ = shapes["x_embedder.proj.weight"]
    token_widths = shapes.get("cls_projectors2.weight", ())[1:]
    tokens = shapes["pos_embed"][1] - len(token_widths)
    rows = shapes["y_embedder.embedding_table.weight"][0]
    outputs = shapes["final_layer.linear.weight"][0]
    if outputs == 2 * channels * patch_size**2:
        raise RepaError(
            f"{path} predicts {2 * channels} channels: it is a checkpoint of the original SiT or DiT, "
            "whose time runs the other way",
            "checkpoints in REPA's form (data at time 0) load",
        )
    depth = _count_blocks(state)
    size_name, heads = _heads(depth, width, shapes.get("blocks.0.attn.q_norm.weight"), heads, path)
    return SiTConfig(
        depth=depth,
        width=width,
        heads=heads,
        patch_size=patch_size,
        input_size=isqrt(tokens) * patch_size,
        in_channels=channels,
        num_classes=rows - 1,
        qk_norm="blocks.0.attn.q_norm.weight" in shapes,
        token_widths=token_widths,
        size_name=size_name,
    )


def _heads(
    depth: int, width: int, head_norm: tuple[int, ...] | None, given: int | None, path: Path
) -> tuple[str | None, int]:
    """Infer the letter of the size, and heads.

    The shapes alone say the heads only where QK-norm has a weight.
    """
    for letter, size in SIT_SIZES.items():
        if (size.depth, size.width) == (depth, width):
            return letter, size.heads
    if head_norm is not None:
        return None, width // head_norm[0]
    if given is not None:
        return None, given
    known = ", ".join(f"{letter} {size.depth}×{size.width}" for letter, size in SIT_SIZES.items())
    raise RepaError(
        f"{path} has depth {depth} and width {width}, which is no known size ({known})",
        "give a checkpoint of one of these",
    )


def _check_strictly(config: SiTConfig, state: Mapping[str, Tensor], path: Path) -> None:
    """Check that there is every key of the architecture in its shape, and no other.

    Raises:
        RepaError: names the first of the keys that are missing, too many or of another shape.
    """
    with torch.device("meta"):
        expected = {key: tuple(value.shape) for key, value in SiT(config).state_dict().items()}
    found = {key: tuple(value.shape) for key, value in state.items()}
    faults = [
        f"{counted(len(keys), 'key')} {what} ({_some(keys)})"
        for what, keys in (
            ("missing", [key for key in expected if key not in found]),
            ("unexpected", [key for key in found if key not in expected]),
            ("of another shape", [key for key, shape in expected.items() if found.get(key, shape) != shape]),
        )
        if keys
    ]
    if faults:
        raise RepaError(
            f"{path} does not fit a SiT of depth {config.depth} and width {config.width}: "
            f"{'; '.join(faults)}",
            "only checkpoints of SiT, REPA, REG and SRA load",
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:_LISTED]) + (", …" if len(names) > _LISTED else "")
