"""Attention targets and int8 tokens in a cache: what is stored, what is recorded of it, who writes what."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from repa.commands.cache_fidelity import verify_fidelity
from repa.commands.preprocess import PreprocessFlags, preprocess
from repa.data.codec import dequantise, quantise
from repa.data.errors import CacheError, RepaError
from repa.data.reader import CacheReader
from repa.data.schema import Manifest
from repa.data.store import SourceWriter, committed_shards, open_manifest
from repa.data.testing import folder_contents
from repa.data.verify import verify_cache
from repa.pipeline.demo.shapes import DemoImages
from repa.pipeline.encoders import load_encoder
from repa.pipeline.encoders.timm_vit import TimmEncoder
from repa.pipeline.preprocess import decode_row
from rich.console import Console

if TYPE_CHECKING:
    from collections.abc import Callable

IMAGES, BATCH, SHARD = 21, 4, 8
BLOCKS = (4, 5, 6)
HELD_OUT = list(range(IMAGES))[2::3]
ATTENTION = "demo+attention"


def demo(cache: Path, **changes: Any) -> str:
    """Run the command on a few of the demo's images; returns what it printed."""
    output = io.StringIO()
    arguments: dict[str, Any] = {
        "data": "demo",
        "cache": cache,
        "limit": IMAGES,
        "batch_size": BATCH,
        "shard_rows": SHARD,
        "attention": "haste",
    }
    preprocess(PreprocessFlags(**{**arguments, **changes}), console=Console(file=output, width=200))
    return output.getvalue()


def read(cache: Path, *kinds: str) -> dict[str, torch.Tensor]:
    """Columns of all rows as stored, by kind."""
    columns = tuple(f"demo/{kind}" for kind in kinds)
    with CacheReader(cache, columns) as reader:
        specs = reader.manifest.columns
        out = {name: np.empty((IMAGES, *specs[name].shape), specs[name].numpy_dtype) for name in columns}
        reader.read_rows(np.arange(IMAGES), columns, out)
    return {kind: torch.from_numpy(out[f"demo/{kind}"]) for kind in kinds}


def notes(cache: Path, source: str = ATTENTION) -> dict[str, Any]:
    return dict(open_manifest(cache).sources[source].notes)


