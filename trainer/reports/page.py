"""One HTML page that compares runs, which opens from a disk and asks nobody for anything.

It has no script, and its policy allows none (Content Security Policy, level 3): the choices of the reader are
radio buttons and checkboxes that style rules look at. All text goes through the template's escaping.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from jinja2 import Environment, PackageLoader, StrictUndefined

from ... import __version__
from ...data.edge import printable
from ...data.units import counted
from . import drawing
from .charts import charts_of
from .curves import AXES, group_runs
from .evaluations import evaluation_tables, read_figures
from .mark import MARK
from .runs import read_runs
from .samples import sample_grids
from .tables import cost_table, held_out_tables, settings_tables

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from .evaluations import Figure
    from .runs import RunRead

COLOURS = 8
_OPEN_CHARTS = 6  # the others are a click away
_MOST_NOTES = 100


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
    charts = charts_of(groups, runs, figures, notes)
    differing, same = settings_tables(runs)
    axes = [axis for axis in AXES if any(each.axis == axis for chart in charts for each in chart.drawings)]
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
            axes=axes,
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
