"""How far stored attention and tokens lie from the teacher: as recorded, and as measured again."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attention_forms import ATTENTION, BLOCKS, HELD_OUT, SHARD, demo, divergences, notes, other_weights, read
from repa.commands.cache.fidelity import verify_fidelity
from repa.data.errors import CacheError, RepaError
from repa.data.format.int8 import dequantise
from repa.data.format.manifest import Manifest
from repa.data.format.opening import open_manifest
from repa.data.format.survey import committed_shards
from repa.data.reading.reader import CacheReader
from repa.data.upkeep.verify import verify_cache
from repa.data.writing.writer import SourceWriter
from rich.console import Console


@pytest.mark.parametrize("form", ["float16", "int8", "rank", "factored"])
def test_what_is_recorded_is_what_the_stored_columns_give(
    form: str, forms: dict[str, Path], teacher: dict[str, torch.Tensor]
) -> None:
    recorded = notes(forms[form])["fidelity"]
    assert recorded["images"] == len(HELD_OUT)
    measured = divergences(teacher, forms[form])[HELD_OUT]
    means = measured.mean(axis=(0, 3))
    assert [(entry["block"], entry["head"]) for entry in recorded["kl"]] == [
        (block, head) for block in BLOCKS for head in (1, 2)
    ]
    for entry in recorded["kl"]:
        place = (BLOCKS.index(entry["block"]), entry["head"] - 1)
        assert entry["mean"] == pytest.approx(means[place], rel=1e-4, abs=1e-12)
        tail = np.quantile(measured[:, place[0], place[1]], 0.99)
        assert entry["p99"] == pytest.approx(tail, rel=1e-4, abs=1e-12)
    assert recorded["kl_mean"] == pytest.approx(means.mean(), rel=1e-4)
    assert recorded["kl_worst_head"] == pytest.approx(means.max(), rel=1e-4)
    assert recorded["rank"] == {"rank": 12, "factored": notes(forms[form])["rank"]}.get(form, 64)


def test_what_is_recorded_of_int8_tokens(forms: dict[str, Path], teacher: dict[str, torch.Tensor]) -> None:
    recorded = notes(forms["int8"], "demo")["fidelity"]
    stored = read(forms["int8"], "patch", "patch-scale")
    kept = dequantise(stored["patch"], stored["patch-scale"])[HELD_OUT].double().numpy()
    exact = teacher["patch"][HELD_OUT].double().numpy()
    cosine = (exact * kept).sum(-1) / np.sqrt((exact**2).sum(-1) * (kept**2).sum(-1))
    assert recorded["cosine_error_mean"] == pytest.approx((1 - cosine).mean(), rel=1e-4)
    assert recorded["cosine_error_max"] == pytest.approx((1 - cosine).max(), rel=1e-4)
    assert recorded["repa_loss_change_bound"] == pytest.approx(np.sqrt(2 - 2 * cosine).mean(), rel=1e-4)
    assert 0 < recorded["repa_loss_change"] < recorded["repa_loss_change_bound"] < 0.01
    assert recorded["bytes_per_image"] == 64 * 128 + 4 * 128 + 2 * 128
    assert recorded["images"] == len(HELD_OUT)
    assert notes(forms["int8"], "demo")["patch"] == "final norm"


def fidelity(cache: Path, **changes: Any) -> str:
    output = io.StringIO()
    verify_fidelity(cache=cache, console=Console(file=output, width=160), **changes)
    return output.getvalue()


@pytest.mark.parametrize("form", ["float16", "float32", "int8", "rank", "factored"])
def test_fidelity_measured_again(form: str, forms: dict[str, Path]) -> None:
    printed = fidelity(forms[form], rows=10, seed=1)
    assert "as close to the teacher as recorded" in printed
    lines = {" ".join(line.split()[:4]): line.split() for line in printed.splitlines()}
    recorded = notes(forms[form])["fidelity"]["kl"][0]["mean"]
    line = lines["block 4, head 1"]
    assert float(line[4]) == pytest.approx(recorded, rel=0.01)
    assert printed.count("block") == 6
    tokens = next(line.split() for line in printed.splitlines() if line.startswith("tokens"))
    if form == "float32":
        # the very bits: a batch is computed as it was
        assert [float(each) for each in tokens[1:3]] == [0.0, 0.0]
        assert float(line[5]) == 0.0


def test_fidelity_of_all_rows_is_recomputed(forms: dict[str, Path], teacher: dict[str, torch.Tensor]) -> None:
    printed = fidelity(forms["rank"], rows=1000)
    means = divergences(teacher, forms["rank"]).mean(axis=(0, 3))
    for block, head in ((4, 1), (6, 2)):
        line = next(each for each in printed.splitlines() if f"block {block}, head {head}" in each).split()
        assert float(line[5]) == pytest.approx(means[block - 4, head - 1], rel=0.01)


def swap_rows(cache: Path, manifest: Manifest, source: str) -> None:
    """Write the first shard anew with its rows in reverse: intact in every checksum, and wrong."""
    columns = tuple(manifest.source_columns(source))
    with CacheReader(cache, columns) as reader:
        specs = manifest.columns
        out = {name: np.empty((SHARD, *specs[name].shape), specs[name].numpy_dtype) for name in columns}
        reader.read_rows(np.arange(SHARD), columns, out)
    with SourceWriter(cache, manifest, source, [0]) as writer, writer.shard(0) as shard:
        for row in range(SHARD):
            for name in columns:
                shard.write(row, name, out[name][SHARD - 1 - row][None])
        shard.commit()


@pytest.mark.parametrize(
    ("form", "source"), [("rank", ATTENTION), ("factored", ATTENTION), ("float16", "demo"), ("int8", "demo")]
)
def test_a_cache_of_other_content_is_found(
    form: str, source: str, forms: dict[str, Path], tmp_path: Path
) -> None:
    cache = Path(shutil.copytree(forms[form], tmp_path / "cache"))
    swap_rows(cache, open_manifest(cache), source)
    assert verify_cache(cache) == []
    output = io.StringIO()
    with pytest.raises(SystemExit) as caught:
        verify_fidelity(cache=cache, console=Console(file=output, width=160))
    assert caught.value.code == 1
    assert "over" in output.getvalue()
    assert "farther from the teacher" in output.getvalue()


def test_fidelity_needs_the_recorded_teacher_and_images(forms: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(RepaError, match="weights") as caught:
        fidelity(forms["rank"], weights=other_weights(tmp_path / "other.safetensors"))
    assert "\n" not in str(caught.value)
    with pytest.raises(RepaError, match="--data"):
        fidelity(forms["rank"], data=str(tmp_path))
    with pytest.raises(RepaError, match="--rows 0"):
        fidelity(forms["rank"], rows=0)
    demo(tmp_path / "bare", encoders=["none"], attention=None)
    with pytest.raises(CacheError, match="no teacher"):
        fidelity(tmp_path / "bare")
    (forms["rank"] / "commits" / ATTENTION / "1.json").rename(tmp_path / "1.json")
    try:
        assert committed_shards(forms["rank"], open_manifest(forms["rank"]), ATTENTION) == [0, 2]
        with pytest.raises(CacheError, match="not wholly written"):
            fidelity(forms["rank"])
    finally:
        (tmp_path / "1.json").rename(forms["rank"] / "commits" / ATTENTION / "1.json")