@pytest.fixture(scope="module")
def live() -> dict[str, torch.Tensor]:
    """The teacher's features in float32, on the batches of the cache, on one thread."""
    encoder = load_encoder("demo", resolution=64)
    images = DemoImages(count=IMAGES)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    parts: list[dict[str, torch.Tensor]] = []
    try:
        for start in range(0, IMAGES, SHARD):
            stop = min(start + SHARD, IMAGES)
            for first in range(start, stop, BATCH):
                rows = range(first, min(first + BATCH, stop))
                pixels = [decode_row(images, row, 64) for row in rows]
                batch = torch.from_numpy(np.stack([each for each in pixels if not isinstance(each, str)]))
                parts.append(encoder.encode(batch, BLOCKS))
    finally:
        torch.set_num_threads(threads)
    return {kind: torch.cat([part[kind] for part in parts]) for kind in ("patch", "cls", "q", "k")}


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One cache of each form."""
    folder = tmp_path_factory.mktemp("forms")
    forms: dict[str, dict[str, Any]] = {
        "float16": {},
        "float32": {"feature_dtype": "float32"},
        "int8": {"feature_dtype": "int8"},
        "rank": {"attention_rank": 12},
    }
    for name, flags in forms.items():
        demo(folder / name, **flags)
    return {name: folder / name for name in forms}


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_as_computed(dtype: str, caches: dict[str, Path], live: dict[str, torch.Tensor]) -> None:
    stored = read(caches[dtype], "patch", "cls", "q", "k")
    for kind, values in stored.items():
        assert torch.equal(values, live[kind].to(getattr(torch, dtype))), kind
    assert stored["q"].shape == (IMAGES, 3, 2, 64, 64)
    recorded = notes(caches[dtype])
    assert recorded["blocks"] == [4, 5, 6]
    assert (recorded["form"], recorded["keys"]) == ("exact", "as computed")
    assert (recorded["rank"], recorded["head_width"], recorded["logit_scale"]) == (64, 64, 0.125)
    assert recorded["calibration"]["images"] == 0
    assert recorded["fidelity"]["bytes_per_image"] == 2 * 3 * 2 * 64 * 64 * (2 if dtype == "float16" else 4)
    assert (recorded["fidelity"]["kl_worst_head"] == 0) == (dtype == "float32")
    assert "fidelity" not in notes(caches[dtype], "demo")


def test_int8_is_the_codec_on_tokens_queries_and_centred_keys(
    caches: dict[str, Path], live: dict[str, torch.Tensor]
) -> None:
    stored = read(caches["int8"], "patch", "patch-scale", "cls", "q", "q-scale", "k", "k-scale")
    wanted = {**live, "k": live["k"] - live["k"].mean(-2, keepdim=True)}
    for kind in ("patch", "q", "k"):
        values, scale = quantise(wanted[kind])
        assert torch.equal(stored[kind], values), kind
        assert torch.equal(stored[f"{kind}-scale"], scale), kind
    assert torch.equal(stored["cls"], live["cls"].half())
    assert (notes(caches["int8"])["form"], notes(caches["int8"])["keys"]) == ("exact", "centred")


def divergences(live: dict[str, torch.Tensor], cache: Path) -> np.ndarray:
    """KL per query row of the stored columns ``[N, L, H, T]``, with numpy and from the definition."""
    columns = open_manifest(cache).columns
    kinds = [kind for kind in ("q", "q-scale", "k", "k-scale") if f"demo/{kind}" in columns]
    stored = read(cache, *kinds)
    pair = {
        kind: dequantise(stored[kind], stored[f"{kind}-scale"]) if "q-scale" in stored else stored[kind]
        for kind in ("q", "k")
    }
    maps = []
    for queries, keys in ((live["q"], live["k"]), (pair["q"], pair["k"])):
        logits = np.einsum("nlhsd,nlhtd->nlhst", queries.double().numpy(), keys.double().numpy()) / 8
        exponentials = np.exp(logits - logits.max(-1, keepdims=True))
        maps.append(exponentials / exponentials.sum(-1, keepdims=True))
    return np.asarray((maps[0] * np.log(maps[0] / maps[1])).sum(-1))


@pytest.mark.parametrize("form", ["float16", "int8", "rank"])
def test_what_is_recorded_is_what_the_stored_columns_give(
    form: str, caches: dict[str, Path], live: dict[str, torch.Tensor]
) -> None:
    recorded = notes(caches[form])["fidelity"]
    assert recorded["images"] == len(HELD_OUT)
    measured = divergences(live, caches[form])[HELD_OUT]
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
    assert recorded["rank"] == (12 if form == "rank" else 64)


def test_what_is_recorded_of_int8_tokens(caches: dict[str, Path], live: dict[str, torch.Tensor]) -> None:
    recorded = notes(caches["int8"], "demo")["fidelity"]
    stored = read(caches["int8"], "patch", "patch-scale")
    kept = dequantise(stored["patch"], stored["patch-scale"])[HELD_OUT].double().numpy()
    exact = live["patch"][HELD_OUT].double().numpy()
    cosine = (exact * kept).sum(-1) / np.sqrt((exact**2).sum(-1) * (kept**2).sum(-1))
    assert recorded["cosine_error_mean"] == pytest.approx((1 - cosine).mean(), rel=1e-4)
    assert recorded["cosine_error_max"] == pytest.approx((1 - cosine).max(), rel=1e-4)
    assert recorded["repa_loss_change_bound"] == pytest.approx(np.sqrt(2 - 2 * cosine).mean(), rel=1e-4)
    assert 0 < recorded["repa_loss_change"] < recorded["repa_loss_change_bound"] < 0.01
    assert recorded["bytes_per_image"] == 64 * 128 + 4 * 128 + 2 * 128
    assert recorded["images"] == len(HELD_OUT)
    assert notes(caches["int8"], "demo")["patch"] == "final norm"


def test_the_smallest_rank_that_meets_the_tolerance_is_taken(tmp_path: Path) -> None:
    worst = {}
    for rank in (8, 16, 24):
        demo(tmp_path / str(rank), attention_rank=rank)
        worst[rank] = notes(tmp_path / str(rank))["fidelity"]["kl_worst_head"]
    assert worst[8] > worst[16] > worst[24]
    tolerance = (worst[8] * worst[16]) ** 0.5
    printed = demo(tmp_path / "kl", attention_kl=tolerance)
    assert "≤" in printed
    recorded = notes(tmp_path / "kl")
    assert (recorded["rank"], recorded["tolerance"], recorded["form"]) == (16, tolerance, "truncated")
    # the very same columns as of that rank
    for kind in ("q", "q-scale", "k", "k-scale"):
        assert torch.equal(read(tmp_path / "kl", kind)[kind], read(tmp_path / "16", kind)[kind])
    assert recorded["fidelity"] == notes(tmp_path / "16")["fidelity"]
    demo(tmp_path / "loose", attention_kl=1.0)
    assert notes(tmp_path / "loose")["rank"] == 8
    printed = demo(tmp_path / "loose", attention_kl=1.0)
    assert "complete: nothing to do" in printed
    assert "q int8[3, 2, 64, 8]" in printed


def test_the_last_resort_is_the_whole_width_in_int8(
    caches: dict[str, Path], command: Callable[..., str], tmp_path: Path
) -> None:
    """Eight images of four tokens do not span 64 directions: what is cut misses some of other images'."""
    command(attention="haste", attention_rank=56)
    assert notes(tmp_path / "cache")["fidelity"]["kl_worst_head"] > 1e-4
    command(attention="haste", attention_kl=1e-4, cache=tmp_path / "whole")
    recorded = notes(tmp_path / "whole")
    assert (recorded["rank"], recorded["form"], recorded["keys"]) == (64, "exact", "centred")
    assert recorded["calibration"]["images"] == 0
    # a rank that cuts nothing off is the same form
    demo(tmp_path / "64", attention_rank=64)
    assert notes(tmp_path / "64")["form"] == "exact"
    assert torch.equal(read(tmp_path / "64", "k")["k"], read(caches["int8"], "k")["k"])


