"""What the demo measures of its runs, from what they left and from their samples."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

import numpy as np
import torch

from ...data.reading.reader import CacheReader
from ...pipeline.demo import RESOLUTION
from ...pipeline.encoders import load_encoder
from ...trainer.config import build
from ...trainer.evaluation.registry import FEATURES, REFERENCE, measure
from ...trainer.run.callbacks import METRICS_FILE
from ...trainer.run.checks import check
from ...trainer.run.folder import CONFIG_FILE
from ...trainer.run.metrics import read_metrics
from ...trainer.run.phases import describe_phases
from ...trainer.run.timing import TIMING_FILE
from ...trainer.sampling.record import ARRAY_FILE
from ...trainer.settings_file import load_yaml

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from matplotlib.axes import Axes
    from numpy.typing import NDArray

    from ...pipeline.demo.shapes import DemoImages
    from .demo_run import DemoRun

HELD_OUT_SEED = 1
"""Seed of drawn images that no model of the demo, and no cache, has seen."""

HELD_OUT = "held_out_ema"
_CHUNK = 64
_CURVES_HEIGHT = 2.8  # inches


class Distance:
    """The Fréchet distance of images to a cache's, in the class vectors of the demo's teacher.

    Args:
        cache: the demo's cache.
    """

    def __init__(self, cache: Path) -> None:
        self._real = _cached_class_vectors(cache)
        self._teacher = load_encoder("demo", resolution=RESOLUTION)

    def __call__(self, images: NDArray[np.uint8]) -> float:
        """Compute the distance of images ``[N, R, R, 3]``."""
        chunks = torch.split(torch.from_numpy(images).permute(0, 3, 1, 2), _CHUNK)
        vectors = [self._teacher.encode(chunk.contiguous())["cls"].numpy() for chunk in chunks]
        return measure("fd", {FEATURES: np.concatenate(vectors), REFERENCE: self._real})["fd"]


def pixels(images: DemoImages) -> NDArray[np.uint8]:
    """Draw all images of a set, uint8 ``[N, R, R, 3]``."""
    return np.stack([np.asarray(images.load(row)) for row in range(len(images))])


def _cached_class_vectors(cache: Path) -> NDArray[np.float32]:
    """Class vectors float32 ``[N, D]`` of every valid image of the cache."""
    with CacheReader(cache, ("demo/cls",)) as reader:
        spec = reader.manifest.columns["demo/cls"]
        values = np.empty((len(reader.valid_rows), *spec.shape), spec.numpy_dtype)
        reader.read_rows(reader.valid_rows, ("demo/cls",), {"demo/cls": values})
    return values.astype(np.float32)


def bytes_per_image(run: DemoRun) -> tuple[int, ...]:
    """Count the bytes that each phase of a run reads for an image."""
    config = build(load_yaml(run.folder / CONFIG_FILE))
    phases = describe_phases(check(config), config)
    return tuple(int(phase["step_bytes"]) // config.batch_size for phase in phases)


def images_per_second(run: DemoRun) -> float:
    """Return the median over the logged stretches of training."""
    rows = read_metrics(run.folder / TIMING_FILE)
    return statistics.median(row["images_per_second"] for row in rows)


def samples(run: DemoRun) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Read the images uint8 ``[N, R, R, 3]`` and labels int64 ``[N]``, or conditions, of a sampling."""
    with np.load(run.samples / ARRAY_FILE) as arrays:
        return arrays["arr_0"], arrays["arr_1"]


def curve(run: DemoRun, name: str) -> list[tuple[float, float]]:
    """Read the pairs (step, value) of a metric of a run."""
    rows = read_metrics(run.folder / METRICS_FILE)
    return [(row["step"], row[name]) for row in rows if name in row]


def draw_runs(
    runs: Sequence[DemoRun],
    path: Path,
    draw: Callable[[Axes, DemoRun], None],
    *,
    across: int,
    cell: tuple[float, float],
    dpi: int,
) -> None:
    """Draw samples of the runs over their curves.

    Args:
        runs: trained and sampled.
        path: the picture.
        draw: draws the samples of a run.
        across: most pictures of samples beside each other.
        cell: width and height of one, in inches.
        dpi: pixels an inch.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    across = min(len(runs), across)
    down = -(-len(runs) // across)
    width, height = cell
    figure = plt.figure(figsize=(width * across, height * down + _CURVES_HEIGHT), layout="constrained")
    grids = figure.add_gridspec(down + 1, 2 * across, height_ratios=(*[height] * down, _CURVES_HEIGHT))
    for index, run in enumerate(runs):
        row, column = divmod(index, across)
        axes = figure.add_subplot(grids[row, 2 * column : 2 * column + 2])
        draw(axes, run)
        axes.tick_params(length=0)
        axes.set_frame_on(False)
    _draw_curves(figure.add_subplot(grids[down, :across]), runs, HELD_OUT, "velocity loss, held-out rows")
    _draw_curves(figure.add_subplot(grids[down, across:]), runs, "velocity", "velocity loss, training")
    figure.savefig(path, dpi=dpi)
    plt.close(figure)


def _draw_curves(axes: Axes, runs: Sequence[DemoRun], name: str, title: str) -> None:
    """Draw a metric of every run over its steps."""
    for run in runs:
        steps, values = zip(*curve(run, name), strict=True)
        axes.plot(steps, values, label=run.method)
    axes.set_title(title)
    axes.set_xlabel("step")
    axes.legend()
    axes.grid(visible=True, alpha=0.3)
