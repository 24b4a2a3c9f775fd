"""How far a compute dtype lies from float32: the numbers, when they are measured, and who keeps them."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from attention_forms import ATTENTION, BLOCKS, demo, notes
from repa.commands.cache.info import info
from repa.data.errors import CacheError, RepaError
from repa.data.format.notes import check_notes
from repa.data.format.opening import declaration, open_manifest
from repa.data.testing import folder_contents
from repa.data.upkeep.verify import verify_cache
from repa.pipeline.columns.calibrator import Calibrator
from repa.pipeline.columns.deviation import DEVIATION_IMAGES
from repa.pipeline.demo import TEACHER_WEIGHTS
from repa.pipeline.demo.shapes import DemoImages
from repa.pipeline.encoders import load_encoder, precision
from repa.pipeline.encoders.vae import Autoencoder
from repa.pipeline.images.workers import decode_row
from repa.pipeline.replay.fidelity import check_fidelity
from repa.pipeline.replay.live import LiveTeachers
from repa.pipeline.replay.recorded import Given
from repa.pipeline.replay.reencode import reencode
from repa.pipeline.replay.tolerances import TOLERANCES
from rich.console import Console
from safetensors.torch import load_file, save_file

if TYPE_CHECKING:
    from numpy.typing import NDArray

SOURCES = ("sd-vae", "demo", ATTENTION)
IMAGES, BATCH = 40, 4


@pytest.fixture(scope="module")
def lower(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A cache computed in bfloat16, and what the command printed."""
    cache = tmp_path_factory.mktemp("lower") / "cache"
    return cache, demo(cache, compute_dtype="bfloat16", limit=IMAGES)


@pytest.fixture
def copied(lower: tuple[Path, str], tmp_path: Path) -> Path:
    return Path(shutil.copytree(lower[0], tmp_path / "cache"))


