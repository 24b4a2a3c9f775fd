"""What attention will take before anything is loaded, and which blocks the words of the flag mean."""

from __future__ import annotations

import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from repa.commands.shared.attention import attention_blocks
from repa.data.errors import RepaError
from repa.data.format.columns import MOMENTS, ColumnSpec
from repa.pipeline.config import PreprocessConfig
from repa.pipeline.plan import Plan, make_plan, require_room_for
from repa.trainer.config import TrainConfig
from repa.trainer.methods.haste import PRESETS

IMAGES = 10


def plan(tmp_path: Path, encoders: tuple[str, ...], wanted: str, **changes: Any) -> Plan:
    config = PreprocessConfig(
        data="demo",
        cache=tmp_path / "cache",
        encoders=encoders,
        vae="demo",
        resolution=256,
        limit=IMAGES,
        batch_size=4,
        attention=attention_blocks(wanted, encoders),
        random_weights=True,
    )
    return make_plan(replace(config, **changes))


@pytest.mark.parametrize(
    ("wanted", "flags", "each"),
    [
        ("haste", {}, 3 * 2 * 256 * 768 * 2),
        # the figures of the specification, four blocks
        ("haste:SiT-XL", {}, 3_145_728),
        ("haste:SiT-XL/2", {"feature_dtype": "float32"}, 2 * 3_145_728),
        ("9-12", {"feature_dtype": "int8"}, 3_145_728 // 2 + 4 * 2 * 4 * 768),
        ("haste:SiT-XL", {"attention_rank": 32}, 24_576 * 32 + 4 * 2 * 4 * 12 * 32),
        ("9,10,11,12", {"attention_rank": 16, "feature_dtype": "float32"}, 24_576 * 16 + 4 * 2 * 4 * 12 * 16),
        ("haste:SiT-XL", {"resolution": 512}, 12_582_912),
        ("9-12", {"resolution": 512, "attention_rank": 32}, 98_304 * 32 + 4 * 2 * 4 * 12 * 32),
    ],
)
def test_bytes_of_an_image(wanted: str, flags: dict[str, Any], each: int, tmp_path: Path) -> None:
    made = plan(tmp_path, ("dinov2-b",), wanted, **flags)
    assert [source.source for source in made.sources] == ["sd-vae", "dinov2-b", "dinov2-b+attention"]
    attention = made.sources[2]
    assert sum(spec.row_bytes for spec in attention.columns.values()) == each
    checksums = 4 * IMAGES * len(attention.columns)
    assert attention.bytes - checksums - IMAGES * each < 20_000 * len(attention.columns)  # the index
    assert attention.bytes == attention.least_bytes
    assert not attention.at_most
    assert made.rows == IMAGES


@pytest.mark.parametrize(("dtype", "tokens"), [("float16", 1_572_864), ("int8", 786_432 + 4 * 768)])
def test_latents_and_tokens_of_an_image_of_512(dtype: str, tokens: int, tmp_path: Path) -> None:
    latents, teacher = plan(tmp_path, ("dinov2-b",), "9-12", resolution=512, feature_dtype=dtype).sources[:2]
    assert {name: spec.row_bytes for name, spec in latents.columns.items()} == {MOMENTS: 131_072}
    assert latents.columns[MOMENTS].shape == (8, 64, 64)
    sizes = {name: spec.row_bytes for name, spec in teacher.columns.items()}
    assert sizes.pop("dinov2-b/cls") == 2 * 768
    assert sum(sizes.values()) == tokens


@pytest.mark.parametrize(
    ("asked", "most"),
    # of a component of 36 heads, 516 bytes each: 27 of them are the first that hold 500,000
    [({"attention_kl": 0.01}, 64), ({"attention_bytes": 500_000}, 27), ({"attention_bytes": 10**7}, 64)],
)
def test_what_is_to_be_reached_leaves_the_components_open(
    asked: dict[str, Any], most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = plan(tmp_path, ("dinov2-b",), "haste", **asked)
    attention = made.sources[2]
    assert attention.at_most
    # every component of every head in int8, or as many as hold the bytes; the least is one in int4
    largest, smallest = (
        {
            "dinov2-b/q": ColumnSpec(shape=(3 * 12 * each,), dtype="uint8"),
            "dinov2-b/q-scale": ColumnSpec(shape=(3 * 12 * components,), dtype="float32"),
            "dinov2-b/k": ColumnSpec(shape=(3 * 12 * each,), dtype="uint8"),
        }
        for each, components in ((most * 256, most), (128, 1))
    )
    assert attention.columns == largest
    bytes_of = [sum(IMAGES * spec.row_bytes for spec in columns.values()) for columns in (largest, smallest)]
    overhead = attention.bytes - bytes_of[0]  # checksums and the index
    assert 0 < overhead < 60_000
    assert attention.least_bytes == bytes_of[1] + overhead
    # a disk between the two may do: what is chosen is looked at again
    others = made.bytes - attention.bytes
    usage = namedtuple("usage", "total used free")
    free = others + sum(bytes_of) // 2
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(free, 0, free))
    tight = plan(tmp_path, ("dinov2-b",), "haste", **asked)
    assert tight.fits
    tight.require_room()
    for chosen, fits in ((smallest, True), (largest, False)):
        columns = {source.source: source.columns for source in made.sources[:2]} | {
            "dinov2-b+attention": chosen
        }
        if fits:
            require_room_for(tmp_path / "cache", made.manifest, columns, compressed=False)
            continue
        with pytest.raises(RepaError, match="free some") as caught:
            require_room_for(tmp_path / "cache", made.manifest, columns, compressed=False)
        assert "\n" not in str(caught.value)


def test_several_teachers_each_with_blocks_of_its_own(tmp_path: Path) -> None:
    assert attention_blocks("haste", ("demo", "dinov2-b")) == {"demo": (4, 5, 6), "dinov2-b": (8, 10, 12)}
    made = plan(tmp_path, ("dinov2-b", "dinov3-s"), "4-6,12")
    assert made.config.sources == (
        "sd-vae",
        "dinov2-b",
        "dinov2-b+attention",
        "dinov3-s",
        "dinov3-s+attention",
    )
    assert made.sources[4].columns["dinov3-s/k"].shape == (4, 6, 256, 64)
    with pytest.raises(RepaError, match=r"block 12 of encoder demo; its blocks are 1 to 6"):
        plan(tmp_path, ("dinov2-b", "demo"), "12")


def test_haste_is_what_the_method_aligns_by_default() -> None:
    preset = PRESETS[TrainConfig().model.removeprefix("SiT-").split("/")[0]]
    assert attention_blocks("haste", ("dinov2-b",)) == {"dinov2-b": preset.teacher_blocks}
    assert attention_blocks("haste:SiT-XL", ("dinov2-b",)) == {"dinov2-b": (9, 10, 11, 12)}
    assert attention_blocks("haste:SiT-down-XL/2", ("dinov2-b",)) == {"dinov2-b": (9, 10, 11, 12)}
    assert attention_blocks("haste:LightningDiT-XL/1", ("dinov2-b",)) == {"dinov2-b": (9, 10, 11, 12)}
    assert attention_blocks("12, 8,8", ("dinov2-b",)) == {"dinov2-b": (8, 12)}


@pytest.mark.parametrize(
    "wanted", ["", "haste:", "haste:XXL", "8;9", "9-", "-9", "12-9", "eight", "1-999999999", f"1-{9:0>5000}"]
)
def test_words_that_mean_no_blocks(wanted: str) -> None:
    with pytest.raises(RepaError, match="--attention") as caught:
        attention_blocks(wanted, ("dinov2-b",))
    assert caught.value.field == "--attention"
    assert "\n" not in str(caught.value)
