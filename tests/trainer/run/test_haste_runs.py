"""HASTE as a run: what happens at τ to terms, bytes, weights and graphs; killed and resumed; two ranks."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from repa.data.format.columns import MOMENTS, ColumnSpec
from repa.data.format.int8 import dequantise
from repa.data.reading.loader import Batch
from repa.data.testing import SYNTHETIC_COLUMNS, expected_row, synthetic_cache
from repa.trainer import compiling
from repa.trainer.config import TrainConfig
from repa.trainer.run.assembly import assemble
from repa.trainer.run.checked import Checked
from repa.trainer.run.checks import check
from repa.trainer.run.identity import identity_of
from repa.trainer.run.lightning_trainer import make_trainer, quiet_lightning
from repa.trainer.run.metrics import read_metrics
from repa.trainer.step import module
from repa.trainer.step.checkpoints import checkpoints_of
from repa.trainer.step.module import TrainingModule
from warmed import Warmed

Settings = Callable[..., TrainConfig]
Fit = Callable[..., Any]
SameRun = Callable[[Path, Path, int], None]

STOP = 6
TEACHER = ("demo/patch", "demo/q", "demo/k")
SHAPE = (3, 2, 4, 8)


def build_run(config: TrainConfig) -> tuple[TrainingModule, Any, Checked]:
    checked = check(config)
    assert checked.problems == []
    return *assemble(config, checked, identity_of(checked, config)), checked


def states_of(run: Path, step: int) -> dict[str, Any]:
    checkpoint: dict[str, Any] = torch.load(checkpoints_of(run)[step], weights_only=True)
    return checkpoint


def column_of(path: str) -> str | None:
    """The column that a shard file is of."""
    parts = Path(path).parts
    return "/".join(parts[parts.index("c") - 2 : parts.index("c")]) if "c" in parts else None


def test_three_terms_before_tau_and_one_from_tau_on(haste: Settings, run_fit: Fit, tmp_path: Path) -> None:
    run_fit(haste())
    rows = {int(row["step"]) - 1: set(row) for row in read_metrics(tmp_path / "run" / "metrics.csv")}
    plain = {"step", "loss", "velocity", "gradient_norm"}
    aligned = plain | {"repa", "repa_weight", "attention", "attention_weight", "attention_excess"}
    assert [rows[step] == aligned for step in range(10)] == [step < STOP for step in range(10)]
    assert [rows[step] == plain for step in range(10)] == [step >= STOP for step in range(10)]
    for row in read_metrics(tmp_path / "run" / "metrics.csv")[:STOP]:
        assert row["loss"] == pytest.approx(
            row["velocity"] + 0.5 * row["repa"] + 0.5 * row["attention"], rel=1e-6
        )
        assert 0 < row["attention_excess"] < row["attention"]
        assert (row["repa_weight"], row["attention_weight"]) == (0.5, 0.5)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_no_byte_of_the_teacher_is_read_from_tau_on(
    haste: Settings, monkeypatch: pytest.MonkeyPatch, accumulate: int
) -> None:
    """Bytes that `preadv` returned, by the file it read from, whatever was read ahead across τ.

    A row of which a part was in memory is read once more, whole.
    """
    config = haste(accumulate=accumulate)
    module, data, checked = build_run(config)
    assert checked.reader is not None
    read: Counter[str | None] = Counter()
    preadv, lock = os.preadv, threading.Lock()

    def counting(descriptor: int, buffers: Any, offset: int, flags: int = 0) -> int:
        count = preadv(descriptor, buffers, offset, flags)
        if not flags or count == sum(map(len, buffers)):
            column = column_of(os.readlink(f"/proc/self/fd/{descriptor}"))
            with lock:
                read[column] += count
        return count

    monkeypatch.setattr(os, "preadv", counting)
    with quiet_lightning():
        make_trainer(config).fit(module, datamodule=data)
    specs, checksum = checked.reader.manifest.columns, 4
    for column in TEACHER:
        assert read[column] == STOP * config.batch_size * (specs[column].row_bytes + checksum)
        assert checked.reader.bytes_read[column] == STOP * config.batch_size * specs[column].row_bytes
    assert read[MOMENTS] >= config.max_steps * config.batch_size * (specs[MOMENTS].row_bytes + checksum)
    assert set(read) == {MOMENTS, *TEACHER}


def test_batches_lose_the_columns_at_tau(haste: Settings) -> None:
    config = haste()
    module, data, _ = build_run(config)
    data.trainer = make_trainer(config)
    stream = data.train_dataloader()
    batches = [next(stream) for _ in range(STOP + 3)]
    data.teardown("fit")
    for batch in batches:
        expected = (MOMENTS, *TEACHER) if batch.step < STOP else (MOMENTS,)
        assert tuple(batch.columns) == expected == module.columns_at(batch.step)


def test_from_tau_on_it_is_plain_sit(
    haste: Settings, settings: Settings, run_fit: Fit, tmp_path: Path, attention_cache: Path
) -> None:
    """A run of plain SiT that is given the weights and moments of step τ goes the same way to the bit."""
    run_fit(haste(checkpoint_every=STOP), "haste")
    none = {"method": "none", "cache": str(attention_cache), "checkpoint_every": STOP}
    run_fit(settings(**none, max_steps=STOP), "none")
    at_stop, place = states_of(tmp_path / "haste", STOP), checkpoints_of(tmp_path / "none")[STOP]
    begun = torch.load(place, weights_only=True)
    begun["state_dict"] = {key: at_stop["state_dict"][key] for key in begun["state_dict"]}
    moments, theirs = (each["optimizer_states"][0]["state"] for each in (begun, at_stop))
    assert len(moments) < len(theirs)
    # the backbone's parameters come first
    begun["optimizer_states"][0]["state"] = {number: theirs[number] for number in moments}
    torch.save(begun, place)
    run_fit(settings(**none, max_steps=10), "none")
    first, second = (states_of(tmp_path / name, 10) for name in ("haste", "none"))
    for key, value in second["state_dict"].items():
        assert torch.equal(value, first["state_dict"][key]), key
    for number, values in second["optimizer_states"][0]["state"].items():
        for key, value in values.items():
            assert torch.equal(value, first["optimizer_states"][0]["state"][number][key])
    rows = [read_metrics(tmp_path / name / "metrics.csv")[STOP:] for name in ("haste", "none")]
    assert len(rows[0]) == 4
    assert rows[0] == rows[1]
    # and the projectors stay where they were
    projectors = [key for key in at_stop["state_dict"] if key.startswith("method.")]
    assert len(projectors) == 6
    for key in projectors:
        assert torch.equal(first["state_dict"][key], at_stop["state_dict"][key])


def graphs_of(run_fit: Fit, config: TrainConfig, name: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The code of every graph that dynamo captures in a run."""
    codes: list[str] = []

    # losses and projector have graphs of their own
    def keep(graph: torch.fx.GraphModule, _: Any) -> Any:
        codes.append(graph.code)
        return graph.forward

    torch._dynamo.reset()
    with monkeypatch.context() as patch:
        patch.setattr(compiling, "BACKEND", keep)
        patch.setattr(module, "compile_children", lambda method: None)
        patch.setattr(module, "compiled_losses", lambda wanted: nullcontext())
        run_fit(config, name)
    return codes


