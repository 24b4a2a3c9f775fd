"""The tables of a report on what runs cost, where they ended and in what their settings differ."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...data.units import human_bytes
from ..methods import METHODS
from .curves import Group, seconds_of
from .drawing import value_number

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .runs import RunRead

UNKNOWN = "–"
_LONGEST_VALUE = 200
_MOST_DIFFERING = 200
HELD_OUT = ("held_out_ema", "held_out")
# what two held-out losses must share, lest they be of other rows or units
OF_HELD_OUT = ("cache", "holdout", "condition", "latents", "latent_norm", "latent_scale", "latent_shift")


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table with the name of what a row is about in its first column.

    Attributes:
        caption: what it is of.
        headings: of the columns.
        rows: cells of each row.
        said: what all numbers in it share.
        numbers: of the groups of the rows, for their colours; none where rows are of no group.
        notes: lines under it.
    """

    caption: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    said: str = ""
    numbers: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()


def cost_table(groups: Sequence[Group]) -> Table:
    """Return what each run took and gave, as far as it was recorded."""
    rows, numbers, estimated = [], [], False
    for group, run in each_run(groups):
        hours, known = device_hours(run)
        estimated |= hours is not None and not known
        size = run.batch_size
        rates = _recorded(run, "images_per_second")
        read, peak, mfu = _recorded(run, "bytes_read"), _recorded(run, "peak_memory"), _recorded(run, "mfu")
        rows.append(
            (
                run.name,
                f"{run.last_step:,}",
                UNKNOWN if size is None else f"{run.last_step * size:,}",
                _devices(run),
                value_number(statistics.median(rates)) if rates else UNKNOWN,
                UNKNOWN if hours is None else f"{'' if known else '≈ '}{hours:.3g}",
                human_bytes(sum(read)) if read else UNKNOWN,
                human_bytes(max(peak)) if peak else UNKNOWN,
                f"{100 * statistics.median(mfu):.1f} %" if mfu else UNKNOWN,
            )
        )
        numbers.append(group.number)
    notes = [
        "Images a second are of training alone, the median over the logged stretches; hours are on the wall, "
        "times the devices, with previews, evaluations and steps that a kill made the run do again.",
        "Bytes are those read from the cache. Memory is the peak of a GPU's allocator, on a CPU of the whole "
        "process. MFU is recorded on CUDA devices alone.",
    ]
    if estimated:
        notes.append("≈ from images a second alone: the run recorded no seconds.")
    headings = ("run", "steps", "images seen", "devices", "images/s", "device-hours", "bytes read")
    return Table(
        caption="Cost",
        headings=(*headings, "peak memory", "MFU"),
        rows=tuple(rows),
        numbers=tuple(numbers),
        notes=tuple(notes),
    )


def device_hours(run: RunRead) -> tuple[float | None, bool]:
    """Return hours times devices, None where nothing says them, and whether both were recorded throughout."""
    if not run.timing:
        return None, True
    total, known, before = 0.0, True, 0
    recorded = [start.get("devices") for start in run.starts]
    usual = next((each for each in reversed(recorded) if isinstance(each, int) and each > 0), 1)
    for row in run.timing:
        known &= "seconds" in row
        step = int(row["step"])
        seconds = seconds_of(row, step - before if step > before else 0, run.batch_size)
        if seconds is None:
            return None, True
        total += seconds * row.get("devices", usual) / 3600
        before = step
    return (total if math.isfinite(total) else None), known


