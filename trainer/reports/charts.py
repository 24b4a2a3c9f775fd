"""The charts of a page, what matters first, each with a table of its values."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...data.units import counted
from ..objectives.registry import OBJECTIVES
from . import drawing
from .curves import AXES, Curve, Group, Positions, curves_of, metric_names, metric_of
from .evaluations import column_name, evaluated_curves, figures_at, protocol_said
from .tables import HELD_OUT, OF_HELD_OUT, UNKNOWN, protocol_of, setting_text

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from .curves import ValuesOf
    from .evaluations import Figure, Pairs
    from .runs import RunRead

_POINTS_OF_A_PAGE = 24_000
_MOST_POINTS = 240
_LEAST_POINTS = 24
_MOST_CHARTS = 60
_ROWS_OF_A_CHART = 12
_FIRST = ("loss", *HELD_OUT)
_LOSSES = "Each method's loss is a sum of terms of its own: compare a run with itself alone."
# what losses of training must share, lest they be of other numbers
_OF_LATENTS = ("latents", "latent_norm", "latent_scale", "latent_shift")
_TRAINED = ("loss", *(term for kind in OBJECTIVES.values() for term in kind.terms))
# of figures that training computed, whose names end in the number of samples; the reference is the cache
_EVALUATED = re.compile(r".+@[0-9]+")
_OF_EVALUATED = (
    "cache",
    "condition",
    "evaluate_solver",
    "evaluate_steps",
    "evaluate_shift",
    "evaluate_guidance",
)


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


def charts_of(
    groups: Sequence[Group],
    runs: Sequence[RunRead],
    figures: Mapping[str, Sequence[Figure]],
    notes: list[str],
) -> list[Chart]:
    """Draw what matters first, and no more than a page can hold.

    Args:
        groups: of the runs.
        runs: all of them.
        figures: of evaluations of each run, by its name.
        notes: takes a line about what is not drawn.
    """
    positions = {run.name: Positions(run) for run in runs}
    wanted = list(_wanted(runs, figures))
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


def _wanted(
    runs: Sequence[RunRead], figures: Mapping[str, Sequence[Figure]]
) -> Iterator[tuple[str, str, ValuesOf]]:
    """Yield title, protocol and values of each chart, apart where values may not be compared."""
    names = metric_names(runs)
    evaluated = [name for name in names if _EVALUATED.fullmatch(name)]
    for name in _FIRST:
        if name in names:
            yield from _apart(name, runs)
    for column, protocol in evaluated_curves(figures):
        yield column_name(column), protocol_said(protocol), _figures_of(figures, column, protocol)
    for name in evaluated:
        yield from _apart(name, runs)
    for name in names:
        if name not in _FIRST and name not in evaluated:
            yield from _apart(name, runs)


def _apart(name: str, runs: Sequence[RunRead]) -> Iterator[tuple[str, str, ValuesOf]]:
    """Yield a metric once for each protocol that some run has it of."""
    evaluated = bool(_EVALUATED.fullmatch(name))
    keys = _OF_EVALUATED if evaluated else OF_HELD_OUT if name in HELD_OUT else ()
    values_of = metric_of(name)
    having = [run for run in runs if values_of(run)]
    if name in _TRAINED:
        said = {run.name: {key: run.settings.get(key) for key in _OF_LATENTS} for run in having}
    else:
        said = {run.name: protocol_of(run, keys) for run in having}
    protocols = list({repr(each): each for each in said.values()}.values())
    for protocol in protocols:
        members = frozenset(run for run, each in said.items() if repr(each) == repr(protocol))
        text = ", ".join(f"{key} {setting_text(value)}" for key, value in protocol.items())
        yield name, text if evaluated or len(protocols) > 1 else "", _of_some(values_of, members)


def _of_some(values_of: ValuesOf, names: frozenset[str]) -> ValuesOf:
    return lambda run: values_of(run) if run.name in names else {}


def _figures_of(figures: Mapping[str, Sequence[Figure]], column: Pairs, protocol: Pairs) -> ValuesOf:
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
