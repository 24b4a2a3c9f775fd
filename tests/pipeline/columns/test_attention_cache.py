"""Attention targets and int8 tokens in a cache: what is stored, in which form, and who writes what."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from attention_forms import ATTENTION, BLOCKS, IMAGES, demo, notes, other_weights, read
from repa.data.errors import CacheError
from repa.data.format.int8 import quantise
from repa.data.format.opening import open_manifest
from repa.data.testing import folder_contents
from repa.data.upkeep.verify import verify_cache
from repa.pipeline.columns.specs import bytes_per_image
from repa.pipeline.encoders.timm_vit import TimmEncoder

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from repa.data.format.columns import ColumnSpec


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_as_computed(dtype: str, forms: dict[str, Path], teacher: dict[str, torch.Tensor]) -> None:
    stored = read(forms[dtype], "patch", "cls", "q", "k")
    for kind, values in stored.items():
        assert torch.equal(values, teacher[kind].to(getattr(torch, dtype))), kind
    assert stored["q"].shape == (IMAGES, 3, 2, 64, 64)
    recorded = notes(forms[dtype])
    assert recorded["blocks"] == [4, 5, 6]
    assert (recorded["form"], recorded["keys"]) == ("exact", "as computed")
    assert (recorded["rank"], recorded["head_width"], recorded["logit_scale"]) == (64, 64, 0.125)
    assert recorded["calibration"]["images"] == 0
    assert recorded["fidelity"]["bytes_per_image"] == 2 * 3 * 2 * 64 * 64 * (2 if dtype == "float16" else 4)
    assert (recorded["fidelity"]["kl_worst_head"] == 0) == (dtype == "float32")
    assert "fidelity" not in notes(forms[dtype], "demo")


def test_int8_is_the_codec_on_tokens_queries_and_centred_keys(
    forms: dict[str, Path], teacher: dict[str, torch.Tensor]
) -> None:
    stored = read(forms["int8"], "patch", "patch-scale", "cls", "q", "q-scale", "k", "k-scale")
    wanted = {**teacher, "k": teacher["k"] - teacher["k"].mean(-2, keepdim=True)}
    for kind in ("patch", "q", "k"):
        values, scale = quantise(wanted[kind])
        assert torch.equal(stored[kind], values), kind
        assert torch.equal(stored[f"{kind}-scale"], scale), kind
    assert torch.equal(stored["cls"], teacher["cls"].half())
    assert (notes(forms["int8"])["form"], notes(forms["int8"])["keys"]) == ("exact", "centred")


def worst(cache: Path) -> float:
    return float(notes(cache)["fidelity"]["kl_worst_head"])


def size(cache: Path) -> int:
    return int(notes(cache)["fidelity"]["bytes_per_image"])


def test_a_tolerance_is_met_with_about_the_fewest_bytes(tmp_path: Path) -> None:
    printed = demo(tmp_path / "kl", attention_kl=3e-4)
    assert "≤" in printed
    recorded = notes(tmp_path / "kl")
    fidelity = recorded["fidelity"]
    said = " ".join(printed.split())
    assert "demo+attention: --attention-kl 0.0003 took" in said
    assert f"{fidelity['kl_worst_head']:.3g} nats in the worst head" in said
    assert (recorded["form"], recorded["keys"], recorded["tolerance"]) == ("factored", "centred", 3e-4)
    assert worst(tmp_path / "kl") <= 3e-4
    assert fidelity["gradient_cosine_near"] >= 0.99
    # what is stored is what is said to be
    columns = open_manifest(tmp_path / "kl").source_columns(ATTENTION)
    assert set(columns) == {"demo/q", "demo/q-scale", "demo/k"}
    assert bytes_per_image(columns) == fidelity["bytes_per_image"]
    assert recorded["rank"] == max(sum(head) for block in recorded["components"] for head in block)
    # a third less does not do
    demo(tmp_path / "less", attention_bytes=size(tmp_path / "kl") * 2 // 3)
    assert size(tmp_path / "less") <= size(tmp_path / "kl") * 2 // 3
    assert worst(tmp_path / "less") > 3e-4
    demo(tmp_path / "loose", attention_kl=1.0)
    # a gradient that is turned too far asks for more than this tolerance does
    assert worst(tmp_path / "loose") < 0.1
    assert notes(tmp_path / "loose")["fidelity"]["gradient_cosine_near"] >= 0.99
    printed = demo(tmp_path / "loose", attention_kl=1.0)
    assert "complete: nothing to do" in printed
    assert f"q uint8[{columns_of(tmp_path / 'loose')['demo/q'].shape[0]}]" in printed


def columns_of(cache: Path) -> Mapping[str, ColumnSpec]:
    return open_manifest(cache).source_columns(ATTENTION)


def test_one_basis_misses_what_an_image_of_its_own_has(
    forms: dict[str, Path], command: Callable[..., str], tmp_path: Path
) -> None:
    """Eight images of four tokens do not span 64 directions: what is cut misses some of other images'."""
    command(attention="haste", attention_rank=56)
    assert worst(tmp_path / "cache") > 1e-4
    command(attention="haste", attention_kl=1e-4, cache=tmp_path / "factors")
    assert worst(tmp_path / "factors") <= 1e-4
    assert size(tmp_path / "factors") < size(tmp_path / "cache") / 4
    # a rank that cuts nothing off is the whole in int8
    demo(tmp_path / "64", attention_rank=64)
    assert (notes(tmp_path / "64")["form"], notes(tmp_path / "64")["keys"]) == ("exact", "centred")
    assert notes(tmp_path / "64")["calibration"]["images"] == 0
    assert torch.equal(read(tmp_path / "64", "k")["k"], read(forms["int8"], "k")["k"])


