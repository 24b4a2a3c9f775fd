"""`repa compare` writes a page that compares runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..data.errors import RepaError
from ..data.units import counted, human_bytes
from .shared.flags import local_folder

if TYPE_CHECKING:
    from rich.console import Console

_SHOWN_NOTES = 5


@dataclass(frozen=True, kw_only=True)
class CompareFlags:
    """The flags of `repa compare`."""

    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", parser=local_folder, help="Folders of runs.", show_default=False),
    ]
    out: Annotated[
        Path, typer.Option(parser=local_folder, metavar="<path>", help="The page, an HTML file.")
    ] = Path("compare.html")
    steps: Annotated[
        list[int] | None,
        typer.Option(
            "--step",
            help="Step whose sample grids are shown; may repeat.",
            show_default="at most 6 that most runs have",
        ),
    ] = None


def compare(flags: CompareFlags, *, console: Console | None = None) -> None:
    """Write the page. One that is there is written anew; no other file is written over.

    Args:
        flags: of the command.
        console: where to print; standard output by default.

    Raises:
        RepaError: a mistake the user can mend.
    """
    from ..data.storage.files import os_errors, write_file
    from .shared.terminal import PlainConsole

    console = console or PlainConsole()
    _check_out(flags.out)
    from ..trainer.reports.page import compare_runs

    page, notes = compare_runs(flags.runs, flags.steps or ())
    raw = page.encode()
    with os_errors("write", flags.out):
        write_file(flags.out, raw, flags.out.parent)
    for note in notes[:_SHOWN_NOTES]:
        console.print(f"note: {note}", highlight=False, soft_wrap=True)
    if len(notes) > _SHOWN_NOTES:
        console.print(f"note: {len(notes) - _SHOWN_NOTES:,} more notes are at the page's end", soft_wrap=True)
    console.print(
        f"Wrote {flags.out}: {counted(len(flags.runs), 'run')}, {human_bytes(len(raw))}.",
        highlight=False,
        soft_wrap=True,
    )


def _check_out(out: Path) -> None:
    """Check that nothing but a page of ours would be written over.

    Raises:
        RepaError: something else is there, or it cannot be read.
    """
    from ..data.storage.files import os_errors
    from ..data.storage.regular import read_regular
    from ..trainer.reports.mark import MARK

    with os_errors("write", out):
        if out.is_dir():
            raise RepaError(f"{out} is a folder", "name a file for the page with --out", field="--out")
        if not out.exists():
            return
        begin = read_regular(out, 1 << 10).decode("utf-8", "replace")
    if MARK not in begin:
        raise RepaError(
            f"{out} is there and is no page of `repa compare`", "name another file with --out", field="--out"
        )
