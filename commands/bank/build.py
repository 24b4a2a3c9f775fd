"""`repa bank build` copies the class tokens of a cache into one file."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...data.errors import RepaError
from ...pipeline.images.names import default_cache

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console


def build(
    *,
    out: Path,
    cache: str | None = None,
    encoder: str | None = None,
    view: str | None = None,
    rank: int | None = None,
    replace: bool = False,
    console: Console | None = None,
) -> None:
    """Write a bank, whole or not at all.

    Args:
        out: the file.
        cache: the cache; by default the only one under ``caches/``.
        encoder: the teacher; by default the cache's only one.
        view: name of the view; by default the first.
        rank: of the singular value decomposition; None stores whole vectors.
        replace: write over a file that is there.
        console: where to print; standard output by default.

    Raises:
        RepaError: a mistake the user can mend.
        CacheError: the cache or a row of it cannot be read.
    """
    from ...data.format.columns import column_name
    from ...data.storage.bucket import cache_path
    from ...trainer.models.conditioning import CLS
    from ...trainer.sampling.bank import open_cache_bank
    from ...trainer.sampling.bank_file import rows_read, write_bank
    from ..shared.terminal import PlainConsole, progress
    from .info import say_bank

    console = console or PlainConsole()
    if out.exists() and (out.is_dir() or not replace):
        remedy = "name a file with --out" if out.is_dir() else "name another with --out, or give --replace"
        raise RepaError(f"{out} is there already", remedy, field="--out")
    path = cache_path(cache if cache is not None else default_cache())
    bank = open_cache_bank(path, column_name(encoder, CLS) if encoder else "", view or "")
    if not len(bank):
        raise RepaError(f"{bank.name} has no image that could be decoded", "name another cache")
    most = min(len(bank), bank.width)
    if rank is not None and not 1 <= rank <= most:
        raise RepaError(
            f"--rank {rank} is none of {len(bank):,} vectors of {bank.width} channels",
            f"give 1 to {most:,}",
            field="--rank",
        )
    with progress(rows_read(bank, rank), console, "reading") as report:
        written = write_bank(out, bank, rank, report)
    say_bank(written, out, console)
