"""`repa bench fidelity`: the numbers that `repa preprocess` records for the same settings; refusals."""

from __future__ import annotations

from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from repa.commands.bench import fidelity
from repa.commands.bench.measured import BenchSettings, Measured
from repa.commands.bench.run import bench
from repa.commands.preprocess import PreprocessFlags, preprocess
from repa.commands.shared.attention import scaled_blocks
from repa.data.errors import RepaError
from repa.data.format.opening import open_manifest
from rich.console import Console

if TYPE_CHECKING:
    from collections.abc import Mapping

IMAGES, BATCH = 9, 3
SETTINGS = BenchSettings(images=IMAGES, batch_size=BATCH, rounds=2, attention="6")


@pytest.fixture(scope="module")
def printed() -> StringIO:
    return StringIO()


@pytest.fixture(scope="module")
def measured(printed: StringIO) -> Mapping[str, Measured]:
    """A teacher's block, all forms of it, by name."""
    lines = bench(("fidelity",), SETTINGS, console=Console(file=printed, width=200))["fidelity"]
    return {line.name: line for line in lines}


def recorded(folder: Path, **options: Any) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """What preprocess notes of tokens and of attention."""
    values = {"limit": IMAGES, "batch_size": BATCH, "attention": "6", "feature_dtype": "int8", **options}
    preprocess(PreprocessFlags(data="demo", cache=folder, **values), console=Console(file=StringIO()))
    sources = open_manifest(folder).sources
    return sources["demo"].notes["fidelity"], sources["demo+attention"].notes["fidelity"]


def test_the_numbers_are_those_that_preprocess_records(
    measured: Mapping[str, Measured], tmp_path: Path
) -> None:
    tokens, factors = recorded(tmp_path / "factors", attention_kl=fidelity.TOLERANCE)
    assert measured["int8 tokens"].fidelity == tokens
    assert measured["factors, --attention-kl 0.001"].fidelity == factors
    assert recorded(tmp_path / "rank", attention_rank=16)[1] == measured["one basis, int8, rank 16"].fidelity


def test_every_form_has_a_line_and_its_bytes(measured: Mapping[str, Measured]) -> None:
    # two heads of 64, 64 tokens, one block: T numbers a component of queries and of keys, and its scales
    per_rank = 2 * 2 * (64 + 4)
    cut = {rank: rank * per_rank for rank in (16, 32, 48, 56)}
    whole = {"float16, whole": 2 * 2 * 64 * 64 * 2, "int8, whole": 64 * per_rank}
    for name, size in {**whole, **{f"one basis, int8, rank {rank}": cut[rank] for rank in cut}}.items():
        assert measured[name].fidelity["bytes_per_image"] == size
    for rank, most in cut.items():
        older = measured[f"one basis, int8, rank {rank}"].fidelity
        factors = measured[f"factors, --attention-bytes {most}"].fidelity
        assert factors["bytes_per_image"] <= most
        assert factors["kl_mean"] < older["kl_mean"]
        # components are shared out by six images and measured on three: a head may be a little off
        assert factors["kl_worst_head"] < 1.1 * older["kl_worst_head"]
    assert {"float16 tokens", "int8 tokens", fidelity.TEACHER} < set(measured)
    assert all(len(line.rates) == 2 and min(line.rates) > 0 for line in measured.values())


def test_what_is_printed(measured: Mapping[str, Measured], printed: StringIO) -> None:
    text = printed.getvalue()
    assert "demo, 64², block 6 of 2 heads; fitted to 6, measured on 3 images" in text
    assert all(name in text for name in measured if name != fidelity.TEACHER)
    worst = max(head["p99"] for head in measured["int8, whole"].fidelity["kl"])
    for part in (f"{worst:.2g}", f"{measured['int8 tokens'].fidelity['cosine_error_max']:.2g}"):
        assert part in text
    teacher = measured[fidelity.TEACHER]
    assert f"{teacher.ratio(measured['int8 tokens']):.3f}" in text


def test_a_tolerance_that_no_form_meets_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fidelity, "TOLERANCE", 1e-12)
    monkeypatch.setattr(fidelity, "EIGHTHS", ())
    text = StringIO()
    lines = bench(("fidelity",), SETTINGS, console=Console(file=text, width=200))["fidelity"]
    assert not any(line.name.startswith("factors") for line in lines)
    assert "none meets --attention-kl 1e-12" in text.getvalue()


def test_the_preset_scaled_to_a_teacher() -> None:
    assert scaled_blocks("dinov2-s") == (8, 10, 12)
    assert scaled_blocks("dinov2-l") == (16, 20, 24)
    assert scaled_blocks("demo") == (4, 5, 6)


@pytest.mark.parametrize(
    ("flag", "given"),
    [
        ("--data", {"data": "demo"}),
        ("--attention", {"attention": "6"}),
        ("--weights", {"weights": ("demo=w",)}),
        ("--random-weights", {"random_weights": True}),
    ],
)
def test_flags_of_fidelity_without_it(flag: str, given: dict[str, Any]) -> None:
    with pytest.raises(RepaError) as error:
        bench(("loader",), BenchSettings(**given))
    assert error.value.field == flag


def test_blocks_and_weights_are_refused_as_by_preprocess() -> None:
    for flag, given in (("--attention", {"attention": "7"}), ("--weights", {"weights": ("other=w",)})):
        with pytest.raises(RepaError) as error:
            bench(("fidelity",), BenchSettings(**given), console=Console(file=StringIO()))
        assert error.value.field == flag
