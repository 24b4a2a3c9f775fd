"""`repa preprocess --attention …` and `repa cache verify --fidelity` as they are typed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from repa.cli import main

if TYPE_CHECKING:
    from pathlib import Path


def run(*words: object) -> int:
    try:
        main([str(word) for word in words])
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_attention_is_written_shown_and_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = tmp_path / "cache"
    preprocess = ["preprocess", "--data", "demo", "--limit", 9, "--cache", cache, "--attention", "haste"]
    assert run(*preprocess, "--attention-kl", 0.01, "--compress", "zstd") == 0
    printed = capsys.readouterr().out
    assert "≤" in printed
    assert "demo/q: 9 images" in printed
    assert "demo/q-scale: 9 images" in printed
    assert run("cache", "info", cache) == 0
    assert "KL(teacher ‖ stored)" in capsys.readouterr().out
    assert run("cache", "verify", cache) == 0
    assert run("cache", "verify", cache, "--fidelity", "--rows", 5, "--seed", 3, "--data", "demo") == 0
    assert "as close to the teacher as recorded" in capsys.readouterr().out


@pytest.mark.parametrize("flags", [["--rows", "3"], ["--seed", "0"], ["--data", "x"], ["--weights", "a=b"]])
def test_flags_of_fidelity_need_it(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("cache", "verify", tmp_path, *flags) == 1
    errors = capsys.readouterr().err
    assert f"{flags[0]} says what --fidelity encodes" in errors
    assert len(errors.splitlines()) == 1
