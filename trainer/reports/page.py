"""One HTML page that compares runs, which opens from a disk and asks nobody for anything.

It has no script, and its policy allows none (Content Security Policy, level 3): the choices of the reader are
radio buttons and checkboxes that style rules look at. All text goes through the template's escaping.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jinja2 import Environment, PackageLoader, StrictUndefined

from ... import __version__
from ...data.edge import printable
from ...data.units import counted
from . import drawing
from .curves import AXES, Curve, Group, Positions, curves_of, group_runs, metric_names, metric_of
from .evaluations import (
    column_name,
    evaluated_curves,
    evaluation_tables,
    figures_at,
    protocol_said,
    read_figures,
)
from .mark import MARK
from .runs import read_runs
from .samples import sample_grids
from .tables import HELD_OUT, UNKNOWN, cost_table, held_out_tables, settings_tables

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from .evaluations import Figure, Pairs
    from .runs import RunRead

COLOURS = 8
_POINTS_OF_A_PAGE = 24_000
_MOST_POINTS = 240
_LEAST_POINTS = 24
_MOST_CHARTS = 60
_OPEN_CHARTS = 6  # the others are a click away
_ROWS_OF_A_CHART = 12
_MOST_NOTES = 100
_FIRST = ("loss", *HELD_OUT)
_LOSSES = "Each method's loss is a sum of terms of its own: compare a run with itself alone."


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A metric of all runs.

    Attributes:
        number: of the chart in the page.
        title: name of the metric.
        said: its values in a sentence, for those who do not see it.
        drawings: against each axis on which something lies.
        headings: of the table of values.
        rows: of that table.
        notes: lines under it.
    """

    number: int
    title: str
    said: str
    drawings: tuple[drawing.Drawing, ...]
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]


def compare_runs(folders: Sequence[Path], steps: Sequence[int] = ()) -> tuple[str, list[str]]:
    """Return the page of some runs, and lines about what it cannot show.

    Args:
        folders: of the runs.
        steps: whose sample grids to show; none chooses.

    Raises:
        RepaError: a folder is no run, or no run has samples of a step.
    """
    runs = read_runs(folders)
    notes: list[str] = []
    figures: dict[str, list[Figure]] = {}
    for run in runs:
        own = list(run.notes)
        figures[run.name] = read_figures(run.folder, own)
        notes += [f"{run.name}: {printable(note)}" for note in own]
    groups = group_runs(runs)
    grids = sample_grids(runs, steps, notes)
    charts = _charts(groups, runs, figures, notes)
    differing, same = settings_tables(runs)
    page = (
        _environment()
        .get_template("page.html")
        .render(
            mark=MARK,
            title=f"Comparison of {counted(len(runs), 'run')}",
            version=__version__,
            colours=COLOURS,
            groups=groups,
            bands=any(len(group.runs) > 1 for group in groups),
            axes=[
                axis for axis in AXES if any(each.axis == axis for chart in charts for each in chart.drawings)
            ],
            charts=charts,
            open_charts=_OPEN_CHARTS,
            geometry=drawing,
            grids=grids,
            tables=[*evaluation_tables(groups, figures), *held_out_tables(groups), cost_table(groups)],
            differing=differing,
            same=same,
            changes=_changes(runs),
            notes=notes[:_MOST_NOTES],
        )
    )
    return page, notes


