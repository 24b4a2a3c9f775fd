"""Cached is online, by the commands: parity of every storage form, and a run that is the cached one."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from narrow import make_narrow
from repa import cli
from repa.commands.parity.flags import ParityFlags
from repa.commands.parity.found import Parity
from repa.commands.parity.run import parity
from repa.commands.preprocess import PreprocessFlags, preprocess
from repa.commands.train import TrainFlags, train
from repa.data.errors import RepaError
from repa.data.format.opening import open_manifest
from repa.trainer.methods import METHODS
from repa.trainer.methods.requirements import NeedsColumn
from repa.trainer.step.checkpoints import checkpoints_of
from rich.console import Console

IMAGES = 40
SMALL = ("method.projector_width=32",)
SHORT = (*SMALL, "preview_every=0", "log_every=1", "checkpoint_every=2", "precision=32-true")


@pytest.fixture(autouse=True)
def _narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    make_narrow(monkeypatch)


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


def written(folder: Path, name: str, **options: Any) -> Path:
    """A cache of the demo in batches of 16, 8, 16 images."""
    values = {"limit": IMAGES, "batch_size": 16, "shard_rows": 24, "attention": "haste"}
    flags = PreprocessFlags(data="demo", cache=folder / name, **{**values, **options})
    preprocess(flags, console=quiet())
    return folder / name


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A cache by the name of its form, written when it is first asked for."""
    folder = tmp_path_factory.mktemp("parity")
    forms: dict[str, dict[str, Any]] = {
        "float32": {"feature_dtype": "float32"},
        "float16": {},
        "int8": {"feature_dtype": "int8"},
        "rank": {"attention_rank": 16},
        "factors": {"attention_kl": 1e-3},
        "tokens": {"attention": None},
    }
    made: dict[str, Path] = {}

    def cache(form: str) -> Path:
        if form not in made:
            made[form] = written(folder, form, **forms[form])
        return made[form]

    return cache


def compared(cache: Path, method: str = "haste", **options: Any) -> Parity:
    values = {"model": "SiT-T/1", "batches": 2, "batch_size": 8, "assignments": SMALL}
    found = parity(ParityFlags(method=method, cache=cache, **{**values, **options}), console=quiet())
    assert list(found) == ["original"]
    return found["original"]


LIVE = [
    name for name, kind in METHODS.items() if any(isinstance(need, NeedsColumn) for need in kind.requires)
]


@pytest.mark.parametrize("method", LIVE)
def test_a_float32_cache_is_the_live_teacher_to_the_bit(caches: Callable[[str], Path], method: str) -> None:
    small = SMALL if hasattr(METHODS[method].config_class(), "projector_width") else ()
    model = f"{METHODS[method].default_model.rpartition('-')[0]}-T/1"
    found = compared(caches("float32"), method, model=model, assignments=small)
    names = {"loss", "velocity", "repa", *(("attention", "attention_excess") if method == "haste" else ())}
    if method == "erw":
        names -= {"velocity"}  # of its first phase
    assert names <= set(found.terms)
    for term in found.terms.values():
        assert len(term.cached) == 2
        assert term.cached == term.live
        assert term.largest == 0.0
    weighted = {name: term for name, term in found.terms.items() if term.gradient_cosine}
    assert names - {"attention_excess"} <= set(weighted)
    assert "attention_excess" not in weighted
    for term in weighted.values():
        assert term.gradient_cosine == [1.0, 1.0]
        assert term.gradient_difference == [0.0, 0.0]
    assert set(found.columns) == {"demo/patch", *(("demo/q", "demo/k") if method == "haste" else ())}
    for column in found.columns.values():
        assert (column.stored, column.largest, column.cosine_error) == ("float32", 0.0, 0.0)
    for name, column in found.columns.items():
        attention = name in ("demo/q", "demo/k")
        assert (column.kl_mean, column.kl_worst_head) == ((0.0, 0.0) if attention else (None, None))


