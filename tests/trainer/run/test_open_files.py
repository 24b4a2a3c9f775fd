"""A limit of open files is refused or noted before step 0."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from repa.data.reading.reader import CacheReader
from repa.data.testing import SYNTHETIC_COLUMNS, synthetic_cache
from repa.trainer.run import open_files
from repa.trainer.run.checked import Checked
from repa.trainer.run.open_files import LEAST_OPEN_FILES, check_open_files


def checked(cache: Path, allowed: int, monkeypatch: pytest.MonkeyPatch) -> Checked:
    monkeypatch.setattr(open_files, "open_files_allowed", lambda: allowed)
    manifest = synthetic_cache(cache, num_rows=16, shard_rows=8)
    reader = CacheReader(cache, tuple(SYNTHETIC_COLUMNS), max_open_files=allowed // 2)
    return Checked(manifest=manifest, reader=reader)


def test_too_few_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = checked(tmp_path / "cache", LEAST_OPEN_FILES - 1, monkeypatch)
    check_open_files(found)
    assert [problem.field for problem in found.problems] == ["ulimit -n"]


def test_fewer_files_than_shards_are_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = checked(tmp_path / "cache", LEAST_OPEN_FILES, monkeypatch)
    check_open_files(found)
    assert (found.problems, found.warnings) == ([], [])
    assert found.manifest is not None
    # 43 shards of three columns are one file more than half of 256
    found.manifest = dataclasses.replace(found.manifest, num_rows=43 * 8)
    check_open_files(found)
    assert len(found.warnings) == 1
    assert "129 files" in found.warnings[0]
    assert "ulimit -n 258" in found.warnings[0]
