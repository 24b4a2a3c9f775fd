"""The shard loop of captions, which writes one device's share of what a text encoder makes of them.

A shard's captions are computed in batches that begin with the shard, so no byte depends on who writes it.
Tokenizing is this loop's work, computing the lanes', and writing a thread's, as for images.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ...data.errors import RepaError
from ...data.format.captions import captions_path
from ...data.format.manifest import DEVIATION_NOTE
from ...data.writing.store import ensure_source
from ...data.writing.writer import SourceWriter
from ..columns.models import SourceDeclaration
from ..lanes.batches import Batch
from ..shard_loop.interrupts import deferred_interrupts
from ..shard_loop.worker import Tally
from ..shard_loop.writer_thread import WriterThread
from ..text.encoder import load_text_encoder
from ..text.form import TextForm, deviation_note
from ..text.registry import find_text_encoder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import torch

    from ...data.format.manifest import Manifest
    from ..config import PreprocessConfig
    from ..lanes.lanes import Lanes
    from ..shard_loop.worker import Report
    from ..text.encoder import TextEncoder

MEASURED = 64
"""Captions on which it is measured how far what is stored lies from float32."""


@dataclass(frozen=True, kw_only=True)
class CaptionJob:
    """What one process does.

    Attributes:
        config: the command, the size of a batch of captions filled in.
        source: the text encoder.
        manifest: of the cache of captions, the sources left out.
        share: shards of the whole job.
        rank: this process, of ``world``: it owns the shards of the job at positions rank, rank + world, …
        world: number of processes.
        device: ``cpu`` or ``cuda:<index>``.
        threads: CPU: batches computed at a time.
        missing: shards of the whole job that are to be written.
    """

    config: PreprocessConfig
    source: str
    manifest: Manifest
    share: range
    rank: int
    world: int
    device: str
    threads: int
    missing: tuple[int, ...]

    @property
    def batch_size(self) -> int:
        """Captions of a forward pass."""
        assert self.config.batch_size is not None, "the plan fills it in"
        return self.config.batch_size


class TextModel:
    """A text encoder with the form in which its outputs are stored.

    Args:
        encoder: the encoder.
        dtype: ``float16``, ``float32`` or ``int8``, of the states.
        compressor: of the columns, see `ColumnSpec`.
    """

    def __init__(self, encoder: TextEncoder, dtype: str, compressor: str | None) -> None:
        self.encoder = encoder
        self.form = TextForm(name=encoder.name, sizes=encoder.sizes, dtype=dtype, compressor=compressor)

    def columns(self, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        """Compute columns ``[B, 1, *shape]`` of tokens, see `TextEncoder.tokens`."""
        stored = self.form.encode(self.encoder.features(tokens))
        return {name: values.unsqueeze(1) for name, values in stored.items()}

    def declaration(self, texts: Sequence[str], batch_size: int) -> SourceDeclaration:
        """Return what the manifest is told, with how far what is stored lies from float32.

        Args:
            texts: the captions, of which some are measured.
            batch_size: captions of a forward pass.

        Raises:
            RepaError: states that are not finite.
        """
        provenance = self.encoder.provenance(batch_size)
        if self.form.dtype != "float32" or provenance.compute_dtype != "float32":
            note = deviation_note(self._pairs(texts, batch_size), self.encoder.name)
            provenance = replace(provenance, notes={**provenance.notes, DEVIATION_NOTE: note})
        return SourceDeclaration(provenance=provenance, columns=self.form.columns)

    def _pairs(self, texts: Sequence[str], batch_size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        import torch

        from ...data.format.columns import TEXT_STATES

        rows = np.unique(np.linspace(0, len(texts) - 1, MEASURED).round().astype(int)).tolist()
        exact = self.encoder.in_float32()
        for start in range(0, len(rows), batch_size):
            own = [texts[row] for row in rows[start : start + batch_size]]
            tokens = torch.from_numpy(self.encoder.tokens(own)).to(self.encoder.device)
            features = self.encoder.features(tokens)
            truth = features if exact.compute_dtype == self.encoder.compute_dtype else exact.features(tokens)
            yield truth[TEXT_STATES], self.form.restore(self.form.encode(features))


def load_text_model(config: PreprocessConfig, source: str, device: str) -> TextModel:
    """Load a text encoder as a command asks for it.

    Raises:
        RepaError: see `load_text_encoder`.
    """
    encoder = load_text_encoder(
        find_text_encoder(source),
        folder=config.weights.get(source),
        device=device,
        compute_dtype=config.compute_dtype,
        random_weights=config.random_weights,
    )
    return TextModel(encoder, config.feature_dtype, config.compress)


def work_captions(job: CaptionJob, texts: Sequence[str], report: Report) -> Tally:
    """Compute and write every missing shard of this process.

    Args:
        job: the share.
        texts: the captions, by row.
        report: see `worker.work`.

    Returns:
        What was done.

    Raises:
        RepaError: see `worker.work`.
    """
    own = [shard for shard in job.share[job.rank :: job.world] if shard in job.missing]
    if not own:
        return Tally()
    started = time.perf_counter()
    import torch

    from ..encoders.precision import require_arithmetic

    require_arithmetic(job.config.compute_dtype, torch.device(job.device))
    model = load_text_model(job.config, job.source, job.device)
    tally = Tally(load_seconds=time.perf_counter() - started)
    write_captions(job, texts, model, own, report, tally)
    return tally


def write_captions(
    job: CaptionJob,
    texts: Sequence[str],
    model: TextModel,
    shards: Sequence[int],
    report: Report,
    tally: Tally,
) -> None:
    """Compute and write shards by a text encoder that is loaded.

    Args:
        job: the share.
        texts: the captions, by row.
        model: the text encoder.
        shards: to write, unless they are there by then.
        report: see `worker.work`.
        tally: what is done is added to it.

    Raises:
        RepaError: see `worker.work`.
    """
    from ..lanes.lanes import Task, open_lanes

    path = captions_path(job.config.cache)
    declared = model.declaration(texts, job.batch_size)
    manifest = ensure_source(path, job.source, declared.provenance, declared.columns)
    with SourceWriter(path, manifest, job.source, shards) as writer:
        # until a shard is committed or locked, another command may have declared the source anew
        ensure_source(path, job.source, declared.provenance, declared.columns)
        remaining = writer.remaining
        task = Task(model=job.source, sources=(job.source,), compute=model.columns)
        started = time.perf_counter()

        def advance(sources: tuple[str, ...], rows: int) -> None:
            tally.images += rows
            report(dict.fromkeys(sources, rows), rows)

        with (
            deferred_interrupts() as check,
            open_lanes(job.device, job.threads) as lanes,
            WriterThread(
                {job.source: writer},
                manifest,
                texts,
                depth=lanes.ahead,
                on_batch=advance,
                check=check,
                noun="caption",
            ) as thread,
        ):
            failure = _feed(job, texts, model, remaining, lanes, task, thread, check)
        if failure is not None:
            raise failure
        tally.written = thread.written
        tally.lanes = lanes.count
        tally.loop_seconds = time.perf_counter() - started


def _feed(
    job: CaptionJob,
    texts: Sequence[str],
    model: TextModel,
    shards: Sequence[int],
    lanes: Lanes,
    task: Any,
    thread: WriterThread,
    check: Callable[[], None],
) -> RepaError | None:
    """Hand on all batches. An error is given back, as what was begun before it is to be written."""
    try:
        for batch in caption_batches(texts, model.encoder, job.manifest, job.batch_size, shards):
            check()
            thread.put(lanes.submit(batch, [task]))
    except RepaError as error:
        return error
    return None


def caption_batches(
    texts: Sequence[str],
    encoder: TextEncoder,
    manifest: Manifest,
    batch_size: int,
    shards: Sequence[int],
    *,
    wanted: frozenset[int] | None = None,
) -> Iterator[Batch]:
    """Yield the batches of shards, tokens in place of images.

    Args:
        texts: the captions, by row.
        encoder: tokenizes them.
        manifest: of the cache of captions.
        batch_size: B of every batch but a shard's last.
        shards: whose captions.
        wanted: rows whose batches alone are yielded; None for all.
    """
    for shard in shards:
        rows = manifest.shard_range(shard)
        for start in range(rows.start, rows.stop, batch_size):
            own = list(range(start, min(start + batch_size, rows.stop)))
            if wanted is not None and wanted.isdisjoint(own):
                continue
            tokens: Any = list(encoder.tokens([texts[row] for row in own]))
            yield Batch(shard=shard, rows=own, images=tokens, last=own[-1] == rows[-1])
