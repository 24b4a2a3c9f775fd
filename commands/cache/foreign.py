"""`repa cache import --format …` makes a cache of latents that another program wrote."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...data.errors import RepaError
from .export import say_transfer, transfer_bar

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console

    from ...data.reading.latents import LatentScale

OWN = "webdataset"
FOREIGN = ("repa", "lightningdit", "fast-dit", "mar")
FORMATS = (OWN, *FOREIGN)


@dataclass(frozen=True, kw_only=True)
class ImportFlags:
    """What `repa cache import` was asked for, see its help.

    Attributes:
        form: one of `FORMATS`.
        vae: the autoencoder, as the user says.
        resolution: side of the images in pixels.
        scaling_factor: of the latents.
        shift_factor: of the latents.
        shard_rows: rows of a shard.
        data: images that name the rows.
    """

    form: str = OWN
    vae: str | None = None
    resolution: int | None = None
    scaling_factor: float | None = None
    shift_factor: float | None = None
    shard_rows: int | None = None
    data: str | None = None


def check_import(flags: ImportFlags) -> None:
    """Refuse an unknown layout, and flags that our own tars answer themselves.

    Raises:
        RepaError: which.
    """
    if flags.form not in FORMATS:
        raise RepaError(
            f"--format {flags.form!r} is unknown", f"there is {', '.join(FORMATS)}", field="--format"
        )
    if flags.shard_rows is not None and not 1 <= flags.shard_rows <= 1 << 20:
        raise RepaError(
            f"--shard-rows {flags.shard_rows} is not valid", "give 1 to 1,048,576", field="--shard-rows"
        )
    if flags.scaling_factor is not None and not 0 < flags.scaling_factor < math.inf:
        raise RepaError(
            f"--scaling-factor {flags.scaling_factor} is no factor of latents",
            "give a finite number above 0",
            field="--scaling-factor",
        )
    given = [
        flag
        for flag, value in (
            ("--vae", flags.vae),
            ("--resolution", flags.resolution),
            ("--scaling-factor", flags.scaling_factor),
            ("--shift-factor", flags.shift_factor),
            ("--shard-rows", flags.shard_rows),
            ("--data", flags.data),
        )
        if value is not None
    ]
    if flags.form == OWN and given:
        raise RepaError(
            f"{given[0]} is about latents of other programs, and tars of a cache say it themselves",
            f"leave it out, or give --format {'|'.join(FOREIGN)}",
            field=given[0],
        )


def import_foreign(*, place: Path, cache: Path, flags: ImportFlags, console: Console | None = None) -> None:
    """Make a cache of latents that another program wrote. The same command goes on where it was stopped.

    Args:
        place: where they lie.
        cache: folder of the cache.
        flags: what is known of them.
        console: where to print; standard output by default.

    Raises:
        RepaError: a mistake the user can mend.
        SystemExit: with status 130 when it was stopped from outside.
    """
    from ...data.format.foreign import foreign_lines
    from ...data.format.manifest import DEFAULT_SHARD_ROWS
    from ...data.format.opening import open_manifest
    from ...pipeline.foreign.base import ForeignOptions
    from ...pipeline.foreign.open import open_foreign
    from ...pipeline.foreign.write import ImportSettings, import_latents
    from ...pipeline.run import StoppedError
    from ...pipeline.summary import say
    from ..shared.terminal import PlainConsole

    console = console or PlainConsole()
    started = time.perf_counter()
    options = ForeignOptions(
        data=flags.data, scaling_factor=flags.scaling_factor, shift_factor=flags.shift_factor
    )
    latents = open_foreign(flags.form, place, options)
    for remark in latents.remarks:
        say(console, f"note: {remark}", style="yellow")
    settings = ImportSettings(
        vae=flags.vae, resolution=flags.resolution, shard_rows=flags.shard_rows or DEFAULT_SHARD_ROWS
    )
    try:
        with (
            transfer_bar("checking", console, "files") as surveyed,
            transfer_bar("importing", console) as written,
        ):
            done = import_latents(latents, cache, settings, surveyed, written)
    except StoppedError as stopped:
        say(console, str(stopped))
        raise SystemExit(130) from None
    say_transfer(done, "written", time.perf_counter() - started, console)
    manifest = open_manifest(cache)
    for line in foreign_lines(manifest):
        say(console, line, style="yellow")
    channels, side, _ = latents.shape
    say(
        console,
        f"Wrote {cache}: latents [{channels // 2}, {side}, {side}] of images of {manifest.resolution}×"
        f"{manifest.resolution}, {_scaled(latents.scale)}; `repa cache verify {cache}` checks it.",
    )


def _scaled(scale: LatentScale) -> str:
    """Say what training makes of a latent z."""
    if scale.mean:
        return f"of which training takes {scale.scaling_factor:g}·(z − mean) / std of each channel as given"
    shifted = f"(z − {scale.shift_factor:g})" if scale.shift_factor else "z"
    return f"of which training takes {scale.scaling_factor:g}·{shifted}"