def test_every_cache_is_sound(caches: dict[str, Path]) -> None:
    for cache in caches.values():
        assert verify_cache(cache) == []


def test_attention_added_later_rewrites_nothing(caches: dict[str, Path], tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    demo(cache, attention=None)
    before = {
        file: (file.read_bytes(), file.stat().st_mtime_ns)
        for file in cache.rglob("*")
        if file.is_file() and file.stat().st_size and file != cache / "zarr.json"
    }
    printed = demo(cache)
    assert "demo+attention" in printed
    assert "demo/patch:" not in printed
    assert {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in before} == before
    assert folder_contents(cache) == folder_contents(caches["float16"])


class Passes:
    """Forward passes of the teacher while the shards are written: (images, blocks asked for)."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.made: list[tuple[int, tuple[int, ...]]] = []
        real = TimmEncoder.encode

        def encode(encoder: TimmEncoder, images: torch.Tensor, attention: tuple[int, ...] = ()) -> Any:
            self.made.append((len(images), attention))
            return real(encoder, images, attention)

        patch.setattr(TimmEncoder, "encode", encode)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Passes:
    return Passes(monkeypatch)


def test_one_pass_a_batch_whichever_source_is_missing(
    caches: dict[str, Path], tmp_path: Path, passes: Passes
) -> None:
    """Shard 0 misses both, shard 1 the attention, shard 2 the tokens."""
    cache = Path(shutil.copytree(caches["rank"], tmp_path / "cache"))
    commits = cache / "commits"
    for source, shard in (("demo", 0), (ATTENTION, 0), (ATTENTION, 1), ("demo", 2)):
        (commits / source / f"{shard}.json").unlink()
    printed = demo(cache, attention_rank=12)
    assert sorted(passes.made) == sorted(
        [(4, BLOCKS), (4, BLOCKS), (4, BLOCKS), (4, BLOCKS), (4, ()), (1, ())]
    )
    assert "wrote 21 images" in printed
    assert "demo/patch: 13 images" in printed
    assert "demo/q: 16 images" in printed
    assert printed.count("· demo ") == 1  # its time is booked once
    assert folder_contents(cache) == folder_contents(caches["rank"])


def test_ranks_of_a_launcher_write_what_one_process_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, passes: Passes
) -> None:
    flags = {"attention_kl": 0.001, "feature_dtype": "int8"}
    demo(tmp_path / "alone", **flags)
    alone = len(passes.made)
    passes.made.clear()
    for rank in (1, 0):
        for name, value in {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": 2}.items():
            monkeypatch.setenv(name, str(value))
        demo(tmp_path / "ranks", **flags)
    assert folder_contents(tmp_path / "ranks") == folder_contents(tmp_path / "alone")
    # the second to come calibrated nothing
    assert len(passes.made) == alone


def test_a_calibration_that_nothing_was_written_with_is_replaced(tmp_path: Path) -> None:
    cache, fresh = tmp_path / "cache", tmp_path / "fresh"
    demo(cache, attention_kl=0.5)
    for record in (cache / "commits" / ATTENTION).glob("*.json"):
        record.unlink()
    demo(cache, attention_rank=16)
    demo(fresh, attention_rank=16)
    assert verify_cache(cache) == []
    assert (cache / "calibration" / f"{ATTENTION}.safetensors").read_bytes() == (
        fresh / "calibration" / f"{ATTENTION}.safetensors"
    ).read_bytes()
    for kind in ("q", "k-scale"):
        assert torch.equal(read(cache, kind)[kind], read(fresh, kind)[kind])


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"attention": "5"}, "--attention 4,5,6, not 5"),
        ({"attention_rank": 8}, "by --attention-rank 12, not by --attention-rank 8"),
        ({"attention_rank": None, "attention_kl": 0.1}, "not by --attention-kl 0.1"),
        ({"attention_rank": None}, "by --attention-rank 12, not whole in float16"),
        ({"batch_size": 2}, "--batch-size 4, not 2"),
        ({"compress": "zstd"}, "--compress None, not zstd"),
    ],
)
def test_another_form_of_what_is_there_is_refused(
    flags: dict[str, Any], expected: str, caches: dict[str, Path]
) -> None:
    before = folder_contents(caches["rank"])
    with pytest.raises(CacheError, match=expected) as caught:
        demo(caches["rank"], **{"attention_rank": 12, **flags})
    assert "\n" not in str(caught.value)
    assert folder_contents(caches["rank"]) == before


def other_weights(file: Path) -> list[str]:
    from repa.pipeline.demo import TEACHER_WEIGHTS
    from safetensors.torch import load_file, save_file

    state = load_file(TEACHER_WEIGHTS)
    state["norm.bias"] = state["norm.bias"] + 1
    save_file(state, file)
    return [f"demo={file}"]


def test_other_weights_of_a_complete_source_are_refused(caches: dict[str, Path], tmp_path: Path) -> None:
    weights = other_weights(tmp_path / "other.safetensors")
    for form, flags in (("rank", {"attention_rank": 12}), ("int8", {"feature_dtype": "int8"})):
        with pytest.raises(CacheError, match=r"weights") as caught:
            demo(caches[form], weights=weights, **flags)
        assert "\n" not in str(caught.value)
    (tmp_path / "same").mkdir()
    from repa.pipeline.demo import TEACHER_WEIGHTS

    assert "nothing to do" in demo(caches["rank"], weights=[f"demo={TEACHER_WEIGHTS}"], attention_rank=12)


@pytest.mark.parametrize("compressor", ["zstd", "blosc"])
def test_compressed_columns_hold_the_same_numbers(
    compressor: str, caches: dict[str, Path], tmp_path: Path
) -> None:
    printed = demo(tmp_path / "cache", attention_rank=12, compress=compressor)
    assert "before compression" in printed
    specs = open_manifest(tmp_path / "cache").columns
    assert {name: spec.compressor for name, spec in specs.items()} == {
        name: None if name == "sd-vae/moments" else compressor for name in specs
    }
    for kind in ("patch", "cls", "q", "q-scale", "k", "k-scale"):
        assert torch.equal(read(tmp_path / "cache", kind)[kind], read(caches["rank"], kind)[kind])
    assert verify_cache(tmp_path / "cache") == []


def fidelity(cache: Path, **changes: Any) -> str:
    output = io.StringIO()
    verify_fidelity(cache=cache, console=Console(file=output, width=160), **changes)
    return output.getvalue()


@pytest.mark.parametrize("form", ["float16", "float32", "int8", "rank"])
def test_fidelity_measured_again(form: str, caches: dict[str, Path]) -> None:
    printed = fidelity(caches[form], rows=10, seed=1)
    assert "as close to the teacher as recorded" in printed
    lines = {" ".join(line.split()[:4]): line.split() for line in printed.splitlines()}
    recorded = notes(caches[form])["fidelity"]["kl"][0]["mean"]
    line = lines["block 4, head 1"]
    assert float(line[4]) == pytest.approx(recorded, rel=0.01)
    assert printed.count("block") == 6
    tokens = next(line.split() for line in printed.splitlines() if line.startswith("tokens"))
    if form == "float32":
        # the very bits: a batch is computed as it was
        assert [float(each) for each in tokens[1:3]] == [0.0, 0.0]
        assert float(line[5]) == 0.0


def test_fidelity_of_all_rows_is_recomputed(caches: dict[str, Path], live: dict[str, torch.Tensor]) -> None:
    printed = fidelity(caches["rank"], rows=1000)
    means = divergences(live, caches["rank"]).mean(axis=(0, 3))
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


@pytest.mark.parametrize(("form", "source"), [("rank", ATTENTION), ("float16", "demo"), ("int8", "demo")])
def test_a_cache_of_other_content_is_found(
    form: str, source: str, caches: dict[str, Path], tmp_path: Path
) -> None:
    cache = Path(shutil.copytree(caches[form], tmp_path / "cache"))
    swap_rows(cache, open_manifest(cache), source)
    assert verify_cache(cache) == []
    output = io.StringIO()
    with pytest.raises(SystemExit) as caught:
        verify_fidelity(cache=cache, console=Console(file=output, width=160))
    assert caught.value.code == 1
    assert "over" in output.getvalue()
    assert "farther from the teacher" in output.getvalue()


def test_fidelity_needs_the_recorded_teacher_and_images(caches: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(RepaError, match="weights") as caught:
        fidelity(caches["rank"], weights=other_weights(tmp_path / "other.safetensors"))
    assert "\n" not in str(caught.value)
    with pytest.raises(RepaError, match="--data"):
        fidelity(caches["rank"], data=str(tmp_path))
    with pytest.raises(RepaError, match="--rows 0"):
        fidelity(caches["rank"], rows=0)
    demo(tmp_path / "bare", encoders=["none"], attention=None)
    with pytest.raises(CacheError, match="no teacher"):
        fidelity(tmp_path / "bare")
    (caches["rank"] / "commits" / ATTENTION / "1.json").rename(tmp_path / "1.json")
    try:
        assert committed_shards(caches["rank"], open_manifest(caches["rank"]), ATTENTION) == [0, 2]
        with pytest.raises(CacheError, match="not wholly written"):
            fidelity(caches["rank"])
    finally:
        (tmp_path / "1.json").rename(caches["rank"] / "commits" / ATTENTION / "1.json")
