"""`repa compare`: the file it writes, what it says, and what it leaves alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from repa.cli import main, run_command
from repa.data.errors import RepaError
from run_folders import make_run

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def runs(tmp_path: Path) -> list[str]:
    return [str(make_run(tmp_path / name, steps=50, log_every=10)) for name in "ab"]


def test_a_page_is_written_and_written_anew(
    runs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run_command(["compare", *runs])
    page = tmp_path / "compare.html"
    first = page.read_text()
    assert first.startswith("<!DOCTYPE html>\n<!-- written by repa compare -->\n<html")
    (tmp_path / "b" / "timing.csv").unlink()
    run_command(["compare", *runs])
    assert page.read_text() != first
    assert "note: b: timing.csv is not there" in capsys.readouterr().out
    run_command(["compare", *runs, "--out", "deep/er/page.html"])
    assert (tmp_path / "deep" / "er" / "page.html").read_text() == page.read_text()


def test_no_other_file_is_written_over(runs: list[str], tmp_path: Path) -> None:
    notes = tmp_path / "notes.html"
    notes.write_text("mine")
    for out in (notes, tmp_path / "a"):
        with pytest.raises(RepaError) as caught:
            run_command(["compare", *runs, "--out", str(out)])
        assert caught.value.field == "--out"
        assert caught.value.remedy
    assert notes.read_text() == "mine"


@pytest.mark.parametrize(
    ("words", "field"),
    [
        (["nowhere"], "RUN"),
        (["."], "RUN"),
        (["a", "a"], "RUN"),
        (["a", "--step", "7"], "--step"),
    ],
)
def test_mistakes(
    runs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], field: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RepaError) as caught:
        run_command(["compare", *words])
    assert caught.value.field == field
    assert not (tmp_path / "compare.html").exists()


def test_a_mistake_is_a_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["compare", str(tmp_path / "no\nwhere")])
    assert stopped.value.code == 1
    assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(SystemExit) as stopped:
        main(["compare"])
    assert stopped.value.code == 2
