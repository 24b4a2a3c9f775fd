"""Text of others appears on the terminal and does nothing else; any terminal gets a readable line."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from repa.cli import main
from repa.commands.cache.info import info
from repa.commands.shared.terminal import PlainConsole, print_figures
from repa.data.testing import synthetic_cache
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from pathlib import Path

MARKUP = ("[/x]", "[bold]", "[link=file:///]a", ":smile:")
HOSTILE = (*MARKUP, "\x1b[2J", "\x07", "\x9b31m", "\u202e", "\ud800", "\r")


def console() -> PlainConsole:
    return PlainConsole(file=io.StringIO(), width=200, force_terminal=True, color_system=None)


@pytest.mark.parametrize("text", HOSTILE)
def test_text_of_others_is_only_shown(text: str) -> None:
    out = console()
    out.print(f"a {text} b", highlight=False)
    out.print(Text(f"a {text} b"))
    table = Table(text)
    table.add_row(text)
    out.print(table)
    shown = out.file.getvalue()  # type: ignore[attr-defined]
    assert shown.replace("\n", "").isprintable()
    if text.isprintable():
        assert shown.count(f"a {text} b") == 2
    shown.encode()


def test_what_a_manifest_says_is_only_shown(tmp_path: Path) -> None:
    columns = {}
    views = ("[/x]", "\x1b[2J")
    synthetic_cache(tmp_path, num_rows=3, columns=columns, views=views)
    out = console()
    info(cache=tmp_path, console=out)
    shown = out.file.getvalue()  # type: ignore[attr-defined]
    assert "[/x], \\x1b[2J" in shown
    assert "\x1b" not in shown


def test_figures_in_a_file_are_not_cut() -> None:
    table = Table()
    for heading in range(14):
        table.add_column(f"heading {heading} of some length")
    table.add_row(*(f"{heading:,}" for heading in range(1_000_000, 15_000_000, 1_000_000)))
    file = io.StringIO()
    console = PlainConsole(file=file, width=80)
    print_figures(console, table)
    assert all(f"{million},000,000" in file.getvalue() for million in range(1, 15))
    assert console.width == 80


def test_an_error_is_one_printable_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["cache", "info", f"{tmp_path}/a\x1b[31m\n\u202e[/x]"])
    printed = capsys.readouterr()
    assert caught.value.code == 1
    assert printed.err.startswith("error: ")
    assert printed.err.removesuffix("\n").isprintable()
    assert printed.out == ""


def repa(*words: str, shell: str = "", **environment: str) -> subprocess.CompletedProcess[bytes]:
    program = "import sys; from repa.cli import main; main(sys.argv[1:])"
    line = [sys.executable, "-c", program, *words]
    if shell:
        line = ["bash", "-c", f'"$@" {shell}', "bash", *line]
    return subprocess.run(line, env={**os.environ, **environment}, capture_output=True, check=False)


def test_terminals_of_few_letters(tmp_path: Path) -> None:
    synthetic_cache(tmp_path / "c", num_rows=3)
    for environment in (
        {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
        {"PYTHONIOENCODING": "latin-1"},
        {"PYTHONIOENCODING": "ascii"},
    ):
        done = repa("cache", "info", str(tmp_path / "c"), **environment)
        assert done.returncode == 0, done.stderr
        assert b"demo/patch" in done.stdout
        assert done.stderr == b""


@pytest.mark.parametrize(("shell", "status"), [("> /dev/full", 1), (">&-", 0), ("2>&- >&-", 0)])
def test_output_that_nobody_takes(tmp_path: Path, shell: str, status: int) -> None:
    synthetic_cache(tmp_path / "c", num_rows=3)
    done = repa("cache", "info", str(tmp_path / "c"), shell=shell)
    assert done.returncode == status
    assert done.stderr.count(b"\n") == status
    assert b"Traceback" not in done.stderr
