"""The figures of evaluations, kept beside what was evaluated as ``evaluation.json`` and ``evaluation.csv``.

Each figure names its samples, its reference, the network whose features it is of, and its counts. The table
says again, a line for each figure, what the document says once for all figures of an evaluation.
"""

from __future__ import annotations

import csv
import io
import json
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ...data.edge import parse_json
from ...data.errors import RepaError
from ...data.storage.files import os_errors, read_file, write_file

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

DOCUMENT_FILE = "evaluation.json"
TABLE_FILE = "evaluation.csv"
VERSION = 1
_MOST_BYTES = 64 << 20
_REMEDY = "move it away to begin another"


@dataclass(frozen=True, kw_only=True)
class SamplesSaid:
    """What the samples of an evaluation are, None where nothing says it.

    Attributes:
        name: of the checkpoint, file or folder.
        sha256: of the checkpoint or file; of a folder, of its files' names and hashes.
        num: N, number of samples.
        resolution: side of a sample in pixels.
        seed: of the noise.
        labels: how classes were chosen, ``balanced`` or ``random``; None where no class was given.
        condition: what was given instead of a class, in words.
        bank: digest of the bank that this was taken from.
        solver: see `SamplerConfig`, as are the next six.
        steps: of the solver.
        shift: of its times, None without one.
        guidance: of the latent.
        guidance_cls: of the vectors beside the latent.
        guidance_channels: of the latent that are guided, None for all.
        interval: times between which guidance acts.
        weights: ``ema`` or ``model``.
        decoder: the autoencoder that decoded.
        decoder_sha256: of its weights.
        step: training steps that the model had.
        images_seen: images that it was trained on until then, each as often as it was seen.
        device_hours: time that its devices trained until then, summed over them.
    """

    name: str
    sha256: str
    num: int
    resolution: int
    seed: int | None = None
    labels: str | None = None
    condition: str | None = None
    bank: str | None = None
    solver: str | None = None
    steps: int | None = None
    shift: float | None = None
    guidance: float | None = None
    guidance_cls: float | None = None
    guidance_channels: str | None = None
    interval: tuple[float, float] | None = None
    weights: str | None = None
    decoder: str | None = None
    decoder_sha256: str | None = None
    step: int | None = None
    images_seen: int | None = None
    device_hours: float | None = None


@dataclass(frozen=True, kw_only=True)
class ReferenceSaid:
    """What samples were compared with.

    Attributes:
        name: of the file, folder or cache.
        sha256: of the file; of a cache, its identity; of a folder, as of `SamplesSaid`.
        kind: ``cache``, ``npz`` or ``folder``.
    """

    name: str
    sha256: str
    kind: str


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One number.

    Attributes:
        metric: its name, with the network's where another could have been taken, as ``fd/dinov2-b``.
        value: the number.
        spread: its standard deviation, over subsets or splits where the metric has them; None without.
        n: samples that it was computed from.
        m: images of the reference; None where the reference does not say how many its statistics are of.
        k: neighbours, where it counts them.
        network: the network whose features it is of.
        network_sha256: of its weights.
        protocol: how it is computed, in a sentence.
    """

    metric: str
    value: float
    spread: float | None = None
    n: int
    m: int | None = None
    k: int | None = None
    network: str
    network_sha256: str
    protocol: str = ""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The figures of some samples against a reference.

    Attributes:
        samples: what was measured.
        reference: what it was compared with; None for metrics of samples alone.
        figures: the numbers.
        notes: what a reader of the numbers must know.
    """

    samples: SamplesSaid
    reference: ReferenceSaid | None
    figures: tuple[Figure, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class _Document:
    """What ``evaluation.json`` holds."""

    version: int
    evaluations: list[Evaluation] = field(default_factory=list)


def read_evaluations(folder: Path) -> list[Evaluation]:
    """Return the evaluations of a run, in the order in which they were made.

    Args:
        folder: of the run, or of what else was evaluated.

    Raises:
        RepaError: the document is damaged, or of a later version.
    """
    file = folder / DOCUMENT_FILE
    if not file.exists():
        return []
    with os_errors("read", file):
        raw = read_file(file, _MOST_BYTES)
    found = parse_json(_Document, raw, where=str(file), remedy=_REMEDY, error=RepaError)
    if found.version != VERSION:
        raise RepaError(f"{file} is of version {found.version}, which this repa cannot read", _REMEDY)
    return found.evaluations


def add_evaluation(folder: Path, evaluation: Evaluation) -> None:
    """Add an evaluation to those of a folder, in the place of figures that it computed again.

    Args:
        folder: of the run, or of what else was evaluated.
        evaluation: of samples and a reference; earlier figures of the same stay.

    Raises:
        RepaError: the document is damaged, or the disk refuses.
    """
    evaluations = []
    for each in read_evaluations(folder):
        if (each.samples, each.reference) == (evaluation.samples, evaluation.reference):
            now = {figure.metric for figure in evaluation.figures}
            kept = tuple(figure for figure in each.figures if figure.metric not in now)
            notes = tuple(dict.fromkeys((*each.notes, *evaluation.notes)))
            evaluation = replace(evaluation, figures=(*kept, *evaluation.figures), notes=notes)
        else:
            evaluations.append(each)
    evaluations.append(evaluation)
    document = json.dumps(asdict(_Document(version=VERSION, evaluations=evaluations)), indent=2) + "\n"
    for name, text in ((DOCUMENT_FILE, document), (TABLE_FILE, _table(evaluations))):
        with os_errors("write", folder / name):
            write_file(folder / name, text.encode(), folder)


def _table(evaluations: Sequence[Evaluation]) -> str:
    """Write a line for each figure, with all that it depends on (RFC 4180, but for line ends)."""
    rows = [row for each in evaluations for row in _rows(each)]
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


COLUMNS = (
    "metric",
    "value",
    "spread",
    "N",
    "M",
    "k",
    "seed",
    "labels",
    "condition",
    "bank",
    "solver",
    "steps",
    "shift",
    "guidance",
    "guidance_cls",
    "guidance_channels",
    "interval",
    "weights",
    "decoder_sha256",
    "reference",
    "reference_sha256",
    "step",
    "images_seen",
    "device_hours",
    "network",
    "network_sha256",
    "samples",
    "samples_sha256",
    "resolution",
)
"""Columns of ``evaluation.csv``. A cell is empty where nothing says the value."""


def _rows(evaluation: Evaluation) -> list[dict[str, Any]]:
    samples, reference = evaluation.samples, evaluation.reference
    shared = {name: getattr(samples, name) for name in COLUMNS if hasattr(samples, name)}
    shared["samples"], shared["samples_sha256"] = samples.name, samples.sha256
    if samples.interval is not None:
        shared["interval"] = "-".join(f"{time:g}" for time in samples.interval)
    if reference is not None:
        shared["reference"], shared["reference_sha256"] = reference.name, reference.sha256
    rows = []
    for figure in evaluation.figures:
        own = {name: getattr(figure, name) for name in ("metric", "spread", "k", "network", "network_sha256")}
        # the shortest text that gives the same float64 again
        rows.append({**shared, **own, "value": repr(figure.value), "N": figure.n, "M": figure.m})
    return rows
