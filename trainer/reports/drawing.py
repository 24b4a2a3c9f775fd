"""The geometry of a chart as SVG wants it (SVG 2, section 9), for a page that needs no script."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from .curves import Axis, Curve, Point

WIDTH, HEIGHT = 460, 280
LEFT, RIGHT, TOP, BOTTOM = 56, 20, 10, 40
_LOGARITHMIC_FROM = 30  # times the smallest value that the largest is
_DECADES = 6  # most labels of a logarithmic scale
_LETTERS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


@dataclass(frozen=True, kw_only=True)
class Tick:
    """A line of the grid.

    Attributes:
        at: its coordinate.
        label: what stands beside it.
    """

    at: float
    label: str


@dataclass(frozen=True, kw_only=True)
class Line:
    """A curve as it is drawn.

    Attributes:
        number: of its group.
        path: of the line.
        band: of the area between the smallest and the largest value; empty for a single run.
        dots: centres of points that no line goes to.
    """

    number: int
    path: str
    band: str
    dots: tuple[tuple[float, float], ...]


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """A chart against one axis.

    Attributes:
        axis: what lies to the right.
        x_ticks: of that axis.
        y_ticks: of the values.
        lines: of the curves that have a position on it.
        logarithmic: whether the values are on a logarithmic scale.
    """

    axis: Axis
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    lines: tuple[Line, ...]
    logarithmic: bool


def draw(curves: Sequence[Curve], axis: Axis) -> Drawing | None:
    """Return the chart of some curves, None where no point can be drawn."""
    drawn = {curve.group.number: _stretches(curve.points, axis) for curve in curves}
    points = [point for stretches in drawn.values() for stretch in stretches for point in stretch]
    if not points:
        return None
    values = [value for point in points for value in (point.low, point.high)]
    logarithmic = min(values) > 0 and max(values) / _LOGARITHMIC_FROM > min(values)
    positions = [point.at[axis] for point in points]
    x_scale, x_ticks = _scale(min(positions), max(positions), LEFT, WIDTH - RIGHT, axis_number, margin=0)
    if logarithmic:
        low, high = math.log10(min(values)), math.log10(max(values))
        exponent, ticks = _scale(low, high, HEIGHT - BOTTOM, TOP, value_number, logarithmic=True)
        y_scale: Callable[[float], float] = lambda value: exponent(math.log10(value))  # noqa: E731
    else:
        y_scale, ticks = _scale(min(values), max(values), HEIGHT - BOTTOM, TOP, value_number)
    lines = [
        _line(curve, drawn[curve.group.number], lambda point: x_scale(point.at[axis]), y_scale)
        for curve in curves
        if drawn[curve.group.number]
    ]
    return Drawing(axis=axis, x_ticks=x_ticks, y_ticks=ticks, lines=tuple(lines), logarithmic=logarithmic)


def axis_number(value: float, digits: int = 4) -> str:
    """Write a number of steps, images or hours, for example ``250``, ``1.5k``, ``12M``."""
    for size, letter in _LETTERS:
        if abs(value) >= size:
            return f"{value / size:.{digits}g}{letter}"
    return f"{value:.{digits}g}"


def value_number(value: float, digits: int = 4) -> str:
    """Write a value with so many digits."""
    return f"{value:.{digits}g}"


def _stretches(points: Sequence[Point], axis: Axis) -> list[list[Point]]:
    """Return the points between gaps."""
    stretches: list[list[Point]] = [[]]
    for point in points:
        if not math.isfinite(point.value):
            stretches.append([])
        elif axis in point.at:
            stretches[-1].append(point)
    return [stretch for stretch in stretches if stretch]


def _scale(
    low: float,
    high: float,
    start: float,
    end: float,
    write: Callable[[float, int], str],
    *,
    margin: float = 0.04,
    logarithmic: bool = False,
) -> tuple[Callable[[float], float], tuple[Tick, ...]]:
    """Return value → coordinate, and the ticks between."""
    if low == high:
        wide = abs(low) * 0.05 or 1.0
        low, high = low - wide, high + wide
    span = high - low
    low, high = low - margin * span, high + margin * span

    def place(value: float) -> float:
        return round(start + (value - low) / (high - low) * (end - start), 1)

    if logarithmic:
        found = [(exponent, 10.0**exponent) for exponent in _exponents(low, high)]
    else:
        found = [(value, value) for value in _round_numbers(low, high)]
    labels = _labels([value for _, value in found], write)
    return place, tuple(Tick(at=place(found[number][0]), label=label) for label, number in labels.items())


def _labels(values: Sequence[float], write: Callable[[float, int], str]) -> dict[str, int]:
    """Return label → number of its value, with as many digits as tell the values apart.

    There are six at most, since no more fit beside the chart; of values that are alike then, one is kept.
    """
    for digits in range(4, 7):
        labels = {write(value, digits): number for number, value in enumerate(values)}
        if len(labels) == len(values):
            break
    return labels


def _round_numbers(low: float, high: float) -> list[float]:
    """Return the multiples of 1, 2 or 5 times a power of ten between two values, six at most."""
    rough = (high - low) / 5.5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(step for step in (power, 2 * power, 5 * power, 10 * power) if step >= rough * 0.999)
    first, last = math.ceil(low / step), math.floor(high / step)
    # where numbers are so large that a step is lost in them, there is nothing to say between them
    return [number * step for number in range(first, last + 1)] if last - first <= 10 else [low, high]


def _exponents(low: float, high: float) -> list[float]:
    """Return the exponents of the ticks of a logarithmic scale."""
    whole = list(range(math.ceil(low), math.floor(high) + 1))
    if len(whole) >= 3:
        return [float(each) for each in whole[:: math.ceil(len(whole) / _DECADES)]]
    decades = range(math.floor(low), math.ceil(high) + 1)
    return [
        at for decade in decades for digit in (1, 2, 5) if low <= (at := decade + math.log10(digit)) <= high
    ]


def _line(
    curve: Curve,
    stretches: Sequence[Sequence[Point]],
    x: Callable[[Point], float],
    y: Callable[[float], float],
) -> Line:
    path, band = [], []
    for stretch in stretches:
        middle = [f"{x(point):g},{y(point.value):g}" for point in stretch]
        path.append("M" + "L".join(middle))
        if curve.is_band:
            upper = [f"{x(point):g},{y(point.high):g}" for point in stretch]
            lower = [f"{x(point):g},{y(point.low):g}" for point in reversed(stretch)]
            band.append("M" + "L".join((*upper, *lower)) + "Z")
    few = len(curve.points) <= 12
    dots = [(x(each), y(each.value)) for part in stretches for each in part if few or len(part) == 1]
    return Line(number=curve.group.number, path="".join(path), band="".join(band), dots=tuple(dots))
