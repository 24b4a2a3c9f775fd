"""Kinds of columns: what a row may look like, and that opening a cache looks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st
from repa.data.errors import CacheError, RepaError
from repa.data.format.columns import KINDS, ColumnKind, ColumnSpec, check_column, column_name, find_kind
from repa.data.reading.reader import CacheReader
from repa.data.testing import SYNTHETIC_COLUMNS, synthetic_cache

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    ("column", "shape", "dtype"),
    [
        ("sd-vae/moments", (8, 4), "float32"),
        ("sd-vae/moments", (7, 4, 4), "float32"),
        ("sd-vae/moments", (8, 4, 4), "int8"),
        ("a/patch", (16,), "float16"),
        ("a/cls", (16, 24), "float16"),
        ("a/cls", (24,), "int8"),
        ("a/q", (2, 16, 8), "float16"),
        ("a/patch-scale", (16, 24), "float32"),
        ("a/patch-scale", (24,), "float16"),
    ],
)
def test_rows_that_are_not_of_their_kind(column: str, shape: tuple[int, ...], dtype: str) -> None:
    with pytest.raises(CacheError) as caught:
        check_column(column, ColumnSpec(shape=shape, dtype=dtype), where="here")
    assert caught.value.field == column
    assert caught.value.remedy


def test_rows_that_are() -> None:
    for column, shape, dtype in (
        ("sd-vae/moments", (8, 4, 4), "float32"),
        ("a/patch", (16, 24), "int8"),
        ("a/patch-scale", (24,), "float32"),
        ("a/k", (2, 3, 16, 8), "float16"),
        ("a/k-scale", (2, 3, 8), "float32"),
        ("a/cls", (24,), "float16"),
    ):
        check_column(column, ColumnSpec(shape=shape, dtype=dtype), where="here")


@given(st.text(max_size=12) | st.sampled_from([*KINDS, "cls-scale", "patch-scale-scale", "-scale"]))
def test_names_of_kinds(name: str) -> None:
    """A name is of a kind, of the scales of one that may be int8, or refused."""
    plain = name.removesuffix("-scale")
    there = name in KINDS or (name != plain and plain in KINDS and "int8" in KINDS[plain].dtypes)
    assert (find_kind(name) is not None) == there
    if there:
        assert column_name("a", name) == f"a/{name}"
        return
    with pytest.raises(RepaError):
        column_name("a", name)


def test_opening_looks_at_the_kind(tmp_path: Path) -> None:
    columns = {**SYNTHETIC_COLUMNS, "demo/cls": ColumnSpec(shape=(4, 4), dtype="float16")}
    synthetic_cache(tmp_path / "cache", num_rows=4, columns=columns)
    with CacheReader(tmp_path / "cache", ("demo/patch",)) as reader:
        assert reader.columns == ("demo/patch",)
    with pytest.raises(CacheError) as caught:
        CacheReader(tmp_path / "cache", ("demo/patch", "demo/cls"))
    assert caught.value.field == "demo/cls"


def test_a_kind_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KINDS, "text", ColumnKind(axes=("T", "D")))
    spec = ColumnSpec(shape=(5, 6), dtype="float16")
    synthetic_cache(tmp_path / "cache", num_rows=4, columns={**SYNTHETIC_COLUMNS, "demo/text": spec})
    with CacheReader(tmp_path / "cache", ("demo/text",)) as reader:
        assert reader.manifest.columns["demo/text"] == spec
    assert find_kind("text-scale") is None
