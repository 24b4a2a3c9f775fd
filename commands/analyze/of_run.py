"""What the blocks of a run have learned, against the teachers of its cache."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ...data.errors import CacheError, RepaError
from ...data.format.captions import with_captions
from ...data.format.columns import MOMENTS, column_name
from ...data.format.opening import open_manifest
from ...data.reading.reader import CacheReader
from ...data.storage.bucket import cache_path
from ...data.storage.files import make_folder, os_errors, write_file
from ...data.tars.names import names_tars
from ...trainer.evaluation.blocks import BlockFeatures, block_features
from ...trainer.evaluation.probe import linear_probe
from ...trainer.evaluation.similarity import cka, cknna
from ...trainer.methods.alignment import stored_columns, target
from ...trainer.run.folder import CONFIG_FILE
from ...trainer.run.trained_beside import beside_of
from ...trainer.sampling.generate import model_of_file, newest_checkpoint
from ...trainer.settings_file import load_yaml
from ...trainer.step.checkpoints import checkpoints_of
from .chosen import batches, chosen_rows, chosen_teachers, columns_of
from .flags import DOCUMENT
from .tables import print_blocks

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray
    from rich.console import Console
    from torch import Tensor

    from ...data.format.manifest import Manifest
    from ...data.storage.bucket import CachePath
    from ...trainer.sampling.generate import TrainedModel
    from .flags import AnalyzeFlags

_FITTED = 0.75
_IMAGES_A_CLASS = 4


def analyze_run(flags: AnalyzeFlags, run: Path, times: Sequence[float], console: Console) -> None:
    """Measure the blocks of a run at some times, print tables, and write the document and the picture.

    Raises:
        RepaError: a mistake the user can mend.
    """
    from .pictures import draw_blocks

    checkpoint = _checkpoint(run, flags.step)
    where = flags.cache or _cache_of(run)
    path = cache_path(where)
    manifest = _manifest_of(path, f"{run} was trained from {where}: " if flags.cache is None else "")
    teachers = chosen_teachers(manifest, flags.teachers or (), "patch", where=where)
    model = model_of_file(checkpoint, weights=flags.weights)
    if not model.predicts:
        line = f"note: {checkpoint} is of a warm-up: blocks that it leaves out are as they were drawn"
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.backbone.to(device)
    beside = beside_of(checkpoint, model.backbone, manifest, where=where)
    latents = (MOMENTS,) if model.tokens is None else model.tokens.columns
    if model.tokens is not None:
        _check_has(manifest, latents, where)
    needed = tuple(dict.fromkeys((*latents, *model.backbone.y_embedder.columns, *beside.columns)))
    columns = dict.fromkeys((*needed, *columns_of(manifest, teachers, "patch")))
    with CacheReader(path, tuple(columns)) as reader:
        _check_fits(reader, model, where)
        rows = _rows_of(reader, flags)
        labels = reader.labels[rows]
        targets = {each: _pooled(reader, rows, each, flags.batch_size) for each in teachers}
        document: dict[str, Any] = {
            "of": "run",
            "run": str(run),
            "checkpoint": checkpoint.name,
            "step": model.steps,
            "weights": flags.weights,
            "cache": where,
            "identity": manifest.identity,
            "images": len(rows),
            "seed": flags.seed,
            "k": flags.k,
            "condition": "none" if model.guidable else "own",
            "teachers": {name: {"probe": _probe(values, labels)} for name, values in targets.items()},
            "times": {},
        }
        for time in times:
            parts = (batch.values for batch in batches(reader, rows, needed, flags.batch_size))
            found = block_features(model, parts, time, beside, seed=flags.seed)
            told = labels if model.guidable else None
            document["times"][f"{time:g}"] = {
                str(block): _numbers(features, told, targets, flags.k) for block, features in found.items()
            }
    out = flags.out or run / "analysis"
    with os_errors("write", out):
        make_folder(out)
    draw_blocks(document["times"], teachers, out / "blocks.png")
    print_blocks(document, console)
    write_file(out / DOCUMENT, (json.dumps(document, indent=2) + "\n").encode(), out)
    console.print(f"Wrote {DOCUMENT} and blocks.png to {out}.", highlight=False, markup=False, soft_wrap=True)


def _checkpoint(run: Path, step: int | None) -> Path:
    """Return the checkpoint to look into.

    Raises:
        RepaError: there is none of that step.
    """
    if step is None:
        return newest_checkpoint(run)
    found = checkpoints_of(run)
    if step not in found:
        steps = ", ".join(f"{each}" for each in found)
        raise RepaError(
            f"{run} holds no checkpoint of step {step}",
            f"give one of {steps}" if found else f"train with `repa train --run {run}`",
            field="--step",
        )
    return found[step]


def _cache_of(run: Path) -> str:
    """Return the cache that a run was trained on.

    Raises:
        RepaError: the run does not say, or names tars.
    """
    cache = str(load_yaml(run / CONFIG_FILE).get("cache", "")) if (run / CONFIG_FILE).exists() else ""
    if not cache or names_tars(cache):
        raise RepaError(
            f"{run} was trained from {cache}, which are tars" if cache else f"{run} does not say its cache",
            "give the cache with --cache",
            field="--cache",
        )
    return cache


def _manifest_of(path: CachePath, before: str) -> Manifest:
    """Open a manifest, with the columns of captions.

    Args:
        path: of the cache.
        before: what an error says first.

    Raises:
        RepaError: there is no cache.
    """
    try:
        return with_captions(path, open_manifest(path))
    except CacheError as error:
        raise RepaError(
            f"{before}{error.what}", "name the cache, wherever it is now, with --cache", field="--cache"
        ) from error


def _rows_of(reader: CacheReader, flags: AnalyzeFlags) -> NDArray[np.int64]:
    """Choose the images.

    Raises:
        RepaError: they have fewer neighbours than are asked for.
    """
    rows = chosen_rows(reader, flags.num, flags.seed)
    if flags.k >= len(rows):
        raise RepaError(
            f"--k {flags.k} neighbours of {len(rows)} images do not exist", "give fewer", field="--k"
        )
    return rows


def _check_has(manifest: Manifest, columns: Sequence[str], where: str) -> None:
    """Refuse a cache without the tokens that a run learned to make, or that stores them in another form.

    Raises:
        RepaError: it is such a cache.
    """
    found = stored_columns(columns[0], manifest.columns)
    if columns[0] not in manifest.columns or found != tuple(columns):
        raise RepaError(
            f"cache {where} has no {' and '.join(columns)}, which the run learned to make",
            "give the cache that the run was trained on with --cache",
            field="--cache",
        )


def _check_fits(reader: CacheReader, model: TrainedModel, where: str) -> None:
    """Refuse a cache of other latents.

    Raises:
        RepaError: their shape is another.
    """
    columns, shape = reader.manifest.columns, model.latent_shape
    if model.tokens is None:
        moments = columns[MOMENTS].shape
        there = (moments[0] // 2, *moments[1:])
    else:
        column, grid = model.tokens.columns[0], reader.manifest.sources[model.tokens.teacher].grid
        there = (columns[column].shape[-1], *grid)
    if there != shape:
        raise RepaError(
            f"cache {where} has latents of {list(there)}, the run of {list(shape)}",
            "give the cache that the run was trained on with --cache",
            field="--cache",
        )


def _pooled(reader: CacheReader, rows: NDArray[np.int64], teacher: str, size: int) -> Tensor:
    """Return the mean token of each image ``[N, D]``."""
    names = columns_of(reader.manifest, (teacher,), "patch")
    return torch.cat(
        [
            target(batch.values, column_name(teacher, "patch"), reader.manifest.columns).float().mean(dim=1)
            for batch in batches(reader, rows, names, size)
        ]
    )


def _numbers(
    features: BlockFeatures, labels: NDArray[np.int32] | None, teachers: Mapping[str, Tensor], k: int
) -> dict[str, Any]:
    values = features.features
    return {
        "norm": features.norm,
        "probe": _probe(values, labels),
        "cknna": {name: cknna(values, other, k=k) for name, other in teachers.items()},
        "cka": {name: cka(values, other) for name, other in teachers.items()},
    }


def _probe(features: Tensor, labels: NDArray[np.int32] | None) -> float | None:
    """Return the accuracy of a probe that is fitted to three quarters of the images.

    It is None where the network was told the labels, and where a class has fewer than 4 images on average.
    """
    if labels is None:
        return None
    order = np.random.default_rng(0).permutation(len(labels))
    fitted, tried = np.split(order, [int(_FITTED * len(order))])
    classes = len(np.unique(labels[fitted]))
    if classes < 2 or len(fitted) < _IMAGES_A_CLASS * classes:
        return None
    return linear_probe(
        features[torch.from_numpy(fitted)],
        labels[fitted],
        features[torch.from_numpy(tried)],
        labels[tried],
    )
