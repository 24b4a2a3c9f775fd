"""Threads that each compute with one thread of PyTorch, whose own threads change the last bits."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import torch


def one_thread_lanes(count: int) -> ThreadPoolExecutor:
    """Start threads that compute with one thread each. The number of threads of everybody else stays.

    Args:
        count: how many.
    """
    before = torch.get_num_threads()
    lanes = ThreadPoolExecutor(count, "repa-one-thread", initializer=_compute_with_one_thread)
    # all begin now: what a thread sets is also the default of threads that have not begun
    barrier = threading.Barrier(count)
    for done in [lanes.submit(barrier.wait) for _ in range(count)]:
        done.result()
    torch.set_num_threads(before)
    return lanes


def _compute_with_one_thread() -> None:
    torch.set_num_threads(1)
    # PyTorch takes the default once more when a thread first asks: it must not be another's by then
    torch.get_num_threads()
