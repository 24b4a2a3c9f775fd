"""Captions of a cache encoded once more, to compare them and to write again what is damaged."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...data.errors import CacheError
from ...data.format.captions import EMPTY, caption_keys, captions_path, read_captions
from ...data.format.columns import SCALE_SUFFIX, TEXT_STATES, column_name, scale_column
from ...data.format.opening import declaration, differences, open_manifest
from ...data.reading.all_views import read_all_views
from ...data.reading.reader import CacheReader
from ...data.upkeep.repair import restore_documents, restore_tables
from ..captions.worker import CaptionJob, TextModel, caption_batches, load_text_model, write_captions
from ..config import PreprocessConfig
from ..lanes.lanes import Task, open_lanes
from ..shard_loop.devices import device_shares
from ..shard_loop.interrupts import terminated_as_interrupt
from ..shard_loop.ranks import Rank
from ..shard_loop.worker import Tally
from .reencode import EXACT, Reencoded, excess_of
from .repair import rewrite
from .tolerances import tolerance_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from numpy.typing import NDArray

    from ...data.format.manifest import Manifest
    from ...data.storage.bucket import CachePath
    from ...data.upkeep.repair import RepairPlan
    from .recorded import Given
    from .repair import Repaired, Report


def reencode_captions(cache: CachePath, given: Given, *, rows: int, seed: int = 0) -> list[Reencoded]:
    """Encode random captions again by every text encoder, and compare, see `reencode`.

    Args:
        cache: folder of the cache of the images.
        given: where the files of text encoders lie.
        rows: how many captions; all, if there are fewer.
        seed: of the choice.

    Returns:
        One comparison a column.

    Raises:
        RepaError: files that cannot be had, a row that is corrupt.
        CacheError: a source that is not complete; other files or forms than the recorded ones.
    """
    where = captions_path(cache)
    manifest = open_manifest(where)
    texts = read_captions(cache)
    chosen = np.random.Generator(np.random.Philox(key=seed)).permutation(len(texts))[:rows]
    found: list[Reencoded] = []
    for source, provenance in manifest.sources.items():
        specs = manifest.source_columns(source)
        noise = tolerance_of(provenance).noise
        columns = {
            name: Reencoded(column=name, noise=noise) for name in specs if not name.endswith(SCALE_SUFFIX)
        }
        with CacheReader(where, tuple(specs)) as reader:
            job, model = _recorded(cache, manifest, source, given)
            for own, computed in _compute(job, model, texts, np.sort(chosen)):
                stored = read_all_views(reader, own, tuple(specs))
                for _name, result in columns.items():
                    _compare(result, own, stored, computed)
        found += columns.values()
    return found


def repair_captions(cache: CachePath, plan: RepairPlan, given: Given, report: Report) -> list[Repaired]:
    """Make the captions of a cache what their manifest says.

    Args:
        cache: folder of the cache of the images.
        plan: what is to be done, of `plan_repair` of the captions.
        given: where the files of text encoders lie.
        report: called with the source, and its captions written and to write.

    Returns:
        What was encoded again, source by source.

    Raises:
        RepaError: files that cannot be had, a disk that refuses.
        CacheError: the captions themselves are damaged; other files or forms than the recorded ones.
    """
    where = captions_path(cache)
    restore_documents(where, plan)
    manifest = open_manifest(where)
    if not plan.needs_images:
        return []
    texts = read_captions(cache)
    if plan.tables:
        restore_tables(where, manifest, caption_keys(texts), np.full(len(texts), EMPTY, np.int32))
    done = []
    with terminated_as_interrupt():
        for source in plan.sources:
            job, model = _recorded(cache, manifest, source, given)
            write = partial(_write, job, texts, model)
            done.append(rewrite(where, manifest, source, plan.shards.get(source, ()), write, report))
    return done


def _write(
    job: CaptionJob, texts: Sequence[str], model: TextModel, missing: Sequence[int], written: Any
) -> None:
    write_captions(job, texts, model, missing, written, Tally())


def _recorded(
    cache: CachePath, manifest: Manifest, source: str, given: Given
) -> tuple[CaptionJob, TextModel]:
    """Load the text encoder that wrote a source, and hold it against what is recorded.

    Raises:
        RepaError: its files are not to be had.
        CacheError: its weights, tokenizer or form are others: nothing has been changed.
    """
    provenance = manifest.sources[source]
    states = manifest.columns[column_name(source, TEXT_STATES)]
    location = Path(provenance.notes.get("location", ""))
    folder = given.weights.get(source) or (location if location.is_absolute() else None)
    config = PreprocessConfig(
        data="",
        cache=cache,
        encoders=(),
        batch_size=provenance.batch_size,
        feature_dtype=states.dtype,
        compress=states.compressor,
        compute_dtype=provenance.compute_dtype,
        random_weights=provenance.random_weights,
        text_encoders=(source,),
        weights={} if folder is None else {source: folder},
    )
    share = range(manifest.num_shards)
    [one] = device_shares(config, Rank(), share, ())
    job = CaptionJob(
        config=config,
        source=source,
        manifest=manifest,
        share=share,
        rank=0,
        world=1,
        device=one.device,
        threads=one.threads,
        missing=(),
    )
    model = load_text_model(config, source, one.device)
    now = model.encoder.provenance(provenance.batch_size)
    different = differences(
        declaration(provenance, manifest.source_columns(source)), declaration(now, model.form.columns)
    )
    if different:
        raise CacheError(
            f"the {source} at hand is not the one that wrote the captions of {cache}: {different}",
            f"give its files with --weights {source}=FOLDER",
            field="--weights",
        )
    return job, model


def _compute(
    job: CaptionJob, model: TextModel, texts: Sequence[str], rows: NDArray[np.int64]
) -> list[tuple[NDArray[np.int64], dict[str, NDArray[Any]]]]:
    """Compute columns of some rows, each in the batch that it was in."""

    def encode(tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        features = model.encoder.features(tokens)
        exact = {f"{name}{EXACT}": values.float() for name, values in model.form.exact(features).items()}
        found = {**model.form.encode(features), **exact}
        return {name: values.unsqueeze(1) for name, values in found.items()}

    task = Task(model=job.source, sources=(job.source,), compute=encode)
    shards = np.unique(rows // job.manifest.shard_rows).tolist()
    wanted = frozenset(rows.tolist())
    pending = []
    with open_lanes(job.device, job.threads) as lanes:
        for batch in caption_batches(
            texts, model.encoder, job.manifest, job.batch_size, shards, wanted=wanted
        ):
            pending.append((batch, lanes.submit(batch, [task])))
        found = []
        for batch, each in pending:
            at = [place for place, row in enumerate(batch.rows) if row in wanted]
            columns = each.result().batch.columns
            own = np.array([batch.rows[place] for place in at], np.int64)
            found.append((own, {name: values[at] for name, values in columns.items()}))
    return found


def _compare(
    result: Reencoded,
    rows: NDArray[np.int64],
    stored: dict[str, NDArray[Any]],
    computed: dict[str, NDArray[Any]],
) -> None:
    name = result.column
    scales = stored.get(scale_column(name))
    exact = computed[f"{name}{EXACT}"].astype(np.float64)
    for position, row in enumerate(rows.tolist()):
        same = all(
            stored[each][position].tobytes() == computed[each][position].tobytes()
            for each in (name, scale_column(name))
            if each in stored
        )
        scale = None if scales is None else scales[position, 0]
        result.add(row, same, excess_of(stored[name][position, 0], scale, exact[position, 0], result.noise))
