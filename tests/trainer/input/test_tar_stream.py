"""Training from tars: which images come, resume, ranks, damage, and what is refused."""

from __future__ import annotations

import io
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from repa.commands.train import TrainFlags, train
from repa.data.errors import CacheError, RepaError
from repa.data.format.columns import MOMENTS
from repa.data.reading.loader import Batch
from repa.data.tars.cache import TarCache, manifest_of
from repa.data.tars.export import export_cache, export_pattern
from repa.data.testing import expected_labels, expected_row, synthetic_cache
from repa.trainer.input.tar_stream import TarLoader
from repa.trainer.run.checked import ProblemsError
from rich.console import Console

ROWS, SHARD = 45, 8
INVALID = {3: "x", 17: "x", 40: "x"}
COLUMNS = (MOMENTS, "demo/patch")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("export")
    synthetic_cache(folder / "cache", num_rows=ROWS, shard_rows=SHARD, invalid=INVALID, views=("a", "b"))
    done = export_cache(folder / "cache", folder / "out")
    return export_pattern(folder / "out", done.shards)


def loader(pattern: str, **changes: object) -> TarLoader:
    settings: dict[str, object] = {"batch_size": 6, "columns_at": lambda step: COLUMNS, "buffer": 10}
    return TarLoader(TarCache(pattern, COLUMNS), **{**settings, **changes})  # type: ignore[arg-type]


def take(tars: TarLoader, count: int) -> list[Batch]:
    try:
        return [batch for batch, _ in zip(tars, range(count), strict=False)]
    finally:
        tars.close()


def rows_of(batches: list[Batch]) -> list[int]:
    return [row for batch in batches for row in batch.rows.tolist()]


def test_values_labels_and_views_are_the_caches(exported: str) -> None:
    manifest = manifest_of(exported)
    batches = take(loader(exported), 14)
    assert [batch.step for batch in batches] == list(range(14))
    assert [batch.images_seen for batch in batches] == [6 * step for step in range(1, 15)]
    labels = expected_labels(ROWS, 3)
    seen = set()
    for batch in batches:
        assert batch.label.tolist() == labels[batch.rows].tolist()
        for position, row in enumerate(batch.rows.tolist()):
            views = [
                view
                for view in range(2)
                if all(
                    np.array_equal(
                        batch.columns[name][position].numpy(),
                        expected_row(name, row, manifest.columns[name], view=view),
                    )
                    for name in COLUMNS
                )
            ]
            assert views == [batch.views[position].item()]  # all columns of a row are of one view, and this
            seen |= set(views)
    assert seen == {0, 1}


def test_an_epoch_is_every_valid_row_once(exported: str) -> None:
    valid = sorted(set(range(ROWS)) - INVALID.keys())
    rows = rows_of(take(loader(exported), 14))
    assert sorted(rows[:42]) == sorted(rows[42:]) == valid
    assert rows[:42] != rows[42:]
    assert rows_of(take(loader(exported), 14)) == rows
    assert rows_of(take(loader(exported, seed=1), 7)) != rows[:42]
    assert rows_of(take(loader(exported, buffer=1), 7)) != valid  # the tars are shuffled


