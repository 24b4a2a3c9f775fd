"""Checkpoint files, whole or not there, read without running any code."""

from __future__ import annotations

import io
import os
import re
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from torch import Tensor

from ...data.edge import parse, printable
from ...data.errors import RepaError
from ...data.storage.files import create_file, make_folder, os_errors, partial_path, publish
from ..models.registry import FLOW
from .module import CHECKPOINT_KEY

if TYPE_CHECKING:
    from collections.abc import Mapping

FOLDER = "checkpoints"
SOFTREPA_FILE = "softrepa.yaml"
"""Settings of a run of SoftREPA, in whose checkpoints are tokens and no backbone."""

SOFTREPA_KEY = "softrepa"
"""What such a checkpoint says of its run."""

_OLDER = "delete it to go on from the one before"
_NAME = re.compile(r"step-(\d{8,})\.ckpt")


def checkpoint_path(run: Path, step: int) -> Path:
    """Return where the checkpoint after `step` steps lies."""
    return run / FOLDER / f"step-{step:08d}.ckpt"


def checkpoints_of(run: Path) -> dict[int, Path]:
    """Step → checkpoint, ascending."""
    folder = run / FOLDER
    if not folder.is_dir():
        return {}
    found = {int(match[1]): path for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))}
    return dict(sorted(found.items()))


@dataclass(frozen=True, kw_only=True)
class _Latent:
    """The latents of a run, as its checkpoints say."""

    scaling_factor: float
    shift_factor: float
    autoencoder: str | None
    weights_sha256: str | None
    random_weights: bool
    latents_mean: list[float] = field(default_factory=list)
    latents_std: list[float] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class _Means:
    """The means since the last row of metrics."""

    counts: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class _Said:
    """What a checkpoint says of its run. Fields that came later have a default."""

    version: int
    backbone: dict[str, Any]
    latent: _Latent
    cache: dict[str, Any]
    means: _Means
    live: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    class_names: list[str] = field(default_factory=list)
    objective: dict[str, Any] | None = None
    path: str | None = None
    predicts: bool = True
    condition_weights_sha256: str | None = None
    condition_random_weights: bool = False
    tokens: dict[str, Any] | None = None


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Return a checkpoint of ours, on the CPU. Only tensors and plain values are unpickled.

    Raises:
        RepaError: it cannot be read, is damaged or not ours; ``field`` is `SOFTREPA_KEY` of one of SoftREPA.
    """
    checkpoint = _load(path)
    if isinstance(checkpoint, dict) and SOFTREPA_KEY in checkpoint:
        raise RepaError(
            f"{path} is a checkpoint of SoftREPA, which trains no backbone",
            "sample with `repa softrepa sample --run`",
            field=SOFTREPA_KEY,
        )
    if not isinstance(checkpoint, dict) or CHECKPOINT_KEY not in checkpoint:
        raise RepaError(f"{path} is no checkpoint of a run", "`repa sample --ckpt` reads published ones")
    weights = checkpoint.get("state_dict")
    if not isinstance(weights, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in weights.items()
    ):
        raise RepaError(f"{path} holds no weights", _OLDER, field="state_dict")
    if not isinstance(checkpoint.get("global_step"), int):
        raise RepaError(f"{path} does not say its step", _OLDER, field="global_step")
    _check_said(checkpoint[CHECKPOINT_KEY], path)
    return checkpoint


def own_checkpoint(path: Path) -> dict[str, Any] | None:
    """Return a checkpoint of ours, None of another file, of which the published loader says what it is.

    Raises:
        RepaError: it is one of SoftREPA.
    """
    if path.suffix == ".safetensors":
        return None
    try:
        return load_checkpoint(path)
    except RepaError as error:
        if error.field == SOFTREPA_KEY:
            raise
        return None


def _check_said(said: Any, path: Path) -> None:
    """Hold what a checkpoint says of its run against the types that it has.

    Raises:
        RepaError: a value is missing or of another type.
    """
    if isinstance(said, dict) and isinstance(said.get("means"), dict):
        sums = said["means"].get("sums")
        if not isinstance(sums, dict) or not all(isinstance(each, float) for each in sums.values()):
            raise RepaError(f"{path}: means.sums are no numbers", _OLDER, field="means.sums")
        # sums of a run that diverged are not finite, and still numbers
        said = {**said, "means": {name: each for name, each in said["means"].items() if name != "sums"}}
    found = parse(_Said, said, where=str(path), remedy=_OLDER, error=RepaError)
    if found.objective is None and found.path is None:
        raise RepaError(f"{path}: objective is missing", _OLDER, field="objective")


def objective_said(said: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the objective of a checkpoint, as plain values.

    Before there was another it was always flow matching, and only its path was said.

    Args:
        said: what a checkpoint says of its run, under `CHECKPOINT_KEY`.
    """
    objective: Mapping[str, Any] = said.get("objective") or {"name": FLOW, "path": said["path"]}
    return objective


def _load(path: Path) -> dict[str, Any]:
    with os_errors("read", path):
        try:
            checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except OSError:
            raise
        except Exception as error:  # a damaged pickle fails in as many ways as its unpickler has lines
            reason = printable(str(error).splitlines()[0]) if str(error) else type(error).__name__
            raise RepaError(f"checkpoint {path} is damaged ({reason})", _OLDER) from error
    return checkpoint


class _WatchedFile(io.BufferedWriter):
    """A file that remembers why a write failed, because torch's archive writer makes other errors of it."""

    failure: OSError | None = None

    def write(self, data: Any) -> int:
        """Write bytes and return how many."""
        try:
            return super().write(data)
        except OSError as error:
            self.failure = self.failure or error
            raise


class AtomicCheckpointIO(CheckpointIO):
    """Writes beside the path, syncs and renames, so that a kill at any moment leaves only whole checkpoints.

    Lightning's own writer keeps a second copy of the checkpoint in memory and does not sync.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any | None = None
    ) -> None:
        """Write a checkpoint.

        Raises:
            RepaError: the disk refuses.
        """
        del storage_options
        target = Path(path)
        with os_errors("write", target):
            make_folder(target.parent, target.parent.parent)
            partial = partial_path(target)
            try:
                with _WatchedFile(io.FileIO(create_file(partial), "wb")) as file:
                    _save(checkpoint, file)
                    file.flush()
                    os.fsync(file.fileno())
                # up to the folder of the run's folder: the run itself must be there after a power cut
                publish(partial, target, target.parent.parent)
            except OSError:
                # half a checkpoint on a full disk helps nobody
                with suppress(OSError):
                    partial.unlink()
                raise

    def load_checkpoint(
        self, path: str | os.PathLike[str], map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint, always with ``weights_only=True``."""
        del map_location, weights_only
        return _load(Path(path))

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Delete a checkpoint."""
        Path(path).unlink(missing_ok=True)


def _save(checkpoint: Mapping[str, Any], file: _WatchedFile) -> None:
    """Write a checkpoint to a file.

    Raises:
        OSError: the operating system refuses.
    """
    try:
        torch.save(checkpoint, file)
    except RuntimeError as error:
        if file.failure is None:
            raise
        # the archive's writer says where it stood, not that the disk is full
        raise file.failure from error
