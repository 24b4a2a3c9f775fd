"""The flags of `repa distill`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path  # noqa: TC003 - typer resolves annotations of flags
from typing import Annotated

import typer

from ..shared.flags import local_folder


@dataclass(frozen=True, kw_only=True)
class DistillFlags:
    """The flags of `repa distill`."""

    encoder: Annotated[
        str | None, typer.Option(help="Teacher of the cache to copy.", show_default="the cache's only one")
    ] = None
    idle: Annotated[float, typer.Option(help="Share of the hidden channels that become linear.")] = 0.75
    norm: Annotated[
        str, typer.Option(help="layer: keep the teacher's LayerNorms; batch: BatchNorms, as published.")
    ] = "layer"
    cache: Annotated[str | None, typer.Option(help="The cache; default: the only one under caches/.")] = None
    data: Annotated[
        str | None, typer.Option(help="The images of the cache.", show_default="images, or demo")
    ] = None
    weights: Annotated[
        list[str] | None, typer.Option(metavar="NAME=FILE", help="Weights of the teacher.")
    ] = None
    fit_images: Annotated[
        int | None,
        typer.Option(help="Images of the closed-form start.", show_default="384, or all that there are"),
    ] = None
    steps: Annotated[
        int | None,
        typer.Option(
            help="Steps of training after it. More go on from a finished run.",
            show_default="400, or 0 with fewer images than 5 times --fit-images",
        ),
    ] = None
    batch_size: Annotated[int, typer.Option(help="Images of a step.")] = 8
    learning_rate: Annotated[
        float,
        typer.Option(help="Of AdamW, less for second layers. Larger ones have destroyed the start."),
    ] = 2e-6
    held_out: Annotated[
        int | None,
        typer.Option(help="Images to measure on, never trained on.", show_default="200, or a fifth"),
    ] = None
    seed: Annotated[int, typer.Option(help="Of the order of the images.")] = 0
    save_every: Annotated[int, typer.Option(help="Steps after which the state is kept.")] = 100
    out: Annotated[
        Path | None,
        typer.Option(
            parser=local_folder,
            metavar="<path>",
            help="The file to write.",
            show_default="encoders/NAME.safetensors",
        ),
    ] = None
