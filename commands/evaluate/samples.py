"""What an evaluation measures: finished samples, or those that a checkpoint is to make."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from ...data.edge import read_json
from ...data.errors import RepaError
from ...data.storage.files import os_errors, read_file
from ...trainer.evaluation.image_sets import ArrayImages, open_samples
from ...trainer.evaluation.networks import BATCH
from ...trainer.evaluation.results import SamplesSaid
from ...trainer.run.folder import run_of
from ...trainer.run.timing import device_hours
from ...trainer.sampling.record import RECORD_FILE, SampleFolder, SamplingRecord
from ..shared.banks import BankAsked
from ..shared.features import FileImages, GeneratedImages
from ..shared.prepared import prepare_sampling
from .flags import NUM

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from ...trainer.evaluation.image_sets import FolderImages
    from ..shared.features import ImageSpec
    from ..shared.prepared import Prepared
    from .flags import EvaluateFlags

FOLDER = "evaluation"
_MOST_RECORD = 1 << 24
IMAGE_CONDITIONED = (
    "image-conditioned: each sample was given the class token of an image of the bank, which tells more than "
    "a class does; rank these figures beside others of the same bank, never beside class-conditional ones"
)
SHOWN_DIGITS = 12


@dataclass(frozen=True, kw_only=True)
class Samples:
    """What is measured.

    Attributes:
        said: what evaluations record of it.
        spec: where its images come from.
        identity: what decides its images.
        folder: name of the folder of its features.
        run: folder of the run it is of; None if it is of none.
        keep: where the images are written too.
        condition: of each image, for that.
        class_sorted: whether images stand class by class.
        prompts: text of each image; none of a model that reads no text.
        notes: what a reader of figures must know.
    """

    said: SamplesSaid
    spec: ImageSpec
    identity: Mapping[str, Any]
    folder: str
    run: Path | None = None
    keep: SampleFolder | None = None
    condition: NDArray[Any] | None = None
    class_sorted: bool = False
    prompts: tuple[str, ...] = ()
    notes: tuple[str, ...] = field(default=())


def folder_of(flags: EvaluateFlags) -> Path:
    """Choose the folder of features and results."""
    if flags.out is not None:
        return flags.out
    if flags.run is not None:
        return flags.run
    named = flags.checkpoint or flags.samples
    assert named is not None, "the flags name one thing"
    return run_of(named) or named.parent / f"{named.stem}-{FOLDER}"


def samples_of(flags: EvaluateFlags, out: Path, say: Callable[[str], None]) -> Samples:
    """Open finished samples, or load what is to make them.

    Args:
        flags: of the command.
        out: folder of features and results.
        say: prints a line.

    Raises:
        RepaError: neither can be had, or they are not what can be measured.
    """
    if flags.samples is not None:
        return _finished(flags)
    return _generated(flags, out, say)


def _finished(flags: EvaluateFlags) -> Samples:
    assert flags.samples is not None
    images = open_samples(flags.samples, flags.num)
    recorded = _record_of(images)
    prompts = _prompts(recorded, images.count)
    of_vectors = not prompts and _given_vectors(images, recorded)
    said = SamplesSaid(
        name=images.name,
        sha256=images.sha256,
        num=images.count,
        resolution=images.resolution,
        condition="class tokens of images" if of_vectors else "prompts" if prompts else None,
    )
    identity = {"images": images.sha256, "num": images.count}
    return Samples(
        said=said,
        spec=FileImages(images=images),
        identity=identity,
        folder=f"samples-{short_sha256(identity)}",
        class_sorted=images.class_sorted,
        prompts=prompts,
        notes=(*images.notes, IMAGE_CONDITIONED) if of_vectors else images.notes,
    )


def _record_of(images: ArrayImages | FolderImages) -> Mapping[str, Any]:
    """Return the record that lies beside finished samples, empty if there is none of ours."""
    folder = images.file.parent if isinstance(images, ArrayImages) else images.folder
    file = folder / RECORD_FILE
    if not file.exists():
        return {}
    with os_errors("read", file):
        raw = read_file(file, _MOST_RECORD)
    try:
        record = read_json(raw, where=str(file), remedy="move it away", error=RepaError)
    except RepaError:
        # of others, whatever it is
        return {}
    return record if isinstance(record, dict) else {}


def _given_vectors(images: ArrayImages | FolderImages, record: Mapping[str, Any]) -> bool:
    """Return whether finished samples were given vectors, by their file or by the record beside them."""
    return images.of_vectors if isinstance(images, ArrayImages) else record.get("bank") is not None


def _prompts(record: Mapping[str, Any], count: int) -> tuple[str, ...]:
    """Return the prompts of the first so many images, none where the record has none."""
    prompts = record.get("prompts")
    if not isinstance(prompts, list) or not prompts or not all(isinstance(each, str) for each in prompts):
        return ()
    return tuple(prompts[number % len(prompts)] for number in range(count))


def _generated(flags: EvaluateFlags, out: Path, say: Callable[[str], None]) -> Samples:
    checkpoint = _checkpoint(flags)
    run = flags.run or run_of(checkpoint)
    prepared = prepare_sampling(
        checkpoint,
        flags,
        num=flags.num or NUM,
        batch_size=BATCH,
        form="npz",
        device="cpu",
        say=say,
        label_mode=flags.labels,
        bank=BankAsked(bank=flags.bank or ""),
        run=run,
    )
    record = prepared.record
    identity = _identity(record)
    folder = f"{checkpoint.stem}-{short_sha256(identity)}"
    return Samples(
        said=_said_of(prepared, run),
        spec=GeneratedImages(
            checkpoint=checkpoint,
            record=record,
            condition=prepared.condition,
            random_autoencoder=prepared.random_autoencoder,
            teacher_weights=prepared.teacher_weights,
        ),
        identity=identity,
        folder=folder,
        run=run,
        keep=SampleFolder(out / FOLDER / folder / "samples", record) if flags.keep_samples else None,
        condition=prepared.told,
        prompts=_prompts({"prompts": list(record.prompts)}, record.num),
        notes=() if record.bank is None or record.prompts else (IMAGE_CONDITIONED,),
    )


def _said_of(prepared: Prepared, run: Path | None) -> SamplesSaid:
    """Return what evaluations record of samples that are to be made."""
    record, model = prepared.record, prepared.model
    return SamplesSaid(
        name=record.checkpoint,
        sha256=record.checkpoint_sha256,
        num=record.num,
        resolution=model.latent_shape[1] * prepared.decoder.stride,
        seed=record.seed,
        labels=record.label_mode if record.bank is None and not record.prompts else None,
        condition=_condition(record),
        bank=record.bank,
        solver=record.solver,
        steps=record.steps,
        shift=None if record.shift == 1 else record.shift,
        guidance=record.guidance,
        guidance_cls=record.guidance_cls,
        guidance_channels=None if record.guidance_channels == "all" else record.guidance_channels,
        interval=record.interval,
        weights=record.weights,
        decoder=record.autoencoder,
        decoder_sha256=record.autoencoder_sha256,
        step=record.step,
        images_seen=model.images_seen,
        device_hours=None if run is None or record.step is None else device_hours(run, record.step),
    )


def _identity(record: SamplingRecord) -> dict[str, Any]:
    """Return what decides the images of a record, and which features are found again by."""
    of_others = ("checkpoint", "autoencoder", "form", "finished")
    # without them, features are found again that were made before there were such settings
    later = {
        "family": None,
        "shift": 1.0,
        "guidance_channels": "all",
        "bank": None,
        "vectors": None,
        "prompts": (),
        "condition_sha256": None,
    }
    return {
        name: value
        for name, value in asdict(record).items()
        if name not in of_others and not (name in later and value == later[name])
    }


def _condition(record: SamplingRecord) -> str | None:
    """Say what samples were given instead of a class."""
    if record.prompts:
        return "prompts" if record.bank is None else "captions of the images of a cache, one of each"
    return None if record.bank is None else f"class tokens of images, {record.vectors}"


def _checkpoint(flags: EvaluateFlags) -> Path:
    from ...trainer.sampling.generate import newest_checkpoint
    from ...trainer.step.checkpoints import checkpoints_of

    if flags.checkpoint is not None:
        return flags.checkpoint
    assert flags.run is not None
    newest = newest_checkpoint(flags.run)
    found = checkpoints_of(flags.run)
    if flags.step is not None and flags.step not in found:
        raise RepaError(
            f"{flags.run} has no checkpoint of step {flags.step}",
            f"it has those of {', '.join(map(str, found))}",
            field="--step",
        )
    return newest if flags.step is None else found[flags.step]


def reference_for(flags: EvaluateFlags, samples: Samples) -> str:
    """Return what to compare with, by default the cache that the run was trained from.

    Raises:
        RepaError: nothing says it.
    """
    from ...trainer.config import build
    from ...trainer.run.folder import CONFIG_FILE
    from ...trainer.settings_file import load_yaml

    if flags.reference is not None:
        return flags.reference
    if samples.run is not None and (samples.run / CONFIG_FILE).exists():
        cache = build(load_yaml(samples.run / CONFIG_FILE)).cache
        if cache:
            return cache
    raise RepaError(
        "nothing says what to compare the samples with",
        "give --reference a file of the ADM evaluation suite, a cache or a folder of images",
        field="--reference",
    )


def short_sha256(identity: Mapping[str, Any]) -> str:
    """Return the first digits of the hash of plain values."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:SHOWN_DIGITS]
