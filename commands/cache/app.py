"""The flags of `repa cache …`, whose work is in the modules that they name."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ...data.errors import RepaError
from ..shared.flags import local_folder
from .foreign import FORMATS, OWN, ImportFlags, check_import

cache_app = typer.Typer(help="Look into a cache, check it, mend it, join it, move it.", no_args_is_help=True)

PlaceArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="[CACHE]",
        help="Folder of the cache, or its address in a bucket, s3://… or gs://…; default: the only one under "
        "caches/.",
    ),
]


@cache_app.command("info")
def _cache_info(
    cache: PlaceArgument = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print all of it as one JSON document, for programs.")
    ] = False,
) -> None:
    """Print what a cache holds. Said are columns, sizes, progress, and which models wrote them."""
    from .info import info

    info(cache=cache, as_json=as_json)


@cache_app.command("verify")
def _cache_verify(
    cache: PlaceArgument = None,
    fidelity: Annotated[
        bool,
        typer.Option(
            "--fidelity", help="Instead: encode random images again, and compare with what is stored."
        ),
    ] = False,
    reencode: Annotated[
        int | None,
        typer.Option(
            metavar="K",
            help="Instead: encode K random images again, and hold every column against them, within the "
            "rounding of its storage.",
        ),
    ] = None,
    rows: Annotated[int | None, typer.Option(help="Fidelity: how many images.", show_default="64")] = None,
    data: Annotated[
        str | None, typer.Option(help="Both: the images of the cache.", show_default="images, or demo")
    ] = None,
    weights: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=FILE", help="Both: weights of a teacher; may repeat."),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Both: of the choice of images.", show_default="0")] = None,
) -> None:
    """Check every byte of a cache. The exit status is 1 if anything is wrong."""
    if fidelity and reencode is not None:
        raise RepaError("--fidelity and --reencode exclude one another", "give them one after the other")
    folder = local_folder(cache) if cache is not None and (fidelity or reencode is not None) else None
    if reencode is not None:
        from .reencoding import verify_by_reencoding

        if rows is not None:
            raise RepaError(
                "--rows is of --fidelity", f"--reencode {reencode} says how many itself: drop --rows"
            )
        verify_by_reencoding(cache=folder, rows=reencode, data=data, weights=weights or (), seed=seed or 0)
        return
    if fidelity:
        from .fidelity import verify_fidelity

        verify_fidelity(cache=folder, rows=rows, data=data, weights=weights or (), seed=seed or 0)
        return
    for flag, value in (("--rows", rows), ("--data", data), ("--weights", weights), ("--seed", seed)):
        if value is not None and value != []:
            raise RepaError(f"{flag} says what --fidelity encodes", "add --fidelity, or drop it")
    from .info import verify

    verify(cache=cache)


@cache_app.command("repair")
def _cache_repair(
    cache: PlaceArgument = None,
    data: Annotated[
        str | None, typer.Option(help="The images of the cache.", show_default="images, or demo")
    ] = None,
    vae: Annotated[
        str | None, typer.Option(help="The autoencoder, if it was moved.", show_default="as recorded")
    ] = None,
    weights: Annotated[
        list[str] | None, typer.Option(metavar="NAME=FILE", help="Weights of a teacher; may repeat.")
    ] = None,
) -> None:
    """Encode again, exactly as it was encoded, what verify finds damaged or missing."""
    from .repair import repair

    repair(cache=cache, data=data, vae=vae, weights=weights or ())


@cache_app.command("drop")
def _cache_drop(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="What to remove: dinov2-b, or dinov2-b+attention.")
    ],
    cache: PlaceArgument = None,
    autoencoder: Annotated[
        bool, typer.Option("--autoencoder", help="Remove the latents, if SOURCE is the autoencoder's.")
    ] = False,
) -> None:
    """Remove a source with its columns. The rest of the cache stays as it is."""
    from .drop import drop

    drop(source=source, cache=cache, autoencoder=autoencoder)


@cache_app.command("upgrade")
def _cache_upgrade(cache: PlaceArgument = None) -> None:
    """Give a cache what earlier versions did not write, in place. No column is rewritten."""
    from .upgrade import upgrade

    upgrade(cache=cache)


@cache_app.command("seal")
def _cache_seal(cache: PlaceArgument = None) -> None:
    """Finish a cache that several jobs wrote. Nothing may be missing; it is counted and measured."""
    from .seal import seal

    seal(cache=cache)


@cache_app.command("merge")
def _cache_merge(
    parts: Annotated[
        list[Path],
        typer.Argument(parser=local_folder, metavar="PART...", help="Caches of parts of one image set."),
    ],
    cache: Annotated[
        Path, typer.Option(parser=local_folder, metavar="<path>", help="Folder of the cache of the whole.")
    ],
    data: Annotated[
        str | None,
        typer.Option(help="The images of the whole, which are only listed: needed to add teachers to it."),
    ] = None,
    source: Annotated[
        list[str] | None, typer.Option(help="Join this source only; may repeat.", show_default="all")
    ] = None,
) -> None:
    """Join caches of parts of one image set. Nothing is encoded. The same command again resumes."""
    from .merge import merge

    merge(parts=parts, cache=cache, data=data, sources=source or ())


@cache_app.command("export")
def _cache_export(
    out: Annotated[Path, typer.Option(parser=local_folder, metavar="<path>", help="Folder of the tars.")],
    cache: PlaceArgument = None,
    form: Annotated[str, typer.Option("--format", help="webdataset.")] = "webdataset",
    columns: Annotated[
        str | None, typer.Option(help="Columns, as sd-vae/moments,dinov2-b/patch.", show_default="all")
    ] = None,
) -> None:
    """Write columns as WebDataset tars, one a shard, for storage that is read in sequence."""
    from .export import export

    export(out=out, cache=cache, form=form, columns=columns)


@cache_app.command("import")
def _cache_import(
    place: Annotated[
        str,
        typer.Argument(
            metavar="FROM",
            help="Tars of one export, 'out/shard-{000000..001251}.tar'; or the folder of another program's "
            "latents.",
        ),
    ],
    cache: Annotated[Path, typer.Option(parser=local_folder, metavar="<path>", help="Folder of the cache.")],
    form: Annotated[
        str, typer.Option("--format", help=f"Whose: {', '.join(FORMATS)}; see docs/import.md.")
    ] = OWN,
    vae: Annotated[
        str | None,
        typer.Option(help="Others': the autoencoder, hub name or folder, which samples are decoded by."),
    ] = None,
    resolution: Annotated[
        int | None,
        typer.Option(help="Others': side of the images in pixels.", show_default="by the autoencoder"),
    ] = None,
    scaling_factor: Annotated[
        float | None,
        typer.Option(help="Others': what latents are multiplied by.", show_default="as their program does"),
    ] = None,
    shift_factor: Annotated[
        float | None,
        typer.Option(help="Others': what is subtracted first.", show_default="as their program does"),
    ] = None,
    shard_rows: Annotated[
        int | None, typer.Option(help="Others': rows of a shard.", show_default="1024")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="lightningdit: the images, whose paths then name the rows.")
    ] = None,
) -> None:
    """Make a cache again of its tars, bit for bit, or one of latents that another program wrote."""
    flags = ImportFlags(
        form=form,
        vae=vae,
        resolution=resolution,
        scaling_factor=scaling_factor,
        shift_factor=shift_factor,
        shard_rows=shard_rows,
        data=data,
    )
    check_import(flags)
    if form == OWN:
        from .export import import_tars

        import_tars(tars=place, cache=cache)
        return
    from .foreign import import_foreign

    import_foreign(place=Path(place), cache=cache, flags=flags)
