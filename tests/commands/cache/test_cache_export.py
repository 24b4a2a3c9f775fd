"""`repa cache export` and `repa cache import` as typed."""

from __future__ import annotations

from pathlib import Path

import pytest
from repa.cli import main, run_command
from repa.data.tars.cache import manifest_of
from repa.data.testing import folder_contents, synthetic_cache


def test_there_and_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache, out, back = tmp_path / "cache", tmp_path / "out", tmp_path / "back"
    synthetic_cache(cache, num_rows=11, invalid={4: "broken"})
    run_command(["cache", "export", str(cache), "--format", "webdataset", "--out", str(out)])
    printed = capsys.readouterr().out
    pattern = f"{out}/shard-{{000000..000001}}.tar"
    assert printed.startswith("10 images"), "no bar, where nobody looks at it"
    assert f"repa cache import '{pattern}' --cache CACHE" in printed
    run_command(["cache", "import", pattern, "--cache", str(back)])
    assert f"Wrote {back}" in capsys.readouterr().out
    assert folder_contents(back) == folder_contents(cache)
    run_command(["cache", "export", str(cache), "--out", str(out)])
    assert "0 images, 0 B of columns written" in (printed := capsys.readouterr().out)
    assert "already there: 2 of 2 shards" in printed
    some = ["--out", str(tmp_path / "some"), "--columns", "demo/cls, demo/patch"]
    run_command(["cache", "export", str(cache), *some])
    columns = manifest_of(f"{tmp_path}/some/shard-{{000000..000001}}.tar").columns
    assert list(columns) == ["demo/patch", "demo/cls"]


def test_a_folder_is_not_tars_and_the_error_says_what_to_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache, out, empty = tmp_path / "cache", tmp_path / "out", tmp_path / "empty"
    synthetic_cache(cache, num_rows=11)
    run_command(["cache", "export", str(cache), "--out", str(out)])
    empty.mkdir()
    capsys.readouterr()
    for folder, said in (
        (out, f"{out} is a folder; name the tars in it, '{out}/*.tar'"),
        (
            cache,
            f"{cache} is a cache, not tars of one; write its tars with `repa cache export {cache} --out OUT`",
        ),
        (
            empty,
            f"{empty} is a folder without tars; name tars, as 'OUT/*.tar' of `repa cache export --out OUT`",
        ),
    ):
        with pytest.raises(SystemExit):
            main(["cache", "import", str(folder), "--cache", str(tmp_path / "back")])
        assert capsys.readouterr().err == f"error: {said}\n"
        assert not (tmp_path / "back").exists()
    run_command(["cache", "import", f"{out}/*.tar", "--cache", str(tmp_path / "back")])
    assert folder_contents(tmp_path / "back") == folder_contents(cache)


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (
            ["export", "--format", "zip", "--out", "x"],
            "--format 'zip' is unknown; there is webdataset",
        ),
        (["export", "--columns", " ,", "--out", "x"], "error: --columns names no column; name some"),
        (["export", "nothing", "--out", "x"], "error: there is no cache at nothing"),
        (["import", "none-*.tar", "--cache", "x"], "error: no tar matches none-*.tar"),
    ],
)
def test_mistakes_are_one_line(words: list[str], what: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["cache", *words])
    printed = capsys.readouterr().err
    assert what in printed
    assert printed.count("\n") == 1
