"""The file of trained tokens, safetensors with what they are of in its header."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import safetensors.torch
import torch
from safetensors import safe_open

from ...data.edge import parse, printable
from ...data.errors import RepaError
from ...data.storage.files import os_errors, write_file
from ..models.denoiser_facts import SD3
from .tokens import BINS, SoftTokens

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

VERSION = 1
KEY = "softrepa"
TOKENS, TIME_TABLE = "tokens", "time_table"
_REMEDY = "give a file that `repa softrepa train` wrote"


@dataclass(frozen=True, kw_only=True)
class SoftTokensNotes:
    """What trained tokens are of.

    Attributes:
        version: of the format.
        kind: of the denoiser: sd15, sdxl or sd3.
        model: folder or hub name of the denoiser that they were trained for.
        model_sha256: of its weight files; empty where it is not known.
        blocks: of a U-Net, which of its parts see them.
        text_length: S, states of a text that they were trained with.
        condition: column of the text states; its text encoder is that of the denoiser.
        bins: rows of the time table; 0 without one.
        interpolate: whether rows are mixed between the middles of bins.
        preset: whose settings they began with.
        step: steps that they were trained.
        settings: of the run, for the record.
    """

    version: int = VERSION
    kind: Literal["sd15", "sdxl", "sd3"]
    model: str
    model_sha256: str
    blocks: list[str]
    text_length: int
    condition: str
    bins: int
    interpolate: bool
    preset: str
    step: int
    settings: dict[str, Any]


def save_soft_tokens(path: Path, weights: Mapping[str, Tensor], notes: SoftTokensNotes) -> None:
    """Write tokens whole or not at all.

    Args:
        path: the file.
        weights: state dict of `SoftTokens`.
        notes: what they are of.

    Raises:
        RepaError: the disk refuses.
    """
    tensors = {name: each.detach().to("cpu", torch.float32).contiguous() for name, each in weights.items()}
    header = {KEY: json.dumps(notes.__dict__, sort_keys=True)}
    data = safetensors.torch.save(tensors, metadata=header)
    with os_errors("write", path):
        write_file(path, data, path.parent)


def read_soft_tokens(path: Path) -> tuple[SoftTokens, SoftTokensNotes]:
    """Read tokens and what they are of, on the CPU. The table is read as strictly as the tokens.

    Raises:
        RepaError: it cannot be read, is none of ours, or its shapes are not those of its kind.
    """
    with os_errors("read", path):
        with path.open("rb"):  # says why it cannot be, which safetensors does not
            pass
        try:
            with safe_open(path, framework="pt") as file:
                header = file.metadata() or {}
                weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        except OSError:
            raise
        except Exception as error:  # SafetensorError is of no public module
            raise RepaError(f"{path} is no safetensors file ({printable(str(error))})", _REMEDY) from error
    try:
        values = json.loads(header[KEY])
    except (KeyError, ValueError) as error:
        raise RepaError(f"{path} does not say what its tokens are of", _REMEDY, field=KEY) from error
    notes = parse(SoftTokensNotes, values, where=str(path), remedy=_REMEDY, error=RepaError)
    if notes.version != VERSION:
        raise RepaError(f"{path} is of version {notes.version}", "read it with a newer repa", field=KEY)
    return _built(path, weights, notes), notes


def _built(path: Path, weights: Mapping[str, Tensor], notes: SoftTokensNotes) -> SoftTokens:
    """Build tokens of the weights of a file.

    Raises:
        RepaError: a tensor is missing, superfluous or of another shape.
    """
    expected = {TOKENS, TIME_TABLE} if notes.bins else {TOKENS}
    axes = 3 if notes.kind == SD3 else 2
    if set(weights) != expected or weights[TOKENS].ndim != axes or notes.bins not in (0, BINS):
        shapes = {name: list(each.shape) for name, each in weights.items()}
        raise RepaError(
            f"{path} holds {shapes}, which are no tokens of {notes.kind} with {notes.bins} bins",
            _REMEDY,
            field=TOKENS,
        )
    try:
        return SoftTokens(weights[TOKENS], weights.get(TIME_TABLE), interpolate=notes.interpolate)
    except ValueError as error:
        raise RepaError(f"{path}: {error}", _REMEDY, field=TIME_TABLE) from error
