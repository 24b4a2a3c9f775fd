"""The shard loop: batches, lanes, the writer thread, ranks and processes."""

from __future__ import annotations

import hashlib
import threading
import time
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from repa.data.errors import RepaError
from repa.data.format.columns import MOMENTS, ColumnSpec
from repa.data.format.manifest import Manifest
from repa.data.format.opening import labels_sha256
from repa.data.format.survey import committed_shards, invalid_reasons
from repa.data.testing import synthetic_provenance
from repa.data.writing.store import ensure_cache, ensure_source, keys_sha256
from repa.data.writing.writer import SourceWriter
from repa.pipeline.lanes.batches import Batch, batches
from repa.pipeline.lanes.encoded import EncodedBatch, Result
from repa.pipeline.lanes.lanes import Task, open_lanes
from repa.pipeline.shard_loop.ranks import Rank, detect_rank
from repa.pipeline.shard_loop.writer_thread import WriterThread

if TYPE_CHECKING:
    from collections.abc import Sequence

PIXELS = np.zeros((3, 4, 4), np.uint8)
COLUMNS = {MOMENTS: ColumnSpec(shape=(2, 1, 1), dtype="float32")}
ROWS, SHARD = 10, 4
KEYS = [f"c/{row}.png" for row in range(ROWS)]


def manifest() -> Manifest:
    return Manifest(
        num_rows=ROWS,
        shard_rows=SHARD,
        resolution=4,
        crop="adm-center",
        exif_orientation="ignored",
        source_kind="synthetic",
        source_fingerprint="sha256:0",
        keys_sha256=keys_sha256(KEYS),
        labels_sha256=labels_sha256(np.zeros(ROWS, np.int32)),
        class_names=("c",),
    )


def grouped(invalid: dict[int, str], batch_size: int, shards: range = range(3)) -> list[Batch]:
    made = manifest()
    rows = [row for shard in shards for row in made.shard_range(shard)]
    return list(batches(((row, invalid.get(row, PIXELS)) for row in rows), made, batch_size))


def test_batches_restart_at_each_shard() -> None:
    assert [(b.shard, b.rows, b.last) for b in grouped({}, 3)] == [
        (0, [0, 1, 2], False),
        (0, [3], True),
        (1, [4, 5, 6], False),
        (1, [7], True),
        (2, [8, 9], True),
    ]


def test_batches_fill_up_over_invalid_rows() -> None:
    made = grouped({1: "bad", 4: "bad", 5: "bad", 6: "bad", 7: "bad", 9: "worse"}, 2)
    assert [(b.shard, b.rows, b.invalid, b.last) for b in made] == [
        (0, [0, 2], {1: "bad"}, False),
        (0, [3], {}, True),
        (1, [], {4: "bad", 5: "bad", 6: "bad", 7: "bad"}, True),
        (2, [8], {9: "worse"}, True),
    ]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 7])
def test_batches_of_a_shard_do_not_depend_on_the_others(batch_size: int) -> None:
    invalid = {2: "bad", 5: "bad"}
    together = {s: [b.rows for b in grouped(invalid, batch_size) if b.shard == s] for s in range(3)}
    for shard in range(3):
        assert [b.rows for b in grouped(invalid, batch_size, range(shard, shard + 1))] == together[shard]


def encoded(
    shard: int, rows: list[int], *, last: bool, invalid: dict[int, str] | None = None
) -> EncodedBatch:
    values = np.arange(len(rows) * 2, dtype=np.float32).reshape(len(rows), 1, 2, 1, 1)
    return EncodedBatch(
        shard=shard,
        sources=("sd-vae",),
        rows=rows,
        invalid=invalid or {},
        columns={MOMENTS: values},
        finite={MOMENTS: np.ones(len(rows), bool)},
        last=last,
    )


@pytest.fixture
def cache(tmp_path):
    path = tmp_path / "cache"
    ensure_cache(path, manifest(), KEYS, np.zeros(ROWS, np.int32))
    return path, ensure_source(path, "sd-vae", synthetic_provenance("sd-vae", COLUMNS), COLUMNS)


class Computed:
    """A batch that is ready, or a failure."""

    def __init__(self, batch: EncodedBatch | None) -> None:
        self.batch = batch

    def ready(self, timeout: float) -> bool:
        return True

    def result(self) -> Result:
        if self.batch is None:
            raise MemoryError("lane")
        return Result(self.batch, {"sd-vae": 0.5})


class Endless(Computed):
    """A batch that is never ready."""

    def ready(self, timeout: float) -> bool:
        time.sleep(timeout)
        return False


