"""A distillation from its cache to the file of a merged encoder."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path  # noqa: TC003 — dataclasses read it
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from ...data.errors import CacheError, RepaError
from ...data.format.columns import split_column
from ...data.format.opening import as_recorded, open_manifest
from ...data.reading.order import permutation, split_holdout
from ...data.storage.bucket import cache_path
from ..encoders import find_teacher, load_encoder
from ..encoders.idle_blocks import make_idle, merged, require_idle_fits
from ..encoders.idle_teacher import (
    ENTRY,
    NORMS,
    SUFFIX,
    Distilled,
    idle_name,
    idle_teacher,
    read_distilled,
    usual_file,
)
from ..encoders.registry import file_of
from ..encoders.timm_vit import TimmEncoder
from .fidelity import fidelity
from .pairs import CachedPairs
from .speed import compare_speed
from .start import fit_in_closed_form
from .training import Distillation, TrainingSettings, write_tensors

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from numpy.typing import NDArray

    from ...data.format.manifest import Manifest, Provenance

FIT_IMAGES = 384
HELD_OUT = 200
MERGE_TOLERANCE = 1e-3
"""Largest difference of a patch token's number by the merge, relative to the largest number. Ours; rounding
in float32 gives about 1e-5."""


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """A `repa distill` as asked for.

    Attributes:
        cache: folder of the cache, or its address in a bucket.
        teacher: name of the teacher; None: the cache's only one.
        idle: θ, the share of the hidden channels that stay linear.
        norm: one of `NORMS`.
        data: the images of the cache.
        may_import: whether ``data`` may name a module.
        weights: file of the teacher's weights; None: the hub's.
        fit_images: images of the closed-form start; None: 384, or all that there are.
        steps: of the training end to end; 0 leaves the start as it is.
        batch_size: images of a step, and of a forward pass.
        learning_rate: of AdamW.
        held_out: images that are measured on and not trained on; None: 200, or a fifth.
        seed: of the order of the images.
        save_every: steps after which the state is kept.
        out: the file to write; None: ``encoders/NAME.safetensors``.
        device: where it computes.
    """

    cache: str
    teacher: str | None
    idle: float
    norm: str
    data: str
    may_import: bool
    weights: Path | None
    fit_images: int | None
    steps: int
    batch_size: int
    learning_rate: float
    held_out: int | None
    seed: int
    save_every: int
    out: Path | None
    device: str


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
        rows, held = _split(config, pairs.reader.valid_rows)
        fit = _fit_rows(config, rows)
        declared = manifest.sources[name]
        teacher = _load(config, manifest, declared, name, device)
        settings = TrainingSettings(
            encoder=copy.name,
            cache=manifest.identity,
            teacher_sha256=declared.weights_sha256,
            fit_images=len(fit),
            held_out=len(held),
            batch_size=config.batch_size,
            learning_rate=config.learning_rate,
            seed=config.seed,
        )
        trained = {**asdict(settings), "steps": config.steps}
        there = _there_already(out, trained)
        if there is not None:
            report.say(f"{out} is there already.")
            return out, there
        student = teacher.with_model(make_idle(teacher.model, config.idle, config.norm)).in_float32()
        run = Distillation(student, settings, pairs, rows, out.with_suffix(".training"))
        if run.resume():
            report.say(f"Going on after step {run.step:,}.")
            if run.step > config.steps:
                raise RepaError(
                    f"the distillation is at step {run.step}, past --steps {config.steps}",
                    f"give at least {run.step}, or name another file with --out",
                    field="--steps",
                )
        else:
            with report.progress(copy.depth * len(fit), "fitting block by block") as done:
                fit_in_closed_form(teacher, student.model, pairs.batches(fit, config.batch_size), done)
            run.save()
        with report.progress((config.steps - run.step) * config.batch_size, "distilling") as done:
            run.run(config.steps, config.save_every, done)
        found = teacher.with_model(merged(student.model, config.norm)).in_float32()
        with report.progress(len(held), "measuring"):
            measured: dict[str, Any] = {
                "merge_error": _merge_error(student, found, pairs, held[: config.batch_size]),
                **fidelity(found, pairs.batches(held, config.batch_size)),
            }
        speed = compare_speed(
            teacher, teacher.with_model(found.model), pairs.read(held[: config.batch_size]).images
        )
        distilled = Distilled(
            name=copy.name,
            teacher=name,
            teacher_sha256=declared.weights_sha256,
            idle=config.idle,
            norm=config.norm,
            merged=True,
            resolution=manifest.resolution,
            data=manifest.source_fingerprint,
            views=manifest.views,
            training=trained,
            fidelity=measured,
            speed=speed,
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


def check_numbers(config: DistillConfig) -> None:
    """Refuse numbers that are out of their range.

    Raises:
        RepaError: the first of them.
    """
    for flag, value, least, most in (
        ("--fit-images", config.fit_images, 1, 10**6),
        ("--steps", config.steps, 0, 10**9),
        ("--batch-size", config.batch_size, 2 if config.norm == NORMS[1] else 1, 1 << 16),
        ("--held-out", config.held_out, 2, 10**6),
        ("--seed", config.seed, 0, 2**63 - 1),
        ("--save-every", config.save_every, 1, 10**9),
    ):
        if value is not None and not least <= value <= most:
            raise RepaError(f"{flag} {value} is not valid", f"give {least} to {most:,}", field=flag)
    if not 0 < config.learning_rate < 1:
        raise RepaError(
            f"--learning-rate {config.learning_rate:g} is not valid",
            "give a small one above 0, as 6e-6",
            field="--learning-rate",
        )
    if config.norm not in NORMS:
        raise RepaError(
            f"--norm {config.norm!r} is unknown", f"the choices are {' and '.join(NORMS)}", field="--norm"
        )


def _split(config: DistillConfig, valid: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the rows that are trained on and those that are measured on.

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
    return split_holdout(valid, held)


def _fit_rows(config: DistillConfig, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Draw the rows that the start is fitted to, ascending.

    Raises:
        RepaError: there are not so many.
    """
    count = min(FIT_IMAGES, len(rows)) if config.fit_images is None else config.fit_images
    if count > len(rows):
        raise RepaError(
            f"--fit-images {count} is more than the {len(rows)} images that are not held out",
            f"give at most {len(rows)}",
            field="--fit-images",
        )
    return np.sort(rows[permutation(config.seed, 0, len(rows))[:count]])


