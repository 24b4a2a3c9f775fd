"""The loggers of a run, read back: what is missing, what arrives, what a resumed run goes on with."""

from __future__ import annotations

import csv
import json
import sys
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import yaml
from repa.data.errors import RepaError
from repa.trainer.config import build
from repa.trainer.run import loggers as loggers_module
from repa.trainer.run.checked import ProblemsError
from repa.trainer.run.checks import check
from repa.trainer.run.loggers import PACKAGES, Reports, logger_ids, name_of
from repa.trainer.run.metrics import read_metrics

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from repa.trainer.config import TrainConfig
    from repa.trainer.run.fit import Outcome

    Settings = Callable[..., TrainConfig]
    Fit = Callable[..., tuple[Outcome, str]]

# of other people's packages
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


class Pixels:
    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        return (128 + 20 * latent[:, :3]).clamp(0, 255).to(torch.uint8)


def train_twice(settings: Settings, run_fit: Fit, *, pause: float = 0, **changes: Any) -> None:
    """Train for 2 steps, then on to 4, with previews of both."""
    for steps in (2, 4):
        config = settings(
            **{
                "max_steps": steps,
                "checkpoint_every": 2,
                "preview_every": 2,
                "preview_steps": 1,
                "preview_count": 2,
                **changes,
            }
        )
        run_fit(config, decoder=Pixels())
        time.sleep(pause)


def ids_of(run: Path) -> list[dict[str, str]]:
    return [start["loggers"] for start in json.loads((run / "run.json").read_text())["starts"]]


@pytest.mark.parametrize("text", ["[csv,tensorboard]", "csv, tensorboard"])
def test_the_setting(text: str) -> None:
    config = build(assignments=[f"loggers={text}"])
    assert config.loggers == ("csv", "tensorboard")
    assert build(yaml.safe_load(config.to_yaml())) == config
    assert build().loggers == build(assignments=["loggers=[]"]).loggers == ()
    with pytest.raises(RepaError) as caught:
        build(assignments=["loggers=[mlflow]"])
    assert caught.value.field == "loggers"


def test_a_missing_package_is_a_problem_before_step_0(
    settings: Settings, run_fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loggers_module, "find_spec", lambda name: None)
    with pytest.raises(ProblemsError) as caught:
        run_fit(settings(loggers="csv,wandb,tensorboard,trackio,wandb"))
    assert [problem.field for problem in caught.value.problems] == ["loggers"] * 3
    for problem, name in zip(caught.value.problems, ("wandb", "tensorboard", "trackio"), strict=True):
        assert f"'repa[{name}]'" in problem.remedy
    assert not (tmp_path / "run").exists()


def test_each_logger_is_an_extra() -> None:
    import tomllib
    from pathlib import Path

    text = (Path(__file__).parents[3] / "pyproject.toml").read_text()
    extras = tomllib.loads(text)["project"]["optional-dependencies"]
    for name, package in PACKAGES.items():
        assert [each.split(">")[0] for each in extras[name]] == [package]


def test_ids_stay_and_begin_anew_where_a_run_goes_back(settings: Settings) -> None:
    config = settings(loggers="trackio,csv,wandb")
    first = logger_ids(config, [])
    assert first.keys() == {"wandb", "trackio"}
    assert first["wandb"] != first["trackio"]
    # a start without the logger between two with it, and one of before there were any
    starts: list[dict[str, Any]] = [{"seed": 0}, {"loggers": first}, {"loggers": {}}]
    assert logger_ids(config, starts) == first
    assert not set(logger_ids(config, starts, anew=True).values()) & set(first.values())
    assert logger_ids(settings(loggers="csv"), starts) == {}


def test_without_loggers_there_are_none(settings: Settings, run_fit: Fit, tmp_path: Path) -> None:
    run_fit(settings(max_steps=1))
    assert ids_of(tmp_path / "run") == [{}]
    assert not {"csv", "tensorboard", "wandb"} & {path.name for path in (tmp_path / "run").iterdir()}


