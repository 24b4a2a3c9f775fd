"""Curves: positions on three axes, bands of seeds, gaps, and drawings of any numbers."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from repa.trainer.reports.curves import Positions, curves_of, group_runs, hours_of, metric_of
from repa.trainer.reports.drawing import HEIGHT, WIDTH, axis_number, draw
from repa.trainer.reports.runs import RunRead


def run(name: str = "a", rows: Any = (), timing: Any = (), starts: Any = (), **settings_of: Any) -> RunRead:
    chosen = {"batch_size": 10, "seed": 0, "lr": 0.1, **settings_of}
    return RunRead(folder=Path(name), name=name, settings=chosen, rows=rows, timing=timing, starts=starts)


def curves(*runs: RunRead, most: int = 100) -> Any:
    positions = {each.name: Positions(each) for each in runs}
    return curves_of(group_runs(runs), metric_of("loss"), positions, most)


def rows(**values: float) -> list[dict[str, float]]:
    return [{"step": float(step[1:]), "loss": value} for step, value in values.items()]


def test_seeds_of_a_setting_are_a_band_and_another_setting_is_not() -> None:
    one = run("x-seed0", rows(_1=1.0, _2=3.0, _3=5.0))
    two = run("x-seed1", rows(_1=2.0, _2=5.0), seed=1, log_every=7, threads=9)
    other = run("y", rows(_1=9.0), lr=0.2)
    band, line = curves(one, other, two)
    assert band.group.name == "x (2 seeds)"
    assert band.group.runs == (one, two)
    # step 3, which one of them has not reached, is left out
    assert [(p.at["steps"], p.value, p.low, p.high) for p in band.points] == [(1, 1.5, 1, 2), (2, 4, 3, 5)]
    assert (line.group.name, line.is_band, [point.value for point in line.points]) == ("y", False, [9.0])


def test_runs_without_settings_are_alone_and_a_run_made_twice_is_no_seed() -> None:
    bare = [RunRead(folder=Path(name), name=name) for name in "ab"]
    assert len(group_runs(bare)) == 2
    assert [group.name for group in group_runs([run("x1"), run("x2")])] == ["x (2 runs)"]
    assert [group.name for group in group_runs([run("b"), run("a", seed=1)])] == ["b and others (2 seeds)"]


def test_values_that_are_not_finite_are_gaps() -> None:
    nan, inf = math.nan, math.inf
    (curve,) = curves(run(rows=rows(_1=1.0, _2=nan, _3=2.0, _4=3.0, _5=inf)))
    assert curve.gaps == 2
    drawing = draw([curve], "steps")
    assert drawing is not None
    assert drawing.lines[0].path.count("M") == 2
    assert draw(curves(run(rows=rows(_1=nan))), "steps") is None
    # of two seeds the finite one is drawn
    band = curves(run("a", rows(_1=nan)), run("b", rows(_1=4.0), seed=1))[0]
    assert (band.points[0].value, band.gaps) == (4.0, 1)


def test_hours_count_what_was_made_again() -> None:
    def row(step: int, **more: float) -> dict[str, float]:
        return {"step": float(step), "images_per_second": 10.0, **more}

    # 10 images a step at 10 a second: 1 s a step; killed after 40, gone on from 20
    killed = run(timing=[row(20), row(40), row(30), row(40, seconds=36.0)], starts=[{"first_step": 20}])
    seconds = {step: hours * 3600 for step, hours in hours_of(killed).items()}
    assert seconds == pytest.approx({20: 20.0, 30: 50.0, 40: 86.0})
    at = Positions(killed).of(25)
    assert (at["images"], at["hours"] * 3600) == (250, pytest.approx(35.0))
    assert "hours" not in Positions(killed).of(41)
    assert hours_of(run(timing=[row(20)], batch_size="many")) == {}
    assert hours_of(run(timing=[{"step": 20.0, "images_per_second": 0.0}])) == {}


def test_many_values_become_few_and_keep_the_last() -> None:
    many = [{"step": float(step), "loss": float(step)} for step in range(1, 1001)]
    (curve,) = curves(run(rows=many), most=100)
    assert len(curve.points) == 100
    assert curve.points[-1].at["steps"] == 1000
    assert curve.points[0].value == pytest.approx(5.5)
    (largest,) = curves(run(rows=[{"step": float(step), "loss": 1.7e308} for step in range(1, 9)]), most=2)
    assert [point.value for point in largest.points] == [1e300, 1e300]


def test_scales() -> None:
    linear = draw(curves(run(rows=rows(_0=0.0, _100=10.0))), "images")
    assert linear is not None
    assert not linear.logarithmic
    assert [tick.label for tick in linear.y_ticks] == ["0", "2", "4", "6", "8", "10"]
    assert [tick.label for tick in linear.x_ticks] == ["0", "200", "400", "600", "800", "1k"]
    for difference, fewest in ((1e-3, 3), (1e-4, 3), (1e-5, 1), (1e-12, 1)):
        narrow = draw(curves(run(rows=rows(_1=2.03641, _2=2.03641 + difference))), "steps")
        assert narrow is not None
        labels = [tick.label for tick in narrow.y_ticks]
        assert len(labels) == len(set(labels)) >= fewest
        assert all(len(label) <= 7 for label in labels)
    wide = draw(curves(run(rows=rows(_1=0.001, _2=1000.0))), "steps")
    assert wide is not None
    assert wide.logarithmic
    assert {"0.001", "0.1", "10"} <= {tick.label for tick in wide.y_ticks}
    assert [axis_number(each) for each in (0.25, 999, 1500, 4e5, 1.2e9)] == [
        "0.25",
        "999",
        "1.5k",
        "400k",
        "1.2G",
    ]


NUMBERS = st.floats(allow_nan=True, allow_infinity=True)


@settings(max_examples=150)
@given(
    st.lists(st.tuples(st.integers(0, 10**18), NUMBERS), min_size=1, max_size=6),
    st.lists(st.tuples(st.integers(0, 10**18), NUMBERS, NUMBERS), max_size=4),
)
def test_any_numbers_are_drawn_inside_the_picture(values: Any, times: Any) -> None:
    timing = [{"step": float(a), "images_per_second": b, "seconds": c} for a, b, c in times]
    one = run(
        rows=[{"step": float(step), "loss": value} for step, value in sorted(dict(values).items())],
        timing=timing,
    )
    found = curves(one, run("b", one.rows, seed=1))
    for axis in ("steps", "images", "hours"):
        drawing = draw(found, axis)
        if drawing is None:
            continue
        for line in drawing.lines:
            for x, y in re.findall(r"[ML](\S+?),([^MLZ]+)", line.path + line.band):
                assert 0 <= float(x) <= WIDTH
                assert 0 <= float(y) <= HEIGHT
        assert len(drawing.x_ticks) <= 12
        assert len(drawing.y_ticks) <= 14
        assert all(0 <= tick.at <= WIDTH for tick in (*drawing.x_ticks, *drawing.y_ticks))
