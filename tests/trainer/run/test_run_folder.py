"""A run is put into a new folder, an empty one, its own, or one with nothing but logs in it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from repa.data.errors import RepaError
from repa.data.testing import folder_contents, synthetic_cache
from repa.trainer.config import TrainConfig
from repa.trainer.run import folder as run_folder
from repa.trainer.run.folder import refuse_foreign_folder, settle_config
from repa.trainer.step.checkpoints import checkpoint_path

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    Settings = Callable[..., TrainConfig]
    Fit = Callable[..., Any]

LEFT_BY_JOBS = (
    "slurm-1234.out",
    "slurm-1234_7.err",
    "train.log",
    "log.txt",
    "nohup.out",
    "job.sh",
    "train.sbatch",
    "repa.o98765",
    "repa.e98765",
    "1234_submitted.pkl",
    "1234_0_result.pkl",
    "logs/1234/0.out",
    ".hydra/config.yaml",
    ".gitkeep",
    ".nfs000000000000beef",
)


def fill(folder: Path, *names: str) -> Path:
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("text")
    return folder


def test_a_folder_that_is_not_there_or_empty_or_of_logs_is_taken(tmp_path: Path) -> None:
    refuse_foreign_folder(tmp_path / "absent")
    refuse_foreign_folder(fill(tmp_path / "empty"))
    (tmp_path / "empty" / "checkpoints").mkdir()
    refuse_foreign_folder(tmp_path / "empty")
    refuse_foreign_folder(fill(tmp_path / "job", *LEFT_BY_JOBS))


@pytest.mark.parametrize(
    "name", ["notes.md", "class0/image.png", "metrics.csv", "model.pt", "logs/model.pt", "out", "a.output"]
)
def test_a_folder_of_something_else_is_refused(name: str, tmp_path: Path) -> None:
    run = fill(tmp_path / "run", "slurm-1.out", name)
    with pytest.raises(RepaError) as caught:
        refuse_foreign_folder(run)
    assert str(caught.value) == f"{run} holds {name} and is no run; choose a new or empty folder with --run"


def test_another_rank_may_begin_the_run_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked = run_folder._foreign_files

    def late(run: Path) -> Iterator[Path]:
        fill(run, "config.yaml", "metrics.csv")
        return looked(run)

    monkeypatch.setattr(run_folder, "_foreign_files", late)
    refuse_foreign_folder(fill(tmp_path / "run", "slurm-1.out"))


def test_a_cache_is_no_place_for_a_run(tmp_path: Path) -> None:
    synthetic_cache(tmp_path, num_rows=4)
    with pytest.raises(RepaError, match=r"holds keys\.txt and is no run; choose a new or empty folder"):
        refuse_foreign_folder(tmp_path)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("hydra: {run: dir}\n", "unknown setting hydra"),
        ("- a\n", "the configuration {place} is not a mapping of settings"),
        ("a: [\n", "the configuration {place} is not YAML: while parsing a flow node"),
    ],
)
def test_the_configuration_of_something_else(text: str, reason: str, tmp_path: Path) -> None:
    place = tmp_path / "config.yaml"
    place.write_text(text)
    with pytest.raises(RepaError) as caught:
        refuse_foreign_folder(tmp_path)
    message = str(caught.value)
    assert message.startswith(
        f"{place} is not of a run that this repa can read ({reason.format(place=place)}"
    )
    assert message.endswith("); choose another folder with --run")
    assert "\n" not in message


def test_a_run_may_hold_anything_else(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(TrainConfig().to_yaml())
    fill(tmp_path, "notes.md", "figures/a.png")
    refuse_foreign_folder(tmp_path)
    # what lost its configuration has its own words, in `settle_config`
    lost = tmp_path / "lost"
    checkpoint_path(lost, 4).parent.mkdir(parents=True)
    checkpoint_path(lost, 4).write_bytes(b"")
    refuse_foreign_folder(lost)


def test_a_run_that_reads_its_cache_from_a_command_is_gone_on_with(tmp_path: Path) -> None:
    config = TrainConfig(cache="pipe:cat a.tar")
    settle_config(config, tmp_path)
    refuse_foreign_folder(tmp_path)
    settle_config(config, tmp_path)
    assert (tmp_path / "config.yaml").read_text() == config.to_yaml()


def test_training_touches_nothing_of_a_foreign_folder(
    settings: Settings, run_fit: Fit, tmp_path: Path
) -> None:
    run = fill(tmp_path / "photos", "class0/image.png")
    before = folder_contents(run)
    with pytest.raises(RepaError, match=r"photos holds class0/image\.png and is no run; choose a new"):
        run_fit(settings(max_steps=1), "photos")
    assert folder_contents(run) == before


def test_training_into_a_folder_with_a_schedulers_log(
    settings: Settings, run_fit: Fit, tmp_path: Path
) -> None:
    run = fill(tmp_path / "run", "slurm-1234.out")
    config = settings(max_steps=2, log_every=1, checkpoint_every=1)
    outcome, _ = run_fit(config, "run")
    assert (outcome.step, outcome.trained) == (2, True)
    assert (run / "slurm-1234.out").read_text() == "text"
    again, printed = run_fit(config, "run")
    assert printed.endswith(f"{run} is finished: 2 steps; for more, set a larger --max-steps\n")
    assert (again.step, again.trained) == (2, False)


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_the_command_refuses_in_one_line(
    dry: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from repa.cli import main

    synthetic_cache(tmp_path / "cache", num_rows=8)
    run = fill(tmp_path / "photos", "image.png")
    with pytest.raises(SystemExit) as left:
        main(["train", "--cache", str(tmp_path / "cache"), "--run", str(run), *dry])
    assert left.value.code == 1
    assert capsys.readouterr().err == (
        f"error: {run} holds image.png and is no run; choose a new or empty folder with --run\n"
    )