def _load(
    config: DistillConfig, manifest: Manifest, declared: Provenance, name: str, device: torch.device
) -> TimmEncoder:
    """Load the teacher of the cache.

    Raises:
        RepaError: its weights cannot be had, are drawn, or no idle channels fit in.
        CacheError: it is another one.
    """
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


def _there_already(out: Path, trained: dict[str, Any]) -> Distilled | None:
    """Return what is in the file if it is what was asked for, and None if it is to be written.

    Raises:
        RepaError: the file is of another distillation, or of one that went on longer.
    """
    if not out.exists():
        return None
    remedy = "name another file with --out, or remove it"
    try:
        found = read_distilled(out)
    except RepaError as error:
        raise RepaError(error.what, remedy, field="--out") from error
    if found.training == trained:
        return found
    if {**found.training, "steps": 0} != {**trained, "steps": 0} or found.training["steps"] > trained[
        "steps"
    ]:
        raise RepaError(f"{out} is of another distillation", remedy, field="--out")
    return None


def _merge_error(
    student: TimmEncoder, found: TimmEncoder, pairs: CachedPairs, rows: NDArray[np.int64]
) -> float:
    """Return the largest difference that the merge makes, relative to the largest number.

    Raises:
        RepaError: it is more than rounding.
    """
    images = pairs.read(rows).images
    before, after = (each.encode(images)["patch"] for each in (student, found))
    error = float((after - before).abs().max() / before.abs().max())
    if not error <= MERGE_TOLERANCE:
        raise RepaError(
            f"merging changes the tokens by {error:.2g} of the largest, more than rounding does",
            "distil with more --fit-images, so that the idle channels are better conditioned",
            field="--fit-images",
        )
    return error
