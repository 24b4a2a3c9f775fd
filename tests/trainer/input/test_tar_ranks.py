"""Training from tars on two gloo ranks: who sees which image, who reads which tar, a kill, a damaged tar."""

from __future__ import annotations

import json
import os
import shutil
import signal
import tarfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from repa.data.tars.cache import TarCache
from repa.data.tars.export import export_cache, export_pattern
from repa.data.tars.order import tar_permutation
from repa.data.testing import synthetic_cache
from repa.trainer.input.tar_stream import TarLoader
from repa.trainer.run.metrics import read_metrics
from repa.trainer.step.checkpoints import checkpoints_of, load_checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable

    from repa.trainer.config import TrainConfig
    from warmed import Ended, Warmed

    Settings = Callable[..., TrainConfig]

ROWS, SHARD, BATCH = 48, 8, 6
INVALID = dict.fromkeys((3, 9, 17, 31, 32, 46), "x")  # one in each tar: both ranks have 21 rows an epoch
EPOCH = 7  # steps
BUFFER = 5

# notes, rank by rank, the batches that are trained on and the tars that are read
RANK = """
import json, os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from repa.cli import main
from repa.data.tars.cache import TarCache
from repa.trainer.input import tar_stream
from repa.trainer.input.datamodule import CacheData
from repa.trainer.models.sit import SIT_SIZES, SiTSize
from repa.trainer.run.metrics import MetricsFile

def note(**values):
    with open(f"{sys.argv[1]}-{os.environ.get('LOCAL_RANK', '0')}.jsonl", "a") as file:
        file.write(json.dumps(values) + "\\n")

def samples(self, shard, columns_of, read=TarCache.samples):
    note(tar=shard)
    return read(self, shard, columns_of)

def permutation(seed, epoch, count, drawn=tar_stream.tar_permutation):
    note(epoch=epoch)
    return drawn(seed, epoch, count)

def transfer(self, batch, device, index, move=CacheData.transfer_batch_to_device):
    note(step=batch.step, micro=batch.micro, rows=batch.rows.tolist(), label=batch.label.tolist(),
         sums={name: values.double().sum().item() for name, values in batch.columns.items()})
    return move(self, batch, device, index)

def write(self, step, values, write=MetricsFile.write):
    write(self, step, values)
    if step == int(sys.argv[2]):  # rank 0 alone writes metrics
        os.kill(os.getpid(), signal.SIGKILL)

TarCache.samples = samples
tar_stream.tar_permutation = permutation
CacheData.transfer_batch_to_device = transfer
MetricsFile.write = write

if __name__ == "__main__":
    SIT_SIZES["T"] = SiTSize(depth=2, width=48, heads=3)
    main(["train", "--config", sys.argv[3], "--run", sys.argv[1], *sys.argv[4:]])
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("export")
    synthetic_cache(folder / "cache", num_rows=ROWS, shard_rows=SHARD, invalid=INVALID, views=("a", "b"))
    done = export_cache(folder / "cache", folder / "out")
    return export_pattern(folder / "out", done.shards)


def two_ranks(warmed: Warmed, config: TrainConfig, run: Path, *flags: str, kill_at: int = 0) -> list[Ended]:
    script, file = run.with_name("rank.py"), run.with_name("config.yaml")
    script.write_text(RANK)
    file.write_text(config.to_yaml())
    return warmed.run(script, run, kill_at, file, *flags, ranks=2)


def notes_of(run: Path, rank: int) -> list[dict[str, Any]]:
    file = run.with_name(f"{run.name}-{rank}.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()]


def batches_of(notes: list[dict[str, Any]], steps: range) -> list[dict[str, Any]]:
    """The micro-batches of some steps, in the order they were trained on."""
    return [each for each in notes if each.get("step") in steps]


def undisturbed(pattern: str, rank: int, steps: int) -> list[dict[str, Any]]:
    """What a rank sees of a run that nothing stops."""
    columns = ("sd-vae/moments", "demo/patch")
    loader = TarLoader(
        TarCache(pattern, columns),
        batch_size=BATCH,
        columns_at=lambda step: columns,
        rank=rank,
        world=2,
        buffer=BUFFER,
    )
    found = []
    for _, batch in zip(range(steps), loader, strict=False):
        sums = {name: values.double().sum().item() for name, values in batch.columns.items()}
        rows, labels = batch.rows.tolist(), batch.label.tolist()
        found.append({"step": batch.step, "micro": 0, "rows": rows, "label": labels, "sums": sums})
    loader.close()
    return found


def config_of(settings: Settings, pattern: str) -> TrainConfig:
    return settings(
        cache=pattern,
        max_steps=16,
        batch_size=BATCH,
        shuffle_buffer=BUFFER,
        checkpoint_every=4,
        trainer__devices=2,
        trainer__accelerator="cpu",
    )


def tars_of(notes: list[dict[str, Any]]) -> list[tuple[int, list[int]]]:
    """Epoch → its tars in the order they were read, epoch after epoch."""
    found: list[tuple[int, list[int]]] = []
    for each in notes:
        if "epoch" in each:
            found.append((each["epoch"], []))
        elif "tar" in each:
            found[-1][1].append(each["tar"])
    return found


@pytest.mark.slow
def test_two_ranks_share_the_tars_and_go_on_after_a_kill(
    settings: Settings, exported: str, tmp_path: Path, warmed: Warmed
) -> None:
    run = tmp_path / "run"
    killed, other = two_ranks(warmed, config_of(settings, exported), run, kill_at=10)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert other.returncode == 1, other.stderr
    assert max(checkpoints_of(run)) == 8
    first = [notes_of(run, rank) for rank in range(2)]
    resumed = two_ranks(warmed, config_of(settings, exported), run, "--cache", f"pipe:cat '{exported}'")
    assert [each.returncode for each in resumed] == [0, 0], resumed
    second = [notes_of(run, rank)[len(first[rank]) :] for rank in range(2)]

    seen: dict[int, list[int]] = {0: [], 1: []}
    for rank in range(2):
        expected = undisturbed(exported, rank, 16)
        assert batches_of(first[rank], range(10)) == expected[:10]
        # steps 8 and 9 are made again, and are the same
        assert batches_of(second[rank], range(16)) == expected[8:]
        for batch in [*batches_of(first[rank], range(8)), *batches_of(second[rank], range(8, 2 * EPOCH))]:
            seen[batch["step"] // EPOCH] += batch["rows"]
    valid = sorted(set(range(ROWS)) - INVALID.keys())
    assert sorted(seen[0]) == sorted(seen[1]) == valid
    assert seen[0] != seen[1]

    for attempt, begins in ((first, 0), (second, 1)):
        read = [tars_of(attempt[rank]) for rank in range(2)]
        assert read[0][0][0] == read[1][0][0] == begins  # nothing of an epoch that is over is read again
        for rank in range(2):
            for epoch, tars in read[rank]:
                own = tar_permutation(0, epoch, 6)[rank::2].tolist()
                assert tars == own[: len(tars)]
        # within an epoch, no tar is read by both or twice: all six are shared out
        assert sorted(read[0][0][1] + read[1][0][1]) == list(range(6))
    assert [row["step"] for row in read_metrics(run / "metrics.csv")] == list(range(1, 17))
    assert load_checkpoint(checkpoints_of(run)[16])["CacheData"] == {"images_seen": 16 * BATCH}


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_damaged_tar_of_one_rank_is_a_line_of_each(
    settings: Settings, exported: str, tmp_path: Path, rank: int, warmed: Warmed
) -> None:
    """That of the rank that read it names the tar and the member; the other says that it is not the cause."""
    for file in Path(exported).parent.glob("*.tar"):
        shutil.copy(file, tmp_path)
    damaged = int(tar_permutation(0, 0, 6)[2 + rank])  # the second tar of the rank
    file = tmp_path / f"shard-{damaged:06d}.tar"
    with tarfile.open(file) as tar:
        member = next(each for each in tar if each.name.endswith("demo.patch.npy") and each.offset > 20_000)
    os.truncate(file, member.offset_data + 40)
    ended = two_ranks(warmed, config_of(settings, export_pattern(tmp_path, 6)), tmp_path / "run")
    assert [each.returncode for each in ended] == [1, 1]
    assert [each.stderr.count("\n") for each in ended] == [1, 1], ended
    lines = ended[rank].stderr.splitlines() + ended[1 - rank].stderr.splitlines()
    assert lines[1].startswith("error: another process of this run has ended (Connection ")
    assert lines[0] == (
        f"error: {file} was cut off: it ends at byte {member.offset_data + 40}, in {member.name}, "
        "without an end mark; fetch or write it again"
    )
