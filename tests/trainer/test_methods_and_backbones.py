"""Every method on every backbone of the registries, checked, and run for two steps where it works."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from methods_and_backbones import (
    FAMILIES,
    ROWS,
    SETTINGS,
    Cell,
    found,
    model_of,
    page,
    shrink,
    typed,
    write_declared,
    write_tiny,
)
from repa.trainer.methods import METHODS
from repa.trainer.run.checked import ProblemsError

PAGE = Path(__file__).parents[2] / "docs" / "methods-and-backbones.md"
CELLS = [(method, preset, family) for method, preset in ROWS for family in FAMILIES]
# of a preset the checks say enough, but on the backbone that its method is for
RUN = [
    (method, preset, family)
    for method, preset, family in CELLS
    if not preset or METHODS[method].default_model.rpartition("-")[0] == family
]
SMALL = (
    *("max_steps=2", "batch_size=4", "log_every=1", "preview_every=0", "checkpoint_every=2"),
    *("eval_every=2", "keep_every=0"),
)


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str, str], Cell]:
    """What the checks say of all of them."""
    declared = write_declared(tmp_path_factory.mktemp("methods") / "declared")
    return {cell: found(*cell, declared) for cell in CELLS}


@pytest.fixture(scope="module")
def tiny_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("methods") / "tiny")


@pytest.mark.parametrize(("method", "preset", "family"), RUN)
def test_two_steps_run_or_are_refused(
    method: str,
    preset: str,
    family: str,
    cells: dict[tuple[str, str, str], Cell],
    tiny_cache: Path,
    run_fit: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shrink(monkeypatch)
    cell = cells[method, preset, family]
    known = {item.name for item in fields(METHODS[method].config_class)}
    small = ("method.projector_width=8",) if "projector_width" in known else ()
    config = typed(method, preset, family, tiny_cache, (*cell.settings, *SMALL, *small))
    if not cell.works:
        with pytest.raises(ProblemsError):
            run_fit(config)
        return
    outcome, _ = run_fit(config)
    assert outcome.finished
    with (tmp_path / "run" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["1", "2"]
    assert all(math.isfinite(float(row["loss"])) for row in rows)


def test_settings_are_given_where_they_are_needed_and_help(cells: dict[tuple[str, str, str], Cell]) -> None:
    helped = {
        (method, model_of(method, preset, family))
        for (method, preset, family), cell in cells.items()
        if cell.settings and cell.refused and cell.works
    }
    assert helped == SETTINGS.keys()


def test_each_works_on_a_backbone(cells: dict[tuple[str, str, str], Cell]) -> None:
    for method, preset in ROWS:
        assert any(cells[method, preset, family].works for family in FAMILIES)


def test_the_page_is_as_the_checks_say(
    cells: dict[tuple[str, str, str], Cell], pytestconfig: pytest.Config
) -> None:
    """``--update-docs`` writes it anew."""
    if pytestconfig.getoption("--update-docs"):
        PAGE.write_text(page(cells), encoding="utf-8")
    assert PAGE.read_text(encoding="utf-8") == page(cells)
