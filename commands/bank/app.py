"""The flags of `repa bank …`, whose work is in the modules that they name."""

from __future__ import annotations

from pathlib import Path  # noqa: TC003 - typer resolves annotations of flags
from typing import Annotated

import typer

from ..shared.flags import local_folder

bank_app = typer.Typer(
    help="Copy the class tokens of a cache, which GMem samples with, into a file of their own.",
    no_args_is_help=True,
)


@bank_app.command("build")
def _bank_build(
    out: Annotated[
        Path,
        typer.Option(parser=local_folder, metavar="FILE", help="The file to write, as bank.safetensors."),
    ],
    cache: Annotated[
        str | None,
        typer.Argument(
            metavar="[CACHE]",
            help="Folder of the cache, or its address in a bucket; default: the only one under caches/.",
        ),
    ] = None,
    encoder: Annotated[
        str | None,
        typer.Option(help="Teacher whose class tokens are taken.", show_default="the cache's only one"),
    ] = None,
    view: Annotated[str | None, typer.Option(help="View of the images.", show_default="the first")] = None,
    rank: Annotated[
        int | None,
        typer.Option(
            help="Store a singular value decomposition of this rank, GMem's 64; its error is printed.",
            show_default="whole vectors",
        ),
    ] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Replace a file that is there.")] = False,
) -> None:
    """Write the class tokens of every image of a cache into one safetensors file, in float16."""
    from .build import build

    build(out=out, cache=cache, encoder=encoder, view=view, rank=rank, replace=replace)


@bank_app.command("info")
def _bank_info(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A file of 'repa bank build'.")],
) -> None:
    """Print what a bank is of, and how far a factored one is from the vectors."""
    from .info import info

    info(file)
