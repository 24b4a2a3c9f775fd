"""Writers in processes of their own that are killed −9 while they write.

When is said in shards: how far a process has come after so many seconds is the machine's affair.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

LIMIT_SECONDS = 600

# for the head of a script: who commits a shard when there are ``most`` of them waits there to be killed
_HOLD = """
import os, sys
from pathlib import Path

def _hold(path, most, replace=os.replace):
    def held(source, target):
        replace(source, target)
        if len(list(path.glob("commits/*/*.json"))) >= most:
            sys.stdin.read()
    os.replace = held

_hold(Path(sys.argv[1]), int(sys.argv.pop()))
"""


def start_writer(
    script: str, path: Path, *arguments: object, most: int = 1_000_000
) -> subprocess.Popen[bytes]:
    """Start a script that writes the cache ``path``, its first argument.

    Args:
        script: Python.
        path: the cache.
        arguments: more of them.
        most: shards committed, over all sources, at which it waits; by default it never does.
    """
    command = [sys.executable, "-c", _HOLD + script, str(path), *map(str, arguments), str(most)]
    return subprocess.Popen(command, stdin=subprocess.PIPE)


def commits_of(path: Path) -> int:
    """Shards committed, over all sources."""
    return len(list(path.glob("commits/*/*.json")))


def kill_writers(
    running: list[subprocess.Popen[bytes]], path: Path, least: int, *, delay: float = 0.0
) -> int:
    """Kill −9 writers, which wait before they are done, ``delay`` seconds after ``least`` commits.

    Returns:
        How many of them were still alive.
    """
    deadline = time.monotonic() + LIMIT_SECONDS
    while commits_of(path) < least:
        assert {process.poll() for process in running} <= {None, 0}
        assert time.monotonic() < deadline, f"{commits_of(path)} of {least} shards in {LIMIT_SECONDS} s"
        time.sleep(0.002)
    time.sleep(delay)
    for process in running:
        process.kill()
    return sum(_end(process) == -signal.SIGKILL for process in running)


def finish_writers(running: list[subprocess.Popen[bytes]]) -> None:
    """Wait for writers that end by themselves."""
    assert [_end(process) for process in running] == [0] * len(running)


def _end(process: subprocess.Popen[bytes]) -> int:
    assert process.stdin is not None
    process.stdin.close()
    return process.wait(LIMIT_SECONDS)
