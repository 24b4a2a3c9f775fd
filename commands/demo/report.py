"""The report of `repa demo` as a table, its numbers as JSON, and a picture of samples and curves."""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from ...data.reading.reader import CacheReader
from ...data.storage.files import write_file
from ...pipeline.demo import RESOLUTION
from ...pipeline.demo.shapes import CLASS_NAMES, DemoImages
from ...pipeline.encoders import load_encoder
from ...trainer.config import build
from ...trainer.evaluation.registry import FEATURES, REFERENCE, measure
from ...trainer.methods import METHODS
from ...trainer.run.callbacks import METRICS_FILE
from ...trainer.run.checks import check
from ...trainer.run.folder import CONFIG_FILE
from ...trainer.run.metrics import read_metrics
from ...trainer.run.phases import describe_phases
from ...trainer.run.timing import TIMING_FILE
from ...trainer.sampling.record import ARRAY_FILE
from ...trainer.settings_file import load_yaml

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from matplotlib.axes import Axes
    from numpy.typing import NDArray

    from .demo_run import DemoRun

HELD_OUT_SEED = 1
"""Seed of drawn images that no model of the demo, and no cache, has seen."""

PER_CLASS = 6
ACROSS = 4
"""Most pictures beside each other."""

_CHUNK = 64


@dataclass(frozen=True, kw_only=True)
class DemoRow:
    """One line of the demo's table.

    Attributes:
        method: name of the method.
        model: name of its backbone.
        velocity_loss: on held-out rows, of the averaged weights, at the last step.
        frechet_distance: between samples and the cache's images, in the class vectors of the demo's teacher.
        images_per_second: of training, the median over its logged stretches.
        bytes_per_image: read from the cache for one image of a step, in each phase of the run.
        condition: what samples were given instead of a class; empty where it was a class.
    """

    method: str
    model: str
    velocity_loss: float
    frechet_distance: float
    images_per_second: float
    bytes_per_image: tuple[int, ...]
    condition: str = ""


