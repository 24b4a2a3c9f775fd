"""The flags of `repa softrepa train`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from ..shared.flags import local_folder

RUNS = Path("runs")


@dataclass(frozen=True, kw_only=True)
class SoftTrainFlags:
    """The flags of `repa softrepa train`. What is None is as in the run or the file, or the default."""

    model: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER|NAME",
            help="Stable Diffusion 1.5, XL or 3: a folder as diffusers saves it, or a name on the hub.",
        ),
    ] = None
    cache: Annotated[
        str | None,
        typer.Option(
            metavar="CACHE",
            help="Folder of the cache, with captions and latents of the model's autoencoder; default: the "
            "only one under caches/.",
        ),
    ] = None
    run: Annotated[
        Path,
        typer.Option(
            "--run",
            "--run-folder",
            parser=local_folder,
            metavar="<path>",
            help="Folder of the run: a new or empty one, or that of the run to go on with.",
        ),
    ] = RUNS / "softrepa"
    max_steps: Annotated[int | None, typer.Option(help="Optimiser steps.", show_default="30000")] = None
    batch_size: Annotated[
        int | None, typer.Option(help="Images of a step; all pairs of them are denoised.", show_default="4")
    ] = None
    lr: Annotated[float | None, typer.Option(help="Learning rate.", show_default="1e-3")] = None
    seed: Annotated[int | None, typer.Option(help="Of first values, order and draws.", show_default="0")] = (
        None
    )
    assignments: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Any other setting, see --help-settings; may repeat."
        ),
    ] = None
    config: Annotated[
        Path | None, typer.Option(help="YAML file of settings, as softrepa.yaml of another run.")
    ] = None
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be done, and stop.")] = False
    help_settings: Annotated[
        bool, typer.Option("--help-settings", help="Print every setting with type and default, and stop.")
    ] = False