def test_float16_differs_by_its_rounding(caches: Callable[[str], Path]) -> None:
    found = compared(caches("float16"))
    assert found.terms["velocity"].largest == 0.0
    assert found.terms["velocity"].gradient_difference == [0.0, 0.0]
    for name in ("loss", "repa", "attention"):
        assert all(0 < value < 2e-3 for value in found.terms[name].gradient_difference)
        assert all(1 - 2e-6 < value < 1 for value in found.terms[name].gradient_cosine)
    assert found.terms["attention_excess"].gradient_cosine == []
    # η of `cosine_similarity`, with the tokens' norms above 1
    assert 0 < found.terms["repa"].largest < 5e-4
    assert 0 < found.terms["attention"].largest < 1e-2
    for column in found.columns.values():
        assert column.stored == "float16"
        assert column.largest is not None
        assert column.cosine_error is not None
        assert 0 < column.largest < 2e-2
        assert 0 < column.cosine_error < 1e-6


def test_int8_keys_are_compared_centred(caches: Callable[[str], Path]) -> None:
    # more batches than are read ahead: scales are read after the live side was computed too
    found = compared(caches("int8"), batches=4)
    for column in found.columns.values():
        assert column.stored == "int8"
        assert column.cosine_error is not None
        # uncentred keys would be far away
        assert 0 < column.cosine_error < 1e-3
    loss = found.terms["loss"]
    assert loss.largest == pytest.approx(
        max(
            abs(0.5 * (repa_here - repa_there) + 0.5 * (here - there))
            for repa_here, repa_there, here, there in zip(
                found.terms["repa"].cached,
                found.terms["repa"].live,
                found.terms["attention"].cached,
                found.terms["attention"].live,
                strict=True,
            )
        ),
        abs=1e-6,
    )


def test_a_cut_rank_is_seen_in_the_loss_alone(caches: Callable[[str], Path]) -> None:
    found = compared(caches("rank"))
    assert found.columns["demo/q"].stored == "truncated, rank 16 of 64"
    assert found.columns["demo/q"].largest is None
    assert found.columns["demo/patch"].largest is not None
    assert found.terms["attention"].largest > 0


def test_factors_are_compared_by_their_attention(caches: Callable[[str], Path]) -> None:
    cache = caches("factors")
    found = compared(cache)
    recorded = open_manifest(cache).sources["demo+attention"].notes["fidelity"]
    for kind in "qk":
        column = found.columns[f"demo/{kind}"]
        assert column.stored.startswith("factored, ")
        assert column.largest is None
        assert column.kl_mean is not None
        assert column.kl_worst_head is not None
        # other images than those that were held out
        assert 0.5 < column.kl_mean / recorded["kl_mean"] < 2
        assert column.kl_mean <= column.kl_worst_head < 2e-3
    assert all(1e-4 < value < 0.1 for value in found.terms["attention"].gradient_difference)
    assert all(value > 0.99 for value in found.terms["attention"].gradient_cosine)


