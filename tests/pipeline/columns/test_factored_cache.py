"""A cache of factored attention: what is recorded, how it compares with what it replaces, its upkeep."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from attention_forms import (
    ATTENTION,
    FACTOR_BYTES,
    HELD_OUT,
    IMAGES,
    demo,
    divergences,
    factored_products,
    notes,
    read,
)
from repa.cli import run_command
from repa.commands.cache.repair import repair
from repa.data.errors import CacheError, RepaError
from repa.data.format.columns import source_of
from repa.data.format.layout import calibration_file, commit_file, shard_file
from repa.data.format.opening import open_manifest
from repa.data.reading.reader import CacheReader
from repa.data.tars.export import export_cache, export_pattern, import_cache
from repa.data.testing import folder_contents
from repa.data.upkeep.verify import verify_cache
from repa.data.writing.writer import SourceWriter
from repa.pipeline.demo.shapes import DemoImages
from repa.pipeline.encoders import load_encoder
from repa.pipeline.images.workers import decode_row
from repa.pipeline.replay.recorded import Given
from repa.pipeline.replay.reencode import reencode
from rich.console import Console

if TYPE_CHECKING:
    pass

GIVEN = Given(data=None, vae=None, weights={})


@pytest.fixture
def cache(forms: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(forms["factored"], tmp_path / "cache"))


def timms_own(rows: list[int]) -> torch.Tensor:
    """Attention ``[N, L, H, T, T]`` in float64 of what timm's own modules multiply, in blocks 4 to 6."""
    model: Any = load_encoder("demo", resolution=64)._model
    seen: dict[int, torch.Tensor] = {}
    handles = [
        model.blocks[block - 1].attn.register_forward_hook(
            lambda module, args, out, block=block: seen.__setitem__(block, (module, args[0]))
        )
        for block in (4, 5, 6)
    ]
    images = DemoImages(count=IMAGES)
    pixels = torch.from_numpy(np.stack([np.asarray(decode_row(images, row, 64)) for row in rows]))
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        model((pixels / 255 - mean) / std)
        maps = []
        for block in (4, 5, 6):
            module, x = seen[block]
            heads = module.num_heads
            q, k, _ = module.qkv(x).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
            # without what is no patch; the softmax is over what is stored
            q, k = (each[:, :, -64:].double() for each in (module.q_norm(q), module.k_norm(k)))
            maps.append(torch.softmax(q @ k.mT * module.scale, dim=-1))
    for handle in handles:
        handle.remove()
    return torch.stack(maps, dim=1)


def test_the_recorded_loss_is_that_of_timms_own_attention(forms: dict[str, Path]) -> None:
    """By another path, from timm's modules and a slow reading of the bytes."""
    recorded = notes(forms["factored"])
    exact = timms_own(HELD_OUT)
    kept = torch.from_numpy(
        factored_products(forms["factored"], read(forms["factored"], "q", "q-scale", "k"))
    )
    log = torch.log_softmax(kept[HELD_OUT] * recorded["logit_scale"], dim=-1)
    divergence = (exact * (exact.log() - log)).sum(-1)
    means = divergence.mean((0, 3))
    for entry, mean in zip(recorded["fidelity"]["kl"], means.flatten().tolist(), strict=True):
        assert entry["mean"] == pytest.approx(mean, rel=0.01)
    assert recorded["fidelity"]["kl_worst_head"] == pytest.approx(float(means.max()), rel=0.01)


def test_what_is_recorded_of_factors(forms: dict[str, Path]) -> None:
    recorded = notes(forms["factored"])
    fidelity = recorded["fidelity"]
    assert (recorded["form"], recorded["keys"], recorded["blocks"]) == ("factored", "centred", [4, 5, 6])
    assert (recorded["tolerance"], recorded["bytes"]) == (None, FACTOR_BYTES)
    assert 0.9 * FACTOR_BYTES < fidelity["bytes_per_image"] <= FACTOR_BYTES
    assert recorded["calibration"]["images"] == IMAGES - len(HELD_OUT)
    heads = [head for block in recorded["components"] for head in block]
    assert len(heads) == 6
    assert recorded["rank"] == max(map(sum, heads))
    assert (
        64 * (2 * sum(head[0] for head in heads) + sum(head[1] for head in heads)) + 4 * sum(map(sum, heads))
        == fidelity["bytes_per_image"]
    )
    assert 0.99 < fidelity["gradient_cosine_near"] < fidelity["gradient_cosine_initial"] < 1
    assert 0 < fidelity["loss_change_near"] < 0.01
    assert "gradient_cosine_near" in notes(forms["rank"])["fidelity"]
    assert notes(forms["float32"])["fidelity"]["gradient_cosine_near"] == 1


