"""What others bring is parsed once: a typed value, or one line that names the field."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import pytest
from annotated_types import Ge, Lt
from hypothesis import given
from hypothesis import strategies as st
from repa.data.edge import parse, parse_json, printable, read_json, shortened
from repa.data.errors import CacheError, RepaError


@dataclass(frozen=True, kw_only=True)
class Inner:
    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}
    rows: Annotated[int, Ge(0), Lt(100)]
    mean: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Outer:
    inner: dict[str, Inner]
    name: str = ""


@dataclass(frozen=True, kw_only=True)
class SelfChecked:
    rows: int

    def __post_init__(self) -> None:
        if self.rows > 3:
            raise RepaError("too many", "take fewer", field="rows")


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=12,
)


def test_json_becomes_the_typed_value() -> None:
    raw = b'{"inner": {"a": {"rows": 3, "mean": [1, 0.5]}}}'
    expected = Outer(inner={"a": Inner(rows=3, mean=(1.0, 0.5))})
    assert parse(Outer, read_json(raw, "here"), where="here") == expected
    assert parse_json(Outer, raw, where="here") == expected


@pytest.mark.parametrize(
    ("value", "field"),
    [
        ({"inner": {"a": {"rows": "3"}}}, "inner.a.rows"),
        ({"inner": {"a": {"rows": True}}}, "inner.a.rows"),
        ({"inner": {"a": {"rows": 100}}}, "inner.a.rows"),
        ({"inner": {"a": {"rows": 10**400}}}, "inner.a.rows"),
        ({"inner": {"a": {"rows": 1, "mean": [0, "x"]}}}, "inner.a.mean.1"),
        ({"inner": {"a": {"rows": 1, "other": 1}}}, "inner.a.other"),
        ({"inner": []}, "inner"),
        ({}, "inner"),
        (None, ""),
    ],
)
def test_a_wrong_value_is_named_by_its_path(value: Any, field: str) -> None:
    with pytest.raises(CacheError) as caught:
        parse(Outer, value, where="here", remedy="write it again")
    assert caught.value.field == field
    assert caught.value.remedy == "write it again"
    assert "\n" not in str(caught.value)


def test_a_text_is_told_from_the_number_it_reads_like() -> None:
    shown = []
    for rows in ("3", 100, "true", "many", ""):
        with pytest.raises(CacheError) as caught:
            parse(Inner, {"rows": rows}, where="here")
        shown.append(caught.value.what.split("rows is ")[1].split(" (")[0])
    assert shown == ['"3"', "100", '"true"', "many", '""']


def test_what_a_model_refuses_itself_keeps_its_remedy() -> None:
    with pytest.raises(RepaError) as caught:
        parse(SelfChecked, {"rows": 4}, where="here", remedy="another", error=RepaError)
    assert (caught.value.field, caught.value.remedy) == ("rows", "take fewer")
    assert type(caught.value) is RepaError


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"\xff",
        b"NaN",
        b"1e999",
        b'"\\ud800"',
        b"[" * 40 + b"]" * 40,
        b"[" * 100_000,
        b"1" * 5000,
        b" " * 200 + b"1",
    ],
)
def test_what_is_no_bounded_json_is_refused(raw: bytes) -> None:
    with pytest.raises(CacheError):
        read_json(raw, "here", most_bytes=100_001 if len(raw) > 201 else 200)


def test_depth_is_counted_as_it_is_nested() -> None:
    assert read_json(b'[{"a": [1]}]', "here", most_depth=3) == [{"a": [1]}]
    with pytest.raises(CacheError):
        read_json(b'[{"a": [1]}]', "here", most_depth=2)


@pytest.mark.parametrize("value", [math.nan, math.inf, {1: 2}, {None: 1}, [b"x"], {"a": {1}}, object()])
def test_what_is_not_plain_is_refused(value: Any) -> None:
    with pytest.raises(CacheError):
        parse(dict[str, Any], value, where="here")


@given(plain)
def test_any_plain_value_is_read_back_or_refused(value: Any) -> None:
    assert read_json(json.dumps(value).encode(), "here") == value
    try:
        parse(Outer, value, where="here")
    except CacheError as error:
        said = str(error)
    else:
        said = ""
    assert not said or said.isprintable()


@given(
    st.text(st.characters(codec=None))
    | st.text(st.sampled_from("a\x1b\x07\r\n\x9b\u202e\u2066\ud800\udcff\u2028é漢"))
)
def test_printable_text_is_printable_and_encodes(text: str) -> None:
    shown = printable(text)
    assert shown.isprintable()
    shown.encode()
    assert printable(shown) == shown
    if text.isprintable():
        assert shown == text
    assert len(shortened(text)) <= 60


def test_escapes_say_which_character_it_was() -> None:
    assert printable("a\x1b[2J\u202eb\udcff\n") == "a\\x1b[2J\\u202eb\\udcff\\n"