def test_every_cache_is_sound(forms: dict[str, Path]) -> None:
    for cache in forms.values():
        assert verify_cache(cache) == []


def test_attention_added_later_rewrites_nothing(forms: dict[str, Path], tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    demo(cache, attention=None)
    groups = {cache / "zarr.json", cache / "zarr.json.copy"}
    before = {
        file: (file.read_bytes(), file.stat().st_mtime_ns)
        for file in cache.rglob("*")
        if file.is_file() and file.stat().st_size and file not in groups
    }
    printed = demo(cache)
    assert "demo+attention" in printed
    assert "demo/patch:" not in printed
    assert {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in before} == before
    assert folder_contents(cache) == folder_contents(forms["float16"])


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
    forms: dict[str, Path], tmp_path: Path, passes: Passes
) -> None:
    """Shard 0 misses both, shard 1 the attention, shard 2 the tokens."""
    cache = Path(shutil.copytree(forms["rank"], tmp_path / "cache"))
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
    assert folder_contents(cache) == folder_contents(forms["rank"])


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


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ({"attention_kl": 0.5}, {"attention_rank": 16}),
        ({"attention_rank": 16}, {"attention_kl": 0.5}),
    ],
)
def test_a_form_that_nothing_was_written_with_is_replaced(
    first: dict[str, Any], then: dict[str, Any], tmp_path: Path
) -> None:
    """Rows of another form, whose files were folders of this one's, are removed too."""
    cache, fresh = tmp_path / "cache", tmp_path / "fresh"
    demo(cache, **first)
    for record in (cache / "commits" / ATTENTION).glob("*.json"):
        record.unlink()
    demo(cache, **then)
    demo(fresh, **then)
    assert verify_cache(cache) == []
    assert folder_contents(cache) == folder_contents(fresh)


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
    flags: dict[str, Any], expected: str, forms: dict[str, Path]
) -> None:
    before = folder_contents(forms["rank"])
    with pytest.raises(CacheError, match=expected) as caught:
        demo(forms["rank"], **{"attention_rank": 12, **flags})
    assert "\n" not in str(caught.value)
    assert folder_contents(forms["rank"]) == before


def test_other_weights_of_a_complete_source_are_refused(forms: dict[str, Path], tmp_path: Path) -> None:
    weights = other_weights(tmp_path / "other.safetensors")
    for form, flags in (("rank", {"attention_rank": 12}), ("int8", {"feature_dtype": "int8"})):
        with pytest.raises(CacheError, match=r"weights") as caught:
            demo(forms[form], weights=weights, **flags)
        assert "\n" not in str(caught.value)
    (tmp_path / "same").mkdir()
    from repa.pipeline.demo import TEACHER_WEIGHTS

    assert "nothing to do" in demo(forms["rank"], weights=[f"demo={TEACHER_WEIGHTS}"], attention_rank=12)


@pytest.mark.parametrize("compressor", ["zstd", "blosc"])
def test_compressed_columns_hold_the_same_numbers(
    compressor: str, forms: dict[str, Path], tmp_path: Path
) -> None:
    printed = demo(tmp_path / "cache", attention_rank=12, compress=compressor)
    assert "before compression" in printed
    specs = open_manifest(tmp_path / "cache").columns
    assert {name: spec.compressor for name, spec in specs.items()} == {
        name: None if name == "sd-vae/moments" else compressor for name in specs
    }
    for kind in ("patch", "cls", "q", "q-scale", "k", "k-scale"):
        assert torch.equal(read(tmp_path / "cache", kind)[kind], read(forms["rank"], kind)[kind])
    assert verify_cache(tmp_path / "cache") == []