@pytest.fixture
def never(monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(*_: Any) -> None:
        raise AssertionError("measured once more")

    monkeypatch.setattr(Calibrator, "deviations", measured)


@pytest.fixture
def tf32_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a CPU take part: what it computes then is float32."""
    monkeypatch.setattr(precision, "require_arithmetic", lambda *_: None)


def outputs(compute_dtype: str) -> dict[str, NDArray[np.float64]]:
    """What the demo's models say of the images that are measured on, in the batches of the cache."""
    images = DemoImages(count=IMAGES)
    rows = [number * IMAGES // DEVIATION_IMAGES for number in range(DEVIATION_IMAGES)]
    pixels = torch.stack([torch.from_numpy(np.asarray(decode_row(images, row, 64))) for row in rows])
    encoder = load_encoder("demo", resolution=64, compute_dtype=compute_dtype)
    autoencoder = Autoencoder.load("demo", compute_dtype=compute_dtype)
    batches = []
    for batch in pixels.split(BATCH):
        features = encoder.encode(batch, BLOCKS)
        moments = autoencoder.encode_moments(batch)
        batches.append({**features, "mean": moments[:, : autoencoder.latent_channels]})
    return {name: torch.cat([each[name] for each in batches]).double().numpy() for name in batches[0]}


def probabilities(found: dict[str, NDArray[np.float64]]) -> NDArray[np.float64]:
    logits = np.einsum("nlhtd,nlhsd->nlhts", found["q"], found["k"]) / np.sqrt(found["q"].shape[-1])
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return np.asarray(weights / weights.sum(-1, keepdims=True))


def test_the_numbers_equal_a_slow_computation(lower: tuple[Path, str]) -> None:
    exact, found = outputs("float32"), outputs("bfloat16")
    off = found["mean"] - exact["mean"]
    scale = np.sqrt((exact["mean"] ** 2).mean())
    assert notes(lower[0], "sd-vae")["deviation"] == {
        "images": DEVIATION_IMAGES,
        "relative_rms": pytest.approx(np.sqrt((off**2).mean()) / scale, rel=1e-5),
        "relative_max": pytest.approx(np.abs(off).max() / scale, rel=1e-5),
    }
    product = (exact["patch"] * found["patch"]).sum(-1)
    lengths = np.linalg.norm(exact["patch"], axis=-1) * np.linalg.norm(found["patch"], axis=-1)
    errors = 1 - product / lengths
    assert notes(lower[0], "demo")["deviation"] == {
        "images": DEVIATION_IMAGES,
        "cosine_error_mean": pytest.approx(errors.mean(), rel=1e-5),
        "cosine_error_max": pytest.approx(errors.max(), rel=1e-5),
    }
    truth, kept = probabilities(exact), probabilities(found)
    heads = (truth * np.log(truth / kept)).sum(-1).mean(axis=(0, 3))
    assert notes(lower[0])["deviation"] == {
        "images": DEVIATION_IMAGES,
        "kl_mean": pytest.approx(heads.mean(), rel=1e-4),
        "kl_worst_head": pytest.approx(heads.max(), rel=1e-4),
    }
    # of the eight significant binary digits of bfloat16
    assert 1e-4 < notes(lower[0], "sd-vae")["deviation"]["relative_rms"] < 0.1


def test_they_are_printed_and_in_the_document(lower: tuple[Path, str]) -> None:
    cache, printed = lower
    output, document = io.StringIO(), io.StringIO()
    info(cache=cache, console=Console(file=output, width=300))
    info(cache=cache, as_json=True, console=Console(file=document))
    sources = json.loads(document.getvalue())["sources"]
    for source in SOURCES:
        note = notes(cache, source)["deviation"]
        assert sources[source]["notes"]["deviation"] == note
        for text in (printed, output.getvalue()):
            (line,) = [each for each in text.splitlines() if f"{source}: computed in bfloat16" in each]
            assert all(f"{value:.3g}" in line for value in note.values())
    assert verify_cache(cache) == []


def test_float32_is_not_compared_with_itself(tmp_path: Path, never: None) -> None:
    printed = demo(tmp_path / "cache")
    assert "computed in" not in printed
    assert all("deviation" not in notes(tmp_path / "cache", source) for source in SOURCES)


def test_a_run_that_resumes_does_not_measure_again(
    copied: Path, lower: tuple[Path, str], never: None
) -> None:
    for source in SOURCES:
        (copied / "commits" / source / "1.json").unlink()
    printed = demo(copied, compute_dtype="bfloat16", limit=IMAGES)
    assert "sd-vae: computed in bfloat16" in printed
    assert folder_contents(copied) == folder_contents(lower[0])


def test_a_source_added_later_is_measured_alone(tmp_path: Path, lower: tuple[Path, str]) -> None:
    cache = tmp_path / "cache"
    demo(cache, compute_dtype="bfloat16", limit=IMAGES, attention=None)
    demo(cache, compute_dtype="bfloat16", limit=IMAGES)
    for source in SOURCES:
        assert notes(cache, source) == notes(lower[0], source)


def test_a_source_begun_without_stays_without(
    tmp_path: Path, lower: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that was begun by a repa that did not measure: the same rows, and nothing is refused."""
    cache = tmp_path / "cache"
    with monkeypatch.context() as patch:
        patch.setattr(Calibrator, "deviations", lambda *_: {})
        demo(cache, compute_dtype="bfloat16", limit=IMAGES)
    (cache / "commits" / "demo" / "2.json").unlink()
    demo(cache, compute_dtype="bfloat16", limit=IMAGES)
    groups = {"zarr.json", "zarr.json.copy"}
    assert all("deviation" not in notes(cache, source) for source in SOURCES)
    mine, theirs = folder_contents(cache), folder_contents(lower[0])
    assert {name: mine[name] for name in mine if name not in groups} == {
        name: theirs[name] for name in theirs if name not in groups
    }


def test_another_compute_dtype_is_another_source(copied: Path, tmp_path: Path) -> None:
    with pytest.raises(CacheError):
        demo(copied, compute_dtype="float16", limit=IMAGES)
    with pytest.raises(CacheError):
        demo(copied, compute_dtype="float32", limit=IMAGES)
    cache = tmp_path / "other"
    demo(cache, limit=6, attention=None)
    for record in (cache / "commits").rglob("*.json"):
        record.unlink()
    # nothing is committed any more, so nothing binds
    demo(cache, compute_dtype="bfloat16", limit=6, attention=None)
    assert open_manifest(cache).sources["demo"].compute_dtype == "bfloat16"
    assert notes(cache, "demo")["deviation"]["images"] == 6


def test_what_was_measured_binds_nobody(lower: tuple[Path, str]) -> None:
    """Another device measures it a little differently, and writes the same source all the same."""
    manifest = open_manifest(lower[0])
    for source, provenance in manifest.sources.items():
        other = dict(provenance.notes)
        other["deviation"] = {**other["deviation"], "images": 7}
        columns = manifest.source_columns(source)
        without = {name: each for name, each in provenance.notes.items() if name != "deviation"}
        for changed in (replace(provenance, notes=other), replace(provenance, notes=without)):
            assert declaration(changed, columns) == declaration(provenance, columns)
            again = manifest.with_source(source, changed, columns)
            assert again.source_identities == manifest.source_identities


@pytest.mark.parametrize("source", SOURCES)
def test_a_note_of_another_kind_is_refused(source: str, lower: tuple[Path, str]) -> None:
    provenance = open_manifest(lower[0]).sources[source]
    for wrong in ({"images": 3}, {**provenance.notes["deviation"], "images": "many"}, 3):
        with pytest.raises(CacheError) as caught:
            check_notes(source, {**provenance.notes, "deviation": wrong}, where="it", remedy="restore it")
        assert caught.value.field.startswith(f"sources.{source}.notes.deviation")


def test_what_is_not_finite_leaves_nothing_behind(tmp_path: Path) -> None:
    state = load_file(TEACHER_WEIGHTS)
    name = next(each for each in state if each.endswith("mlp.fc2.weight"))
    state[name] = state[name] * 1e6
    save_file(state, tmp_path / "large.safetensors")
    weights = [f"demo={tmp_path / 'large.safetensors'}"]
    with pytest.raises(RepaError) as caught:
        demo(tmp_path / "cache", compute_dtype="float16", weights=weights, attention=None, limit=4)
    assert caught.value.field == "--compute-dtype"
    assert not (tmp_path / "cache").exists()


def test_tf32_without_a_gpu_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RepaError) as caught:
        demo(tmp_path / "cache", compute_dtype="tf32")
    assert caught.value.field == "--compute-dtype"
    assert not (tmp_path / "cache").exists()
    # what is only looked at needs none
    assert "to write" in demo(tmp_path / "cache", compute_dtype="tf32", dry_run=True)


@pytest.fixture
def tf32_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache that says it was computed in TF32, of a CPU's float32."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with monkeypatch.context() as patch:
        patch.setattr(precision, "require_arithmetic", lambda *_: None)
        demo(tmp_path / "cache", compute_dtype="tf32", feature_dtype="int8")
    return tmp_path / "cache"


def test_a_cache_in_tf32_names_it_everywhere(tf32_cache: Path) -> None:
    manifest = open_manifest(tf32_cache)
    assert {each.compute_dtype for each in manifest.sources.values()} == {"tf32"}
    assert all("deviation" in notes(tf32_cache, source) for source in SOURCES)
    with pytest.raises(CacheError):
        demo(tf32_cache, compute_dtype="float32", feature_dtype="int8")
    assert "complete: nothing to do" in demo(tf32_cache, compute_dtype="tf32", feature_dtype="int8")
    given = Given(data="demo", vae=None, weights={})
    for use in (
        lambda: check_fidelity(tf32_cache, data="demo", weights={}, rows=2),
        lambda: reencode(tf32_cache, given, rows=2),
        lambda: LiveTeachers(tf32_cache, data="demo", encoders=("demo",)).load(torch.device("cpu")),
    ):
        with pytest.raises(RepaError) as caught:
            use()
        assert caught.value.field == "--compute-dtype"


def test_a_cache_in_tf32_is_held_against_its_own_tolerance(
    tf32_cache: Path, tf32_anywhere: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("repa.pipeline.replay.live.require_arithmetic", lambda *_: None)
    given = Given(data="demo", vae=None, weights={})
    assert all(
        each.kept and each.noise == TOLERANCES["tf32"].noise for each in reencode(tf32_cache, given, rows=3)
    )
    found = check_fidelity(tf32_cache, data="demo", weights={}, rows=3)
    assert found[0].limit == pytest.approx(2 * float(found[0].recorded or 0) + TOLERANCES["tf32"].cosine_mean)
    assert all(each.kept for each in found)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_tf32_on_a_gpu(tmp_path: Path) -> None:
    """It differs from float32, by less than bfloat16, and the cache is as its teachers say."""
    if not torch.cuda.is_tf32_supported():
        pytest.skip("a GPU without TF32")
    found: dict[str, Any] = {}
    for compute_dtype in ("tf32", "bfloat16"):
        demo(tmp_path / compute_dtype, compute_dtype=compute_dtype)
        found[compute_dtype] = [notes(tmp_path / compute_dtype, source)["deviation"] for source in SOURCES]
    for name, one, other in zip(
        ("relative_rms", "cosine_error_mean", "kl_mean"), found["tf32"], found["bfloat16"], strict=True
    ):
        assert 0 < one[name] < other[name]
    given = Given(data="demo", vae=None, weights={})
    assert all(each.kept for each in reencode(tmp_path / "tf32", given, rows=8))
