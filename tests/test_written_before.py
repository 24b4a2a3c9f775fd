"""A cache and a run that version c3bcdb5 wrote: opened, checked, read, exported, gone on with, sampled."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from repa.commands.sample import SampleFlags, sample
from repa.data.format.opening import open_manifest, read_keys
from repa.data.reading.reader import CacheReader
from repa.data.tars.export import export_cache, export_pattern, import_cache
from repa.data.upkeep.upgrade import upgrade_cache
from repa.data.upkeep.verify import verify_cache
from repa.trainer.config import build
from repa.trainer.models.sit import SIT_SIZES, SiTSize
from repa.trainer.run.fit import fit
from repa.trainer.settings_file import load_yaml
from repa.trainer.step.checkpoints import checkpoints_of, load_checkpoint
from rich.console import Console

if TYPE_CHECKING:
    from collections.abc import Mapping

WRITTEN = Path(__file__).parent / "written_by_c3bcdb5"
FACTS: Mapping[str, Any] = json.loads((WRITTEN / "facts.json").read_text())


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A copy that may be written to."""
    return Path(shutil.copytree(WRITTEN, tmp_path / "old"))


def contents(folder: Path) -> dict[str, bytes]:
    """Relative path → bytes of every file but locks."""
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file() and not file.name.endswith(".lock")
    }


def assert_read_as_written(cache: Path) -> None:
    """The numbers, labels and keys are those that c3bcdb5 itself read."""
    manifest = open_manifest(cache)
    assert read_keys(cache, manifest) == FACTS["keys"]
    with CacheReader(cache, list(manifest.columns)) as reader:
        assert reader.labels.tolist() == FACTS["labels"]
        rows = reader.valid_rows
        out = {
            name: np.empty((len(rows), *spec.shape), dtype=spec.numpy_dtype)
            for name, spec in manifest.columns.items()
        }
        reader.read_rows(rows, list(out), out)
    found = {name: hashlib.sha256(array.tobytes()).hexdigest() for name, array in out.items()}
    assert found == FACTS["columns_sha256"]


def test_the_cache_is_whole_and_reads_the_same_numbers() -> None:
    assert verify_cache(WRITTEN / "cache") == []
    assert_read_as_written(WRITTEN / "cache")


def test_the_cache_is_upgraded_in_place(old: Path) -> None:
    assert open_manifest(old / "cache").outdated
    before = contents(old / "cache")
    assert upgrade_cache(old / "cache")
    assert not open_manifest(old / "cache").outdated
    assert verify_cache(old / "cache") == []
    assert_read_as_written(old / "cache")
    after = contents(old / "cache")
    changed = {name for name in before if before[name] != after[name]}
    assert all(name == "zarr.json" or name.startswith("commits/") for name in changed)


def test_the_cache_goes_through_tars_unchanged(tmp_path: Path) -> None:
    export_cache(WRITTEN / "cache", tmp_path / "tars")
    import_cache(export_pattern(tmp_path / "tars", 3), tmp_path / "cache")
    assert contents(tmp_path / "cache") == contents(WRITTEN / "cache")


def test_the_run_goes_on_as_it_did_then(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to the last bits, which are the machine's."""
    monkeypatch.chdir(old)  # its configuration names the cache so
    monkeypatch.setitem(SIT_SIZES, "T", SiTSize(depth=1, width=16, heads=2))
    config = build(load_yaml(old / "run" / "config.yaml"), flags={"max_steps": 8})
    outcome = fit(config, old / "run", console=Console(file=io.StringIO()))
    assert (outcome.resumed_from, outcome.step) == (4, 8)

    tables = [np.genfromtxt(old / run / "metrics.csv", delimiter=",", names=True) for run in ("run", "whole")]
    assert tables[0].dtype == tables[1].dtype
    assert len(tables[0]) == 8
    for column in tables[1].dtype.names:
        np.testing.assert_allclose(tables[0][column], tables[1][column], rtol=2e-5, err_msg=column)

    here, there = (load_checkpoint(checkpoints_of(old / run)[8])["state_dict"] for run in ("run", "whole"))
    assert here.keys() == there.keys()
    for name, value in there.items():
        # a step of Adam moves a weight by up to 1e-4
        torch.testing.assert_close(here[name], value, rtol=1e-5, atol=2e-6, msg=name)


def test_the_run_samples(old: Path) -> None:
    flags = SampleFlags(run=old / "run", out=old / "samples", num=2, steps=2, npz=True)
    sample(flags, console=Console(file=io.StringIO()))
    with np.load(old / "samples" / "samples.npz") as arrays:
        assert arrays["arr_0"].shape == (2, 64, 64, 3)
        assert arrays["arr_0"].std() > 5
