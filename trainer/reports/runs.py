"""A run's folder as a report reads it, where what is damaged or missing is a note and never the end.

The folder may have come from anybody: nothing in it is believed to be of a size, a type or a form.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ...data.edge import printable
from ...data.errors import RepaError
from ...data.storage.files import read_file
from ..config import build
from ..resuming import ON_RESUME, flat
from ..run.callbacks import METRICS_FILE
from ..run.folder import CONFIG_FILE
from ..run.metrics import read_whole_rows
from ..run.previews import FOLDER
from ..run.starts import read_starts
from ..run.timing import TIMING_FILE
from ..settings_file import load_yaml
from ..step.checkpoints import SOFTREPA_FILE, SOFTREPA_KEY

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

_MOST_BYTES = 64 << 20
_LONGEST_NAME = 60
_PREVIEW = re.compile(r"step-([0-9]{8,15})\.png")

# of a run that is made again with another value of these nothing that is learned differs, but for the seed
_LEAVES_THE_SETTING = frozenset(
    {key for key, rule in ON_RESUME.items() if rule == "free"} - {"cache", "max_steps"} | {"seed"}
)


@dataclass(frozen=True, kw_only=True)
class RunRead:
    """What a report knows of a run.

    Attributes:
        folder: of the run.
        name: under which it is shown, unlike that of any other run of the report.
        settings: dotted key → value, as the configuration says it; empty where it cannot be read.
        rows: of metrics.csv, in ascending steps.
        timing: rows of timing.csv, in the order in which they were written.
        starts: of run.json.
        previews: step → sample grid.
        notes: what could not be read.
    """

    folder: Path
    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    rows: Sequence[Mapping[str, float]] = ()
    timing: Sequence[Mapping[str, float]] = ()
    starts: Sequence[Mapping[str, Any]] = ()
    previews: Mapping[int, Path] = field(default_factory=dict)
    notes: Sequence[str] = ()

    @property
    def last_step(self) -> int:
        """Last step of which something is recorded."""
        return max((int(row["step"]) for row in self.rows or self.timing), default=0)

    @property
    def batch_size(self) -> int | None:
        """Images of a step, None where the configuration does not say."""
        value = self.settings.get("batch_size")
        return value if isinstance(value, int) and 0 < value < 10**12 else None

    @property
    def setting(self) -> tuple[tuple[str, str], ...]:
        """What seeds of one setting share, as keys and texts."""
        return tuple(
            sorted(
                (key, repr(value))
                for key, value in self.settings.items()
                if key.partition(".")[0] not in _LEAVES_THE_SETTING
            )
        )


def read_runs(folders: Sequence[Path]) -> list[RunRead]:
    """Return what is known of some runs, in the order in which they are named.

    Args:
        folders: of the runs.

    Raises:
        RepaError: one is not there, is no run, or is named twice; ``field`` is ``RUN``.
    """
    resolved = [os.path.realpath(folder) for folder in folders]
    for number, folder in enumerate(folders):
        if resolved[number] in resolved[:number]:
            raise RepaError(f"{folder} is named twice", "name each run once", field="RUN")
    return [_read_run(folder, name) for folder, name in zip(folders, _names(resolved), strict=True)]


def _names(paths: Sequence[str]) -> list[str]:
    """Return the ends of the paths, as few parts as tell them apart, in letters that only appear."""
    parts = [path.strip("/").split("/") for path in paths]
    count = 1
    while count < max(map(len, parts)) and len({tuple(each[-count:]) for each in parts}) < len(parts):
        count += 1
    names: list[str] = []
    for each in parts:
        name = printable("/".join(each[-count:])) or "/"
        if len(name) > _LONGEST_NAME:
            name = f"…{name[1 - _LONGEST_NAME :]}"
        same = names.count(name)
        names.append(f"{name} ({same + 1})" if same else name)
    return names


def _read_run(folder: Path, name: str) -> RunRead:
    if not folder.is_dir():
        raise RepaError(f"{folder} is no folder", "name the folder of a run", field="RUN")
    if not (folder / CONFIG_FILE).exists() and not (folder / METRICS_FILE).exists():
        raise RepaError(
            f"{folder} is no run: it has neither {CONFIG_FILE} nor {METRICS_FILE}",
            "name the folder that --run of `repa train` named",
            field="RUN",
        )
    notes: list[str] = []
    soft = folder / SOFTREPA_FILE
    settings = _soft_settings(soft, notes) if soft.exists() else _settings(folder / CONFIG_FILE, notes)
    starts: list[dict[str, Any]] = []
    try:
        starts = read_starts(folder)
    except RepaError as error:
        notes.append(error.what)
    rows = _table(folder / METRICS_FILE, notes)
    steps: dict[int, Mapping[str, float]] = {int(row["step"]): row for row in rows}
    return RunRead(
        folder=folder,
        name=name,
        settings=settings,
        rows=[steps[step] for step in sorted(steps)],
        timing=_table(folder / TIMING_FILE, notes),
        starts=starts,
        previews=_previews(folder / FOLDER, notes),
        notes=[printable(note) for note in notes],
    )


def _settings(path: Path, notes: list[str]) -> dict[str, Any]:
    """Read the settings with the defaults of what an older configuration does not say.

    Those of a method or an objective that cannot be had here are taken as they are written.
    """
    try:
        written = load_yaml(path)
    except RepaError as error:
        notes.append(error.what)
        return {}
    try:
        return {**flat(build(written, {"cache": ""}).to_dict()), "cache": written.get("cache", "")}
    except RepaError as error:
        notes.append(f"{path.name} is shown as it is written: {error.what}")
        return flat(written)


def _soft_settings(path: Path, notes: list[str]) -> dict[str, Any]:
    """Read the settings of a run of SoftREPA, which writes all of them."""
    try:
        return {"method.name": SOFTREPA_KEY, **flat(load_yaml(path))}
    except RepaError as error:
        notes.append(error.what)
        return {}


def _table(path: Path, notes: list[str]) -> list[dict[str, float]]:
    try:
        raw = read_file(path, _MOST_BYTES)
    except FileNotFoundError:
        notes.append(f"{path.name} is not there")
        return []
    except OSError as error:
        notes.append(f"{path.name} cannot be read: {error.strerror}")
        return []
    rows, damaged = read_whole_rows(raw)
    if damaged is not None:
        notes.append(f"{path.name} is damaged in line {damaged}: what follows is not shown")
    return rows


def _previews(folder: Path, notes: list[str]) -> dict[int, Path]:
    try:
        found = sorted(folder.iterdir()) if folder.is_dir() else []
    except OSError as error:
        notes.append(f"{folder.name} cannot be read: {error.strerror}")
        return {}
    matches = ((_PREVIEW.fullmatch(path.name), path) for path in found)
    return {int(match[1]): path for match, path in matches if match}