@pytest.mark.parametrize("world", [2, 3, 6])
def test_ranks_have_tars_of_their_own(exported: str, world: int) -> None:
    steps = loader(exported, world=world).epoch_steps
    shards: list[set[int]] = []
    rows: list[int] = []
    for rank in range(world):
        own = rows_of(take(loader(exported, rank=rank, world=world), steps))
        assert len(own) == steps * 6 // world
        rows += own
        shards.append({row // SHARD for row in own})
    assert len(set(rows)) == len(rows)
    assert sum(map(len, shards)) == len(set().union(*shards))


def test_resume_is_exact_with_as_many_ranks(exported: str) -> None:
    for world, rank in ((1, 0), (2, 1)):
        whole = take(loader(exported, world=world, rank=rank, accumulate=3 // world), 24)
        for step in (1, 5, 6, 7, 10):
            micro = 3 // world
            again = loader(exported, world=world, rank=rank, accumulate=micro, images_seen=6 * step)
            found = take(again, 6)
            for one, other in zip(found, whole[step * micro :], strict=False):
                assert (one.step, one.micro) == (other.step, other.micro)
                assert torch.equal(one.rows, other.rows)
                assert all(torch.equal(one.columns[name], other.columns[name]) for name in COLUMNS)


def test_resume_skips_tars_that_are_done(exported: str, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[int] = []
    samples = TarCache.samples

    def noted(self: TarCache, shard: int, columns_of: object) -> object:
        opened.append(shard)
        return samples(self, shard, columns_of)  # type: ignore[arg-type]

    monkeypatch.setattr(TarCache, "samples", noted)
    last = take(loader(exported, images_seen=36), 1)
    shards = {row // SHARD for row in last[0].rows.tolist()}
    assert set(opened[: len(shards)]) == shards


def test_columns_follow_the_step(exported: str) -> None:
    tars = loader(exported, columns_at=lambda step: COLUMNS if step < 9 else (MOMENTS,))
    batches = take(tars, 14)
    assert [len(batch.columns) for batch in batches] == [2] * 9 + [1] * 5


def test_damage_reaches_who_waits_for_a_batch(exported: str, tmp_path: Path) -> None:
    for number in range(6):
        source = Path(exported).parent / f"shard-00000{number}.tar"
        data = bytearray(source.read_bytes())
        if number == 4:
            data[data.index(b"sd-vae.moments.npy", 20_000) + 512 + 300] ^= 1
        (tmp_path / source.name).write_bytes(data)
    with pytest.raises(CacheError, match=r"row 3\d in .*shard-000004\.tar.* does not match its checksum"):
        take(loader(export_pattern(tmp_path, 6)), 7)
    (tmp_path / "shard-000004.tar").write_bytes(data[:9000])
    with pytest.raises(RepaError, match=r"000004\.tar"):
        take(loader(export_pattern(tmp_path, 6)), 7)
    left = [thread for thread in threading.enumerate() if thread.name == "repa-tars"]
    for thread in left:
        thread.join(600)
    assert not any(thread.is_alive() for thread in left)


def test_tars_must_be_all_and_in_order(exported: str) -> None:
    folder = Path(exported).parent
    with pytest.raises(CacheError, match="names 2 tars, the export has 6"):
        TarCache(f"{folder}/shard-{{000000..000001}}.tar", COLUMNS)
    with pytest.raises(CacheError, match=r"is shard \d, named as number \d"):
        take(loader(f"{folder}/shard-{{000005..000000}}.tar"), 1)
    with pytest.raises(CacheError, match="has no column other/patch"):
        TarCache(exported, ("other/patch",))
    with pytest.raises(RepaError, match="cannot be shared among 7 ranks"):
        loader(exported, world=7, batch_size=7)
    with pytest.raises(RepaError, match="does not divide"):
        loader(exported, accumulate=4)


def run_train(pattern: str, run: Path, **changes: object) -> str:
    output = io.StringIO()
    settings = [
        "preview_every=0",
        "method.projector_width=16",
        "method.depth=1",
        "log_every=1",
        "checkpoint_every=2",
        "shuffle_buffer=10",
    ]
    arguments: dict[str, object] = {
        "model": "SiT-T/2",
        "cache": pattern,
        "run": run,
        "max_steps": 3,
        "batch_size": 6,
        "assignments": [*settings, *changes.pop("more", [])],  # type: ignore[misc]
    }
    flags = TrainFlags(**{**arguments, **changes})  # type: ignore[arg-type]
    train(flags, console=Console(file=output, width=300))
    return output.getvalue()


def test_repa_train_reads_tars_and_resumes(exported: str, tmp_path: Path, tiny: str) -> None:
    said = run_train(exported, tmp_path / "run", max_steps=9)
    assert "images come from tars in sequence" in said
    assert "each epoch leaves out 0 of 42 images" in said
    run_train(exported, tmp_path / "parts", max_steps=4)
    assert "resuming" in run_train(f"pipe:cat '{exported}'", tmp_path / "parts", max_steps=9)
    whole, parts = (
        [line.split(",")[:3] for line in (tmp_path / name / "metrics.csv").read_text().splitlines()]
        for name in ("run", "parts")
    )
    assert whole == parts
    # the rows are those of the cache, their order is not
    cache = str(Path(exported).parent.parent / "cache")
    with pytest.raises(CacheError, match=r"the cache is not the one .* \(order changed\)"):
        run_train(cache, tmp_path / "parts", max_steps=12)


def test_what_tars_cannot_do_is_a_problem(exported: str, tmp_path: Path, tiny: str) -> None:
    with pytest.raises(RepaError, match="holdout=4: rows cannot be held out of tars"):
        run_train(exported, tmp_path / "run", more=["holdout=4"])
    with pytest.raises(RepaError, match="order=blocks is of caches"):
        run_train(exported, tmp_path / "run", more=["order=blocks"])
    with pytest.raises(RepaError, match="live teachers cannot be called beside tars"):
        run_train(exported, tmp_path / "run", targets="online")
    with pytest.raises(RepaError, match="larger than what 1 rank can be sure of among 42 images"):
        run_train(exported, tmp_path / "run", batch_size=50)
    with pytest.raises(ProblemsError) as refused:
        run_train(exported, tmp_path / "run", method="reg", more=["method.standardise=true"])
    assert [problem.field for problem in refused.value.problems] == ["method.standardise"]
    assert "step" in run_train(exported, tmp_path / "reg", method="reg", max_steps=1)
    pattern = f"{tmp_path}/none-{{0..3}}.tar"
    with pytest.raises(RepaError) as caught:
        run_train(pattern, tmp_path / "run")
    said = f"{pattern} names 4 tars, of which 4 tars cannot be found, first {tmp_path}/none-0.tar"
    assert said in str(caught.value)
    assert "fetch what is missing, or name only tars that are there" in str(caught.value)
