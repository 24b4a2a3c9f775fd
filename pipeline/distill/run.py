"""A distillation from its cache to the file of a merged encoder."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from ...data.errors import CacheError, RepaError
from ...data.format.columns import split_column
from ...data.format.opening import as_recorded, open_manifest
from ...data.reading.order import permutation, split_holdout
from ...data.storage.bucket import cache_path
from ..encoders import find_teacher, load_encoder
from ..encoders.distilled import ENTRY, Distilled, Fidelity, Training, TrainingSettings
from ..encoders.idle_blocks import make_idle, merged, require_idle_fits
from ..encoders.idle_teacher import SUFFIX, idle_name, idle_teacher, usual_file
from ..encoders.registry import file_of
from ..encoders.timm_vit import TimmEncoder
from .begun import require_ahead, there_already
from .fidelity import fidelity
from .pairs import CachedPairs
from .speed import compare_speed
from .start import fit_in_closed_form
from .training import Distillation, write_tensors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager
    from pathlib import Path

    from numpy.typing import NDArray
    from torch import Tensor

    from ...data.format.manifest import Manifest
    from ..encoders.idle_teacher import IdleTeacher
    from .config import DistillConfig
    from .pairs import Pairs

FIT_IMAGES = 384
HELD_OUT = 200
STEPS = 400
"""Where there are `FRESH` times as many images to train on as the start is fitted to."""
FRESH = 5
"""Ours, as measured. The start has learned the tokens of its images by heart, so that training on them alone
gains next to nothing, see ``docs/distill.md``."""
MERGE_TOLERANCE = 1e-3
"""Largest difference of a patch token's number by the merge, relative to the largest number. Ours; rounding
in float32 gives about 1e-5."""


class Report(Protocol):
    """Shows how far a distillation is."""

    def say(self, text: str) -> None:
        """Show a line."""

    def progress(self, total: int, what: str) -> AbstractContextManager[Any]:
        """Return a context that gives a function to be told what is done."""


def distill(config: DistillConfig, report: Report) -> tuple[Path, Distilled]:
    """Distil a channel-idle copy of a teacher from its cached tokens, merge it, measure it and write it.

    What was begun with the same settings goes on where its state was kept.

    Args:
        config: what is asked for.
        report: where progress goes.

    Returns:
        The file, and what it says of the encoder.

    Raises:
        RepaError: a mistake the user can mend.
        CacheError: the cache, the images or the weights do not fit each other.
    """
    path = cache_path(config.cache)
    manifest = open_manifest(path)
    name = _teacher_of(manifest, config)
    copy = idle_teacher(
        idle_name(name, config.idle, config.norm), find_teacher(name), config.idle, config.norm
    )
    out = _out(config, copy.name)
    device = torch.device(config.device)
    with CachedPairs(
        path, manifest, name, data=config.data, device=device, may_import=config.may_import
    ) as pairs:
        rows = _rows(config, pairs.reader.valid_rows)
        settings = _settings(config, manifest, copy, rows)
        steps = _steps(config, rows)
        there = there_already(out, settings, steps)
        if there is not None:
            report.say(f"{out} is there already.")
            return out, there
        teacher = _load(config, manifest, name, device)
        student, start = _student(config, settings, steps, teacher, pairs, rows, out, report)
        found = teacher.with_model(merged(student.model, config.norm)).in_float32()
        with report.progress(len(rows.held_out), "measuring") as done:
            measured = _fidelity(config, student, found, pairs, rows.held_out, done)
        if start is not None:
            report.say(_gain(start, measured.patch_cosine_mean, steps))
        images = pairs.read(rows.held_out[: config.batch_size]).images
        distilled = Distilled(
            name=copy.name,
            teacher=name,
            teacher_sha256=settings.teacher_sha256,
            idle=config.idle,
            norm=config.norm,
            merged=True,
            resolution=manifest.resolution,
            data=manifest.source_fingerprint,
            views=manifest.views,
            training=Training(**asdict(settings), steps=steps),
            fidelity=measured,
            speed=compare_speed(teacher, teacher.with_model(found.model), images),
        )
        write_tensors(out, found.model.state_dict(), {ENTRY: distilled.as_json()})
    return out, distilled


def _teacher_of(manifest: Manifest, config: DistillConfig) -> str:
    """Return the teacher that is asked for, or the only one whose tokens a cache has.

    Raises:
        RepaError: the cache has not its tokens, or those of several.
    """
    names = [split_column(each)[0] for each in manifest.columns if each.endswith("/patch")]
    if config.teacher in names:
        return config.teacher
    if config.teacher is None and len(names) == 1:
        return names[0]
    raise RepaError(
        f"cache {config.cache} has the tokens of {', '.join(names) or 'no teacher'}"
        + ("" if config.teacher is None else f", not of {config.teacher}"),
        "name one of them with --encoder" if names else "add some with `repa preprocess`",
        field="--encoder",
    )


@dataclass(frozen=True)
class _Rows:
    """Rows of the cache by what they are for, int64 and ascending.

    Attributes:
        trained: that are trained on.
        fitted: those of them that the start is fitted to.
        held_out: that are measured on.
    """

    trained: NDArray[np.int64]
    fitted: NDArray[np.int64]
    held_out: NDArray[np.int64]


def _rows(config: DistillConfig, valid: NDArray[np.int64]) -> _Rows:
    """Choose rows.

    Raises:
        RepaError: too few are there.
    """
    held = min(HELD_OUT, len(valid) // 5) if config.held_out is None else config.held_out
    if held < 2 or len(valid) - held < config.batch_size:
        raise RepaError(
            f"of {len(valid)} images {held} would be held out, and {max(len(valid) - held, 0)} left for "
            f"batches of {config.batch_size}",
            "give another --held-out of at least 2, or cache more images",
            field="--held-out",
        )
    trained, held_out = split_holdout(valid, held)
    count = min(FIT_IMAGES, len(trained)) if config.fit_images is None else config.fit_images
    if count > len(trained):
        raise RepaError(
            f"--fit-images {count} is more than the {len(trained)} images that are not held out",
            f"give at most {len(trained)}",
            field="--fit-images",
        )
    fitted = np.sort(trained[permutation(config.seed, 0, len(trained))[:count]])
    return _Rows(trained, fitted, held_out)


def _steps(config: DistillConfig, rows: _Rows) -> int:
    """Return how many steps are trained."""
    if config.steps is not None:
        return config.steps
    return STEPS if len(rows.trained) >= FRESH * len(rows.fitted) else 0


def _settings(config: DistillConfig, manifest: Manifest, copy: IdleTeacher, rows: _Rows) -> TrainingSettings:
    return TrainingSettings(
        encoder=copy.name,
        cache=manifest.identity,
        teacher_sha256=manifest.sources[copy.teacher].weights_sha256,
        fit_images=len(rows.fitted),
        held_out=len(rows.held_out),
        batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        seed=config.seed,
    )


def _student(
    config: DistillConfig,
    settings: TrainingSettings,
    steps: int,
    teacher: TimmEncoder,
    pairs: CachedPairs,
    rows: _Rows,
    out: Path,
    report: Report,
) -> tuple[TimmEncoder, float | None]:
    """Return the student after its last step, begun or gone on with.

    Returns:
        It, and the cosine of its held-out patch tokens before the first step, None without steps.

    Raises:
        RepaError: the kept state is of another distillation, or past the last step.
        CacheError: the teacher gives other tokens than the cache has.
    """
    student = teacher.with_model(make_idle(teacher.model, config.idle, config.norm)).in_float32()
    file = out.with_suffix(".training")
    run = Distillation(student, settings, pairs, rows.trained, file)
    if run.resume():
        require_ahead(file, run.step, steps)
        report.say(f"Going on after step {run.step:,}.")
    else:
        with report.progress(teacher.depth * len(rows.fitted), "fitting block by block") as done:
            batches = pairs.batches(rows.fitted, config.batch_size)
            fit_in_closed_form(teacher, student.model, batches, done)
        run.save()
    if steps and run.start is None:
        with report.progress(len(rows.held_out), "measuring the start") as done:
            batches = _reported(pairs.batches(rows.held_out, config.batch_size), done)
            run.start = fidelity(student, batches)["patch_cosine_mean"]
    with report.progress((steps - run.step) * config.batch_size, "distilling") as done:
        run.run(steps, config.save_every, done)
    return student, run.start if steps else None


def _gain(start: float, end: float, steps: int) -> str:
    """Return what is said of the training's worth."""
    said = f"Cosine of held-out patch tokens: {start:.4f} at the start, {end:.4f} after {steps:,} steps."
    if end < start:
        said += " Training has made the copy worse: distil with --steps 0 and another --out, or more images."
    return said


