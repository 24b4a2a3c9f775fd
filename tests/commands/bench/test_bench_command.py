"""`repa bench`: medians and ratios by hand; every part runs."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from narrow import make_narrow
from repa.commands.bench import measured
from repa.commands.bench.arithmetic import SIDE
from repa.commands.bench.attention import ATTENTION_FORMS
from repa.commands.bench.forms import FORMS
from repa.commands.bench.measured import BenchSettings, Measured, interleaved
from repa.commands.bench.run import SPEEDS, bench
from repa.data.errors import RepaError
from repa.trainer.methods import METHODS
from rich.console import Console

if TYPE_CHECKING:
    from collections.abc import Mapping

    from repa.data.format.columns import ColumnSpec


def test_ratio_is_the_median_of_the_rounds_ratios() -> None:
    reference = Measured(name="reference", rates=(10.0, 20.0, 40.0))
    measured = Measured(name="measured", rates=(5.0, 20.0, 30.0))
    assert measured.median == 20.0
    # 0.5, 1.0, 0.75: not the ratio of the medians
    assert measured.ratio(reference) == 0.75


def test_variants_take_turns_and_the_first_turn_does_not_count() -> None:
    turns: list[str] = []

    def variant(name: str) -> float:
        turns.append(name)
        return float(len(turns))

    rates = interleaved({"a": lambda: variant("a"), "b": lambda: variant("b")}, rounds=2)
    assert turns == ["a", "b"] * 3
    assert rates == {"a": (3.0, 5.0), "b": (4.0, 6.0)}
    turns.clear()
    warm = interleaved({"a": lambda: variant("a"), "b": lambda: variant("b")}, rounds=2, warm=True)
    assert warm == {"a": (1.0, 3.0), "b": (2.0, 4.0)}


def row_bytes(form: str) -> int:
    return sum(spec.row_bytes for spec in FORMS[form].values())


def test_the_forms_are_those_of_the_readme() -> None:
    # latents and tokens: 8·32·32·4 + 256·768·2 bytes; int8 tokens and 768 scales
    assert {form: row_bytes(form) for form in FORMS} == {
        "float16": 425_984,
        "int8": 32_768 + 196_608 + 3_072,
    }


def test_the_forms_of_attention_are_of_the_sizes_that_are_told() -> None:
    # q and k of 36 heads: 512 bytes a component in int8, 256 in int4; float32 scales, of each or of both
    assert {
        name: sum(spec.row_bytes for spec in form.columns.values()) for name, form in ATTENTION_FORMS.items()
    } == {
        "int8, one basis, rank 32": 36 * 32 * (512 + 8),
        "int8, whole": 36 * 64 * (512 + 8),
        "factors, 16 int8 and 32 int4": 36 * (16 * 516 + 32 * 260),
        "factors, 10 int8 and 16 int4": 36 * (10 * 516 + 16 * 260),
    }


def small(form: Mapping[str, ColumnSpec]) -> dict[str, ColumnSpec]:
    """The same columns with shapes a quarter as long."""
    shapes = {name: tuple(side // 4 for side in spec.shape) for name, spec in form.items()}
    return {name: replace(spec, shape=shapes[name]) for name, spec in form.items()}


@pytest.mark.slow
def test_every_part_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for form, columns in FORMS.items():
        monkeypatch.setitem(FORMS, form, small(columns))
    for form in list(ATTENTION_FORMS)[:-1]:
        monkeypatch.delitem(ATTENTION_FORMS, form)
    monkeypatch.setitem(SIDE, "cpu", 64)
    monkeypatch.setattr(measured, "UNCOUNTED", 0)
    make_narrow(monkeypatch)
    settings = BenchSettings(
        batch_size=4, images=8, rows=64, steps=1, rounds=1, methods="haste,urepa,sra,erw"
    )
    text = StringIO()
    # per form: warm 7 lines of ours and the limit, cold 8; and zarr, perhaps tensorstore, in each
    others = 4 * (1 + (find_spec("tensorstore") is not None)) - 2
    results = bench((), settings, folder=tmp_path, console=Console(file=text, width=160))
    assert [len(results[part]) for part in SPEEDS] == [32 + others, 4, 6, 4, 21]
    for lines in results.values():
        assert lines[0].ratio(lines[0]) == 1.0
        assert all(rate > 0 for line in lines for rate in line.rates)
        assert all(line.name in text.getvalue() for line in lines)
    train = {line.name: line for line in results["train"]}
    # the method beside none on its own backbone, and beside itself on constant targets where it reads some
    assert {name: line.baseline for name, line in train.items() if name.startswith("none")} == {
        "none": "none",
        "none, bare loop": "none",
        "none, SiT-down-T/1": "none, SiT-down-T/1",
        "none, SiT-down-T/1, bare loop": "none, SiT-down-T/1",
    }
    # each turn of these has had one of the bare loop
    assert {name: len(line.bare_turns) for name, line in train.items() if line.bare_turns} == dict.fromkeys(
        ("none", "none, SiT-down-T/1", "haste, cached", "urepa, cached", "erw, cached"), 1
    )
    assert all(line.flops > 0 and line.of_product > 0 for line in train.values())
    assert train["haste, cached"].flops == train["haste, bare loop"].flops > train["none"].flops
    assert {name: (line.baseline, line.beside) for name, line in train.items() if "cached" in name} == {
        "haste, cached": ("none", "haste, constant targets"),
        "urepa, cached": ("none, SiT-down-T/1", "urepa, constant targets"),
        "erw warm-up, cached": ("none", "erw warm-up, constant targets"),
        "erw, cached": ("none", "erw, constant targets"),
    }
    # a step of the warm-up beside a full one of the same targets
    assert {name: line.full for name, line in train.items() if line.full} == {
        f"erw warm-up, {targets}": f"erw, {targets}"
        for targets in ("constant targets", "cached", "teacher live")
    }
    assert train["sra"].baseline == train["haste after τ"].baseline == "none"
    assert not train["sra"].beside
    assert all(line.beside in train for line in train.values() if line.beside)
    assert {line.bytes_per_item for line in results["loader"]} == {row_bytes(form) for form in FORMS}
    assert all(min(line.cpu_per_1000) > 0 for line in results["loader"])
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_does_not_fit_the_teacher_is_refused(tmp_path: Path) -> None:
    settings = BenchSettings(model="SiT-T/2", batch_size=4, steps=1, rounds=1, methods="none,repa,haste,sra")
    with pytest.raises(RepaError, match="8×8 grid, the backbone 4×4"):
        bench(("train",), settings, folder=tmp_path, console=Console(file=StringIO(), width=160))


def test_every_method_is_measured_by_default() -> None:
    assert sorted(BenchSettings().methods.split(",")) == sorted(METHODS)


def test_unknown_parts_and_sizes_are_refused() -> None:
    with pytest.raises(
        RepaError, match="no part sampler; the parts are loader, attention, writer, preprocess, train"
    ):
        bench(["sampler"], BenchSettings())
    with pytest.raises(RepaError, match="--rounds 0"):
        BenchSettings(rounds=0)
    with pytest.raises(RepaError, match="--folder /not/there is no folder"):
        bench(["loader"], BenchSettings(), folder=Path("/not/there"))
