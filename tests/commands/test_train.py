"""`repa train` as a function: flags, files, defaults, the plan."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from repa.commands.train import TrainFlags, _settings, train
from repa.data.errors import CacheError, RepaError
from repa.data.testing import synthetic_cache
from repa.trainer.config import build
from repa.trainer.models.sit import SIT_SIZES, SiTSize
from repa.trainer.run.checked import ProblemsError
from repa.trainer.run.fit import Outcome
from repa.trainer.run.starts import read_starts
from repa.trainer.settings_file import load_yaml
from repa.trainer.step.checkpoints import checkpoints_of
from rich.console import Console

if TYPE_CHECKING:
    from collections.abc import Callable

SMALL = ("method.depth=1", "method.projector_width=16", "preview_every=0", "log_every=1")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with one cache where `repa preprocess` would have put it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(SIT_SIZES, "T", SiTSize(depth=2, width=48, heads=3))
    synthetic_cache(tmp_path / "caches" / "one", num_rows=24)
    return tmp_path


@pytest.fixture
def run_train() -> Callable[..., str]:
    def run(**options: Any) -> str:
        printed = io.StringIO()
        values = {"method": "repa", "model": "SiT-T/2", "max_steps": 2, "batch_size": 8, "assignments": SMALL}
        train(TrainFlags(**{**values, **options}), console=Console(file=printed, width=300))
        return printed.getvalue()

    return run


def test_defaults_find_the_cache_and_name_the_run(here: Path, run_train: Callable[..., str]) -> None:
    printed = run_train()
    config = build(load_yaml(here / "runs" / "repa-SiT-T-2" / "config.yaml"))
    assert Path(config.cache) == Path("caches/one")
    assert (config.max_steps, config.batch_size, config.method_name) == (2, 8, "repa")
    assert "repa sample --run runs/repa-SiT-T-2" in printed


def test_the_configuration_can_be_passed_back_in(here: Path, run_train: Callable[..., str]) -> None:
    run_train()
    file = here / "runs" / "repa-SiT-T-2" / "config.yaml"
    train(TrainFlags(config=file, run=here / "again"), console=Console(file=io.StringIO()))
    assert (here / "again" / "config.yaml").read_text() == file.read_text()
    assert (here / "again" / "metrics.csv").read_bytes() == (file.parent / "metrics.csv").read_bytes()


def test_a_resumed_run_keeps_its_cache(here: Path, run_train: Callable[..., str]) -> None:
    run_train()
    synthetic_cache(here / "caches" / "two", num_rows=24, seed=1)
    assert "resuming" in run_train(max_steps=3)
    with pytest.raises(CacheError, match="2 caches"):
        run_train(run=Path("runs/new"))


def test_a_run_named_alone_goes_on_with_its_own_configuration(
    here: Path, run_train: Callable[..., str]
) -> None:
    run_train(run=Path("mine"), lr=2e-4, seed=3)
    synthetic_cache(here / "caches" / "two", num_rows=24, seed=1)
    before = (here / "mine" / "metrics.csv").read_bytes()
    train(TrainFlags(run=Path("mine"), max_steps=3), console=Console(file=io.StringIO()))
    config = build(load_yaml(here / "mine" / "config.yaml"))
    assert (config.lr, config.seed, config.max_steps, config.model) == (2e-4, 3, 3, "SiT-T/2")
    assert Path(config.cache) == Path("caches/one")
    assert (here / "mine" / "metrics.csv").read_bytes().startswith(before)
    assert checkpoints_of(here / "mine").keys() >= {3}
    assert read_starts(here / "mine")[-1]["changed"] == []


def test_settings_of_a_run_named_alone_are_of_its_method(tmp_path: Path) -> None:
    flags = {"method": "sra", "model": "SiT-T/2", "cache": "somewhere"}
    (tmp_path / "config.yaml").write_text(build(flags=flags).to_yaml())
    settings, folder = _settings(TrainFlags(run=tmp_path, assignments=["method.preset=channel"]))
    assert folder == tmp_path
    assert (settings.method_name, settings.model, settings.method.weight) == ("sra", "SiT-T/2", 0.5)
    settings, _ = _settings(TrainFlags(run=tmp_path, assignments=["method.offset=0.1"]))
    assert (settings.method_name, settings.method.offset) == ("sra", 0.1)
    with pytest.raises(RepaError) as caught:
        _settings(TrainFlags(run=tmp_path, assignments=["method.projector_width=8"]))
    assert caught.value.field == "method.projector_width"


def test_dry_run_prints_and_writes_nothing(here: Path, run_train: Callable[..., str]) -> None:
    printed = run_train(dry_run=True, max_steps=100, assignments=(*SMALL, "holdout=4"))
    for part in (
        "model: SiT-T/2",
        "weight: 0.5",
        "run folder: runs/repa-SiT-T-2",
        "20 to train on, 4 held out",
        "800 seen in 100 steps, 40.0 epochs",
        "sd-vae/moments",
        "demo/patch",
        "0–99",
        "5.12 kB",
        "512 kB",
        "parameters: backbone ",
    ):
        assert part in printed, part
    assert not (here / "runs").exists()


def test_dry_run_shows_what_is_missing(here: Path, run_train: Callable[..., str], capsys: Any) -> None:
    with pytest.raises(ProblemsError, match="dinov2-b"):
        run_train(dry_run=True, assignments=(*SMALL, "method.encoders=dinov2-b"))
    assert not (here / "runs").exists()


def test_no_cache_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_train: Callable[..., str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CacheError, match="repa preprocess"):
        run_train()
    with pytest.raises(RepaError, match="there is no cache at"):
        run_train(cache=str(tmp_path / "nowhere"))


@pytest.mark.usefixtures("here")
def test_a_stopped_run_ends_with_its_own_status(
    run_train: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome = Outcome(step=1, finished=False, resumed_from=0, trained=True)
    monkeypatch.setattr("repa.trainer.run.fit.fit", lambda *_, **__: outcome)
    with pytest.raises(SystemExit) as caught:
        run_train()
    assert caught.value.code == 130


def test_previews_use_the_autoencoder_of_the_cache(
    here: Path, run_train: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The synthetic cache names an autoencoder that is nowhere: a note, and the run goes on."""
    asked = []

    class Absent:
        @classmethod
        def load(cls, name: str, **_: Any) -> None:
            asked.append(name)
            raise RepaError(f"{name} is not here")

    monkeypatch.setattr("repa.pipeline.encoders.vae.Autoencoder", Absent)
    printed = run_train(assignments=(*SMALL, "preview_every=1", "preview_count=1", "preview_steps=1"))
    assert asked == ["synthetic/sd-vae"]
    assert "no previews: synthetic/sd-vae is not here" in printed
