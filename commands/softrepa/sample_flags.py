"""The flags of `repa softrepa sample`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path  # noqa: TC003 - typer resolves annotations of flags
from typing import Annotated

import typer

from ..shared.flags import local_folder, square_side


@dataclass(frozen=True, kw_only=True)
class SoftSampleFlags:
    """The flags of `repa softrepa sample`."""

    run: Annotated[
        Path | None,
        typer.Option(
            parser=local_folder,
            metavar="<path>",
            help="Folder of a run: its tokens of the lowest held-out loss, or its last ones.",
        ),
    ] = None
    tokens: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Instead: a file of tokens.", show_default=False)
    ] = None
    plain: Annotated[
        bool, typer.Option("--plain", help="Leave the tokens out: what the model makes without, to compare.")
    ] = False
    prompts: Annotated[
        list[str] | None,
        typer.Option(
            "--prompt",
            metavar="TEXT",
            help="Text of a sample; may repeat, in turn.",
            show_default="captions of the cache, of evenly spaced images",
        ),
    ] = None
    prompts_file: Annotated[
        Path | None,
        typer.Option("--prompts", metavar="FILE", help="Prompts of a file, one a line, in turn."),
    ] = None
    encoder_weights: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=FOLDER", help="Of --prompt: folder of the text encoder."),
    ] = None
    model: Annotated[
        str | None,
        typer.Option(metavar="FOLDER|NAME", help="The denoiser.", show_default="that of the tokens"),
    ] = None
    cache: Annotated[
        str | None,
        typer.Option(metavar="CACHE", help="The cache.", show_default="that of the tokens"),
    ] = None
    num: Annotated[int, typer.Option(help="Number of images.")] = 16
    out: Annotated[
        Path | None,
        typer.Option(
            parser=local_folder,
            metavar="<path>",
            help="Folder to write to, a new or empty one.",
            show_default="samples/final or samples/plain of the run",
        ),
    ] = None
    steps: Annotated[
        int | None, typer.Option(help="Steps of the scheduler.", show_default="30, of Stable Diffusion 3 28")
    ] = None
    guidance: Annotated[
        float | None,
        typer.Option(help="Scale of guidance; 1: none.", show_default="7, of Stable Diffusion 3 4"),
    ] = None
    resolution: Annotated[
        int | None,
        typer.Option(
            parser=square_side, metavar="<int>", help="Side of the images.", show_default="the cache's"
        ),
    ] = None
    seed: Annotated[int, typer.Option(help="Of the noise.")] = 0
    batch_size: Annotated[int, typer.Option(help="Images of a forward pass.")] = 4
    vae: Annotated[
        str | None, typer.Option(help="AutoencoderKL.", show_default="the one the latents came from")
    ] = None
