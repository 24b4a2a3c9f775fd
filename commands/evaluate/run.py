"""An evaluation from what the flags name to the figures it writes."""

from __future__ import annotations

import hashlib
import json
import os
import time
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from ...data.errors import RepaError
from ...data.storage.files import make_folder, os_errors
from ...data.units import counted
from ...pipeline.lanes.lanes import usable_cores
from ...pipeline.shard_loop.ranks import detect_rank
from ...trainer.evaluation.feature_shards import IMAGE, FeatureShards, repeated
from ...trainer.evaluation.image_sets import open_samples
from ...trainer.evaluation.measuring import Measured, asked_for, check_asked, figures_of, notes_of
from ...trainer.evaluation.networks import BATCH
from ...trainer.evaluation.results import Evaluation, SamplesSaid, add_evaluation
from ...trainer.run.timing import device_hours
from ...trainer.sampling.record import SampleFolder
from ..shared.features import (
    FeatureJob,
    FileImages,
    GeneratedImages,
    NetworkSpec,
    SourceImages,
    compute_features,
)
from ..shared.prepared import check_devices, prepare_sampling
from ..shared.processes import in_processes
from ..shared.terminal import progress
from .flags import NUM
from .printed import print_evaluation
from .references import network_specs, open_reference

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray
    from rich.console import Console

    from ...pipeline.shard_loop.ranks import Rank
    from ...trainer.evaluation.networks import FeatureNetwork
    from ...trainer.evaluation.references import Reference
    from ..shared.features import ImageSpec
    from .flags import EvaluateFlags

FOLDER = "evaluation"
_SHOWN_DIGITS = 12
_POLL_SECONDS = 0.5
_ADM_METRICS = "fid,sfid,is,precision,recall"
_CACHE_METRICS = "fd"


@dataclass(frozen=True, kw_only=True)
class _Samples:
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
    notes: tuple[str, ...] = field(default=())


@dataclass(frozen=True, kw_only=True)
class _Set:
    """A set of images and the features that are wanted of it."""

    spec: ImageSpec
    count: int
    networks: tuple[NetworkSpec, ...]
    shards: tuple[FeatureShards, ...]
    what: str
    keep: SampleFolder | None = None

    def missing(self) -> list[int]:
        """Return the first image of each batch that lacks something."""
        found = {first for shards in self.shards for first in shards.missing()}
        return sorted(found | set(self.keep.missing() if self.keep is not None else ()))

    def absent(self) -> int:
        """Count the batches that lack a file, whatever is in those that have it."""
        return sum(shards.absent() for shards in self.shards)


def run_evaluation(flags: EvaluateFlags, console: Console) -> None:
    """Measure what the flags name, see `evaluate`.

    Args:
        flags: of the command.
        console: where to print.

    Raises:
        RepaError: a mistake the user can mend.
    """
    rank = detect_rank(os.environ, flags.devices)
    cuda = torch.cuda.is_available()
    check_devices(flags.devices, torch.cuda.device_count() if cuda else 0)

    def say(line: str) -> None:
        if rank.rank == 0:
            console.print(line, highlight=False, markup=False, soft_wrap=True)

    out = _out(flags)
    samples = _samples(flags, out, say)
    for note in samples.notes:
        say(f"note: {note}")
    reference = open_reference(_reference(flags, samples), samples.said.resolution)
    names = flags.metrics or (_CACHE_METRICS if reference.cache is not None else _ADM_METRICS)
    asked = asked_for([each.strip() for each in names.split(",") if each.strip()], reference)
    specs = network_specs(
        asked, reference, samples.said.resolution, flags.inception, flags.encoder_weights or ()
    )
    rows = {each: reference.count(each) for each in specs if reference.count(each)}
    check_asked(asked, reference, samples.said.num, rows)
    with os_errors("write", out):
        make_folder(out, samples.run)
    # before anything is sampled: what cannot be had is said now
    networks = {name: spec.load("cpu") for name, spec in specs.items()}
    of_samples, of_reference = _sets(out, samples, reference, specs, networks, cuda)
    for each in filter(None, (of_reference, of_samples)):
        _compute(each, flags, rank, console, cuda, say)
    if rank.rank:
        return
    arrays = dict(zip(specs, (each.read() for each in of_samples.shards), strict=True))
    twice = repeated(next(iter(arrays.values()))[IMAGE])
    if twice is not None:
        raise RepaError(
            f"samples {twice[0]:,} and {twice[1]:,} are the same image, so there are fewer than "
            f"{samples.said.num:,}",
            "look at the samples; make them anew with different noise",
            field="--samples" if flags.samples is not None else "--seed",
        )
    measured = _measured(networks, arrays, reference, of_reference)
    evaluation = Evaluation(
        samples=samples.said,
        reference=reference.said,
        figures=tuple(figures_of(asked, measured, bootstrap=flags.bootstrap)),
        notes=(
            *samples.notes,
            *notes_of(asked, measured, reference, class_sorted=samples.class_sorted),
        ),
    )
    if samples.keep is not None and samples.condition is not None:
        samples.keep.finish(samples.condition)
    add_evaluation(out, evaluation)
    print_evaluation(evaluation, console, out)


