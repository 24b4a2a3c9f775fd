"""Processes that begin with PyTorch and the trainer imported, as forks of one that has imported them.

A new interpreter spends four seconds of a core on these imports, more than most tests need for all they do.
A fork is a process of its own all the same: it can be killed, be a rank of a process group, and end with a
traceback.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ports import free_port

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

LIMIT_SECONDS = 900


@dataclass(frozen=True)
class Ended:
    """How a process ended, and what it printed."""

    returncode: int
    stdout: str
    stderr: str


class Warmed:
    """The process that forks, as seen by who asks it."""

    def __init__(self, server: subprocess.Popen[str]) -> None:
        self._server = server

    def start(self, script: Path, *arguments: object) -> int:
        """Run a script as `run` does, and return the process id without waiting for the end."""
        return self._start(script, arguments, {}, 0)

    def wait(self, pid: int, script: Path, rank: int = 0) -> Ended:
        """Wait for the end of a process that was started with a script."""
        code, output = self._ask(wait=pid), output_of(script, rank)
        return Ended(code, *(Path(f"{output}.{name}").read_text() for name in ("out", "err")))

    def run(self, script: Path, *arguments: object, ranks: int = 1) -> list[Ended]:
        """Run a script as ``__main__`` in a process for each rank, warnings being errors, and wait for all.

        Args:
            script: Python; each of several ranks finds its own as a child of Lightning's launcher does.
            arguments: its ``sys.argv``.
            ranks: how many processes.
        """
        world = world_of(ranks) if ranks > 1 else [{}]
        started = [self._start(script, arguments, each, rank) for rank, each in enumerate(world)]
        return [self.wait(pid, script, rank) for rank, pid in enumerate(started)]

    def _start(
        self, script: Path, arguments: Sequence[object], environment: Mapping[str, str], rank: int
    ) -> int:
        words = [str(script), *map(str, arguments)]
        return self._ask(words=words, environment=environment, output=output_of(script, rank))

    def _ask(self, **request: Any) -> int:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        ready, _, _ = select.select([self._server.stdout], [], [], LIMIT_SECONDS)
        if not ready:
            if "wait" in request:
                os.kill(request["wait"], signal.SIGKILL)
            raise TimeoutError(f"no answer in {LIMIT_SECONDS} s to {request}")
        return int(self._server.stdout.readline())


def output_of(script: Path, rank: int) -> str:
    """Return the path of what a rank prints, less the suffix."""
    return str(script.with_name(f"{script.stem}-output-{rank}"))


def world_of(ranks: int) -> list[dict[str, str]]:
    """Return the environment of each rank of a process group on this machine."""
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "NODE_RANK": "0"}
    return [{**shared, "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


@contextmanager
def warmed(*modules: str) -> Iterator[Warmed]:
    """Start the process that forks, and end it after the block.

    Args:
        modules: that it imports, beside PyTorch.
    """
    command = [sys.executable, "-W", "error", __file__, *modules]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as server:
        try:
            yield Warmed(server)
        finally:
            assert server.stdin is not None
            server.stdin.close()
            server.wait(LIMIT_SECONDS)


def serve() -> None:
    """Fork, and wait for forks, as asked line by line on standard input."""
    import torch

    for name in sys.argv[1:]:
        importlib.import_module(name)
    torch.set_num_threads(1)  # a fork does not survive a pool of threads
    gc.collect()
    gc.freeze()
    for line in iter(sys.stdin.readline, ""):
        request = json.loads(line)
        if "wait" in request:
            answer = os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])
        else:
            answer = os.fork()
            if not answer:
                become(request["words"], request["environment"], request["output"])
                return
        print(answer, flush=True)


def become(words: Sequence[str], environment: Mapping[str, str], output: str) -> None:
    """Do in this fork what an interpreter would that was started with a script and its arguments."""
    with open(os.devnull) as nothing, open(f"{output}.out", "w") as out, open(f"{output}.err", "w") as err:
        for number, file in enumerate((nothing, out, err)):
            os.dup2(file.fileno(), number)
    os.environ.update(environment)
    sys.argv = list(words)
    warnings.simplefilter("error")
    runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    serve()
