"""A run that stops early: by which signals, by its time, on two ranks, within SLURM."""

from __future__ import annotations

import io
import multiprocessing
import os
import signal
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from repa.data.errors import RepaError
from repa.trainer.run.fit import fit
from repa.trainer.run.metrics import MetricsFile, read_metrics
from repa.trainer.run.starts import read_starts
from repa.trainer.run.stop import duration, requeue
from repa.trainer.step.checkpoints import checkpoints_of
from rich.console import Console

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection

    from repa.trainer.config import TrainConfig

    Settings = Callable[..., TrainConfig]
    Fit = Callable[..., Any]


def at_step(step: int, act: Callable[[], None]) -> Callable[..., None]:
    """`MetricsFile.write`, and something to do after a step's row."""
    write = MetricsFile.write

    def write_and_act(self: MetricsFile, now: int, values: Any) -> None:
        write(self, now, values)
        if now == step:
            act()

    return write_and_act


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2])
def test_a_warning_of_a_scheduler_saves(
    settings: Settings, run_fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(MetricsFile, "write", at_step(2, lambda: os.kill(os.getpid(), number)))
    outcome, printed = run_fit(settings(max_steps=6, checkpoint_every=100))
    assert not outcome.finished
    assert outcome.step in (2, 3)
    assert list(checkpoints_of(tmp_path / "run")) == [outcome.step]
    assert signal.Signals(number).name in printed


def test_a_second_ctrl_c_stops_at_once(
    settings: Settings, run_fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def twice() -> None:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(MetricsFile, "write", at_step(2, twice))
    with pytest.raises(KeyboardInterrupt):
        run_fit(settings(max_steps=6, checkpoint_every=100))
    assert checkpoints_of(tmp_path / "run") == {}
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_max_time_saves_and_every_start_has_its_own(settings: Settings, run_fit: Fit, tmp_path: Path) -> None:
    config = settings(max_steps=3, checkpoint_every=100, trainer__max_time="00:00:00:00")
    steps = [run_fit(config)[0].step for _ in range(2)]
    assert steps == [1, 2]
    assert list(checkpoints_of(tmp_path / "run")) == [1, 2]
    outcome, _ = run_fit(config)
    assert outcome.finished


def test_an_end_that_saved_nothing_is_an_error(
    settings: Settings, run_fit: Fit, monkeypatch: pytest.MonkeyPatch
) -> None:
    from repa.trainer.run.checkpointing import Checkpoints

    monkeypatch.setattr(Checkpoints, "on_step", lambda *_: None)
    with pytest.raises(RepaError) as caught:
        run_fit(settings(max_steps=6, trainer__max_time="00:00:00:00"))
    assert caught.value.field == "trainer"


@pytest.mark.parametrize(
    ("value", "seconds"),
    [(None, None), ("01:02:03:04", 93784.0), ({"hours": 1.5}, 5400.0), ("00:00:00:00", 0.0)],
)
def test_durations(value: Any, seconds: float | None) -> None:
    assert duration(value) == seconds


# YAML reads 12:00:00:00 as the number 2592000
@pytest.mark.parametrize("value", ["1:00", 2592000, {"weeks": "x"}, {"years": 1}, {"days": 1e300}, [1], {}])
def test_what_is_no_duration(value: Any) -> None:
    with pytest.raises(RepaError) as caught:
        duration(value)
    assert caught.value.field == "trainer.max_time"


SLURM = {"SLURM_JOB_ID": "17"}


@pytest.mark.parametrize(
    ("reason", "environment", "asked"),
    [
        ("SIGUSR1", SLURM, "requeue 17"),
        ("SIGUSR2", {**SLURM, "SLURM_ARRAY_JOB_ID": "16", "SLURM_ARRAY_TASK_ID": "3"}, "requeue 16_3"),
        ("SIGTERM", SLURM, None),  # of scancel, or of a preemption, which requeues by itself
        ("SIGINT", SLURM, None),
        ("trainer.max_time", SLURM, None),
        ("SIGUSR1", {}, None),
    ],
)
@pytest.mark.parametrize("status", [0, 1])
def test_slurm_is_asked_to_run_the_job_again(
    reason: str,
    environment: dict[str, str],
    asked: str | None,
    status: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scontrol, log = tmp_path / "scontrol", tmp_path / "log"
    scontrol.write_text(f'#!/bin/sh\necho "$@" > {log}\necho "[red] no" >&2\nexit {status}\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    said: list[str] = []
    requeue(reason, environment, said.append)
    assert (log.read_text().strip() if log.exists() else None) == asked
    assert len(said) == (0 if asked is None else 1)
    if asked and status:
        assert "[red] no" in said[0]


def test_without_scontrol_it_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    said: list[str] = []
    requeue("SIGUSR1", SLURM, said.append)
    assert len(said) == 1


def rank(
    number: int, port: int, config: TrainConfig, run: Path, act: Callable[[], None] | None, last: Connection
) -> None:
    """One of two that torchrun has started; sends how it ended."""
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(number),
        "WORLD_SIZE": "2",
        "LOCAL_RANK": str(number),
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    if act is not None:
        from repa.trainer.step.module import TrainingModule

        update, steps = TrainingModule.update_ema, []

        def update_and_act(self: TrainingModule) -> None:
            update(self)
            steps.append(1)
            if len(steps) == 2:
                act()

        TrainingModule.update_ema = update_and_act  # type: ignore[method-assign]
    printed = io.StringIO()
    try:
        outcome = fit(config, run, console=Console(file=printed, width=300))
        last.send((outcome, printed.getvalue()))
    except BaseException as error:
        last.send((repr(error), printed.getvalue()))
    last.close()
    os._exit(0)


def two_ranks(config: TrainConfig, run: Path, act: Callable[[], None] | None = None) -> list[Any]:
    """Train on two gloo ranks, forked from this process; the second does something in its second step."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    ends = []
    for number in range(2):
        here, there = context.Pipe(duplex=False)
        process = context.Process(
            target=rank, args=(number, port, config, run, act if number else None, there)
        )
        process.start()
        there.close()
        ends.append((process, here))
    said = [here.recv() if here.poll(120) else "no answer" for _, here in ends]
    for process, _ in ends:
        process.join(5)
        process.kill()
    return said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_ranks_of_a_launcher_are_one_run_and_stop_at_one_step(
    settings: Settings, tmp_path: Path, number: int
) -> None:
    """Nothing says trainer.devices, and only the second rank hears the signal."""
    config = settings(max_steps=2000, checkpoint_every=10000, trainer__accelerator="cpu")
    run = tmp_path / "run"
    (first, printed), (second, silence) = two_ranks(config, run, lambda: os.kill(os.getpid(), number))
    assert first.step == second.step
    assert 2 < first.step < 2000
    assert (first.leader, second.leader) == (True, False)
    assert list(checkpoints_of(run)) == [first.step]
    assert [row["step"] for row in read_metrics(run / "metrics.csv")] == list(range(1, first.step + 1))
    assert read_starts(run)[0]["devices"] == 2
    assert signal.Signals(number).name in printed
    assert silence == ""
