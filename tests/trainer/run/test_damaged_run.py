"""What a run's folder holds is data: whatever it is, one line says so."""

from __future__ import annotations

import json
import resource
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from repa.data.errors import RepaError
from repa.trainer.run.metrics import MetricsFile, read_metrics
from repa.trainer.run.starts import read_starts
from repa.trainer.step.checkpoints import AtomicCheckpointIO, checkpoint_path, checkpoints_of, load_checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable

    from repa.trainer.config import TrainConfig

    Settings = Callable[..., TrainConfig]
    Fit = Callable[..., Any]

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


def one_line(error: RepaError) -> None:
    assert "\n" not in str(error)
    assert str(error).isprintable()


@pytest.fixture
def checkpoint(settings: Settings, undisturbed: Callable[..., Path]) -> dict[str, Any]:
    """A checkpoint of a run of one step."""
    run = undisturbed(settings(max_steps=1))
    values: dict[str, Any] = torch.load(checkpoint_path(run, 1), weights_only=True)
    return values


DAMAGE: dict[str, Callable[[dict[str, Any]], object]] = {
    "state_dict": lambda values: values.pop("state_dict"),
    "state_dict ": lambda values: values.update(state_dict={"a": 1}),
    "global_step": lambda values: values.update(global_step="2"),
    "version": lambda values: values["repa"].pop("version"),
    "backbone": lambda values: values["repa"].update(backbone=3),
    "latent.scaling_factor": lambda values: values["repa"]["latent"].update(scaling_factor="1"),
    "means.sums": lambda values: values["repa"]["means"].update(sums={"loss": "x"}),
    "means": lambda values: values["repa"].pop("means"),
    "objective": lambda values: values["repa"].pop("objective"),
}


@pytest.mark.parametrize("field", DAMAGE)
def test_a_damaged_checkpoint_is_one_line(checkpoint: dict[str, Any], field: str, tmp_path: Path) -> None:
    DAMAGE[field](checkpoint)
    torch.save(checkpoint, tmp_path / "a.ckpt")
    with pytest.raises(RepaError) as caught:
        load_checkpoint(tmp_path / "a.ckpt")
    one_line(caught.value)
    assert caught.value.field == field.strip()


