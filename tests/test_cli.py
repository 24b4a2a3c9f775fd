"""The command line: what a mistake looks like, and that every command of the README is one."""

from __future__ import annotations

import errno
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from repa import __version__
from repa.cli import app, main
from repa.data.testing import synthetic_cache

ROOT = Path(__file__).resolve().parents[1]


def readme_commands() -> list[str]:
    """Return every `repa …` of the README, of an indented line or between backticks."""
    text = (ROOT / "README.md").read_text()
    lines = re.findall(r"^    (.+)$", text, flags=re.MULTILINE) + re.findall(r"`(repa [^`\n]+)`", text)
    commands = [part.strip() for line in lines for part in re.sub(r"\s+#.*", "", line).split("&&")]
    return [command for command in dict.fromkeys(commands) if command.startswith("repa ")]


def test_the_readme_has_the_two_commands_and_the_demo() -> None:
    commands = readme_commands()
    assert commands[0].startswith("repa preprocess")
    assert commands[1].startswith("repa train")
    assert "repa demo" in commands


@pytest.mark.parametrize("line", readme_commands())
def test_every_command_of_the_readme_parses(line: str) -> None:
    command, words = typer.main.get_command(app), shlex.split(line)[1:]
    while hasattr(command, "commands"):
        command = command.commands[words.pop(0)]
    # fails for an unknown flag or a value of another type
    command.make_context(line, words)


def test_a_mistake_is_one_line_and_status_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["cache", "info", str(tmp_path / "nowhere")])
    output = capsys.readouterr()
    assert stop.value.code == 1
    assert output.out == ""
    assert output.err.startswith("error: ")
    assert output.err.count("\n") == 1
    assert "repa preprocess" in output.err


def test_several_problems_are_a_line_each_and_a_line_for_each_remedy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever stands in them: a name with a line break adds no line of its own."""
    synthetic_cache(tmp_path / "cache", num_rows=16)
    words = ["train", "--cache", str(tmp_path / "cache"), "--run", str(tmp_path / "run"), "--batch-size", "8"]
    asked = ["--set", "method.depth=99", "--set", "method.encoders=[\x1b[31mred\nerror: b]"]
    with pytest.raises(SystemExit) as stop:
        main([*words, "--model", "SiT-T/2", *asked])
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 1
    assert lines[0].startswith("error: ")
    assert [line.lstrip()[0] for line in lines[1:]] == ["1", "→", "2", "→"]
    assert all(line.isprintable() for line in lines)
    assert not (tmp_path / "run").exists()


def words_of_paths(place: str) -> dict[str, list[str]]:
    """Commands that name a path, each before it would load a model."""
    return {
        "preprocess --data": ["preprocess", "--data", place],
        "preprocess --cache": ["preprocess", "--data", "demo", "--cache", place],
        "preprocess --class-names": ["preprocess", "--data", "{0..1}.tar", "--class-names", place],
        "plan --cache": ["plan", "--data", "demo", "--cache", place],
        "train --config": ["train", "--config", place],
        "sample --run": ["sample", "--run", place],
        "sample --ckpt": ["sample", "--ckpt", place],
        "cache info": ["cache", "info", place],
        "cache verify": ["cache", "verify", place],
        "cache repair": ["cache", "repair", place],
        "cache merge": ["cache", "merge", place, place, "--cache", "whole"],
        "cache export": ["cache", "export", "--out", "tars", place],
        "cache import": ["cache", "import", place, "--cache", "cache"],
    }


@pytest.mark.parametrize("command", words_of_paths(""))
@pytest.mark.parametrize("place", ["file", "file/below", "folder", "n" * 300])
def test_a_path_that_cannot_be_is_one_line(
    command: str,
    place: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("text")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "other.txt").write_text("text")
    words = words_of_paths(place)[command]
    with pytest.raises(SystemExit) as stop:
        main(words)
    error = capsys.readouterr().err
    assert stop.value.code == 1
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert sorted(each.name for each in tmp_path.iterdir()) == ["file", "folder"]
    assert [each.name for each in (tmp_path / "folder").iterdir()] == ["other.txt"]


def test_errors_of_the_system_without_a_path_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(flags: object) -> None:
        raise OSError("a library is not there")

    monkeypatch.setattr("repa.cli.train", fail)
    with pytest.raises(OSError, match="a library is not there"):
        main(["train"])


@pytest.mark.parametrize(
    "error", [OSError(errno.EMFILE, "Too many open files"), OSError(errno.EAGAIN, "no"), MemoryError()]
)
def test_what_the_system_has_no_more_of_is_one_line(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def exhaust(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("repa.cli.preprocess", exhaust)
    with pytest.raises(SystemExit) as caught:
        main(["preprocess"])
    assert caught.value.code == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_an_unknown_flag_is_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["train", "--learning-rate", "1"])
    assert stop.value.code == 2
    assert "--learning-rate" in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert not stop.value.code
    assert capsys.readouterr().out == f"repa {__version__}\n"


def test_output_may_be_cut_off() -> None:
    """`repa … | head -1` ends without a traceback."""
    code = "from repa.cli import main; main(['preprocess', '--help'])"
    line = f"{shlex.quote(sys.executable)} -c {shlex.quote(code)} | head -1"
    done = subprocess.run(line, shell=True, capture_output=True, text=True, check=True, cwd="/")
    assert "Traceback" not in done.stderr
