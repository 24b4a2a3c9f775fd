"""A writer that dies at any point leaves an old or a new state, and running it again gives the same bytes."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from killed_writers import finish_writers, kill_writers, start_writer
from repa.data.format.opening import open_manifest
from repa.data.format.survey import committed_shards
from repa.data.testing import SYNTHETIC_COLUMNS, folder_contents, synthetic_cache
from repa.data.upkeep.verify import verify_cache

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable

ROWS = 5
SHARD_ROWS = 3
SHARDS = 2
CHANGES = ("mkdir", "replace", "unlink")


class Killed(BaseException):
    """The process is gone: nothing it still runs changes the disk."""


def write_all(path: Path) -> None:
    synthetic_cache(path, num_rows=ROWS, shard_rows=SHARD_ROWS, invalid={4: "bad"})


class Life:
    """Lets ``steps`` calls that change the disk happen; the next, and all after it, raise `Killed`."""

    def __init__(self, patch: pytest.MonkeyPatch, steps: int) -> None:
        self.left = steps
        for name in CHANGES:
            patch.setattr(os, name, self.mortal(getattr(os, name)))

    def mortal(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            self.left -= 1
            if self.left < 0:
                raise Killed
            return function(*args, **options)

        return call


def check_state(path: Path) -> None:
    """What is committed is intact, and nothing else claims to be."""
    if not (path / "zarr.json").exists():
        return
    manifest = open_manifest(path)
    for finding in verify_cache(path):
        unfinished = finding.shard is not None and "is not committed" in finding.what
        left = finding.path.name.endswith(".partial") or finding.path.parts[-3] not in manifest.sources
        assert unfinished or left, str(finding)


def test_death_at_any_step_leaves_an_old_or_a_new_state(tmp_path: Path) -> None:
    write_all(tmp_path / "whole")
    whole = folder_contents(tmp_path / "whole")
    states = set()
    for step in range(1000):
        path = tmp_path / "cache"
        with pytest.MonkeyPatch.context() as patch:
            Life(patch, step)
            try:
                write_all(path)
                finished = True
            except Killed:
                finished = False
        check_state(path)
        if (path / "zarr.json").exists():
            manifest = open_manifest(path)
            states.add(tuple(tuple(committed_shards(path, manifest, source)) for source in manifest.sources))
        write_all(path)
        assert folder_contents(path) == whole, f"killed at step {step}"
        if finished:
            break
        shutil.rmtree(path)
    else:
        pytest.fail("the writer never finishes")
    # every state of the sequence was seen: no source, one declared, each shard alone, two declared, …
    partly = [(), (0,), (0, 1)]
    assert states == {()} | {(done,) for done in partly} | {(partly[-1], done) for done in partly}
    assert step > 50


def test_each_step_is_durable_before_the_next_relies_on_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[tuple[str, Path]] = []
    rename = os.replace

    def log_fsync(descriptor: int) -> None:
        events.append(("sync", Path(os.readlink(f"/proc/self/fd/{descriptor}"))))

    def log_replace(source: str | Path, target: str | Path) -> None:
        events.append(("rename", Path(target)))
        assert events[-2] == ("sync", Path(source)) or ("sync", Path(source)) in events
        rename(source, target)

    monkeypatch.setattr(os, "fsync", log_fsync)
    monkeypatch.setattr(os, "replace", log_replace)
    path = tmp_path / "cache"
    write_all(path)

    renamed = {target: position for position, (kind, target) in enumerate(events) if kind == "rename"}

    def durable(file: Path, before: int) -> None:
        """The file's name and all folders above it were synced between its rename and ``before``."""
        after = {target for kind, target in events[renamed[file] : before] if kind == "sync"}
        assert {folder for folder in file.parents if folder.is_relative_to(path)} <= after, file

    for source in ("sd-vae", "demo"):
        for shard in range(SHARDS):
            record = path / "commits" / source / f"{shard}.json"
            files = [file for file in renamed if file.is_relative_to(path / source) and "c" in file.parts]
            files = [file for file in files if file.parts[file.parts.index("c") + 1] == str(shard)]
            assert len(files) == (1 if source == "sd-vae" else 2)
            for file in files:
                durable(file, renamed[record])
            durable(record, len(events))
    group = path / "zarr.json"
    for file in (path / "keys.txt", path / "label" / "c" / "0", path / "label" / "zarr.json"):
        durable(file, events.index(("rename", group)))
    for source in ("sd-vae", "demo"):
        durable(path / source / "zarr.json", renamed[group])
    durable(group, len(events))


RANK = """
import sys
from pathlib import Path
import numpy as np
from repa.data.writing.writer import SourceWriter
from repa.data.format.opening import open_manifest
from repa.data.writing.store import ensure_cache, ensure_source
from repa.data.testing import SYNTHETIC_COLUMNS, expected_row, synthetic_cache, synthetic_provenance

path, rank, world = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
manifest = synthetic_cache(path, num_rows=160, shard_rows=4, columns={})
for source in ("sd-vae", "demo"):
    columns = {name: spec for name, spec in SYNTHETIC_COLUMNS.items() if name.startswith(source + "/")}
    manifest = ensure_source(path, source, synthetic_provenance(source, columns), columns)
    with SourceWriter(path, manifest, source, range(rank, manifest.num_shards, world)) as writer:
        for number in writer.remaining:
            with writer.shard(number) as shard:
                for row in shard.rows:
                    for name, spec in columns.items():
                        shard.write(row, name, expected_row(name, row, spec)[None])
                shard.commit()
"""


def start(path: Path, world: int, **options: int) -> list[subprocess.Popen[bytes]]:
    return [start_writer(RANK, path, rank, world, **options) for rank in range(world)]


@pytest.mark.parametrize("world", [1, 3])
def test_kill_9_at_random_moments_then_resume_gives_the_same_bytes(tmp_path: Path, world: int) -> None:
    synthetic_cache(tmp_path / "whole", num_rows=160, shard_rows=4)
    whole = folder_contents(tmp_path / "whole")
    path = tmp_path / "cache"
    moments = random.Random(world)
    # of 80 shards; the first may come before anything is there
    for least in (0, 1, 20, 40, 60):
        delay = moments.uniform(0, 0.05 if least else 1.0)
        assert kill_writers(start(path, world, most=least + 10), path, least, delay=delay)
        if path.exists():
            check_state(path)
    finish_writers(start(path, 4 - world))
    assert folder_contents(path) == whole
    assert verify_cache(path) == []
    assert set(open_manifest(path).columns) == set(SYNTHETIC_COLUMNS)