def test_one_graph_a_phase_and_from_tau_on_that_of_plain_sit(
    haste: Settings, settings: Settings, run_fit: Fit, attention_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = settings(method="none", cache=str(attention_cache), compile=True)
    (graph,) = graphs_of(run_fit, plain, "none", monkeypatch)
    aligned, after = graphs_of(run_fit, haste(compile=True), "haste", monkeypatch)
    assert after == graph
    assert aligned != graph


# whole batches are killed at τ for every method, see `test_every_method`
@pytest.mark.parametrize("accumulate", [pytest.param(1, marks=pytest.mark.thorough), 2])
@pytest.mark.parametrize(
    "resumed",
    [
        *(STOP - 1, STOP, STOP + 1),
        *(pytest.param(each, marks=pytest.mark.thorough) for each in (1, 2, 3, 4, 8, 9)),
    ],
)
def test_killed_and_resumed_around_tau(
    haste: Settings,
    run_fit: Fit,
    killed_fit: Callable[..., None],
    undisturbed: Callable[..., Path],
    same_run: SameRun,
    tmp_path: Path,
    resumed: int,
    accumulate: int,
) -> None:
    """The loader had read ahead over τ when it was killed; sums of a row are carried over."""
    config = haste(log_every=4, checkpoint_every=1, accumulate=accumulate, holdout=7, eval_every=5)
    killed_fit(config, "killed", moment=resumed + 1)
    outcome, _ = run_fit(config, "killed")
    assert outcome.resumed_from == resumed
    same_run(undisturbed(config), tmp_path / "killed", 10)


def test_killed_before_tau_and_resumed_from_long_before(
    haste: Settings, run_fit: Fit, killed_fit: Callable[..., None], same_run: SameRun, tmp_path: Path
) -> None:
    config = haste(log_every=1, checkpoint_every=4)
    run_fit(config, "whole")
    killed_fit(config, "killed", moment=STOP + 2)
    outcome, _ = run_fit(config, "killed")
    assert outcome.resumed_from == 4
    same_run(tmp_path / "whole", tmp_path / "killed", 10)


def direct(batch: Batch, columns: dict[str, ColumnSpec]) -> dict[str, torch.Tensor]:
    """The columns of a batch, not from the cache but from the function of the row that it holds."""
    return {
        name: torch.stack(
            [torch.from_numpy(expected_row(name, int(row), columns[name]).copy()) for row in batch.rows]
        )
        for name in batch.columns
    }


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_cached_targets_are_the_targets(
    haste: Settings, tmp_path: Path, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Full rank float32 from a cache gives the losses of float32 tensors that never were in one, exactly.

    int8 gives those of the decoded numbers.
    """
    columns = {
        **{name: SYNTHETIC_COLUMNS[name] for name in (MOMENTS,)},
        "demo/patch": ColumnSpec(shape=(4, 16), dtype=dtype),
        "demo/q": ColumnSpec(shape=SHAPE, dtype=dtype),
        "demo/k": ColumnSpec(shape=SHAPE, dtype=dtype),
    }
    if dtype == "int8":
        scale = ColumnSpec(shape=(3, 2, 8), dtype="float32")
        columns |= {"demo/patch-scale": ColumnSpec(shape=(16,), dtype="float32")}
        columns |= {"demo/q-scale": scale, "demo/k-scale": scale}
    synthetic_cache(tmp_path / "cache", num_rows=16, columns=columns)
    config = haste(cache=str(tmp_path / "cache"))
    module, data, _ = build_run(config)
    data.trainer = make_trainer(config)
    batch = next(data.train_dataloader())
    data.teardown("fit")
    assert set(batch.columns) == set(columns)
    online = direct(batch, columns)
    for name in columns:
        assert torch.equal(batch.columns[name], online[name])
    found = module.terms(batch)
    if dtype == "int8":
        for name in TEACHER:
            online[name] = dequantise(online[name], online.pop(f"{name}-scale"))
    floats = {name: ColumnSpec(shape=columns[name].shape, dtype="float32") for name in TEACHER}
    monkeypatch.setattr(module.method, "specs", floats)
    batch.columns = online
    expected = module.terms(batch)
    assert list(found) == ["velocity", "repa", "attention", "attention_excess"]
    for name, term in found.items():
        assert torch.equal(term.value, expected[name].value), name


def test_int8_cache_trains(haste: Settings, run_fit: Fit, tmp_path: Path) -> None:
    """Rank-cut, the notes saying the scale of the logits of the teacher's own head width."""
    scale = ColumnSpec(shape=(3, 2, 4), dtype="float32")
    int8 = ColumnSpec(shape=(3, 2, 4, 4), dtype="int8")
    columns = {**SYNTHETIC_COLUMNS, "demo/q": int8, "demo/k": int8}
    columns |= {"demo/q-scale": scale, "demo/k-scale": scale}
    notes = {"demo+attention": {"blocks": [2, 4, 6], "logit_scale": 0.125, "form": "truncated"}}
    synthetic_cache(tmp_path / "cache", num_rows=16, columns=columns, notes=notes)
    config = haste(cache=str(tmp_path / "cache"), method__teacher_blocks="4,6", max_steps=3)
    run_fit(config)
    rows = read_metrics(tmp_path / "run" / "metrics.csv")
    assert all(row["attention_excess"] > 0 for row in rows)
    assert len(rows) == 3


def test_tau_beyond_the_run_is_never_reached(haste: Settings, run_fit: Fit, tmp_path: Path) -> None:
    run_fit(haste(max_steps=2, method__stop=100_000))
    rows = read_metrics(tmp_path / "run" / "metrics.csv")
    assert all("attention" in row for row in rows)


TWO_RANKS = """
import io, sys
from pathlib import Path
from rich.console import Console
import torch
torch.set_num_threads(1)
from repa.trainer.config import build
from repa.trainer.settings_file import load_yaml
from repa.trainer.run.fit import fit
from repa.trainer.models.sit import SIT_SIZES, SiTSize

if __name__ == "__main__":
    SIT_SIZES["T"] = SiTSize(depth=2, width=48, heads=3)
    fit(build(load_yaml(Path(sys.argv[2]))), Path(sys.argv[1]), console=Console(file=io.StringIO()))
"""


@pytest.mark.slow
def test_two_ranks_cross_tau(haste: Settings, tmp_path: Path, warmed: Warmed) -> None:
    """DDP over gloo waits for a gradient of every parameter, the idle projectors' too; none of them moves."""
    config = haste(
        trainer__devices=2,
        trainer__accelerator="cpu",
        checkpoint_every=STOP,
        keep_last=9,
        gradient_angle_every=2,
    )
    script, file = tmp_path / "two_ranks.py", tmp_path / "config.yaml"
    script.write_text(TWO_RANKS)
    file.write_text(config.to_yaml())
    ended = warmed.run(script, tmp_path / "run", file, ranks=2)
    assert [each.returncode for each in ended] == [0, 0], ended
    rows = read_metrics(tmp_path / "run" / "metrics.csv")
    assert ["attention" in row for row in rows] == [step < STOP for step in range(10)]
    assert [row["step"] for row in rows if "gradient_angle" in row] == [2, 4, 6]
    before, after = (states_of(tmp_path / "run", step) for step in (STOP, 10))
    for key, value in after["state_dict"].items():
        assert torch.equal(value, before["state_dict"][key]) == key.startswith(("method.",)) or "pos" in key