def _out(flags: EvaluateFlags) -> Path:
    """Choose the folder of features and results."""
    if flags.out is not None:
        return flags.out
    if flags.run is not None:
        return flags.run
    named = flags.checkpoint or flags.samples
    assert named is not None, "the flags name one thing"
    return _run_of(named) or named.parent / f"{named.stem}-{FOLDER}"


def _run_of(checkpoint: Path) -> Path | None:
    """Return the run that a checkpoint lies in, if it lies in one."""
    from ...trainer.run.folder import CONFIG_FILE
    from ...trainer.step.checkpoints import FOLDER as CHECKPOINTS

    run = checkpoint.parent.parent
    return run if checkpoint.parent.name == CHECKPOINTS and (run / CONFIG_FILE).exists() else None


def _samples(flags: EvaluateFlags, out: Path, say: Callable[[str], None]) -> _Samples:
    if flags.samples is not None:
        return _finished(flags)
    return _generated(flags, out, say)


def _finished(flags: EvaluateFlags) -> _Samples:
    assert flags.samples is not None
    images = open_samples(flags.samples, flags.num)
    said = SamplesSaid(name=images.name, sha256=images.sha256, num=images.count, resolution=images.resolution)
    identity = {"images": images.sha256, "num": images.count}
    return _Samples(
        said=said,
        spec=FileImages(images=images),
        identity=identity,
        folder=f"samples-{_short(identity)}",
        class_sorted=images.class_sorted,
        notes=images.notes,
    )


def _generated(flags: EvaluateFlags, out: Path, say: Callable[[str], None]) -> _Samples:
    checkpoint = _checkpoint(flags)
    run = flags.run or _run_of(checkpoint)
    prepared = prepare_sampling(
        checkpoint,
        flags,
        num=flags.num or NUM,
        batch_size=BATCH,
        form="npz",
        device="cpu",
        say=say,
        label_mode=flags.labels,
    )
    record, model = prepared.record, prepared.model
    said = SamplesSaid(
        name=record.checkpoint,
        sha256=record.checkpoint_sha256,
        num=record.num,
        resolution=model.latent_shape[1] * prepared.decoder.load().stride,
        seed=record.seed,
        labels=record.label_mode,
        solver=record.solver,
        steps=record.steps,
        guidance=record.guidance,
        guidance_cls=record.guidance_cls,
        interval=record.interval,
        weights=record.weights,
        decoder=record.autoencoder,
        decoder_sha256=record.autoencoder_sha256,
        step=record.step,
        images_seen=model.images_seen,
        device_hours=None if run is None or record.step is None else device_hours(run, record.step),
    )
    of_others = ("checkpoint", "autoencoder", "form", "finished")
    identity = {name: value for name, value in asdict(record).items() if name not in of_others}
    folder = f"{checkpoint.stem}-{_short(identity)}"
    return _Samples(
        said=said,
        spec=GeneratedImages(
            checkpoint=checkpoint,
            record=record,
            condition=prepared.condition,
            random_autoencoder=prepared.random_autoencoder,
        ),
        identity=identity,
        folder=folder,
        run=run,
        keep=SampleFolder(out / FOLDER / folder / "samples", record) if flags.keep_samples else None,
        condition=prepared.condition,
    )


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


def _reference(flags: EvaluateFlags, samples: _Samples) -> str:
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


