"""Every method planned on a cache of 512² images, with latents of 64×64 and 1,024 tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from repa.data.format.columns import MOMENTS, ColumnSpec
from repa.data.testing import synthetic_cache
from repa.trainer.config import build
from repa.trainer.methods import METHODS
from repa.trainer.methods.sra import SraConfig
from repa.trainer.models.layers import position_table
from repa.trainer.run.checks import check

if TYPE_CHECKING:
    from pathlib import Path

LATENTS = {MOMENTS: ColumnSpec(shape=(8, 64, 64), dtype="float32")}
ATTENTION = ColumnSpec(shape=(4, 12, 1024, 64), dtype="float16")
COLUMNS = LATENTS | {
    "dinov2-b/patch": ColumnSpec(shape=(1024, 768), dtype="float16"),
    "dinov2-b/cls": ColumnSpec(shape=(768,), dtype="float16"),
    "dinov2-b/q": ATTENTION,
    "dinov2-b/k": ATTENTION,
}
NOTES = {"dinov2-b+attention": {"blocks": [9, 10, 11, 12], "depth": 12, "logit_scale": 0.125}}
PRESETS = [(name, preset) for name in sorted(METHODS) for preset in ("none", *METHODS[name].named_presets)]


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache before its first row is written."""
    path = tmp_path_factory.mktemp("512") / "cache"
    synthetic_cache(path, num_rows=256, columns=COLUMNS, notes=NOTES, resolution=512, written=False)
    return path


@pytest.mark.parametrize(("name", "preset"), PRESETS)
def test_every_preset_of_the_largest_size_fits(name: str, preset: str, planned: Path) -> None:
    default = METHODS[name].default_model
    model = f"{default.rpartition('-')[0]}-XL/{default.rpartition('/')[2]}"
    settings = {"method": name, "method.preset": preset, "model": model, "cache": str(planned)}
    found = check(build(flags=settings))
    assert found.method is not None
    assert found.method.problems() == []
    assert found.method.backbone.resolution == 512
    # nothing is wrong but that no row is there yet
    assert [problem.field for problem in found.problems] == [""]


def test_presets_follow_the_resolution_that_the_cache_records(planned: Path, tmp_path: Path) -> None:
    """Latents of 32×32 in patches of one have 1,024 tokens too, and are of 256² images."""
    fine = tmp_path / "fine"
    columns = {**COLUMNS, MOMENTS: ColumnSpec(shape=(8, 32, 32), dtype="float32")}
    synthetic_cache(fine, num_rows=256, columns=columns, notes=NOTES, resolution=256, written=False)
    for cache, model, stop, decay in (
        (planned, "SiT-XL/2", 300_000, (99, 800)),
        (fine, "SiT-XL/1", 250_000, (149, 1000)),
    ):
        haste, sra = (
            check(build(flags={"method": name, "model": model, "cache": str(cache)})).method
            for name in ("haste", "sra")
        )
        assert haste is not None
        assert haste.backbone.grid == (32, 32)
        assert [phase.stop for phase in haste.phases()] == [stop, None]
        assert sra is not None
        assert isinstance(sra.config, SraConfig)
        assert (sra.config.decay_after, sra.config.decay_epochs) == decay


def test_positions_are_counted_anew() -> None:
    """The table of 32×32 tokens has positions 0 to 31, and begins as the smaller one."""
    small, large = (position_table(96, (side, side)).view(side, side, 96) for side in (16, 32))
    assert torch.equal(large[:16, :16], small)
    frequencies = 10_000 ** -(torch.arange(24, dtype=torch.float64) / 24)
    angle = 31 * frequencies
    last = torch.cat([angle.sin(), angle.cos()])
    torch.testing.assert_close(large[31, 31], torch.cat([last, last]), rtol=0, atol=1e-12)
