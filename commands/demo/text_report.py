"""The report of `repa demo --text` as a table, its numbers as JSON, and a picture of prompts and curves."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np

from ...data.storage.files import write_file
from ...pipeline.demo import RESOLUTION
from ...pipeline.demo.captions import captions_of
from ...pipeline.demo.shapes import CLASS_NAMES, COLOUR_NAMES, DemoImages
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
from .prompts import obeyed, prompts

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from matplotlib.axes import Axes
    from numpy.typing import NDArray

    from .demo_run import DemoRun

ACROSS = 2
"""Most pictures beside each other."""


@dataclass(frozen=True, kw_only=True)
class TextRow:
    """One line of the table.

    Attributes:
        method: name of the method.
        model: name of its backbone.
        velocity_loss: on held-out rows, of the averaged weights, at the last step.
        frechet_distance: between samples and the cache's images, in the class vectors of the demo's teacher.
        right_shape: share of samples that show the shape of their prompt.
        right_colour: share of samples that show the colour of their prompt.
        right_both: share of samples that show both.
        images_per_second: of training, the median over its logged stretches.
        bytes_per_image: read from the cache for one image of a step, in each phase of the run.
    """

    method: str
    model: str
    velocity_loss: float
    frechet_distance: float
    right_shape: float
    right_colour: float
    right_both: float
    images_per_second: float
    bytes_per_image: tuple[int, ...]


def report(cache: Path, runs: Sequence[DemoRun], out: Path) -> list[TextRow]:
    """Compare the runs in a printed table, ``demo-text.json`` and ``demo-text.png``.

    Args:
        cache: the demo's cache.
        runs: the runs, trained and sampled.
        out: folder of the two files.

    Returns:
        The table's rows.
    """
    distance = Distance(cache)
    rows = [_row(run, distance) for run in runs]
    unseen = DemoImages(count=len(samples(runs[0])[0]), seed=HELD_OUT_SEED)
    drawn = pixels(unseen)
    floor = distance(drawn)
    # by a caption of its own each: what falls short of 1 is read wrongly, not drawn wrongly
    ceiling = float(obeyed(drawn, [own[0] for own in captions_of(unseen)]).both.mean())
    _print_table(rows, floor, ceiling, len(unseen))
    numbers = {
        "rows": [asdict(row) for row in rows],
        "frechet_distance_of_unseen_images": floor,
        "right_both_of_unseen_images": ceiling,
    }
    write_file(out / "demo-text.json", (json.dumps(numbers, indent=2) + "\n").encode(), out)
    draw_runs(runs, out / "demo-text.png", _draw_prompts, across=ACROSS, cell=(6.8, 4.5), dpi=80)
    print(f"Wrote {out / 'demo-text.png'} and {out / 'demo-text.json'}.")
    return rows


def _row(run: DemoRun, distance: Distance) -> TextRow:
    images = samples(run)[0]
    right = obeyed(images, prompts())
    return TextRow(
        method=run.method,
        model=run.model,
        velocity_loss=curve(run, HELD_OUT)[-1][1],
        frechet_distance=distance(images),
        right_shape=float(right.shape.mean()),
        right_colour=float(right.colour.mean()),
        right_both=float(right.both.mean()),
        images_per_second=images_per_second(run),
        bytes_per_image=bytes_per_image(run),
    )


def _print_table(rows: Sequence[TextRow], floor: float, ceiling: float, count: int) -> None:
    from rich.table import Table

    from ..shared.terminal import PlainConsole

    models = ", ".join(dict.fromkeys(row.model for row in rows))
    table = Table(
        title=f"The demo's runs of text on {models}: the same seed, order, noise and steps",
        title_justify="left",
    )
    for heading in (
        "method",
        "held-out loss",
        "Fréchet distance",
        "right shape",
        "right colour",
        "right both",
        "training images/s",
        "bytes / image",
    ):
        table.add_column(
            heading.replace(" ", "\n", 1), justify="left" if heading == "method" else "right", no_wrap=True
        )
    for row in rows:
        table.add_row(
            row.method,
            f"{row.velocity_loss:.4f}",
            f"{row.frechet_distance:.2f}",
            f"{row.right_shape:.0%}",
            f"{row.right_colour:.0%}",
            f"{row.right_both:.0%}",
            f"{row.images_per_second:,.0f}",
            " → ".join(f"{each:,}" for each in row.bytes_per_image),
        )
    console = PlainConsole()
    console.print(table)
    shapes, colours = len(CLASS_NAMES), len(COLOUR_NAMES)
    console.print(
        f"Right: of {count} samples, those whose pixels show what the prompt says, read without a network by "
        f"brightness, hue and overlap with the drawn shapes. As many unseen real images are read right by "
        f"{ceiling:.0%}. Guesses would be right by {1 / shapes:.0%} of shapes, {1 / colours:.0%} of colours "
        f"and {1 / (shapes * colours):.0%} of both.",
        highlight=False,
    )
    console.print(
        f"Loss: of the velocity, on held-out rows. Fréchet distance: of {count} samples to the cache's "
        f"images, by class vectors of the demo's own teacher, not Inception's. As many unseen real images "
        f"score {floor:.2f}.",
        highlight=False,
    )


def _draw_prompts(axes: Axes, run: DemoRun) -> None:
    """Draw a row for each colour and a column for each shape, with a mark on what is not what was asked."""
    texts = prompts()
    images = samples(run)[0][: len(texts)]
    right = obeyed(images, texts).both
    rows, columns = len(COLOUR_NAMES), len(CLASS_NAMES)
    axes.imshow(_grid(images, rows, columns), interpolation="nearest")
    wrong = np.flatnonzero(~right)
    axes.scatter(
        RESOLUTION * (wrong % columns + 0.88),
        RESOLUTION * (wrong // columns + 0.12),
        marker="x",
        color="white",
        s=18,
        linewidths=1.2,
    )
    axes.set_title(
        f"{run.method}: “a COLOUR SHAPE on dark”, {right.sum()} of {len(texts)} as asked (× is not)"
    )
    axes.set_xticks(
        [RESOLUTION * (each + 0.5) for each in range(columns)], CLASS_NAMES, rotation=35, ha="right"
    )
    axes.set_yticks([RESOLUTION * (each + 0.5) for each in range(rows)], COLOUR_NAMES)


def _grid(images: NDArray[np.uint8], rows: int, columns: int) -> NDArray[np.uint8]:
    """Arrange images row by row, uint8 ``[rows·R, columns·R, 3]``."""
    side = images.shape[1]
    return images.reshape(rows, columns, side, side, 3).swapaxes(1, 2).reshape(rows * side, columns * side, 3)