def _charts(
    groups: Sequence[Group],
    runs: Sequence[RunRead],
    figures: Mapping[str, Sequence[Figure]],
    notes: list[str],
) -> list[Chart]:
    """Draw what matters first, and no more than a page can hold."""
    positions = {run.name: Positions(run) for run in runs}
    names = metric_names(runs)
    wanted = [(name, "", metric_of(name)) for name in _FIRST if name in names]
    for column, protocol in evaluated_curves(figures):
        said = protocol_said(protocol)
        wanted.append((column_name(column), said, _figures_of(figures, column, protocol)))
    wanted += [(name, "", metric_of(name)) for name in names if name not in _FIRST]
    if len(wanted) > _MOST_CHARTS:
        notes.append(f"{len(wanted) - _MOST_CHARTS:,} more metrics are not drawn")
        wanted = wanted[:_MOST_CHARTS]
    most = _POINTS_OF_A_PAGE // max(len(groups) * len(wanted), 1)
    most = max(_LEAST_POINTS, min(_MOST_POINTS, most))
    charts: list[Chart] = []
    methods = {repr(run.settings.get("method.name")) for run in runs}
    for title, said, values_of in wanted:
        curves = curves_of(groups, values_of, positions, most)
        notes_of_chart = [said] if said else []
        if title == "loss" and len(methods) > 1:
            notes_of_chart.append(_LOSSES)
        chart = _chart(len(charts), title, curves, notes_of_chart)
        if chart is not None:
            charts.append(chart)
    return charts


def _figures_of(
    figures: Mapping[str, Sequence[Figure]], column: Pairs, protocol: Pairs
) -> Callable[[RunRead], Mapping[float, float]]:
    return lambda run: figures_at(figures.get(run.name, ()), column, protocol)


def _chart(number: int, title: str, curves: Sequence[Curve], notes: list[str]) -> Chart | None:
    drawings = tuple(drawn for axis in AXES if (drawn := drawing.draw(curves, axis)) is not None)
    if not drawings:
        return None
    if drawings[0].logarithmic:
        notes.append("The scale is logarithmic.")
    gaps = sum(curve.gaps for curve in curves)
    if gaps:
        notes.append(f"{counted(gaps, 'value', ',')} not finite, left out.")
    headings, rows = _values(curves)
    return Chart(
        number=number,
        title=title,
        said="; ".join(_said(curve) for curve in curves),
        drawings=drawings,
        headings=headings,
        rows=rows,
        notes=tuple(notes),
    )


def _said(curve: Curve) -> str:
    finite = [point for point in curve.points if math.isfinite(point.value)]
    if not finite:
        return f"{curve.group.name}: no finite value"
    first, last = finite[0], finite[-1]
    return (
        f"{curve.group.name}: from {drawing.value_number(first.value)} at step {first.at['steps']:,.0f} to "
        f"{drawing.value_number(last.value)} at step {last.at['steps']:,.0f}"
    )


def _values(curves: Sequence[Curve]) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    """Return a table of a few steps of what is drawn, and of the last of each curve."""
    by_step = [{point.at["steps"]: point for point in curve.points} for curve in curves]
    steps = sorted(set().union(*by_step))
    count = min(_ROWS_OF_A_CHART, len(steps))
    chosen = {steps[round(each * (len(steps) - 1) / max(count - 1, 1))] for each in range(count)}
    chosen |= {max(each) for each in by_step}
    rows = []
    for step in sorted(chosen):
        cells = []
        for each in by_step:
            point = each.get(step)
            cells.append(UNKNOWN if point is None else drawing.value_number(point.value))
        rows.append((f"{step:,.0f}", *cells))
    return ("step", *(curve.group.name for curve in curves)), tuple(rows)


def _changes(runs: Sequence[RunRead]) -> list[str]:
    """Return what runs went on with at another value, as run.json says it."""
    lines = []
    for run in runs:
        for start in run.starts:
            changed = start.get("changed")
            for each in changed if isinstance(changed, list) else ():
                if isinstance(each, dict):
                    lines.append(
                        f"{run.name}: {each.get('key')} from {each.get('before')} to {each.get('now')} "
                        f"after step {start.get('first_step')}"
                    )
    return [line[:300] for line in lines[:_MOST_NOTES]]


def _shown(value: object) -> object:
    """Return what is printed for a value, text of others in letters that only appear."""
    # what a macro has escaped already says so by this attribute
    return printable(value) if isinstance(value, str) and not hasattr(value, "__html__") else value


def _environment() -> Environment:
    return Environment(
        loader=PackageLoader(__package__),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_shown,
    )
