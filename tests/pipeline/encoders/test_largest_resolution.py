"""Which teachers are refused for images that are larger than they were trained for."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from repa.commands.preprocess import PreprocessFlags, make_config, preprocess
from repa.data.errors import RepaError
from repa.pipeline.encoders.registry import find_teacher
from repa.pipeline.encoders.teachers import TEACHERS
from repa.pipeline.plan import make_plan
from repa.pipeline.replay.live import LiveTeachers

if TYPE_CHECKING:
    from pathlib import Path

LIMITED = {"clip-l", "dinov1-b", "mae-l", "mocov3-b", "mocov3-l", "siglip2-b"}


@pytest.mark.parametrize("name", sorted(TEACHERS))
def test_at_512_only_teachers_of_any_size_are_left(name: str) -> None:
    teacher = TEACHERS[name]
    teacher.require_resolution(256)
    if name not in LIMITED:
        teacher.require_resolution(512)
        return
    with pytest.raises(RepaError) as error:
        teacher.require_resolution(512)
    assert error.value.field == "--encoder"
    assert error.value.remedy
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "largest"),
    [
        ("vit_base_patch16_224.mae", 256),
        ("vit_base_patch16_siglip_512.v2_webli", 512),
        ("vit_small_patch14_dinov2.lvd142m", 37 * 16),
        ("vit_small_patch16_dinov3.lvd1689m", None),
        ("beit_base_patch16_224", 256),
    ],
)
def test_a_vit_of_timm_takes_as_many_tokens_as_its_table_has(name: str, largest: int | None) -> None:
    assert find_teacher(f"timm:{name}").largest_resolution == largest


def test_plans_and_live_runs_refuse_them_unless_the_cache_has_them_already(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    asked = PreprocessFlags(data="demo", cache=cache, encoders=["demo"], vae="demo", resolution=72, limit=2)
    preprocess(replace(asked, encoders=["none"]))
    any_size = TEACHERS["demo"]
    monkeypatch.setitem(TEACHERS, "demo", replace(any_size, largest_resolution=64))
    for refused in (
        lambda: make_plan(make_config(asked)),
        lambda: LiveTeachers(cache, data="demo", encoders=("demo",)),
    ):
        with pytest.raises(RepaError) as error:
            refused()
        assert error.value.field == "--encoder"
    monkeypatch.setitem(TEACHERS, "demo", any_size)
    preprocess(asked)
    monkeypatch.setitem(TEACHERS, "demo", replace(any_size, largest_resolution=64))
    assert make_plan(make_config(asked)).rows == 0
    assert LiveTeachers(cache, data="demo", encoders=("demo",)).grids["demo"] == (9, 9)