def _sets(
    out: Path,
    samples: _Samples,
    reference: Reference,
    specs: Mapping[str, NetworkSpec],
    networks: Mapping[str, FeatureNetwork],
    cuda: bool,
) -> tuple[_Set, _Set | None]:
    """Say which features are wanted of the samples and of the reference's images, and where they lie."""

    def shards(name: str, identity: Mapping[str, Any], folder: str, count: int) -> FeatureShards:
        network = networks[name]
        whole = {
            "images": identity,
            "network": network.weights_sha256,
            "resolution": samples.said.resolution,
            # a GPU rounds otherwise
            "device": "cuda" if cuda else "cpu",
        }
        return FeatureShards(
            folder=out / FOLDER / folder / f"{name}-{network.weights_sha256[:_SHOWN_DIGITS]}",
            root=out,
            identity=json.dumps(whole, sort_keys=True),
            count=count,
            widths=network.widths,
        )

    of_samples = _Set(
        spec=samples.spec,
        count=samples.said.num,
        networks=tuple(specs.values()),
        shards=tuple(shards(name, samples.identity, samples.folder, samples.said.num) for name in specs),
        what="sampling" if isinstance(samples.spec, GeneratedImages) else "samples",
        keep=samples.keep,
    )
    images = reference.images
    # those of a cache's encoder are its column
    wanted = [] if images is None else [name for name in specs if name not in reference.encoders]
    if images is None or not wanted:
        return of_samples, None
    identity = {"images": reference.said.sha256}
    folder = f"reference-{_short(identity)}"
    of_reference = _Set(
        spec=images if isinstance(images, SourceImages) else FileImages(images=images),
        count=images.count,
        networks=tuple(specs[name] for name in wanted),
        shards=tuple(shards(name, identity, folder, images.count) for name in wanted),
        what="reference",
    )
    return of_samples, of_reference


def _compute(
    wanted: _Set, flags: EvaluateFlags, rank: Rank, console: Console, cuda: bool, say: Callable[[str], None]
) -> None:
    """Compute what is missing of a set, this process's share of it, and as leader wait for the others'."""
    if wanted.keep is not None and rank.rank == 0:
        wanted.keep.open(replace_other=False)
    missing = wanted.missing()
    # dealt by number, as ranks may look at different moments
    mine = [first for first in missing if first // BATCH % rank.world == rank.rank]
    left = sum(min(BATCH, wanted.count - first) for first in mine)
    done = wanted.count - sum(min(BATCH, wanted.count - first) for first in missing)
    if done:
        say(f"{wanted.what}: {done:,} of {counted(wanted.count, 'image', ',')} are measured already.")
    processes = min(flags.devices, len(mine))
    cores = usable_cores()
    local = max(processes, rank.local_world)
    jobs = [
        FeatureJob(
            images=wanted.spec,
            networks=wanted.networks,
            shards=wanted.shards,
            batches=tuple(mine[number::processes]),
            count=wanted.count,
            device=f"cuda:{rank.local_rank + number}" if cuda else "cpu",
            threads=max(cores // local, 1),
            keep=wanted.keep,
        )
        for number in range(processes)
    ]
    if rank.rank == 0:
        with progress(left, console, wanted.what) as report:
            _do(jobs, report)
        _wait_for_others(wanted, say)
    else:
        _do(jobs, lambda _: None)


def _do(jobs: Sequence[FeatureJob], report: Callable[[int], None]) -> None:
    if len(jobs) > 1:
        in_processes(compute_features, jobs, report, what="evaluation")
        return
    for job in jobs:
        compute_features(job, report)


def _wait_for_others(wanted: _Set, say: Callable[[str], None]) -> None:
    said = False
    while absent := wanted.absent():
        if not said:
            say(f"{wanted.what}: waiting for {counted(absent, 'batch', ',')} of other processes.")
            said = True
        time.sleep(_POLL_SECONDS)


def _measured(
    networks: Mapping[str, FeatureNetwork],
    arrays: Mapping[str, Mapping[str, NDArray[Any]]],
    reference: Reference,
    of_reference: _Set | None,
) -> dict[str, Measured]:
    of_images = {}
    if of_reference is not None:
        for spec, shards in zip(of_reference.networks, of_reference.shards, strict=True):
            of_images[spec.name] = {name: values for name, values in shards.read().items() if name != IMAGE}
    found = {}
    for name, network in networks.items():
        cached = {"pool": reference.cached_features(name)} if name in reference.encoders else {}
        found[name] = Measured(
            samples={key: values for key, values in arrays[name].items() if key != IMAGE},
            reference=cached or of_images.get(name, {}),
            statistics=reference.statistics_of(name),
            weights_sha256=network.weights_sha256,
            random_weights=network.random_weights,
        )
    return found


def _short(identity: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:_SHOWN_DIGITS]