def test_the_command_prints_both_tables(
    caches: Callable[[str], Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    arguments = ["parity", "--cache", str(caches("tokens")), "--model", "SiT-T/1", "--data", "demo"]
    cli.run_command([*arguments, "--batches", "1", "--batch-size", "4", "--set", SMALL[0]])
    printed = capsys.readouterr().out
    for part in (
        "repa, SiT-T/1: 1 batch, 4 images",
        "velocity",
        "largest",
        "gradient",
        "1.00000000",
        "demo/patch",
        "float16",
    ):
        assert part in printed, part


def test_what_parity_cannot_compare(caches: Callable[[str], Path]) -> None:
    with pytest.raises(RepaError, match="--batches 0"):
        compared(caches("tokens"), batches=0)
    with pytest.raises(RepaError, match="no attention targets of demo"):
        compared(caches("tokens"))
    with pytest.raises(RepaError, match="encoder 'nobody' is unknown"):
        compared(caches("tokens"), "repa", encoders=["nobody"])
    with pytest.raises(RepaError, match="image folder nowhere does not exist"):
        compared(caches("tokens"), "repa", data="nowhere")


@pytest.fixture
def run_train(tmp_path: Path) -> Callable[..., str]:
    def run(name: str, cache: Path, **options: Any) -> str:
        printed = io.StringIO()
        values = {"method": "haste", "model": "SiT-T/1", "max_steps": 4, "batch_size": 8, "lr": 1e-3}
        values |= {"assignments": (*SHORT, "method.stop=3")}
        flags = TrainFlags(cache=str(cache), run=tmp_path / name, **{**values, **options})
        train(flags, console=Console(file=printed, width=200))
        return printed.getvalue()

    return run


def weights(run: Path, step: int) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(checkpoints_of(run)[step], weights_only=True)["state_dict"]
    return state


def test_an_online_run_from_latents_is_the_cached_one_and_resumes(
    caches: Callable[[str], Path], run_train: Callable[..., str], tmp_path: Path
) -> None:
    """A cache of latents alone, and the flags given only once: the record of the run has them."""
    run_train("cached", caches("float32"))
    latents = written(tmp_path, "latents", encoders=["none"], attention=None)
    run_train("online", latents, targets="online", data="demo", encoders=["demo"], max_steps=2)
    assert "resuming" in run_train("online", latents, targets="online")
    metrics = [(tmp_path / name / "metrics.csv").read_bytes() for name in ("cached", "online")]
    assert metrics[0] == metrics[1]
    cached, online = weights(tmp_path / "cached", 4), weights(tmp_path / "online", 4)
    assert cached.keys() == online.keys()
    assert all(torch.equal(value, online[name]) for name, value in cached.items())
    starts = json.loads((tmp_path / "online" / "run.json").read_text())["starts"]
    assert [start["live"]["encoders"] for start in starts] == [["demo"], ["demo"]]


def test_dry_run_shows_what_is_live(caches: Callable[[str], Path], run_train: Callable[..., str]) -> None:
    printed = run_train("plan", caches("tokens"), targets="online", dry_run=True)
    assert "targets: online" in printed
    for column in ("demo/patch", "demo/q", "demo/k"):
        assert f"{column} (live)" in printed


def test_flags_of_live_teachers_without_any(
    caches: Callable[[str], Path], run_train: Callable[..., str]
) -> None:
    with pytest.raises(RepaError, match="--data, --encoder choose live teachers; add --targets online"):
        run_train("refused", caches("tokens"), data="demo", encoders=["demo"])
    with pytest.raises(RepaError, match="targets"):
        run_train("refused", caches("tokens"), targets="sometimes")
    with pytest.raises(RepaError, match="method none takes nothing from a teacher"):
        run_train("refused", caches("tokens"), targets="online", method="none", assignments=())


def test_a_teacher_without_the_blocks_is_named(
    caches: Callable[[str], Path], run_train: Callable[..., str]
) -> None:
    """The preset of SiT-B is for a teacher of twelve blocks."""
    with pytest.raises(RepaError, match=r"attention of blocks 8, 10, 12, there is demo 1 to 6"):
        run_train("refused", caches("tokens"), targets="online", model="SiT-B/1", assignments=())


def test_tars_have_no_live_teachers(run_train: Callable[..., str]) -> None:
    with pytest.raises(RepaError, match="live teachers cannot be called beside tars"):
        run_train("refused", Path("shards/{0..3}.tar"), targets="online")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_parity_on_a_gpu(tmp_path: Path) -> None:
    """Written and called on the GPU; float32 without TF32, whose kernels may still choose by their input."""
    cache = written(tmp_path, "gpu", feature_dtype="float32")
    found = compared(cache, assignments=(*SMALL, "precision=32-true"))
    assert all(term.largest <= 1e-4 for term in found.terms.values())
    assert all(column.largest is not None and column.largest <= 1e-4 for column in found.columns.values())