def test_csv_and_tensorboard(
    settings: Settings, run_fit: Fit, killed_fit: Callable[..., None], tmp_path: Path
) -> None:
    """A run that was killed and resumed shows each step once, as metrics.csv does, with pictures beside."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    values = {"loggers": "csv,tensorboard", "max_steps": 5, "checkpoint_every": 2, "preview_every": 4}
    config = settings(**values, preview_steps=1, preview_count=2)
    killed_fit(config, "run", moment=4, decoder=Pixels())
    run_fit(config, decoder=Pixels())
    run = tmp_path / "run"
    ours = read_metrics(run / "metrics.csv")
    assert [row["step"] for row in ours] == [1, 2, 3, 4, 5]
    with (run / "csv" / "metrics.csv").open(newline="") as file:
        theirs = list(csv.DictReader(file))
    assert [int(row["step"]) for row in theirs] == [1, 2, 3, 4, 5]
    for mine, other in zip(ours, theirs, strict=True):
        assert mine["loss"] == pytest.approx(float(other["loss"]), rel=1e-8)
        assert float(other["images_per_second"]) > 0
    hyperparameters = yaml.safe_load((run / "csv" / "hparams.yaml").read_text())
    assert hyperparameters["max_steps"] == 5
    events = EventAccumulator(str(run / "tensorboard"), {"images": 0, "scalars": 0})
    events.Reload()
    found = events.Scalars("loss")
    assert [event.step for event in found] == [1, 2, 3, 4, 5]
    np.testing.assert_allclose([event.value for event in found], [row["loss"] for row in ours], rtol=1e-6)
    assert [event.step for event in events.Images("samples")] == [4, 5]
    picture = (run / "samples" / "step-00000005.png").read_bytes()
    assert events.Images("samples")[-1].width == int.from_bytes(picture[16:20], "big")
    assert "config/text_summary" in events.Tags()["tensors"]


def test_wandb_offline(
    settings: Settings, run_fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both starts are of one run, which another run of this process does not go on with."""
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    # W&B names the folder of a start by the second
    train_twice(settings, run_fit, pause=1.1, loggers="wandb")
    run = tmp_path / "run"
    first, second = ids_of(run)
    assert first == second
    folders = sorted((run / "wandb").glob(f"offline-run-*-{first['wandb']}"))
    assert folders
    assert wandb.run is None
    pictures = [path for folder in folders for path in folder.rglob("samples_*.png")]
    assert len(pictures) == 2
    steps = [step for folder in folders for step in steps_in(folder / f"run-{first['wandb']}.wandb")]
    assert steps == [1, 2, 2, 3, 4, 4]  # with the pictures of 2 and 4
    run_fit(settings(max_steps=1, loggers="wandb"), "other")
    (other,) = ids_of(tmp_path / "other")
    assert other != first
    assert list((tmp_path / "other" / "wandb").glob(f"offline-run-*-{other['wandb']}"))


def steps_in(file: Path) -> list[int]:
    """Steps of the values in a file of W&B: its records lie as in a log of LevelDB, behind a header."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, parts, found = file.read_bytes(), 7, b"", []
    while place + 7 <= len(data):
        if 2**15 - place % 2**15 < 7:
            place += 2**15 - place % 2**15  # the rest of a block that no record's head fits in
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = Record.FromString(parts)
            found += [
                int(json.loads(item.value_json))
                for item in record.history.item
                if "trainer/global_step" in (item.key, *item.nested_key)
            ]
            parts = b""
    return found


def test_trackio(settings: Settings, run_fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "trackio" in sys.modules:
        pytest.skip("trackio has been imported, with another folder")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    trackio = pytest.importorskip("trackio")
    train_twice(settings, run_fit, loggers="trackio")
    first, second = ids_of(tmp_path / "run")
    assert first == second
    (run,) = trackio.Api().runs("repa")
    assert run.name == f"run-{first['trackio']}"
    assert run.config["batch_size"] == 8
    from trackio.sqlite_storage import SQLiteStorage

    rows = SQLiteStorage.get_logs("repa", run.name)
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4]
    assert [row["step"] for row in rows if "samples" in row] == [2, 4]
    ours = {row["step"]: row["loss"] for row in read_metrics(tmp_path / "run" / "metrics.csv")}
    assert {row["step"]: pytest.approx(row["loss"]) for row in rows if "loss" in row} == ours


class Failing:
    """A logger whose service is gone after the first values."""

    def __init__(self) -> None:
        self.sent: list[int] = []
        self.experiment = self

    def log_hyperparams(self, params: Any) -> None:
        pass

    def log_metrics(self, values: dict[str, float], step: int) -> None:
        if self.sent:
            raise ConnectionError("gone\n\x1b[31mfor good")
        self.sent.append(step)

    def finalize(self, status: str) -> None:
        raise AssertionError("a logger that failed is not asked again")


class CsvLogger(Failing):
    pass


def test_one_that_fails_is_left_out(settings: Settings) -> None:
    said: list[str] = []
    reports = Reports(settings(), said.append)
    logger: Any = CsvLogger()
    assert name_of(logger) == "csv"
    with reports.begun([logger]):
        for step in (1, 2, 3):
            reports.values({"loss": 1.0}, step)
    assert logger.sent == [1]
    assert len(said) == 1
    assert said[0].isprintable()


def test_one_that_cannot_begin_stops_the_run(settings: Settings) -> None:
    class CsvLogger(Failing):
        def log_hyperparams(self, params: Any) -> None:
            raise ValueError("no account")

    logger: Any = CsvLogger()
    with pytest.raises(RepaError) as caught, Reports(settings(), print).begun([logger]):
        pass
    assert caught.value.field == "loggers"
    assert caught.value.remedy


def test_links_in_a_run_are_not_followed(settings: Settings, run_fit: Fit, tmp_path: Path) -> None:
    config = settings(max_steps=1, loggers="csv")
    assert not check(config).problems
    run_fit(settings(max_steps=1))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run" / "csv").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RepaError):
        run_fit(settings(max_steps=2, loggers="csv"))
    assert not list((tmp_path / "elsewhere").iterdir())