def report(cache: Path, runs: Sequence[DemoRun], out: Path) -> list[DemoRow]:
    """Compare the runs in a printed table, ``demo.json`` and ``demo.png``.

    Args:
        cache: the demo's cache.
        runs: the runs, trained and sampled.
        out: folder of the two files.

    Returns:
        The table's rows.
    """
    real = _cached_class_vectors(cache)
    teacher = load_encoder("demo", resolution=RESOLUTION)

    def class_vectors(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Class vectors ``[N, D]`` of uint8 images ``[N, R, R, 3]``."""
        chunks = torch.split(torch.from_numpy(images).permute(0, 3, 1, 2), _CHUNK)
        return np.concatenate([teacher.encode(chunk.contiguous())["cls"].numpy() for chunk in chunks])

    def distance(images: NDArray[np.uint8]) -> float:
        """Compute the Fréchet distance of images to the cache's."""
        return measure("fd", {FEATURES: class_vectors(images), REFERENCE: real})["fd"]

    rows = [
        DemoRow(
            method=run.method,
            model=run.model,
            velocity_loss=_curve(run, "held_out_ema")[-1][1],
            frechet_distance=distance(_samples(run)[0]),
            images_per_second=_images_per_second(run),
            bytes_per_image=_bytes_per_image(run),
            condition=METHODS[run.method].own_condition if run.method in METHODS else "",
        )
        for run in runs
    ]
    unseen = DemoImages(count=len(_samples(runs[0])[0]), seed=HELD_OUT_SEED)
    pixels = np.stack([np.asarray(unseen.load(index)) for index in range(len(unseen))])
    floor = distance(pixels)
    _print_table(rows, floor, len(unseen))
    numbers = {"rows": [asdict(row) for row in rows], "frechet_distance_of_unseen_images": floor}
    write_file(out / "demo.json", (json.dumps(numbers, indent=2) + "\n").encode(), out)
    _draw(runs, out / "demo.png")
    print(f"Wrote {out / 'demo.png'} and {out / 'demo.json'}.")
    return rows


def _cached_class_vectors(cache: Path) -> NDArray[np.float32]:
    """Class vectors float32 ``[N, D]`` of every valid image of the cache."""
    with CacheReader(cache, ("demo/cls",)) as reader:
        spec = reader.manifest.columns["demo/cls"]
        values = np.empty((len(reader.valid_rows), *spec.shape), spec.numpy_dtype)
        reader.read_rows(reader.valid_rows, ("demo/cls",), {"demo/cls": values})
    return values.astype(np.float32)


def _bytes_per_image(run: DemoRun) -> tuple[int, ...]:
    """Count the bytes that each phase of a run reads for an image."""
    config = build(load_yaml(run.folder / CONFIG_FILE))
    phases = describe_phases(check(config), config)
    return tuple(int(phase["step_bytes"]) // config.batch_size for phase in phases)


def _images_per_second(run: DemoRun) -> float:
    """Median over the logged stretches of training."""
    rows = read_metrics(run.folder / TIMING_FILE)
    return statistics.median(row["images_per_second"] for row in rows)


def _samples(run: DemoRun) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Read the images uint8 ``[N, R, R, 3]`` and labels int64 ``[N]``, or conditions, of a sampling."""
    with np.load(run.samples / ARRAY_FILE) as arrays:
        return arrays["arr_0"], arrays["arr_1"]


def _curve(run: DemoRun, name: str) -> list[tuple[float, float]]:
    """Read the pairs (step, value) of a metric of a run."""
    rows = read_metrics(run.folder / METRICS_FILE)
    return [(row["step"], row[name]) for row in rows if name in row]


def _print_table(rows: Sequence[DemoRow], floor: float, unseen: int) -> None:
    from rich.table import Table

    from ..shared.terminal import PlainConsole

    table = Table(title="The demo's runs: the same seed, order, noise and steps", title_justify="left")
    for heading in (
        "method",
        "backbone",
        "velocity loss, held out",
        "Fréchet distance",
        "training images/s",
        "bytes/image",
    ):
        names = heading in ("method", "backbone")
        table.add_column(heading, justify="left" if names else "right", no_wrap=names)
    for row in rows:
        table.add_row(
            f"{row.method}*" if row.condition else row.method,
            row.model,
            f"{row.velocity_loss:.4f}",
            f"{row.frechet_distance:.2f}",
            f"{row.images_per_second:,.0f}",
            " → ".join(f"{count:,}" for count in row.bytes_per_image),
        )
    console = PlainConsole()
    console.print(table)
    for condition in dict.fromkeys(row.condition for row in rows if row.condition):
        console.print(
            f"* image-conditioned: images and samples were given {condition}, not a class. Neither loss nor "
            "distance may be ranked beside the others.",
            highlight=False,
        )
    console.print(
        f"Fréchet distance: of {unseen} samples to the cache's images, by class vectors of the demo's own "
        f"teacher, not Inception's. As many unseen real images score {floor:.2f}.",
        highlight=False,
    )


def _draw(runs: Sequence[DemoRun], path: Path) -> None:
    """Draw samples of the runs over the curves, the same noise and labels in the same positions."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    across = min(len(runs), ACROSS)
    down = -(-len(runs) // across)
    figure = plt.figure(figsize=(5.2 * across, 3.3 * down + 3.1), layout="constrained")
    grids = figure.add_gridspec(down + 1, 2 * across, height_ratios=(*[3.2] * down, 2.6))
    for index, run in enumerate(runs):
        row, column = divmod(index, across)
        axes = figure.add_subplot(grids[row, 2 * column : 2 * column + 2])
        axes.imshow(_grid(*_samples(run)), interpolation="nearest")
        on = "" if run.model == runs[0].model else f" on {run.model}"
        of_classes = _samples(run)[1].ndim == 1
        axes.set_title(
            f"{run.method}{on}: {PER_CLASS} samples of each class"
            if of_classes
            else f"{run.method}{on}: samples"
        )
        ticks = [RESOLUTION * (label + 0.5) for label in range(len(CLASS_NAMES))] if of_classes else []
        axes.set_xticks(ticks, CLASS_NAMES if of_classes else [], rotation=35, ha="right", fontsize=8)
        axes.tick_params(length=0)
        axes.set_yticks([])
        axes.set_frame_on(False)
    _draw_curves(
        figure.add_subplot(grids[down, :across]), runs, "held_out_ema", "velocity loss, held-out rows"
    )
    _draw_curves(figure.add_subplot(grids[down, across:]), runs, "velocity", "velocity loss, training")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _grid(images: NDArray[np.uint8], labels: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Arrange a column for each class and `PER_CLASS` rows, uint8 ``[PER_CLASS·R, classes·R, 3]``.

    Samples without a class stand as they come.
    """
    if labels.ndim > 1:
        labels = np.arange(len(images)) % len(CLASS_NAMES)
    columns = [np.concatenate(images[labels == label][:PER_CLASS]) for label in np.unique(labels)]
    return np.concatenate(columns, axis=1)


def _draw_curves(axes: Axes, runs: Sequence[DemoRun], name: str, title: str) -> None:
    for run in runs:
        steps, values = zip(*_curve(run, name), strict=True)
        axes.plot(steps, values, label=run.method)
    axes.set_title(title)
    axes.set_xlabel("step")
    axes.legend()
    axes.grid(visible=True, alpha=0.3)
