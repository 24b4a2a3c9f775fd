"""The flags of `repa analyze`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path  # noqa: TC003 - typer resolves annotations of flags
from typing import Annotated

import typer

from ..shared.flags import local_folder

DOCUMENT = "analysis.json"


@dataclass(frozen=True, kw_only=True)
class AnalyzeFlags:
    """The flags of `repa analyze`."""

    cache: Annotated[
        str | None,
        typer.Option(help="A cache, to be looked into; with --run, where the images of the run are now."),
    ] = None
    run: Annotated[
        Path | None, typer.Option(parser=local_folder, metavar="<path>", help="Instead: folder of a run.")
    ] = None
    step: Annotated[
        int | None, typer.Option(help="Of the run's checkpoint.", show_default="newest", min=0)
    ] = None
    weights: Annotated[str, typer.Option(help="Of the run: ema or model.")] = "ema"
    times: Annotated[
        str, typer.Option(metavar="T,T,…", help="Times at which a run is looked into; 0: data, 1: noise.")
    ] = "0.5"
    teachers: Annotated[
        list[str] | None,
        typer.Option("--teacher", help="Teacher of the cache; may repeat.", show_default="all"),
    ] = None
    num: Annotated[int, typer.Option(help="Images, drawn at random.")] = 512
    k: Annotated[int, typer.Option(help="Neighbours of CKNNA.")] = 10
    seed: Annotated[int, typer.Option(help="Of the choice of images, and of a run's noise.")] = 0
    batch_size: Annotated[int, typer.Option(help="Images at once; changes no result.")] = 32
    pictures: Annotated[
        int, typer.Option(help="Images of a cache that are drawn; 0 draws none and needs no autoencoder.")
    ] = 8
    rows: Annotated[
        list[int] | None,
        typer.Option("--row", help="Row of the cache to draw; may repeat.", show_default="the first drawn"),
    ] = None
    data: Annotated[
        str | None,
        typer.Option(help="The images of the cache, to be compared with what its latents decode to."),
    ] = None
    vae: Annotated[
        str | None, typer.Option(help="AutoencoderKL; default the one that the latents came from.")
    ] = None
    out: Annotated[
        Path | None,
        typer.Option(
            parser=local_folder,
            metavar="<path>",
            help="Folder of analysis.json and pictures.",
            show_default="analysis of the run; analysis-<cache>",
        ),
    ] = None
