"""The curves of runs against steps, images and hours, with the seeds of one setting as one band."""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from .runs import RunRead

    ValuesOf: TypeAlias = Callable[[RunRead], Mapping[float, float]]

Axis: TypeAlias = Literal["steps", "images", "hours"]
AXES: tuple[Axis, ...] = ("steps", "images", "hours")
_LARGEST = 1e300  # so that the difference of two values is finite


@dataclass(frozen=True, kw_only=True)
class Group:
    """Runs that are drawn as one curve, for they differ in nothing but the seed.

    Attributes:
        number: of the group, which its colour is of.
        name: of the only run, or of all of them.
        runs: one or more.
    """

    number: int
    name: str
    runs: tuple[RunRead, ...]


@dataclass(frozen=True, kw_only=True)
class Point:
    """A point of a curve.

    Attributes:
        at: its position on each axis that it has one on.
        value: the mean over the runs of the group.
        low: the smallest of their values.
        high: the largest of them.
    """

    at: Mapping[Axis, float]
    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A metric of a group.

    Attributes:
        group: whose it is.
        points: in ascending steps; their value is not finite where there is a gap.
        gaps: how many values of its runs are not finite.
    """

    group: Group
    points: Sequence[Point]
    gaps: int

    @property
    def is_band(self) -> bool:
        """Whether it is of several runs."""
        return len(self.group.runs) > 1


def group_runs(runs: Sequence[RunRead]) -> list[Group]:
    """Put runs of one setting together, in the order in which the first of each comes.

    A run whose configuration cannot be read is alone.
    """
    settings: dict[object, list[RunRead]] = {}
    for run in runs:
        settings.setdefault(run.setting or run.name, []).append(run)
    groups = []
    for number, members in enumerate(settings.values()):
        name = members[0].name
        if len(members) > 1:
            seeds = {repr(run.settings.get("seed")) for run in members}
            what = "seeds" if len(seeds) == len(members) else "runs"
            shared = _common(members) or f"{members[0].name} and others"
            name = f"{shared} ({len(members)} {what})"
        groups.append(Group(number=number, name=name, runs=tuple(members)))
    return groups


def _common(runs: Sequence[RunRead]) -> str:
    """Return what the names of runs begin with, without what counts them."""
    first, last = min(run.name for run in runs), max(run.name for run in runs)
    length = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    return first[:length].rstrip("-_ ./0123456789").removesuffix("seed").rstrip("-_ ./")


def metric_names(runs: Sequence[RunRead]) -> list[str]:
    """List the metrics that some run has, in the order in which they come."""
    return list(dict.fromkeys(name for run in runs for row in run.rows for name in row if name != "step"))


def metric_of(name: str) -> ValuesOf:
    """Return what gives step → value of a metric of metrics.csv."""
    return lambda run: {row["step"]: row[name] for row in run.rows if name in row}


def hours_of(run: RunRead) -> dict[int, float]:
    """Return step → hours of the wall clock that the run had taken, of starts that are over too.

    Steps that a kill made the run do again count each time. A row of before seconds were recorded says the
    rate of training alone, and its time is that of its images.
    """
    hours: dict[int, float] = {}
    total, before = 0.0, 0
    firsts = [start.get("first_step") for start in run.starts]
    for row in run.timing:
        step = int(row["step"])
        if step <= before:
            known = [first for first in firsts if isinstance(first, int) and 0 <= first < step]
            before = max(known, default=0)
            hours = {done: hour for done, hour in hours.items() if done <= before}
        seconds = seconds_of(row, step - before, run.batch_size)
        if seconds is None or not math.isfinite(total + seconds):
            return {}
        total += seconds / 3600
        hours[step] = total
        before = step
    return hours


def seconds_of(row: Mapping[str, float], steps: int, batch_size: int | None) -> float | None:
    """Return the seconds of a row of timing.csv, None where nothing says them."""
    seconds, rate = row.get("seconds"), row.get("images_per_second")
    if seconds is None and rate and rate > 0 and batch_size is not None:
        seconds = steps * batch_size / rate
    return seconds if seconds is not None and math.isfinite(seconds) and seconds >= 0 else None


class Positions:
    """Where the steps of a run lie on each axis.

    Args:
        run: the run.
    """

    def __init__(self, run: RunRead) -> None:
        self._batch_size = run.batch_size
        hours = hours_of(run)
        self._steps = [0, *sorted(hours)]
        self._hours = [0.0, *(hours[step] for step in self._steps[1:])]

    def of(self, step: float) -> dict[Axis, float]:
        """Return the positions of a step, on a line between the steps whose hours are known."""
        at: dict[Axis, float] = {"steps": step}
        if self._batch_size is not None:
            at["images"] = step * self._batch_size
        after = bisect_left(self._steps, step)
        if 0 < after < len(self._steps):
            one, two = self._steps[after - 1], self._steps[after]
            before, later = self._hours[after - 1], self._hours[after]
            at["hours"] = before + (later - before) * (step - one) / (two - one)
        return at


def curves_of(
    groups: Sequence[Group],
    values_of: ValuesOf,
    positions: Mapping[str, Positions],
    most_points: int,
) -> list[Curve]:
    """Return the curve of a metric of each group that has it.

    Args:
        groups: of runs.
        values_of: step → value of a run, empty of one that has none.
        positions: of the steps of each run, by the run's name.
        most_points: of a curve; of more values the means over equal numbers of neighbours are taken.
    """
    found = []
    for group in groups:
        # of seeds that were begun and came to nothing there is nothing to draw
        runs = [run for run in group.runs if values_of(run)]
        values = [values_of(run) for run in runs]
        gaps = sum(not math.isfinite(value) for each in values for value in each.values())
        # a step that one of the seeds has not reached would let the mean jump
        steps = sorted(set.intersection(*map(set, values))) if values else []
        if not steps:
            continue
        points = [
            _point([positions[run.name].of(step) for run in runs], [each[step] for each in values])
            for step in steps
        ]
        found.append(Curve(group=group, points=list(_thinned(points, most_points)), gaps=gaps))
    return found


def _point(places: Sequence[Mapping[Axis, float]], values: Sequence[float]) -> Point:
    finite = [_clipped(value) for value in values if math.isfinite(value)]
    shared = [axis for axis in AXES if all(axis in place for place in places)]
    at = {axis: _mean([place[axis] for place in places]) for axis in shared}
    if not finite:
        return Point(at=at, value=math.nan, low=math.nan, high=math.nan)
    return Point(at=at, value=_mean(finite), low=min(finite), high=max(finite))


def _thinned(points: Sequence[Point], most: int) -> Iterator[Point]:
    """Yield a point for every few neighbours, with their mean values at the last one's position."""
    size = math.ceil(len(points) / most)
    for first in range(0, len(points), size):
        some = points[first : first + size]
        finite = [point for point in some if math.isfinite(point.value)]
        if size == 1 or not finite:
            yield some[-1]
            continue
        yield Point(
            at=some[-1].at,
            value=_mean([point.value for point in finite]),
            low=_mean([point.low for point in finite]),
            high=_mean([point.high for point in finite]),
        )


def _mean(values: Sequence[float]) -> float:
    return sum(value / len(values) for value in values)  # the sum itself may be too large


def _clipped(value: float) -> float:
    return max(-_LARGEST, min(value, _LARGEST))
