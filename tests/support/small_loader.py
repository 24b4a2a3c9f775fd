"""A cache of 61 rows, one of them invalid, and what a loader must give of it."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from repa.data.format.columns import ColumnSpec
from repa.data.reading.loader import THREAD_NAME, Batch, CacheLoader
from repa.data.reading.order import EpochOrder
from repa.data.reading.reader import CacheReader
from repa.data.testing import expected_labels, expected_row

if TYPE_CHECKING:
    from collections.abc import Sequence

MOMENTS = "sd-vae/moments"
PATCH = "demo/patch"
COLUMNS = {
    MOMENTS: ColumnSpec(shape=(8, 4, 4), dtype="float32"),
    PATCH: ColumnSpec(shape=(4, 16), dtype="float16"),
}
NUM_ROWS = 61
INVALID = {7: "text"}
LABELS = expected_labels(NUM_ROWS, 3)


def loader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith(THREAD_NAME)]


def both(step: int) -> Sequence[str]:
    return list(COLUMNS)


def make(reader: CacheReader, **options: Any) -> CacheLoader:
    given: dict[str, Any] = {"rows": reader.valid_rows, "batch_size": 24, "columns_at": both, "seed": 5}
    return CacheLoader(reader, **{**given, **options})


def check(batch: Batch) -> None:
    """Every value of a batch is the one of its row."""
    for column, values in batch.columns.items():
        for position, row in enumerate(batch.rows.tolist()):
            expected = expected_row(column, row, COLUMNS[column])
            assert values.dtype == getattr(torch, COLUMNS[column].dtype)
            assert np.array_equal(values[position].numpy(), expected)
    assert batch.label.tolist() == LABELS[batch.rows.numpy()].tolist()
    assert batch.rows.dtype == batch.label.dtype == torch.int64


def global_batch(reader: CacheReader, images_seen: int, batch_size: int = 24) -> list[int]:
    positions = EpochOrder(seed=5, count=NUM_ROWS - 1).batch(images_seen, batch_size)
    return reader.valid_rows[positions].tolist()
