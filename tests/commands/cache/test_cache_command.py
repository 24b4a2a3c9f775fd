"""`repa cache info` and `repa cache verify`."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from repa.commands.cache.info import info, verify
from repa.data.errors import CacheError
from repa.data.format.layout import shard_file
from repa.data.testing import SYNTHETIC_COLUMNS, synthetic_cache
from rich.console import Console


def printed(command: object, cache: Path | None) -> str:
    output = io.StringIO()
    assert callable(command)
    command(cache=cache, console=Console(file=output, width=160))
    return output.getvalue()


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    path = tmp_path / "caches" / "some"
    synthetic_cache(path, num_rows=20, invalid={3: "truncated", 9: "[bold]not an image"}, random_weights=True)
    return path


def test_info(cache: Path) -> None:
    text = printed(info, cache)
    lines = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line.strip()}
    assert lines["sd-vae/moments"] == ["float32", "[8,", "4,", "4]", "512", "B", "9.68", "kB", "3/3"]
    assert lines["demo/cls"][:3] == ["float16", "[16]", "32"]
    assert "20 images of 32×32 in 3 classes" in text
    assert "random!" in text
    assert "\n2 images could not be decoded, left out:\n" in text
    assert "images/000003.png (row 3): truncated" in text
    assert "images/000009.png (row 9): [bold]not an image" in text
    assert "not complete" not in text


def test_info_of_a_cache_that_is_not_complete(cache: Path) -> None:
    (cache / "commits" / "demo" / "1.json").unlink()
    text = printed(info, cache)
    assert "2/3" in text
    assert "not complete: the same `repa preprocess` goes on with it" in text


def test_the_default_is_the_only_cache(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "caches/some" in printed(info, None)
    assert "caches/some" in printed(verify, None)


def test_verify_of_an_intact_cache(cache: Path) -> None:
    text = printed(verify, cache)
    assert "all is as committed" in text
    assert "checked in" in text
    assert "/s)" in text


def test_verify_names_what_is_wrong_and_fails(cache: Path) -> None:
    file = shard_file(cache, "demo/patch", SYNTHETIC_COLUMNS["demo/patch"], 1)
    data = bytearray(file.read_bytes())
    data[0] ^= 1
    file.write_bytes(bytes(data))
    output = io.StringIO()
    with pytest.raises(SystemExit) as caught:
        verify(cache=cache, console=Console(file=output, width=160))
    assert caught.value.code == 1
    lines = output.getvalue().strip().splitlines()
    assert "row 8 of demo/patch" in lines[0]
    assert str(file) in lines[0]
    assert lines[-1].endswith("1 finding")


def test_one_of_everything_is_said_in_the_singular(tmp_path: Path) -> None:
    path = tmp_path / "one"
    synthetic_cache(path, num_rows=1, shard_rows=1, num_classes=1, invalid={0: "cut off"})
    text = printed(info, path)
    assert "\n1 image of 32×32 in 1 class · 1 shard of 1 · views original · " in text
    assert "\n1 image could not be decoded, left out:\n" in text


@pytest.mark.parametrize("command", [info, verify])
def test_no_cache(command: object, tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="no cache at"):
        printed(command, tmp_path / "nowhere")
