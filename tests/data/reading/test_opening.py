"""Opening a cache of ImageNet's size: the shard files are holes but for their index."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from typing import TYPE_CHECKING

import numpy as np
import pytest
from repa.data.format.columns import MOMENTS, ColumnSpec, source_of
from repa.data.format.commits import ColumnRecord, CommitRecord
from repa.data.format.layout import commit_file, shard_file
from repa.data.format.manifest import Manifest
from repa.data.format.opening import labels_sha256
from repa.data.format.shard_index import encode_index
from repa.data.testing import synthetic_provenance
from repa.data.writing.store import create_cache, ensure_source, keys_sha256

if TYPE_CHECKING:
    from pathlib import Path

NUM_ROWS = 1_281_167
PATCH = "dinov2-b/patch"
COLUMNS = {
    MOMENTS: ColumnSpec(shape=(8, 32, 32), dtype="float32"),
    PATCH: ColumnSpec(shape=(256, 768), dtype="float16"),
}

OPENING = """
import json, sys, time
import numpy as np
from repa.data.reading.order import EpochOrder, split_holdout
from repa.data.reading.reader import CacheReader

def peak():
    # of this program alone: getrusage knows the parent's from before it was started, too
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])

started = time.perf_counter()
with CacheReader(sys.argv[1], ["sd-vae/moments", "dinov2-b/patch"]) as reader:
    opened, opened_peak = time.perf_counter() - started, peak()
    rows, _ = split_holdout(reader.valid_rows, 0)
    first = EpochOrder(seed=0, count=len(rows)).batch(0, 64)
    # the index of every shard, and no row: what a run keeps of them after an epoch
    for column in reader._readers.values():
        for shard in range(reader.manifest.num_shards):
            column.load_index(reader._opened(1), shard * reader.manifest.shard_rows)
    chunks = [each for column in reader._readers.values() for each in column._chunks.values()]
    kept = sum(each.offsets is not None for each in chunks)
    print(json.dumps({
        "rows": len(rows), "first": len(set(first.tolist())), "seconds": opened, "opened": opened_peak,
        "peak": peak(), "kept": kept,
    }))
"""


def make(path: Path) -> None:
    keys = [f"{row:07d}.JPEG" for row in range(NUM_ROWS)]
    labels = np.zeros(NUM_ROWS, dtype=np.int32)
    manifest = Manifest(
        num_rows=NUM_ROWS,
        resolution=256,
        crop="adm-center",
        exif_orientation="ignored",
        source_kind="synthetic",
        source_fingerprint="sha256:",
        keys_sha256=keys_sha256(keys),
        labels_sha256=labels_sha256(labels),
        class_names=("one",),
    )
    create_cache(path, manifest, keys, labels)
    nothing = hashlib.sha256(b"").hexdigest()
    for column, spec in COLUMNS.items():
        source, chunk = source_of(column), spec.row_bytes + 4
        manifest = ensure_source(path, source, synthetic_provenance(source, {column: spec}), {column: spec})
        commit_file(path, source, 0).parent.mkdir(parents=True)
        for shard in range(manifest.num_shards):
            rows = manifest.shard_range(shard)
            index = np.full((manifest.shard_rows, 1, 2), 2**64 - 1, dtype=np.uint64)
            index[: len(rows), 0, 0] = np.arange(len(rows)) * chunk
            index[: len(rows), 0, 1] = chunk
            tail = encode_index(index)
            file = shard_file(path, column, spec, shard)
            file.parent.mkdir(parents=True)
            with open(file, "wb") as out:
                out.seek(chunk * len(rows))
                out.write(tail)
            record = ColumnRecord(
                file_bytes=chunk * len(rows) + len(tail),
                chunks_sha256=nothing,
                chunks_crc32c=bytes(4 * manifest.shard_rows),  # as in the file, a hole
                index_crc32c=int.from_bytes(tail[-4:], "little"),
            )
            commit = CommitRecord(
                shard=shard,
                rows=(rows.start, rows.stop),
                columns={column: record},
                cache=manifest.identity,
                source=manifest.source_identities[source],
            )
            commit_file(path, source, shard).write_bytes(commit.encode())


@pytest.mark.slow
def test_a_cache_of_imagenets_size_opens_in_little_memory(tmp_path: Path) -> None:
    make(tmp_path / "cache")
    command = [sys.executable, "-c", OPENING, str(tmp_path / "cache")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["rows"], found["first"]) == (NUM_ROWS, 64)
    # the whole process, Python and NumPy included
    assert found["opened"] < 200e6
    assert found["peak"] < 200e6
    # shards without invalid rows need no table of offsets
    assert found["kept"] == 0
    print(found)
