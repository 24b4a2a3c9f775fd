"""Rows with stored queries and keys, read, and decoded where they lie, in the forms that attention has."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from ...data.format.columns import ColumnSpec, attention_source, column_name
from ...data.format.factor_layout import FactorLayout
from ...data.reading.loader import CacheLoader
from ...data.reading.reader import CacheReader
from ...pipeline.columns.specs import FACTORED, INT8, attention_columns, factored_columns
from ...trainer.methods.alignment import attention_target
from .forms import FORMS
from .loader import BATCH_SIZE, LoaderBench, Pass, Timer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from .measured import BenchSettings, Measured

MODEL = "dinov2-b"
BLOCKS, HEADS, TOKENS, WIDTH = 3, 12, 256, 64
RANK = 32


@dataclass(frozen=True)
class StoredForm:
    """A form of queries and keys of three blocks of dinov2-b at 256².

    Attributes:
        columns: of queries and keys, name → spec.
        notes: of their source, beyond those of any synthetic cache.
    """

    columns: Mapping[str, ColumnSpec]
    notes: Mapping[str, Any]


def _whole_or_cut(rank: int, dtype: str) -> StoredForm:
    columns = attention_columns(MODEL, blocks=BLOCKS, heads=HEADS, tokens=TOKENS, rank=rank, dtype=dtype)
    return StoredForm(columns, {})


def _factored(whole: int, half: int) -> StoredForm:
    layout = FactorLayout(tokens=TOKENS, components=(((whole, half),) * HEADS,) * BLOCKS)
    notes = {
        "blocks": list(range(1, BLOCKS + 1)),
        "logit_scale": WIDTH**-0.5,
        "head_width": WIDTH,
        "rank": whole + half,
        "form": FACTORED,
        "keys": "centred",
        **layout.as_notes,
    }
    return StoredForm(factored_columns(MODEL, layout), notes)


ATTENTION_FORMS: dict[str, StoredForm] = {
    f"int8, one basis, rank {RANK}": _whole_or_cut(RANK, INT8),
    "int8, whole": _whole_or_cut(WIDTH, INT8),
    "factors, 16 int8 and 32 int4": _factored(16, 32),
    # about what --attention-kl 1e-3 takes on trained weights
    "factors, 10 int8 and 16 int4": _factored(10, 16),
}


def bench_attention(settings: BenchSettings, room: Path) -> Iterator[tuple[str, str, list[Measured]]]:
    """Measure random rows per second of what HASTE reads, latents, int8 tokens, queries and keys.

    There is a table for each form, page cache warm. The limit is one thread copying whole rows from a memory
    map into one reused batch buffer. Decoding is that of all blocks, on the CPU's own threads.
    """
    rows = max(settings.rows, BATCH_SIZE) // BATCH_SIZE * BATCH_SIZE
    for name, form in ATTENTION_FORMS.items():
        bench = _AttentionBench(room / "form", form, rows)
        what = f"{name}, {rows:,} rows of {bench.row_bytes:,} bytes, batch {BATCH_SIZE}"
        yield f"attention: {what}, page cache warm", "rows/s", bench.lines(bench.variants(), settings.rounds)
        shutil.rmtree(room / "form")


class _AttentionBench(LoaderBench):
    """A cache with queries and keys, and what is measured with it."""

    def __init__(self, room: Path, form: StoredForm, rows: int) -> None:
        notes = {attention_source(MODEL): form.notes}
        super().__init__(room, {**FORMS["int8"], **form.columns}, rows, notes)
        self._form = form

    def variants(self) -> dict[str, Callable[[], Pass]]:
        """Measure a plain copy, reading, and reading and decoding."""
        return {
            "copy from a memory map (limit)": self.copy,
            "repa, 2 threads, crc32c on": partial(self.load, 2, "off", warm_up=True),
            "the same, and decoded": self._load_and_decode,
            "decoded alone, of one batch": self._decode_alone,
        }

    def _load_and_decode(self) -> Pass:
        columns = tuple(self.columns)
        with CacheReader(self.cache, columns) as reader:
            count = len(reader.valid_rows)
            loader = CacheLoader(
                reader,
                rows=reader.valid_rows,
                batch_size=BATCH_SIZE,
                threads=2,
                columns_at=lambda step: columns,
                last_image=2 * count,
            )
            batches = iter(loader)
            for _ in range(count // BATCH_SIZE):
                next(batches)
            with Timer() as timer:
                seen = 0
                for batch in batches:
                    self._decode(batch.columns)
                    seen += len(batch.rows)
            loader.close()
        return timer.result(seen)

    def _decode_alone(self) -> Pass:
        generator = torch.Generator().manual_seed(0)
        columns = {}
        for name, spec in self._form.columns.items():
            drawn = torch.randint(256, (BATCH_SIZE, spec.row_bytes), dtype=torch.uint8, generator=generator)
            columns[name] = drawn.view(getattr(torch, spec.dtype)).view(BATCH_SIZE, *spec.shape)
        with Timer() as timer:
            self._decode(columns)
        return timer.result(BATCH_SIZE)

    def _decode(self, columns: Mapping[str, torch.Tensor]) -> None:
        names = column_name(MODEL, "q"), column_name(MODEL, "k")
        for block in range(BLOCKS):
            attention_target(columns, names, self.columns, self._form.notes, at=block)
