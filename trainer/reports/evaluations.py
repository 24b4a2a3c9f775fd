"""The figures of ``evaluation.csv`` of runs, where no two of another count, reference or protocol meet.

What identifies a figure's run may differ between the rows of a table. Everything else the file says, whatever
it is called, is the protocol, and tells tables apart.
"""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from ...data.storage.files import read_file
from .tables import UNKNOWN, Measured, each_run, measured_table

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from .curves import Group
    from .runs import RunRead
    from .tables import Table

Pairs: TypeAlias = tuple[tuple[str, str], ...]

EVALUATION_FILE = "evaluation.csv"
_MOST_BYTES = 16 << 20
_LONGEST = 200
CONDITION = "condition"
"""Column that says what samples were given instead of a class; empty where it was a class."""
_VALUE, _SPREAD, _STEP = "value", "spread", "step"
_OF_THE_RUN = frozenset((_VALUE, _SPREAD, _STEP, "images_seen", "device_hours", "samples", "samples_sha256"))
# beside the metric's name, what its columns are told apart by
_OF_THE_COLUMN = ("metric", "k", "network", "network_sha256")


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A figure of a run.

    Attributes:
        column: what tells columns of a table apart, as pairs of name and text.
        protocol: what tells tables apart, likewise.
        value: the number, which may be no finite one.
        spread: its deviation; None without.
        step: of the weights; None where the file does not say.
        beside: ``images_seen`` and ``device_hours`` as they are written.
    """

    column: Pairs
    protocol: Pairs
    value: float
    spread: float | None
    step: int | None
    beside: tuple[str, str]


def read_figures(folder: Path, notes: list[str]) -> list[Figure]:
    """Return the figures of a run, those that cannot be read left out and said.

    Args:
        folder: of the run.
        notes: takes a line about what cannot be read.
    """
    try:
        raw = read_file(folder / EVALUATION_FILE, _MOST_BYTES)
    except FileNotFoundError:
        return []
    except OSError as error:
        notes.append(f"{EVALUATION_FILE} cannot be read: {error.strerror}")
        return []
    # a last line without an end was cut short
    text = raw.decode("utf-8", "replace").rpartition("\n")[0]
    figures: list[Figure] = []
    try:
        for row in csv.DictReader(io.StringIO(text, newline=""), strict=True):
            figure = _figure(row)
            if figure is None:
                notes.append(
                    f"{EVALUATION_FILE} has no figure in line {len(figures) + 2}: the rest is not shown"
                )
                break
            figures.append(figure)
    except csv.Error as error:
        notes.append(f"{EVALUATION_FILE} is no table after {len(figures)} figures: {error}")
    return figures


def _figure(row: Mapping[str | None, str | list[str] | None]) -> Figure | None:
    cells = {name: cell[:_LONGEST] for name, cell in row.items() if name and isinstance(cell, str)}
    value = _number(cells.get(_VALUE, ""))
    if len(cells) < len(row) or value is None or not cells.get("metric"):
        return None
    step = cells.get(_STEP, "")
    return Figure(
        column=tuple((name, cells.get(name, "")) for name in _OF_THE_COLUMN),
        protocol=tuple(
            (name, cell)
            for name, cell in cells.items()
            if name not in (*_OF_THE_RUN, *_OF_THE_COLUMN) and cell
        ),
        value=value,
        spread=_number(cells.get(_SPREAD, "")),
        step=int(step) if step.isascii() and step.isdigit() and len(step) <= 18 else None,
        beside=(cells.get("images_seen", ""), cells.get("device_hours", "")),
    )


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def evaluation_tables(groups: Sequence[Group], figures: Mapping[str, Sequence[Figure]]) -> list[Table]:
    """Return a table for each protocol, with the figures of the last step of each run.

    Args:
        groups: of the runs.
        figures: of each run, by its name.
    """
    protocols = dict.fromkeys(each.protocol for some in figures.values() for each in some)
    return [_table(protocol, groups, figures) for protocol in protocols]


def _table(protocol: Pairs, groups: Sequence[Group], figures: Mapping[str, Sequence[Figure]]) -> Table:
    lasts: list[tuple[Group, RunRead, list[Figure]]] = []
    for group, run in each_run(groups):
        some = [each for each in figures.get(run.name, ()) if each.protocol == protocol]
        if some:
            last = max(-1 if each.step is None else each.step for each in some)
            lasts.append(
                (group, run, [each for each in some if (-1 if each.step is None else each.step) == last])
            )
    columns = list(dict.fromkeys(each.column for _, _, some in lasts for each in some))
    found = []
    for group, run, some in lasts:
        # of a figure that was computed twice the later one counts
        of_column = {each.column: each for each in some}
        values = [of_column.get(column) for column in columns]
        step, (images, hours) = some[-1].step, some[-1].beside
        found.append(
            Measured(
                group=group,
                run=run,
                beside=(UNKNOWN if step is None else f"{step:,}", _grouped(images), _grouped(hours)),
                values=tuple(None if each is None else each.value for each in values),
                spreads=tuple(None if each is None else each.spread for each in values),
            )
        )
    return measured_table(
        "Evaluation",
        protocol_said(protocol),
        ("run", "at step", "images seen", "device-hours"),
        tuple(column_name(column) for column in columns),
        found,
    )


def evaluated_curves(figures: Mapping[str, Sequence[Figure]]) -> list[tuple[Pairs, Pairs]]:
    """Return the columns and protocols that some run has figures of at two steps or more."""
    steps: dict[tuple[str, Pairs, Pairs], set[int]] = {}
    for run, some in figures.items():
        for each in some:
            if each.step is not None:
                steps.setdefault((run, each.column, each.protocol), set()).add(each.step)
    return list(
        dict.fromkeys((column, protocol) for (_, column, protocol), found in steps.items() if len(found) > 1)
    )


def figures_at(figures: Sequence[Figure], column: Pairs, protocol: Pairs) -> dict[float, float]:
    """Return step → value of the figures of a column and a protocol."""
    return {
        float(each.step): each.value
        for each in figures
        if each.step is not None and (each.column, each.protocol) == (column, protocol)
    }


def protocol_said(protocol: Pairs) -> str:
    """Write what all figures of a table share, first of all that they are not of a class."""
    said = ", ".join(f"{name} {_short(name, cell)}" for name, cell in protocol) or "protocol not said"
    if not any(name == CONDITION for name, _ in protocol):
        return said
    return f"image-conditioned, not to be ranked beside class-conditional figures: {said}"


def column_name(column: Pairs) -> str:
    """Write a metric with the neighbours it counts and the network whose features it is of."""
    values = dict(column)
    beside = [f"k {values['k']}"] if values.get("k") else []
    if values.get("network") and values["network"] not in values["metric"]:
        beside.append(values["network"])
    if values.get("network_sha256"):
        beside.append(_short("sha256", values["network_sha256"]))
    return values["metric"] + (f" ({', '.join(beside)})" if beside else "")


def _short(name: str, cell: str) -> str:
    """Write enough of a hash to tell it from others by chance."""
    return f"{cell[:12]}…" if (name == "bank" or name.endswith("sha256")) and len(cell) > 20 else cell


def _grouped(cell: str) -> str:
    number = _number(cell)
    if number is None or not abs(number) < 1e15:
        return cell or UNKNOWN
    return f"{number:,.0f}" if number == int(number) else f"{number:.3g}"
