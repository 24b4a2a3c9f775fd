"""The FLOPs of an image against their formula, and the MFU of known rates."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from every_method import shrink, small_config, write_cache
from repa.trainer.methods import METHODS
from repa.trainer.run.assembly import assemble
from repa.trainer.run.callbacks import progress_note, time_left
from repa.trainer.run.checks import check
from repa.trainer.run.utilisation import (
    PEAKS,
    Utilisation,
    image_flops,
    peak_flops,
    utilisation_of,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from repa.trainer.config import TrainConfig
    from repa.trainer.step.module import TrainingModule

    Settings = Callable[..., TrainConfig]


def module_of(config: TrainConfig) -> TrainingModule:
    checked = check(config)
    assert not checked.problems
    return assemble(config, checked, {})[0]


def forward_flops(*, blocks: int, width: int, tokens: int, numbers: int) -> int:
    """Multiply-adds times two of SiT's forward pass of one image, matrix by matrix.

    Args:
        blocks: of the network.
        width: D.
        tokens: T.
        numbers: of a token, C·p², going in and coming out.
    """
    attention = 2 * tokens * 4 * width**2 + 2 * 2 * tokens**2 * width
    block = attention + 2 * tokens * 8 * width**2 + 2 * 6 * width**2
    time = 2 * (256 + width) * width
    ends = 2 * 2 * tokens * numbers * width + 2 * 2 * width**2
    return blocks * block + time + ends


def test_flops_of_sit_and_of_the_projector(settings: Settings) -> None:
    module = module_of(settings())
    (phase,) = module.method.phases()
    projector = sum(each.numel() for each in module.method.parameters())
    assert projector > 0
    forward = forward_flops(blocks=2, width=48, tokens=4, numbers=16)
    assert image_flops(module, phase) == 3 * forward + 6 * projector * 4
    assert all(each.device.type == "cpu" for each in module.backbone.parameters())


def test_phases_without_alignment_count_less(haste: Settings) -> None:
    module = module_of(haste())
    align, plain = (image_flops(module, phase) for phase in module.method.phases())
    projector = sum(each.numel() for each in module.method.parameters())
    assert align - plain == 6 * projector * 4
    found = Utilisation(module, peak=plain, devices=2)
    assert found.at(7, 3.0) == 1.5  # the seventh step is the first behind τ = 6
    assert found.at(6, 3.0) == pytest.approx(1.5 * align / plain)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with everything that a method reads."""
    return write_cache(tmp_path_factory.mktemp("flops") / "whole")


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_is_counted(name: str, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On its own backbone, never more for a phase without alignment, and less where blocks are left out."""
    shrink(monkeypatch)
    module = module_of(small_config(name, whole))
    method = module.method
    counted = {phase: image_flops(module, phase) for phase in method.phases()}
    whole_steps = [each for phase, each in counted.items() if method.capture(phase).stop_after is None]
    assert min(whole_steps) > 3 * sum(each.numel() for each in module.backbone.blocks.parameters())
    assert whole_steps == sorted(whole_steps, reverse=True)
    assert all(each < min(whole_steps) for each in counted.values() if each not in whole_steps)


@pytest.mark.parametrize(
    ("name", "precision", "tf32", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16-mixed", False, 989.4e12),
        ("NVIDIA H100 PCIe", "16-mixed", False, 756e12),
        ("NVIDIA A100-SXM4-80GB", "32-true", False, 19.5e12),
        ("NVIDIA A100 80GB PCIe", "32-true", True, 156e12),
        ("Tesla V100-SXM2-32GB", "16-mixed", True, 125e12),
        ("Tesla T4", "32-true", True, 8.1e12),
        ("NVIDIA H200", "bf16-mixed", True, 989.4e12),
        ("NVIDIA H200 NVL", "bf16-mixed", True, 835e12),
        ("NVIDIA GH200 480GB", "bf16-mixed", True, 989.4e12),
        ("NVIDIA H100 NVL", "bf16-mixed", True, 835e12),
        ("NVIDIA L40S", "bf16-mixed", True, 362e12),
        ("NVIDIA B200", "bf16-mixed", True, 2250e12),
        ("NVIDIA GeForce RTX 4090", "32-true", True, 82.6e12),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bf16-mixed", True, None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16-mixed", True, None),
        ("NVIDIA A10G", "bf16-mixed", False, None),
        ("NVIDIA L40", "bf16-mixed", False, None),
        ("AMD Instinct MI300X", "bf16-mixed", False, None),
    ],
)
def test_peaks(name: str, precision: str, tf32: bool, expected: float | None) -> None:
    assert peak_flops(name, precision, tf32=tf32) == expected


def test_peaks_fall_with_the_digits() -> None:
    assert all(half > tensor >= single > 0 for half, tensor, single in PEAKS.values())


def test_where_it_is_known(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    config = settings(precision="bf16-mixed")
    module = module_of(config)
    assert utilisation_of(config, module, torch.device("cpu"), 1) is None
    for name, known in (("NVIDIA H200", True), ("NVIDIA of tomorrow", False)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        found = utilisation_of(config, module, torch.device("cuda"), 4)
        assert (found is not None) == known
        if found is not None:
            flops = image_flops(module, module.method.phases()[0])
            assert found.at(1, 1e6) == pytest.approx(1e6 * flops / (4 * 989.4e12))


def test_the_line_of_progress(settings: Settings) -> None:
    values = {"loss": 0.51234, "repa": -0.3, "held_out_ema": 0.7}
    cost: dict[str, Any] = {"images_per_second": 1234.56, "seconds": 3.0, "mfu": 0.4123}
    assert progress_note(values, cost) == "loss 0.5123 held out ema 0.7000 · 1,234.6 images/s · MFU 41.2%"
    assert progress_note(values, {}) == "loss 0.5123 held out ema 0.7000"
    config = settings(max_steps=1000)  # of batch 8
    assert time_left(config, 100, {"images_per_second": 10.0}) == " · 12 min 0 s left"
    assert time_left(config, 1000, cost) == time_left(config, 100, {}) == ""
