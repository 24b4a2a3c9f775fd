"""The loader beside other formats and their loaders, on the same rows in one run.

    pip install -e '.[peers]'             # in an environment of its own, '.[peers,peers-mds]': MDS too
    python benchmarks/peers.py --folder /disk/to/measure --rows 4096 --rounds 5

Every measurement is a process of its own, started in turn A B C, A B C …: some of these libraries cannot
share one with a fork of another. A process reads an epoch that does not count, whose rows are checked (warm
only), and then one that does, from its first batch on. CPU seconds are the process's from then on, and all of
its workers'. Libraries that are not installed are left out, and said to be. ``--cold`` empties the
page cache of the files before each process, which reads the epoch that counts and no other.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from peer_formats import BATCH_SIZE, FEW, PEERS, ROW_BYTES, WORKERS, check

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_TIMEOUT = 1800


class Round(NamedTuple):
    """What one process measured, as rows a second and CPU seconds a thousand rows."""

    rate: float
    cpu_per_1000: float


def measure(name: str, root: Path, rows: int, *, cold: bool) -> Round:
    """Read epochs in this process, see the module."""
    peer = PEERS[name]
    folder, count = root / peer.store, min(rows, FEW) if peer.few else rows
    if not cold:
        read = 0
        for batch in peer.read(folder, count):
            check(batch)
            read += len(batch[0])
        if read < count - BATCH_SIZE * 4:
            raise ValueError(f"{name} gave {read} rows of {count}")
    batches = iter(peer.read(folder, count))
    next(batches)
    cpu, started = _cpu_seconds(), time.perf_counter()
    seen = sum(len(batch[0]) for batch in batches)
    seconds = time.perf_counter() - started
    return Round(seen / seconds, 1000 * (_cpu_seconds() - cpu) / seen)


def _cpu_seconds() -> float:
    # of workers that have ended, too
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def drop_page_cache(folder: Path) -> None:
    """Let the kernel forget the files of a folder."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _in_a_process(name: str, root: Path, rows: int, *, cold: bool) -> Round | None:
    """Run `measure` in a new process. It is None, with the last line of its errors, if that fails."""
    command = [sys.executable, __file__, "--folder", str(root), "--rows", str(rows), "--one", name]
    try:
        done = subprocess.run(
            [*command, *(["--cold"] if cold else [])],
            capture_output=True,
            text=True,
            check=False,
            timeout=_TIMEOUT,
        )
    except subprocess.TimeoutExpired:
        print(f"{name}: nothing after {_TIMEOUT} s", flush=True)
        return None
    if done.returncode:
        print(f"{name}: {(done.stderr.strip().splitlines() or ['failed'])[-1]}", flush=True)
        return None
    return Round(**json.loads(done.stdout.splitlines()[-1]))


def run(root: Path, rows: int, rounds: int, names: Sequence[str], *, cold: bool) -> Mapping[str, list[Round]]:
    """Write what is to be read, then measure all in turn. The first turn is one more and does not count."""
    for store in dict.fromkeys(PEERS[name].store for name in names):
        folder = root / store
        folder.mkdir()
        started = time.perf_counter()
        next(PEERS[name] for name in names if PEERS[name].store == store).write(folder, rows)
        print(f"wrote {store} in {time.perf_counter() - started:.1f} s", flush=True)
    found: dict[str, list[Round]] = {name: [] for name in names}
    for number in range(rounds + 1):
        for name in names:
            if cold:
                drop_page_cache(root / PEERS[name].store)
            measured = _in_a_process(name, root, rows, cold=cold)
            if measured is not None and number:
                found[name].append(measured)
        print(f"turn {number} of {rounds} done", flush=True)
    return found


def show(found: Mapping[str, list[Round]]) -> None:
    """Print a Markdown table of medians, ratios to the first line's, and CPU time against workers'."""
    limit = statistics.median(each.rate for each in next(iter(found.values())))
    print("| | rows/s | GB/s | CPU s / 1,000 rows | of the first line |")
    print("|---|---|---|---|---|")
    for name, measured in found.items():
        if not measured:
            print(f"| {name} | failed | | | |")
            continue
        rate = statistics.median(each.rate for each in measured)
        cpu = statistics.median(each.cpu_per_1000 for each in measured)
        print(f"| {name} | {rate:,.0f} | {rate * ROW_BYTES / 1e9:.2f} | {cpu:.3f} | {rate / limit:.3f} |")
    costs = {
        name: statistics.median(each.cpu_per_1000 for each in measured)
        for name, measured in found.items()
        if measured
    }
    peers = [name for name in costs if name.endswith(f"{WORKERS} workers")]
    if peers:
        best = min(peers, key=lambda name: costs[name])
        print(f"\nRows per CPU second against the best of DataLoader's workers ({best}):")
        for name, cost in costs.items():
            if name.startswith("repa"):
                print(f"{name}: {costs[best] / cost:.1f} times")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=None, help="on the disk to measure")
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cold", action="store_true", help="from the disk, not from the page cache")
    parser.add_argument("--only", nargs="*", default=[], help="parts of the names of what is measured")
    parser.add_argument("--one", default=None, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.rows < 4 * BATCH_SIZE or given.rounds < 1:
        parser.error(f"at least {4 * BATCH_SIZE} rows and one round")
    if given.one is not None:
        print(json.dumps(measure(given.one, given.folder, given.rows, cold=given.cold)._asdict()))
        return
    absent = sorted({peer.needs for peer in PEERS.values() if find_spec(peer.needs) is None})
    names = [
        name
        for index, (name, peer) in enumerate(PEERS.items())
        if peer.needs not in absent and (not index or not given.only or any(o in name for o in given.only))
    ]
    if absent:
        print(f"not installed, left out: {', '.join(absent)}")
    root = Path(tempfile.mkdtemp(prefix="repa-peers-", dir=given.folder))
    try:
        found = run(root, given.rows, given.rounds, names, cold=given.cold)
        state = "cold" if given.cold else "warm"
        print(f"\n{given.rows:,} rows of {ROW_BYTES:,} bytes, page cache {state}, {given.rounds} rounds\n")
        show(found)
    finally:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
