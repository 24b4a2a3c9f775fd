"""`repa cache verify --reencode` holds what is stored against what is computed now."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...data.errors import CacheError, RepaError
from ...pipeline.images.names import default_cache
from ...pipeline.summary import say
from .repair import given_of

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from rich.console import Console
    from rich.table import Table

    from ...pipeline.replay.reencode import Reencoded


def verify_by_reencoding(
    *,
    cache: Path | None = None,
    rows: int,
    data: str | None = None,
    weights: Sequence[str] = (),
    seed: int = 0,
    console: Console | None = None,
) -> None:
    """Encode random rows again and hold every column against them, within the rounding of its storage.

    Args:
        cache: the cache; by default the only one under ``caches/``.
        rows: how many rows.
        data: the images it was made from; by default ``images``, of a cache of the demo ``demo``.
        weights: ``NAME=FILE`` of an encoder's weights.
        seed: of the choice of rows.
        console: where to print; standard output by default.

    Raises:
        RepaError: no cache, other images or weights than recorded, a row that is corrupt.
        SystemExit: with status 1 when a row is not what is computed now.
    """
    from ..shared.terminal import PlainConsole

    if rows < 1:
        raise RepaError(f"--reencode {rows} compares nothing", "give at least 1", field="--reencode")
    from ...data.format.captions import caption_keys, has_captions, read_captions
    from ...data.format.columns import AUTOENCODER
    from ...data.format.foreign import foreign_note
    from ...data.format.opening import open_manifest, read_keys
    from ...pipeline.replay.captions import reencode_captions
    from ...pipeline.replay.reencode import reencode

    console = console or PlainConsole()
    path = cache or default_cache()
    manifest = open_manifest(path)
    if foreign_note(manifest) is not None:
        if list(manifest.sources) == [AUTOENCODER] and not has_captions(path):
            raise CacheError(
                f"the latents of {path} were imported, and nothing here can encode them again",
                "`repa cache verify` checks every byte of them",
                field=AUTOENCODER,
            )
        say(console, f"{AUTOENCODER} was imported, and nothing here can encode it again: it is left out")
    given = given_of(data, None, weights)
    found = reencode(path, given, rows=rows, seed=seed)
    names = dict.fromkeys((each.column for each in found), ("image", read_keys(path, manifest)))
    if has_captions(path):
        text = reencode_captions(path, given, rows=rows, seed=seed)
        names |= dict.fromkeys((each.column for each in text), ("caption", caption_keys(read_captions(path))))
        found += text
    console.print(_reencoded(found))
    for each in found:
        noun, keys = names[each.column]
        for row in each.outside:
            say(console, f"{each.column} of {noun} {keys[row]} (row {row}) is not what is computed of it now")
    lost = [each.column for each in found if not each.kept]
    say(console, f"{path}: {_verdict(lost)}")
    if lost:
        raise SystemExit(1)


def _verdict(lost: Sequence[str]) -> str:
    if not lost:
        return "what is stored is what the images give, within its rounding"
    return (
        f"{', '.join(lost)} {'is' if len(lost) == 1 else 'are'} not what the images give; write the cache "
        "again in another folder, and compare"
    )


def _reencoded(found: Sequence[Reencoded]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for heading in ("column", "rows", "same bits", "largest difference", "noise allowed", ""):
        table.add_column(heading, justify="left" if heading == "column" else "right")
    for each in found:
        table.add_row(
            each.column,
            str(each.rows),
            str(each.identical),
            f"{each.largest:.2f} of what is allowed",
            f"{each.noise:g}",
            Text("" if each.kept else "over", style="bold red"),
        )
    return table