@settings(max_examples=60)
@given(value=PLAIN | st.dictionaries(st.just("repa"), PLAIN))
def test_no_checkpoint_at_all(value: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "a.ckpt"
    torch.save(value, path)
    with pytest.raises(RepaError) as caught:
        load_checkpoint(path)
    one_line(caught.value)


@settings(max_examples=60)
@given(raw=st.binary(max_size=300))
def test_bytes_of_anything(raw: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.getbasetemp()
    (folder / "a.ckpt").write_bytes(raw)
    with pytest.raises(RepaError) as caught:
        load_checkpoint(folder / "a.ckpt")
    one_line(caught.value)


@pytest.mark.parametrize("key", ["loops", "optimizer_states", "CacheData", "callbacks", "weights"])
def test_what_lightning_cannot_restore(
    settings: Settings, run_fit: Fit, tmp_path: Path, checkpoint: dict[str, Any], key: str
) -> None:
    """Its own state is not ours to type: what it cannot take is one line all the same."""
    run_fit(settings(max_steps=1))
    if key == "weights":
        del checkpoint["state_dict"]["ema.final_layer.linear.bias"]
    else:
        checkpoint[key] = 5
    torch.save(checkpoint, checkpoint_path(tmp_path / "run", 1))
    with pytest.raises(RepaError) as caught:
        run_fit(settings(max_steps=2))
    one_line(caught.value)
    assert caught.value.field == "--from-step"


@settings(max_examples=150)
@given(value=PLAIN | st.fixed_dictionaries({"starts": PLAIN | st.lists(PLAIN | st.fixed_dictionaries({}))}))
def test_run_json_of_anything(value: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    run = tmp_path_factory.getbasetemp()
    (run / "run.json").write_text(json.dumps(value))
    try:
        starts = read_starts(run)
    except RepaError as error:
        one_line(error)
    else:
        assert all(isinstance(each, dict) for each in starts)


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ('{"starts": 5}', "starts"),
        ('{"starts": [{"first_step": "a"}]}', "starts.0.first_step"),
        ('{"starts": [{"live": []}]}', "starts.0.live"),
        ("{}", "starts"),
    ],
)
def test_run_json_of_another_type(text: str, field: str, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(RepaError) as caught:
        read_starts(tmp_path)
    assert caught.value.field == field


@settings(max_examples=150)
@given(
    raw=st.binary(max_size=80)
    | st.lists(st.binary(max_size=12)).map(lambda lines: b"step,a\n" + b"\n".join(lines))
)
def test_metrics_of_anything(raw: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "metrics.csv"
    path.write_bytes(raw)
    for read in (read_metrics, lambda file: MetricsFile(file, resumed_step=10**17)):
        try:
            read(path)
        except RepaError as error:
            one_line(error)


ROWS = b"step,loss\n1,0.5\n2,0.25\n"


@pytest.mark.parametrize(
    "tail",
    [b"\xff\xfe\x00\n", b"3,0.1,9\n", b"0" * 140_000 + b"3,1\n", b"\0" * 30 + b"\n", b"x,1\n", b"3,one\n"],
)
def test_damage_after_the_rows_of_a_checkpoint_is_dropped(tail: bytes, tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_bytes(ROWS + tail)
    # a checkpoint that says how many rows it counts on
    assert len(MetricsFile(path, resumed_step=2, rows=2)) == 2
    assert path.read_bytes() == ROWS
    for rows in (3, None):
        path.write_bytes(ROWS + tail)
        with pytest.raises(RepaError) as caught:
            MetricsFile(path, resumed_step=2, rows=rows)
        assert caught.value.field == "metrics.csv"
        assert path.read_bytes() == ROWS + tail


def test_rows_that_are_missing_are_said(settings: Settings, run_fit: Fit, tmp_path: Path) -> None:
    run_fit(settings(max_steps=3))
    (tmp_path / "run" / "metrics.csv").unlink()
    _, printed = run_fit(settings(max_steps=4))
    assert "lacks 3 rows" in printed
    assert [row["step"] for row in read_metrics(tmp_path / "run" / "metrics.csv")] == [4]


def test_a_checkpoint_larger_than_the_disk_takes(tmp_path: Path) -> None:
    """torch makes another error of it; a limit on the size of files stands for a full disk."""
    import signal

    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        for count in (10_000, 30_000, 300_000):
            place = tmp_path / "run" / "checkpoints" / f"{count}.ckpt"
            tensors = {str(number): torch.zeros(count) for number in range(3)}
            if count == 10_000:
                AtomicCheckpointIO().save_checkpoint(tensors, place)
                continue
            with pytest.raises(RepaError) as caught:
                AtomicCheckpointIO().save_checkpoint(tensors, place)
            one_line(caught.value)
            assert str(place) in str(caught.value)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    # nothing half written is left, and the one before is
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["10000.ckpt"]


def test_a_full_disk_ends_a_run_that_goes_on_later(settings: Settings, run_fit: Fit, tmp_path: Path) -> None:
    import signal

    config = settings(max_steps=4, checkpoint_every=2)
    run_fit(config, "whole")
    size = checkpoint_path(tmp_path / "whole", 4).stat().st_size
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, hard))
    try:
        with pytest.raises(RepaError) as caught:
            run_fit(config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    one_line(caught.value)
    assert checkpoints_of(tmp_path / "run") == {}
    outcome, _ = run_fit(config)
    assert outcome.finished
    texts = [(tmp_path / name / "metrics.csv").read_bytes() for name in ("run", "whole")]
    assert texts[0] == texts[1]
