"""Processes that were started together: which of them a terminal's Ctrl-C reaches."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

DEAF = """
import multiprocessing, signal

def child(connection):
    connection.send(signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, []))

if __name__ == "__main__":
    from repa.pipeline.shard_loop.processes import deaf_to_interrupts

    context = multiprocessing.get_context("spawn")
    with deaf_to_interrupts():
        for _ in range(2):
            here, there = context.Pipe(duplex=False)
            process = context.Process(target=child, args=(there,))
            process.start()
            print(here.recv())
            process.join()
    print(signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, []))
"""


def test_processes_that_just_start_do_not_hear_ctrl_c(tmp_path: Path) -> None:
    script = tmp_path / "deaf.py"
    script.write_text(DEAF)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=600)
    assert done.stdout.split() == ["True", "True", "False"], done.stderr
