"""An evaluation from what the flags name to the figures it writes."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from ...data.errors import RepaError
from ...data.machine import usable_cores
from ...data.storage.files import make_folder, os_errors
from ...data.units import counted
from ...pipeline.encoders.clip_similarity import ClipSimilarity
from ...pipeline.shard_loop.ranks import detect_rank
from ...trainer.evaluation.feature_shards import IMAGE, FeatureShards, repeated
from ...trainer.evaluation.measuring import (
    Measured,
    asked_for,
    check_asked,
    figures_of,
    needs_images,
    notes_of,
)
from ...trainer.evaluation.networks import BATCH
from ...trainer.evaluation.results import Evaluation, add_evaluation
from ..shared.features import (
    FeatureJob,
    FileImages,
    GeneratedImages,
    NetworkSpec,
    SourceImages,
    compute_features,
)
from ..shared.processes import in_processes
from ..shared.references import network_specs, open_reference
from ..shared.sampling_checks import check_devices
from ..shared.terminal import progress
from .printed import print_evaluation
from .samples import FOLDER, SHOWN_DIGITS, folder_of, reference_for, samples_of, short_sha256

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray
    from rich.console import Console

    from ...pipeline.shard_loop.ranks import Rank
    from ...trainer.evaluation.networks import FeatureNetwork
    from ...trainer.evaluation.references import Reference
    from ...trainer.sampling.record import SampleFolder
    from ..shared.features import ImageSpec
    from .flags import EvaluateFlags
    from .samples import Samples

_POLL_SECONDS = 0.5
_ADM_METRICS = "fid,sfid,is,precision,recall"
_CACHE_METRICS = "fd"


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
    gpus = torch.cuda.device_count() if cuda else 0
    check_devices(flags.devices, gpus)
    if cuda and rank.local_rank >= gpus:
        raise RepaError(
            f"{counted(rank.local_rank + 1, 'process')} of this machine, which shows {counted(gpus, 'GPU')}",
            "start fewer",
            field="--devices",
        )

    def say(line: str) -> None:
        if rank.rank == 0:
            console.print(line, highlight=False, markup=False, soft_wrap=True)

    out = folder_of(flags)
    samples = samples_of(flags, out, say)
    reference = open_reference(reference_for(flags, samples), samples.said.resolution)
    names = flags.metrics or (_CACHE_METRICS if reference.cache is not None else _ADM_METRICS)
    asked = asked_for([each.strip() for each in names.split(",") if each.strip()], reference)
    specs = network_specs(
        asked,
        reference,
        samples.said.resolution,
        flags.inception,
        flags.encoder_weights or (),
        clip=flags.clip,
    )
    rows = {each: reference.count(each) for each in specs if reference.count(each)}
    check_asked(asked, reference, samples.said.num, rows, prompts=bool(samples.prompts))
    # before anything is sampled: what cannot be had is said now
    networks = {name: spec.load("cpu") for name, spec in specs.items()}
    with os_errors("write", out):
        make_folder(out, samples.run)
    encoded = [name for name in specs if needs_images(asked, reference, name)]
    of_samples, of_reference = _sets(out, samples, reference, specs, networks, encoded, cuda)
    for each in filter(None, (of_reference, of_samples)):
        _compute(each, flags, rank, console, cuda, say)
    if rank.rank:
        return
    arrays = dict(zip(specs, (each.read() for each in of_samples.shards), strict=True))
    _refuse_repeated(next(iter(arrays.values()))[IMAGE], "--seed" if flags.samples is None else "--samples")
    measured = _measured(networks, arrays, reference, of_reference)
    for name, network in networks.items():
        if isinstance(network, ClipSimilarity):
            texts = network.text_features(samples.prompts).numpy()
            measured[name] = replace(measured[name], texts=texts)
    figures = figures_of(asked, measured, bootstrap=flags.bootstrap)
    if samples.said.condition is not None and not samples.prompts:
        figures = [replace(each, protocol=f"{each.protocol}; image-conditioned") for each in figures]
    notes = (*samples.notes, *notes_of(asked, measured, reference, class_sorted=samples.class_sorted))
    evaluation = Evaluation(
        samples=samples.said, reference=reference.said, figures=tuple(figures), notes=notes
    )
    if samples.keep is not None and samples.condition is not None:
        samples.keep.finish(samples.condition)
    add_evaluation(out, evaluation)
    print_evaluation(evaluation, console, out)


def _refuse_repeated(hashes: NDArray[Any], flag: str) -> None:
    """Refuse samples of which two are the same.

    Raises:
        RepaError: two are.
    """
    twice = repeated(hashes)
    if twice is not None:
        raise RepaError(
            f"of {len(hashes):,} samples {twice[0]:,} and {twice[1]:,} are the same image",
            "look at them, and make them anew with other noise",
            field=flag,
        )


def _sets(
    out: Path,
    samples: Samples,
    reference: Reference,
    specs: Mapping[str, NetworkSpec],
    networks: Mapping[str, FeatureNetwork],
    encoded: Sequence[str],
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
            folder=out / FOLDER / folder / f"{name}-{network.weights_sha256[:SHOWN_DIGITS]}",
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
    if images is None or not encoded:
        return of_samples, None
    identity = {"images": reference.said.sha256}
    folder = f"reference-{short_sha256(identity)}"
    of_reference = _Set(
        spec=images if isinstance(images, SourceImages) else FileImages(images=images),
        count=images.count,
        networks=tuple(specs[name] for name in encoded),
        shards=tuple(shards(name, identity, folder, images.count) for name in encoded),
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
