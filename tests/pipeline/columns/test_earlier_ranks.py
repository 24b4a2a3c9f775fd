"""Caches of versions whose `--attention-kl` chose a rank: the same command goes on with them as they are."""

from __future__ import annotations

import io
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from attention_forms import ATTENTION, demo, notes
from repa.commands.cache.fidelity import verify_fidelity
from repa.commands.cache.repair import repair
from repa.data.errors import CacheError
from repa.data.format.layout import calibration_file, commit_file, shard_file
from repa.data.format.manifest import LATENTS_NOTE
from repa.data.format.opening import open_manifest
from repa.data.reading.reader import CacheReader
from repa.data.testing import folder_contents
from repa.data.upkeep.verify import verify_cache
from repa.pipeline import plan as plan_module
from repa.pipeline.replay.recorded import Given
from repa.pipeline.replay.reencode import reencode
from rich.console import Console

if TYPE_CHECKING:
    from collections.abc import Callable

WRITTEN = Path(__file__).parents[2] / "written_by_f2def21" / "cache"
GIVEN = Given(data=None, vae=None, weights={})
FLAGS: dict[str, Any] = {
    "encoders": ["demo"],
    "attention": "5",
    "attention_kl": 0.002,
    "limit": 6,
    "shard_rows": 2,
    "batch_size": 2,
}


@pytest.fixture
def old(tmp_path: Path) -> Path:
    return Path(shutil.copytree(WRITTEN, tmp_path / "cache"))


def rows(cache: Path) -> dict[str, np.ndarray]:
    columns = tuple(open_manifest(cache).source_columns(ATTENTION))
    with CacheReader(cache, columns) as reader:
        specs = reader.manifest.columns
        out = {name: np.empty((6, *specs[name].shape), specs[name].numpy_dtype) for name in columns}
        reader.read_rows(np.arange(6), columns, out)
    return out


def assert_the_rows_of_old(cache: Path) -> None:
    """Up to a step of int8 here and there, where another machine computes."""
    assert verify_cache(cache) == []
    for name, before in open_manifest(WRITTEN).sources.items():
        now = open_manifest(cache).sources[name]
        notes_now = {key: note for key, note in now.notes.items() if key != LATENTS_NOTE}
        assert replace(now, notes=notes_now) == before
    for name, values in rows(WRITTEN).items():
        off = np.abs(rows(cache)[name].astype(np.float64) - values)
        if name.endswith("-scale"):
            assert off.max() <= 1e-4 * values.max()
            continue
        assert off.max() <= 1
        assert (off > 0).mean() < 0.01


def test_it_is_complete_for_the_same_command(old: Path) -> None:
    before = folder_contents(old)
    assert "nothing to do" in demo(old, **FLAGS)
    # that version named repa among the libraries, as later ones do: its latents count as not measured yet
    group = ("zarr.json", "zarr.json.copy")
    after = {name: each for name, each in folder_contents(old).items() if not name.endswith(".lock")}
    assert {name for name in after if after[name] != before.get(name)} == set(group)
    assert set(after) == set(before)
    assert_the_rows_of_old(old)
    assert (notes(old)["form"], notes(old)["rank"], notes(old)["tolerance"]) == ("truncated", 8, 0.002)


def test_it_is_gone_on_with(old: Path) -> None:
    calibration = calibration_file(old, ATTENTION).read_bytes()
    commit_file(old, ATTENTION, 1).unlink()
    assert "demo/q: 2 images" in demo(old, **FLAGS)
    assert calibration_file(old, ATTENTION).read_bytes() == calibration
    assert_the_rows_of_old(old)


def test_it_is_encoded_again_and_repaired(old: Path) -> None:
    for each in reencode(old, GIVEN, rows=6):
        assert each.outside == [], each.column
    verify_fidelity(cache=old, console=Console(file=io.StringIO(), width=200))
    file = shard_file(old, "demo/q", open_manifest(old).columns["demo/q"], 2)
    content = bytearray(file.read_bytes())
    content[30] ^= 4
    file.write_bytes(content)
    assert verify_cache(old)
    repair(cache=old, console=Console(file=io.StringIO(), width=200))
    assert_the_rows_of_old(old)


@pytest.mark.parametrize(
    "changes",
    [
        {"attention_kl": 0.001},
        {"attention_kl": None, "attention_rank": 8},
        {"attention_kl": None, "attention_bytes": 4000},
    ],
)
def test_another_form_is_refused(changes: dict[str, Any], old: Path) -> None:
    before = folder_contents(old)
    with pytest.raises(CacheError):
        demo(old, **{**FLAGS, **changes})
    assert folder_contents(old) == before


def test_the_whole_width_that_was_chosen_stays(
    command: Callable[..., str], pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last resort of those versions, int8 without a cut, and the calibration they asked for."""
    asked = {"attention": "haste", "attention_kl": 1e-4}
    with monkeypatch.context() as patch:
        patch.setattr(plan_module, "_attention_rank", lambda config, recorded: 64)
        command(**asked)
    cache = tmp_path / "cache"
    recorded = notes(cache)
    assert (recorded["form"], recorded["rank"], recorded["tolerance"]) == ("exact", 64, 1e-4)
    whole = folder_contents(cache)
    assert "nothing to do" in command(**asked)
    commit_file(cache, ATTENTION, 0).unlink()
    command(**asked)
    assert folder_contents(cache) == whole
    given = Given(data=str(pictures), vae=None, weights={})
    assert all(each.identical == each.rows for each in reencode(cache, given, rows=3))
    shard_file(cache, "demo/k", open_manifest(cache).columns["demo/k"], 1).unlink()
    repair(cache=cache, data=str(pictures), console=Console(file=io.StringIO(), width=200))
    assert folder_contents(cache) == whole
