"""Folders of runs as `repa train` leaves them, made without training."""

from __future__ import annotations

import csv
import json
import math
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from repa.trainer.config import build
from repa.trainer.run.metrics import MetricsFile

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path


def make_run(
    folder: Path,
    *,
    steps: int = 2000,
    log_every: int = 20,
    previews: Iterable[int] = (),
    side: int = 34,
    device: str = "cpu",
    mfu: float | None = None,
    **settings: Any,
) -> Path:
    """Write the folder of a run whose losses fall smoothly, with noise of its seed."""
    flags = {"method": "none", "model": "SiT-T/1", "cache": "cache", "batch_size": 32, "max_steps": steps}
    config = build(flags={**flags, "holdout": 256, **{k.replace("__", "."): v for k, v in settings.items()}})
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(config.to_yaml())
    draws = np.random.default_rng(config.seed)
    aligned = config.method_name != "none"
    metrics = MetricsFile(folder / "metrics.csv", resumed_step=0)
    timing = MetricsFile(folder / "timing.csv", resumed_step=0)
    for step in range(log_every, steps + 1, log_every):
        loss = 0.8 + math.exp(-step / 300) - 0.05 * aligned + float(draws.normal(0, 0.02))
        values = {"loss": loss, "velocity": loss, "gradient_norm": 3 * math.exp(-step / 500)}
        if aligned:
            values |= {"loss": loss - 0.2, "repa": -0.4, "repa_weight": 0.5}
        if step % (steps // 5) == 0:
            values |= {"held_out_ema": loss + 0.01, "held_out": loss + 0.02}
        metrics.write(step, values)
        rate = 300.0 - 40 * aligned
        cost = {
            "images_per_second": rate,
            "seconds": 1.1 * log_every * config.batch_size / rate,
            "devices": 1,
            "bytes_read": log_every * config.batch_size * 8192,
            "peak_memory": 2.5e9,
        }
        timing.write(step, cost | ({} if mfu is None else {"mfu": mfu}))
    start = {"first_step": 0, "changed": [], "devices": 1, "device": device}
    (folder / "run.json").write_text(json.dumps({"starts": [start]}))
    for step in previews:
        write_preview(folder, step, side, seed=config.seed)
    return folder


def write_preview(folder: Path, step: int, side: int, *, seed: int = 0) -> Path:
    """Write a grid of patches whose colours depend on the seed, and that are clearer at later steps."""
    draws = np.random.default_rng(seed)
    patches = np.kron(draws.integers(0, 255, (4, 4, 3)), np.ones((side // 4 + 1, side // 4 + 1, 1)))
    noise = np.random.default_rng(step).normal(0, 2000 / (10 + step), (side, side, 3))
    path = folder / "samples" / f"step-{step:08d}.png"
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(np.clip(patches[:side, :side] + noise, 0, 255).astype(np.uint8)).save(path)
    return path


FIGURE = {
    "metric": "fid",
    "value": "12.5",
    "spread": "",
    "N": "5000",
    "M": "50000",
    "k": "",
    "seed": "0",
    "labels": "balanced",
    "solver": "sde",
    "steps": "250",
    "guidance": "1.0",
    "interval": "0-1",
    "weights": "ema",
    "decoder_sha256": "sha256:dd",
    "reference": "imagenet256.npz",
    "reference_sha256": "sha256:" + "ab" * 32,
    "step": "2000",
    "images_seen": "64000",
    "device_hours": "0.5",
    "network": "inception",
    "network_sha256": "sha256:ee",
    "samples": "step-00002000.ckpt",
    "samples_sha256": "sha256:01",
}


def write_figures(folder: Path, *changes: Mapping[str, str]) -> None:
    """Write evaluation.csv, a line for each change of `FIGURE`."""
    with (folder / "evaluation.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(FIGURE), lineterminator="\n")
        writer.writeheader()
        writer.writerows({**FIGURE, **change} for change in changes)