def put_all(thread: WriterThread, made: Sequence[EncodedBatch | None]) -> None:
    for batch in made:
        thread.put(Computed(batch))
        time.sleep(0.01)


def writer_of(cache, writer: SourceWriter, **options) -> WriterThread:
    return WriterThread({"sd-vae": writer}, cache[1], KEYS, **options)


def test_writer_commits_a_shard_with_its_last_batch(cache) -> None:
    path, made = cache
    seen = []
    with SourceWriter(path, made, "sd-vae", range(3)) as source:
        with writer_of(cache, source, on_batch=lambda sources, rows: seen.append((sources, rows))) as thread:
            thread.put(Computed(encoded(0, [0, 2], last=False, invalid={1: "bad"})))
            thread.put(Computed(encoded(0, [3], last=True)))
            thread.put(Computed(encoded(1, [4, 5], last=False)))
        # shard 1 never came to its end: nothing of it stays
        assert committed_shards(path, made, "sd-vae") == [0]
    assert invalid_reasons(path, made) == {1: "bad"}
    assert seen == [(("sd-vae",), 3), (("sd-vae",), 1), (("sd-vae",), 2)]
    assert thread.written.rows == {"sd-vae": 3}
    assert thread.written.bytes == {MOMENTS: 3 * 8}
    assert thread.written.invalid == {1: "bad"}
    assert thread.written.busy_seconds == {"sd-vae": 1.5}
    assert thread.written.write_seconds > 0
    assert not list(path.rglob("*.partial"))


def test_an_error_of_the_writer_stops_the_loop_with_its_cause(cache) -> None:
    path, made = cache
    bad = encoded(0, [0, 1, 2, 3], last=True)
    bad = replace(bad, columns={MOMENTS: bad.columns[MOMENTS].astype(np.float64)})
    with SourceWriter(path, made, "sd-vae", range(3)) as source:
        with pytest.raises(RuntimeError, match="writer thread") as caught, writer_of(cache, source) as thread:
            put_all(thread, [bad] * 100)
        assert isinstance(caught.value.__cause__, ValueError)
    assert committed_shards(path, made, "sd-vae") == []
    assert not list(path.rglob("*.partial"))


@pytest.mark.parametrize(
    ("dtype", "value", "expected"),
    [(np.float16, np.inf, "65504"), (np.float16, np.nan, "not finite"), (np.float32, np.inf, "not finite")],
)
def test_a_value_that_is_not_finite_names_image_source_and_remedy(cache, dtype, value, expected: str) -> None:
    path, made = cache
    values = np.zeros((2, 2, 1, 1), dtype)
    values[1, 0] = value
    batch = replace(
        encoded(1, [4, 6], last=False, invalid={5: "bad"}),
        columns={MOMENTS: values},
        finite={MOMENTS: np.array([True, False])},
    )
    with (
        SourceWriter(path, made, "sd-vae", range(3)) as source,
        pytest.raises(RepaError) as caught,
        writer_of(cache, source) as thread,
    ):
        put_all(thread, [encoded(0, [0, 1, 2, 3], last=True), batch])
    message = str(caught.value)
    for part in (expected, "c/6.png", "sd-vae/moments", "--"):
        assert part in message
    assert "\n" not in message
    assert committed_shards(path, made, "sd-vae") == [0]


def test_the_queue_is_bounded_and_an_interrupt_leaves_no_thread(cache) -> None:
    path, made = cache
    release = threading.Event()

    def interrupted(thread: WriterThread) -> None:
        threading.Timer(0.3, release.set).start()
        for shard, rows in enumerate(([0, 1, 2, 3], [4, 5, 6, 7], [8, 9])):
            thread.put(Computed(encoded(shard, rows, last=True)))
        # the last has waited until the first was through
        assert release.is_set()
        raise KeyboardInterrupt

    with (
        SourceWriter(path, made, "sd-vae", range(3)) as source,
        pytest.raises(KeyboardInterrupt),
        writer_of(cache, source, depth=1, on_batch=lambda *_: release.wait(600)) as thread,
    ):
        interrupted(thread)
    assert not [each for each in threading.enumerate() if each.name == "repa-writer"]
    assert not list(path.rglob("*.partial"))


def test_a_failure_of_a_lane_is_raised_with_its_cause(cache) -> None:
    path, made = cache
    with (
        SourceWriter(path, made, "sd-vae", range(3)) as source,
        pytest.raises(RuntimeError) as caught,
        writer_of(cache, source) as thread,
    ):
        put_all(thread, [encoded(0, [0, 1, 2, 3], last=True), None])
    assert isinstance(caught.value.__cause__, MemoryError)
    assert committed_shards(path, made, "sd-vae") == [0]


