"""The report of `repa demo` as a table, its numbers as JSON, and a picture of samples and curves."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np

from ...data.storage.files import write_file
from ...pipeline.demo import RESOLUTION
from ...pipeline.demo.shapes import CLASS_NAMES, DemoImages
from ...trainer.methods import METHODS
from .measured import (
    HELD_OUT,
    HELD_OUT_SEED,
    Distance,
    bytes_per_image,
    curve,
    draw_runs,
    images_per_second,
    pixels,
    samples,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from matplotlib.axes import Axes
    from numpy.typing import NDArray

    from .demo_run import DemoRun

PER_CLASS = 6
ACROSS = 4
"""Most pictures beside each other."""


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
    distance = Distance(cache)
    rows = [
        DemoRow(
            method=run.method,
            model=run.model,
            velocity_loss=curve(run, HELD_OUT)[-1][1],
            frechet_distance=distance(samples(run)[0]),
            images_per_second=images_per_second(run),
            bytes_per_image=bytes_per_image(run),
            condition=METHODS[run.method].own_condition if run.method in METHODS else "",
        )
        for run in runs
    ]
    unseen = DemoImages(count=len(samples(runs[0])[0]), seed=HELD_OUT_SEED)
    floor = distance(pixels(unseen))
    _print_table(rows, floor, len(unseen))
    numbers = {"rows": [asdict(row) for row in rows], "frechet_distance_of_unseen_images": floor}
    write_file(out / "demo.json", (json.dumps(numbers, indent=2) + "\n").encode(), out)
    draw_runs(runs, out / "demo.png", _draw_samples, across=ACROSS, cell=(5.2, 3.3), dpi=100)
    print(f"Wrote {out / 'demo.png'} and {out / 'demo.json'}.")
    return rows


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


def _draw_samples(axes: Axes, run: DemoRun) -> None:
    """Draw a column for each class, of samples without one a grid."""
    images, labels = samples(run)
    of_classes = labels.ndim == 1
    axes.imshow(_grid(images, labels), interpolation="nearest")
    what = f"{PER_CLASS} samples of each class" if of_classes else "samples"
    axes.set_title(f"{run.method} on {run.model}: {what}")
    ticks = [RESOLUTION * (label + 0.5) for label in range(len(CLASS_NAMES))] if of_classes else []
    axes.set_xticks(ticks, CLASS_NAMES if of_classes else [], rotation=35, ha="right", fontsize=8)
    axes.set_yticks([])


def _grid(images: NDArray[np.uint8], labels: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Arrange a column for each class and `PER_CLASS` rows, uint8 ``[PER_CLASS·R, classes·R, 3]``.

    Samples without a class stand as they come.
    """
    if labels.ndim > 1:
        labels = np.arange(len(images)) % len(CLASS_NAMES)
    columns = [np.concatenate(images[labels == label][:PER_CLASS]) for label in np.unique(labels)]
    return np.concatenate(columns, axis=1)
