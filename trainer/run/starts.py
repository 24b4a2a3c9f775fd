"""The file ``run.json``, which has every start of a run with what it takes to make its results again."""

from __future__ import annotations

import json
import os
import subprocess
import time
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ...data.edge import parse, read_json
from ...data.errors import RepaError
from ...data.storage.files import os_errors, write_file
from ..methods.outside import origin_of
from ..methods.registry import METHODS
from .arithmetic import products_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lightning.pytorch import Trainer

    from ..config import TrainConfig
    from ..resuming import Change
    from .checked import Checked

RECORD_FILE = "run.json"


@dataclass(frozen=True, kw_only=True)
class _Start:
    """What is read again of a start. The rest is for people."""

    command: list[str] = field(default_factory=list)
    first_step: int = 0
    from_step: int | None = None
    live: dict[str, Any] | None = None
    method: dict[str, str | None] = field(default_factory=dict)
    loggers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class _Record:
    """What the file holds."""

    starts: list[_Start]


_LIBRARIES = ("torch", "lightning", "numpy", "zarr", "repa")


def read_starts(run: Path) -> list[dict[str, Any]]:
    """Return the starts of a run, the first one first. There are none of a run that does not exist.

    Raises:
        RepaError: the file is damaged.
    """
    file = run / RECORD_FILE
    if not file.exists():
        return []
    with os_errors("read", file):
        raw = file.read_bytes()
    remedy = "delete it, it only records how the run was started"
    values = read_json(raw, str(file), remedy=remedy, error=RepaError)
    parse(_Record, values, where=str(file), remedy=remedy, error=RepaError)
    starts: list[dict[str, Any]] = values["starts"]
    return starts


def describe_start(
    config: TrainConfig,
    checked: Checked,
    trainer: Trainer,
    *,
    command: Sequence[str],
    resumed: int,
    changed: Sequence[Change] = (),
) -> dict[str, Any]:
    """Return what is recorded of a start, as plain values.

    Args:
        config: of the run.
        checked: what the checks found.
        trainer: that will train.
        command: the command line.
        resumed: step of the checkpoint that it goes on from, 0 without.
        changed: settings that it goes on with at another value.
    """
    manifest = checked.manifest
    device = trainer.strategy.root_device
    return {
        "command": list(command),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "first_step": resumed,
        "changed": [asdict(each) for each in changed],
        "recipe": config.recipe,
        "seed": config.seed,
        "commit": _commit(),
        "method": {"name": config.method_name, **origin_of(config.method_name)},
        "cache": config.cache,
        "cache_source": None if manifest is None else manifest.source_fingerprint,
        "live": None if checked.live is None else dict(checked.live.record),
        "compile": config.compile,
        "tf32": device.type == "cuda" and products_of(config) == "high",
        "devices": trainer.world_size,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "cpus": os.cpu_count(),
        "libraries": _versions(),
    }


def method_changed(run: Path, start: Mapping[str, Any]) -> bool:
    """Return whether the file of a method from outside is another than at the run's last start.

    Args:
        run: folder of the run.
        start: what will be recorded, as of `describe_start`.

    Raises:
        RepaError: the file of the starts is damaged.
    """
    now, starts = start["method"], read_starts(run)
    # the code of repa itself is told by its commit and version
    if now["name"] in METHODS or not starts or "method" not in starts[-1]:
        return False
    return bool(starts[-1]["method"].get("file_sha256") != now["file_sha256"])


def add_start(run: Path, start: Mapping[str, Any]) -> None:
    """Add a start to those of a run.

    Raises:
        RepaError: the file is damaged or cannot be written.
    """
    file = run / RECORD_FILE
    starts = [*read_starts(run), start]
    with os_errors("write", file):
        write_file(file, (json.dumps({"starts": starts}, indent=2) + "\n").encode(), run)


def _versions() -> dict[str, str]:
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _commit() -> str | None:
    """Return the commit of the checkout that runs, if it is one."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        result = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()