@pytest.mark.parametrize(("rank", "mean", "largest"), [(4, 0.2, 0.15), (16, 0.85, 0.6), (64, 0.7, 0.7)])
def test_no_worse_than_one_basis_of_the_same_bytes(
    rank: int, mean: float, largest: float, teacher: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """On all images of the demo, whose one basis is good, up to whole int8."""
    demo(tmp_path / "rank", attention_rank=rank)
    size = notes(tmp_path / "rank")["fidelity"]["bytes_per_image"]
    demo(tmp_path / "factors", attention_bytes=size)
    assert notes(tmp_path / "factors")["fidelity"]["bytes_per_image"] <= size
    one, own = (divergences(teacher, tmp_path / name).mean((0, 3)) for name in ("rank", "factors"))
    assert own.mean() < mean * one.mean()
    assert own.max() < largest * one.max()


def test_verify_and_reencode_find_the_same_bytes(cache: Path) -> None:
    assert verify_cache(cache) == []
    found = reencode(cache, GIVEN, rows=7, seed=1)
    assert [each.column for each in found] == ["sd-vae/moments", "demo/patch", "demo/cls", "demo/q", "demo/k"]
    assert all((each.rows, each.identical, each.outside) == (7, 7, []) for each in found)
    # half of what is allowed at most: the loss is the very same
    assert all(0 < each.largest <= 0.5 for each in found if each.column in ("demo/q", "demo/k"))


@pytest.mark.parametrize("column", ["demo/q", "demo/k", "demo/q-scale"])
def test_reencode_finds_a_row_that_is_not_of_its_image(column: str, cache: Path) -> None:
    """With checksums that are right: what only encoding again can find."""
    manifest = open_manifest(cache)
    specs = manifest.source_columns(ATTENTION)
    rows = np.arange(8)
    values = {name: np.empty((8, *spec.shape), spec.numpy_dtype) for name, spec in specs.items()}
    with CacheReader(cache, tuple(specs)) as reader:
        reader.read_rows(rows, tuple(specs), values)
    values[column][3] = values[column][4]
    with SourceWriter(cache, manifest, source_of(column), [0]) as writer, writer.shard(0) as shard:
        for row in rows.tolist():
            for name in specs:
                shard.write(row, name, values[name][row][None])
        shard.commit()
    assert verify_cache(cache) == []
    found = {each.column: each for each in reencode(cache, GIVEN, rows=100)}
    for name in ("demo/q", "demo/k"):
        # each stands for both
        assert found[name].outside == [3]
    assert found["demo/patch"].kept


def test_damage_is_repaired_to_the_bytes_that_were(cache: Path, forms: dict[str, Path]) -> None:
    specs = open_manifest(cache).columns
    for column, shard, at in (("demo/q", 0, 40), ("demo/k", 2, -3), ("demo/q-scale", 1, 7)):
        file = shard_file(cache, column, specs[column], shard)
        content = bytearray(file.read_bytes())
        content[at] ^= 4
        file.write_bytes(content)
    commit_file(cache, ATTENTION, 0).unlink()
    calibration_file(cache, ATTENTION).write_bytes(b"no calibration")
    assert verify_cache(cache)
    repair(cache=cache, console=Console(file=io.StringIO(), width=200))
    assert folder_contents(cache) == folder_contents(forms["factored"])


def test_resumed_and_by_any_number_of_processes_it_is_the_same(
    cache: Path, forms: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit_file(cache, ATTENTION, 1).unlink()
    demo(cache, attention_bytes=FACTOR_BYTES)
    assert folder_contents(cache) == folder_contents(forms["factored"])
    for rank in (1, 0):
        for name, value in {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": 2}.items():
            monkeypatch.setenv(name, str(value))
        demo(tmp_path / "two", attention_bytes=FACTOR_BYTES)
    assert folder_contents(tmp_path / "two") == folder_contents(forms["factored"])


def test_through_tars_and_back_bit_for_bit(forms: dict[str, Path], tmp_path: Path) -> None:
    export_cache(forms["factored"], tmp_path / "tars")
    import_cache(export_pattern(tmp_path / "tars", 3), tmp_path / "cache")
    assert folder_contents(tmp_path / "cache") == folder_contents(forms["factored"])


def test_info_says_what_matters_to_training(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_command(("cache", "info", str(cache), "--json"))
    noted = json.loads(capsys.readouterr().out)
    print(noted)
    run_command(("cache", "info", str(cache)))
    printed = " ".join(capsys.readouterr().out.split())
    fidelity = notes(cache)["fidelity"]
    assert "components a head, each image by itself" in printed
    for student in ("initial", "near"):
        assert f"cosine {fidelity[f'gradient_cosine_{student}']:.6g}" in printed
    run_command(("cache", "drop", ATTENTION, str(cache)))
    assert verify_cache(cache) == []
    assert set(open_manifest(cache).sources) == {"sd-vae", "demo"}
    assert not (cache / "demo" / "q").exists()


def test_compressed_factors_hold_the_same_bytes(forms: dict[str, Path], tmp_path: Path) -> None:
    demo(tmp_path / "cache", attention_bytes=FACTOR_BYTES, compress="zstd")
    for kind in ("q", "q-scale", "k"):
        assert torch.equal(read(tmp_path / "cache", kind)[kind], read(forms["factored"], kind)[kind])
    assert verify_cache(tmp_path / "cache") == []


@pytest.mark.parametrize(
    ("flags", "field"),
    [
        ({"attention_kl": 1e-12}, "--attention-kl"),
        ({"attention_kl": 0.0}, "--attention-kl"),
        ({"attention_bytes": 100}, "--attention-bytes"),
        ({"attention_bytes": 0}, "--attention-bytes"),
        ({"attention_bytes": 5000, "attention_kl": 0.1}, "--attention-kl"),
        ({"attention_bytes": 5000, "attention_rank": 8}, "--attention-rank"),
        ({"attention_bytes": 5000, "compress": "pcodec"}, "compressor"),
        ({"attention_bytes": 5000, "attention": None}, "--attention-bytes"),
    ],
)
def test_what_cannot_be_had_is_refused(flags: dict[str, Any], field: str, tmp_path: Path) -> None:
    """Before anything is written but what was calibrated."""
    with pytest.raises(RepaError) as caught:
        demo(tmp_path / "cache", **flags)
    assert caught.value.field == field
    assert caught.value.remedy
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "cache").rglob("zarr.json"))


def test_another_size_of_what_is_there_is_refused(cache: Path) -> None:
    before = folder_contents(cache)
    for flags in ({"attention_bytes": 6000}, {"attention_kl": 1e-3}, {"attention_rank": 12}, {}):
        with pytest.raises(CacheError):
            demo(cache, **flags)
    assert folder_contents(cache) == before
