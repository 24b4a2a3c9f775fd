"""``run.json``: every start of a run, with what a row of results needs to be told apart and made again."""

from __future__ import annotations

import json
import os
import subprocess
import time
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ...data.errors import RepaError
from ...data.storage.files import os_errors, write_file
from ..methods.outside import origin_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lightning.pytorch import Trainer

    from ..config import Change, TrainConfig
    from .checked import Checked

RECORD_FILE = "run.json"
_LIBRARIES = ("torch", "lightning", "numpy", "zarr", "repa")


def read_starts(run: Path) -> list[dict[str, Any]]:
    """The starts of a run, the first one first; none of a run that there is not.

    Raises:
        RepaError: the file is damaged.
    """
    place = run / RECORD_FILE
    if not place.exists():
        return []
    with os_errors("read", place):
        try:
            starts: list[dict[str, Any]] = json.loads(place.read_text(encoding="utf-8"))["starts"]
        except (ValueError, KeyError, TypeError) as error:
            raise RepaError(
                f"{place} is damaged", "delete it, it only records how the run was started"
            ) from error
    return starts


def add_start(
    run: Path,
    config: TrainConfig,
    checked: Checked,
    trainer: Trainer,
    *,
    command: Sequence[str],
    resumed: int,
    changed: Sequence[Change] = (),
) -> None:
    """Add a start.

    Args:
        run: folder of the run.
        config: of the run.
        checked: what the checks found.
        trainer: that will train.
        command: the command line.
        resumed: step of the checkpoint that it goes on from, 0 without.
        changed: settings that it goes on with at another value.

    Raises:
        RepaError: the file is damaged or cannot be written.
    """
    manifest = checked.manifest
    device = trainer.strategy.root_device
    start = {
        "command": list(command),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "first_step": resumed,
        "changed": [asdict(each) for each in changed],
        "seed": config.seed,
        "commit": _commit(),
        "method": {"name": config.method_name, **origin_of(config.method_name)},
        "cache": config.cache,
        "cache_source": None if manifest is None else manifest.source_fingerprint,
        "live": None if checked.live is None else dict(checked.live.record),
        "devices": trainer.world_size,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "cpus": os.cpu_count(),
        "libraries": _versions(),
    }
    place = run / RECORD_FILE
    starts = [*read_starts(run), start]
    with os_errors("write", place):
        write_file(place, (json.dumps({"starts": starts}, indent=2) + "\n").encode(), run)


def _versions() -> dict[str, str]:
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _commit() -> str | None:
    """The commit of the checkout that runs, if it is one."""
    root = Path(__file__).resolve().parents[1]
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
