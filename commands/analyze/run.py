"""`repa analyze` says what a cache holds for training, and what the blocks of a run have learned."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path  # noqa: TC003 - typer resolves annotations of flags
from typing import TYPE_CHECKING, Annotated

import typer

from ...data.errors import RepaError
from ..shared.flags import local_folder

if TYPE_CHECKING:
    from rich.console import Console

DOCUMENT = "analysis.json"
_MOST = 100_000


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


def analyze(flags: AnalyzeFlags, *, console: Console | None = None) -> None:
    """Measure teachers of a cache, or blocks of a run, into a table, a document and pictures.

    Args:
        flags: of the command.
        console: where to print; standard output by default.

    Raises:
        RepaError: a mistake the user can mend.
    """
    from ..shared.terminal import PlainConsole

    console = console or PlainConsole()
    _check(flags)
    times = _times(flags.times)
    if flags.run is not None:
        from .of_run import analyze_run

        analyze_run(flags, flags.run, times, console)
        return
    from .of_cache import analyze_cache

    analyze_cache(flags, console)


def _check(flags: AnalyzeFlags) -> None:
    """Refuse numbers out of their range, and flags that do not go together.

    Raises:
        RepaError: the first of them.
    """
    for flag, value, least, most in (
        ("--num", flags.num, 8, _MOST),
        ("--k", flags.k, 1, _MOST),
        ("--seed", flags.seed, 0, 2**63 - 1),
        ("--batch-size", flags.batch_size, 1, 10**6),
        ("--pictures", flags.pictures, 0, 256),
    ):
        if not least <= value <= most:
            raise RepaError(f"{flag} {value} is not valid", f"give {least:,} to {most:,}", field=flag)
    if flags.run is None and flags.step is not None:
        raise RepaError("--step is of a run, and none is given", "add --run", field="--step")
    of_caches = {"--row": flags.rows, "--data": flags.data, "--vae": flags.vae}
    strange = [flag for flag, value in of_caches.items() if value] if flags.run is not None else []
    if strange:
        raise RepaError(
            f"{strange[0]} is of a cache, and --run asks for the blocks of a run",
            "leave one of them out",
            field=strange[0],
        )


def _times(text: str) -> tuple[float, ...]:
    """Parse the times.

    Raises:
        RepaError: one is no number from 0 to 1.
    """
    try:
        times = tuple(dict.fromkeys(float(each) for each in text.split(",")))
    except ValueError:
        times = ()
    if not times or not all(0 <= each <= 1 for each in times):
        raise RepaError(
            f"--times {text} are no times", "give numbers from 0 to 1, as 0.2,0.5,0.8", field="--times"
        )
    return times