def _reported(batches: Iterator[Pairs], report: Callable[[int], None]) -> Iterator[Pairs]:
    for each in batches:
        yield each
        report(len(each.images))


def _fidelity(
    config: DistillConfig,
    student: TimmEncoder,
    found: TimmEncoder,
    pairs: CachedPairs,
    held: NDArray[np.int64],
    report: Callable[[int], None],
) -> Fidelity:
    """Measure the merged student.

    Raises:
        RepaError: merging has changed it.
    """
    error = _merge_error(student, found, pairs.read(held[: config.batch_size]).images)
    batches = _reported(pairs.batches(held, config.batch_size), report)
    return Fidelity(merge_error=error, **fidelity(found, batches))


def _load(config: DistillConfig, manifest: Manifest, name: str, device: torch.device) -> TimmEncoder:
    """Load the teacher of the cache.

    Raises:
        RepaError: its weights cannot be had, are drawn, or no idle channels fit in.
        CacheError: it is another one.
    """
    declared = manifest.sources[name]
    if declared.random_weights:
        raise RepaError(
            f"the weights of {name} in cache {config.cache} were drawn, which leaves nothing to distil",
            "encode the images by trained weights into another cache",
            field="--encoder",
        )
    encoder = load_encoder(
        find_teacher(name),
        resolution=manifest.resolution,
        device=device,
        compute_dtype=declared.compute_dtype if device.type == "cuda" else "float32",
        weights=config.weights,
    )
    assert isinstance(encoder, TimmEncoder), "the copy's facts have been made of it"
    found = as_recorded(encoder.provenance(config.batch_size), [declared]).weights_sha256
    if found != declared.weights_sha256:
        raise CacheError(
            f"the {name} at hand is not the one of cache {config.cache}: its weights have sha256 "
            f"{found[:12]}…, the cache's {declared.weights_sha256[:12]}…",
            f"give the cache's with --weights {name}=FILE",
            field="--weights",
        )
    require_idle_fits(encoder.model, name)
    return encoder


def _out(config: DistillConfig, name: str) -> Path:
    """Return the file to write.

    Raises:
        RepaError: `repa preprocess` would not take its name for that of an encoder's file.
    """
    out = config.out or usual_file(name)
    if file_of(str(out)) is None:
        raise RepaError(
            f"--out {out} is no name of an encoder's file",
            f"let it end in {SUFFIX}, without a colon in it",
            field="--out",
        )
    return out


def _merge_error(student: TimmEncoder, found: TimmEncoder, images: Tensor) -> float:
    """Return the largest difference that the merge makes, relative to the largest number.

    Raises:
        RepaError: it is more than rounding.
    """
    before, after = (each.encode(images)["patch"] for each in (student, found))
    error = float((after - before).abs().max() / before.abs().max())
    if not error <= MERGE_TOLERANCE:
        raise RepaError(
            f"merging changes the tokens by {error:.2g} of the largest, more than rounding does",
            "distil with more --fit-images, so that the idle channels are better conditioned",
            field="--fit-images",
        )
    return error