def test_an_interrupt_does_not_wait_for_a_batch_under_way(cache) -> None:
    path, made = cache

    def interrupted(thread: WriterThread) -> None:
        put_all(thread, [encoded(0, [0, 1], last=False)])
        thread.put(Endless(None))
        raise KeyboardInterrupt

    with (
        SourceWriter(path, made, "sd-vae", range(3)) as source,
        pytest.raises(KeyboardInterrupt),
        writer_of(cache, source) as thread,
    ):
        interrupted(thread)
    assert not list(path.rglob("*.partial"))


class Network:
    """A model of the operations whose last bits depend on PyTorch's intra-op threads."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.weight = torch.randn(64, 32, 1, 1, generator=generator)
        self.first = torch.randn(32, 3, 3, 3, generator=generator)

    def encode(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        x = torch.nn.functional.conv2d(images.float() / 255, self.first, padding=1)
        x = torch.nn.functional.silu(torch.nn.functional.group_norm(x, 8))
        return {"sd-vae/moments": torch.nn.functional.conv2d(x, self.weight)}


def digests(threads: int) -> list[str]:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 3, 33, 31), np.uint8)
    task = Task(model="sd-vae", sources=("sd-vae",), compute=Network().encode)
    results = []
    with open_lanes("cpu", threads) as lanes:
        waits = [
            lanes.submit(Batch(shard=0, rows=list(range(a, a + 5)), images=list(pixels[a : a + 5])), [task])
            for a in range(0, 20, 5)
        ]
        for pending in waits:
            result = pending.result()
            assert result.batch.finite["sd-vae/moments"].all()
            assert result.seconds["sd-vae"] > 0
            results.append(hashlib.sha256(result.batch.columns["sd-vae/moments"].tobytes()).hexdigest())
    return results


def test_bytes_do_not_depend_on_the_number_of_threads() -> None:
    before = torch.get_num_threads()
    assert digests(1) == digests(2) == digests(3)
    assert torch.get_num_threads() == before


def test_a_batch_without_images_is_computed_without_the_model() -> None:
    with open_lanes("cpu", 1) as lanes:
        task = Task(model="sd-vae", sources=("sd-vae",), compute=Network().encode)
        result = lanes.submit(Batch(shard=0, invalid={0: "bad"}, last=True), [task]).result()
    assert result.batch.sources == ("sd-vae",)
    assert result.batch.columns == {}
    assert result.batch.invalid == {0: "bad"}
    assert result.batch.last


TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
SLURM = {
    "SLURM_PROCID": "2",
    "SLURM_NTASKS": "3",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "1",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_TASKS_PER_NODE": "2,1",
}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, Rank()),
        (TORCHRUN, Rank(rank=5, world=8, local_rank=1, local_world=4, launcher="torchrun")),
        (SLURM, Rank(rank=2, world=3, local_rank=0, local_world=1, launcher="SLURM")),
        # what sbatch gives a batch script: it is nobody's task
        ({name: value for name, value in SLURM.items() if "STEP" not in name}, Rank()),
        ({**SLURM, "SLURM_STEP_ID": "4294967290"}, Rank()),  # the interactive shell of salloc
        ({**TORCHRUN, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}, Rank()),
        ({"SLURM_NTASKS": "4"}, Rank()),  # a shell within an allocation
        ({**SLURM, **TORCHRUN}, Rank(rank=5, world=8, local_rank=1, local_world=4, launcher="torchrun")),
    ],
)
def test_ranks(environment: dict[str, str], expected: Rank) -> None:
    assert detect_rank(environment, 1) == expected


@pytest.mark.parametrize(
    ("environment", "devices", "expected"),
    [
        (TORCHRUN, 2, "--devices"),
        (SLURM, 2, "--devices"),
        ({**TORCHRUN, "LOCAL_RANK": "x"}, 1, "WORLD_SIZE"),
        ({"RANK": "1", "WORLD_SIZE": "2"}, 1, "WORLD_SIZE"),
        ({**TORCHRUN, "RANK": "8"}, 1, "RANK"),
        ({**SLURM, "SLURM_STEP_TASKS_PER_NODE": "2"}, 1, "SLURM_NTASKS"),
    ],
)
def test_ranks_that_contradict(environment: dict[str, str], devices: int, expected: str) -> None:
    with pytest.raises(RepaError) as caught:
        detect_rank(environment, devices)
    assert caught.value.field == expected