def held_out_tables(groups: Sequence[Group]) -> list[Table]:
    """Return the last held-out losses, a table for each set of rows and units that they are of."""
    protocols: dict[tuple[tuple[str, str], ...], list[tuple[Group, RunRead]]] = {}
    for group, run in each_run(groups):
        if any(name in row for row in run.rows for name in HELD_OUT):
            key = tuple((name, repr(value)) for name, value in protocol_of(run, OF_HELD_OUT).items())
            protocols.setdefault(key, []).append((group, run))
    tables = []
    for members in protocols.values():
        said = protocol_of(members[0][1], OF_HELD_OUT)
        found = [
            Measured(
                group=group,
                run=run,
                beside=(f"{max(_last(run, name)[0] for name in HELD_OUT):,}",),
                values=tuple(_last(run, name)[1] for name in HELD_OUT),
            )
            for group, run in members
        ]
        tables.append(
            measured_table(
                "Held-out loss",
                ", ".join(f"{key} {setting_text(each)}" for key, each in said.items()),
                ("run", "at step"),
                ("averaged weights", "weights"),
                found,
                (
                    "The objective's loss on rows that were never trained on, the same in all rows of this "
                    "table. Noise is drawn from the run's seed: runs of one seed are compared in pairs.",
                ),
            )
        )
    return tables


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The numbers of a run in a table.

    Attributes:
        group: of the run.
        run: whose they are.
        beside: cells before the numbers.
        values: the numbers; None where there is none.
        spreads: of the numbers, where they have one.
    """

    group: Group
    run: RunRead
    beside: tuple[str, ...]
    values: tuple[float | None, ...]
    spreads: tuple[float | None, ...] = ()


def measured_table(
    caption: str,
    said: str,
    headings: tuple[str, ...],
    metrics: tuple[str, ...],
    found: Sequence[Measured],
    notes: tuple[str, ...] = (),
) -> Table:
    """Return a table of numbers that may be compared, with mean and deviation of the seeds of a setting.

    Args:
        caption: what the numbers are of.
        said: what they share.
        headings: of the name of the run and the cells beside it.
        metrics: headings of the numbers.
        found: a row of each run.
        notes: lines under it.
    """
    rows, numbers = [], []
    for each in found:
        spreads = each.spreads or (None,) * len(each.values)
        cells = [_with_spread(value, spread) for value, spread in zip(each.values, spreads, strict=True)]
        rows.append((each.run.name, *each.beside, *cells))
        numbers.append(each.group.number)
    for group in {each.group.number: each.group for each in found}.values():
        members = [each for each in found if each.group.number == group.number]
        if len(members) < 2:
            continue
        columns = list(zip(*(each.values for each in members), strict=True))
        cells = [_mean_and_deviation([value for value in column if value is not None]) for column in columns]
        rows.append((f"{group.name}: mean ± deviation", *[""] * (len(headings) - 1), *cells))
        numbers.append(group.number)
    return Table(
        caption=caption,
        headings=(*headings, *metrics),
        rows=tuple(rows),
        said=said,
        numbers=tuple(numbers),
        notes=notes,
    )


def _with_spread(value: float | None, spread: float | None) -> str:
    if value is None:
        return UNKNOWN
    return value_number(value) if spread is None else f"{value_number(value)} ± {spread:.2g}"


def _mean_and_deviation(values: Sequence[float]) -> str:
    """Write the mean and the deviation of the sample (n − 1) of finite values, and how many they are."""
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return UNKNOWN
    largest = max(map(abs, values)) or 1.0
    scaled = [value / largest for value in values]  # the squares of large numbers are too large
    mean, deviation = statistics.fmean(scaled) * largest, statistics.stdev(scaled) * largest
    return f"{value_number(mean)} ± {deviation:.2g}"


def settings_tables(runs: Sequence[RunRead]) -> tuple[Table, Table]:
    """Return the settings in which runs differ, and those in which they do not."""
    keys = list(dict.fromkeys(key for run in runs for key in run.settings))
    absent = object()
    differing, same = [], []
    for key in keys:
        values = [run.settings.get(key, absent) for run in runs]
        texts = [UNKNOWN if value is absent else setting_text(value) for value in values]
        if len({repr(value) for value in values}) > 1:
            differing.append((key[:_LONGEST_VALUE], *texts))
        else:
            same.append((key[:_LONGEST_VALUE], texts[0]))
    more = len(differing) - _MOST_DIFFERING
    names = tuple(run.name for run in runs)
    return (
        Table(
            caption="Settings in which the runs differ",
            headings=("setting", *names),
            rows=tuple(differing[:_MOST_DIFFERING]),
            notes=(f"{more:,} more differ",) if more > 0 else (),
        ),
        Table(
            caption="Settings that are the same in all runs",
            headings=("setting", "value"),
            rows=tuple(same[:_MOST_DIFFERING]),
        ),
    )


def setting_text(value: Any) -> str:
    """Write a setting as people read it, 200 characters at most."""
    if value is None or value == "":
        return "none"
    try:
        text = value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
    except (TypeError, ValueError):  # YAML takes more as a name than JSON does
        text = repr(value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[: _LONGEST_VALUE - 1]}…"


def protocol_of(run: RunRead, keys: Sequence[str]) -> dict[str, Any]:
    """Return some settings that numbers must share to be compared, with those of the objective."""
    if not keys:
        return {}
    objective = {key: value for key, value in run.settings.items() if key.startswith("objective.")}
    values = {key: run.settings.get(key) for key in keys} | objective
    method = METHODS.get(str(run.settings.get("method.name")))
    if "condition" in values and method is not None and method.own_condition:
        values["condition"] = method.own_condition
    return values


def each_run(groups: Sequence[Group]) -> list[tuple[Group, RunRead]]:
    """List the runs with their groups, those of a group together."""
    return [(group, run) for group in groups for run in group.runs]


def _recorded(run: RunRead, column: str) -> list[float]:
    """Return the finite values of a column of timing.csv that are no less than 0."""
    values = [row[column] for row in run.timing if column in row]
    return [value for value in values if math.isfinite(value) and value >= 0]


def _devices(run: RunRead) -> str:
    start = run.starts[-1] if run.starts else {}
    device, count = start.get("device"), start.get("devices")
    if not isinstance(device, str) or not isinstance(count, int):
        return UNKNOWN
    return f"{count} × {device[:_LONGEST_VALUE]}"


def _last(run: RunRead, metric: str) -> tuple[int, float | None]:
    found = [(int(row["step"]), row[metric]) for row in run.rows if metric in row]
    return found[-1] if found else (0, None)
