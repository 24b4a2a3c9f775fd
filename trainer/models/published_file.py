"""Files of published weights, read as tensors and plain values before anybody knows of which model they are.

A published file is ``{"model", "ema", …}`` with what else its training script keeps, or a bare state dict, as
``.pt`` or ``.safetensors``. Nothing in it is executed: `torch.load` reads tensors and plain values only, and
of classes only the `argparse.Namespace` in which some training scripts keep their flags.
"""

from __future__ import annotations

import argparse
import pickle
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from ...data.edge import shortened
from ...data.errors import RepaError
from ...data.storage.files import os_errors

if TYPE_CHECKING:
    from pathlib import Path

WEIGHTS = ("ema", "model")
KNOWN = "DiT, SiT, REPA, REG, SRA, LightningDiT or GMem"
"""Whose checkpoints are read."""

# what a block has that those of SiT have not
_GATED = "blocks.0.mlp.w12.weight"
_ENDS = "final_layer.linear.weight", "x_embedder.proj.weight"
_LISTED = 4
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# of a network that was saved as its training processes share it
_WRAPPER = "module."


@dataclass(frozen=True, kw_only=True)
class PublishedFile:
    """What a file holds, before anybody knows of which family it is.

    Attributes:
        path: of the file.
        state: the state dict that was asked for.
        weights: which of two it is, ``ema`` or ``model``; None for a bare state dict.
        content: of a file that holds more than a state dict, all of it; else empty.
    """

    path: Path
    state: Mapping[str, Tensor]
    weights: str | None
    content: Mapping[str, Any]

    @property
    def steps(self) -> int | None:
        """Training steps, None if the file does not say."""
        steps = self.content.get("steps")
        return steps if isinstance(steps, int) else None

    def flag(self, name: str) -> str | None:
        """Return a flag of the training script, None where the file keeps no such text."""
        flags = self.content.get("args")
        value = vars(flags).get(name) if isinstance(flags, argparse.Namespace) else None
        return value if isinstance(value, str) else None

    @property
    def is_doubled(self) -> bool:
        """Whether it predicts 2C channels of latents of C, as DiT and the first SiT."""
        outputs, patches = (self.state.get(name) for name in _ENDS)
        if outputs is None or patches is None or patches.ndim != 4:
            return False
        return outputs.shape[0] == 2 * patches[0].numel()

    @property
    def is_gated(self) -> bool:
        """Whether its blocks have a gated MLP, by which LightningDiT is told from SiT."""
        return _GATED in self.state


def read_published(path: Path, *, weights: str) -> PublishedFile:
    """Read a file of tensors and plain values.

    Args:
        path: ``.safetensors``, or any other name for a file of `torch.save`.
        weights: which of the two sets of a nested file, ``ema`` or ``model``.

    Raises:
        RepaError: it is unreadable, or holds no such weights.
    """
    if weights not in WEIGHTS:
        raise RepaError(f"weights {weights!r} are unknown", f"choose {' or '.join(WEIGHTS)}")
    content = _read(path)
    nested = [name for name in WEIGHTS if isinstance(content.get(name), Mapping)]
    if nested and weights not in nested:
        raise RepaError(f"{path} holds no {weights!r} weights, only {nested[0]!r}", "ask for those")
    return PublishedFile(
        path=path,
        state=_tensors(content[weights] if nested else content, path),
        weights=weights if nested else None,
        content=content if nested else {},
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
            f"give a published .pt of {KNOWN}, or its state dict as .safetensors",
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
            f"{path} holds no weights (it has {some(others) or 'nothing'})",
            'a published checkpoint has "ema" and "model", or is a state dict',
        )
    if wrong := [key for key in state if not isinstance(key, str)]:
        raise RepaError(
            f"{path} names a tensor {shortened(wrong[0])}, which is no text",
            "give a state dict, or a checkpoint that repa train wrote",
            field="--ckpt",
        )
    if wrong := [f"{key}: {_form(value)}" for key, value in state.items() if not _is_plain(value)]:
        raise RepaError(
            f"{path} holds tensors that are no weights as they were trained ({some(wrong)})",
            "give the file before it was quantised or stripped, in float16, bfloat16, float32 or float64",
            field="--ckpt",
        )
    return {key.removeprefix(_WRAPPER): value.detach() for key, value in state.items()}


def _is_plain(value: Tensor) -> bool:
    return value.dtype in _DTYPES and value.layout == torch.strided and not value.is_meta


def _form(value: Tensor) -> str:
    """Return what a tensor is, for a message."""
    if value.is_meta:
        return "without data"
    words = (value.dtype,) if value.layout == torch.strided else (value.layout, value.dtype)
    return " ".join(str(word).removeprefix("torch.") for word in words)


def some(names: list[str]) -> str:
    """Return the first of some names, for a message."""
    return ", ".join(names[:_LISTED]) + (", …" if len(names) > _LISTED else "")
