"""Precision, compilation and TF32, as settings and machine say."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from repa.trainer.run import arithmetic
from repa.trainer.run.arithmetic import describe, float32_products, products_of, resolve_precision, resolved
from repa.trainer.run.starts import read_starts

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from repa.trainer.config import TrainConfig

    Settings = Callable[..., TrainConfig]


@pytest.mark.parametrize(
    ("precision", "asked", "expected"),
    [
        ("32-true", "auto", "highest"),
        ("32-true", "high", "high"),
        ("bf16-mixed", "auto", "high"),
        ("16-mixed", "auto", "high"),
        ("bf16-mixed", "highest", "highest"),
    ],
)
def test_what_stays_float32(settings: Settings, precision: str, asked: str, expected: str) -> None:
    assert products_of(settings(precision=precision, matmul_precision=asked)) == expected


def switches() -> tuple[Any, ...]:
    backends: Any = torch.backends
    return (
        torch.get_float32_matmul_precision(),
        backends.cudnn.allow_tf32,
        backends.cuda.matmul.fp32_precision,
        backends.cudnn.conv.fp32_precision,
    )


def test_switches_are_turned_and_put_back(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    before = switches()
    config = settings(precision="bf16-mixed")
    with float32_products(config):
        assert switches() == before  # on the CPU there is no TF32
    monkeypatch.setattr(arithmetic, "device_kind", lambda config: "cuda")
    with float32_products(config):
        assert switches() == ("high", True, "tf32", "tf32")
    assert switches()[:2] == before[:2]

    def fail() -> None:
        with float32_products(settings(precision="32-true")):
            assert switches()[:3] == ("highest", False, "ieee")
            raise ValueError("inside")

    with pytest.raises(ValueError, match="inside"):
        fail()
    assert switches()[:2] == before[:2]


def test_auto_is_what_fits_the_machine(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    config = settings(precision="auto", compile="auto", trainer__accelerator="cpu")
    assert (resolved(config).precision, resolved(config).compile) == ("32-true", "off")
    assert "TF32" not in describe(config)
    monkeypatch.setattr(arithmetic, "device_kind", lambda config: "cuda")
    # of a T4, which PyTorch emulates it on
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert resolve_precision(config) == "32-true"
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    monkeypatch.setattr(arithmetic, "missing", lambda kind: "the package triton")
    monkeypatch.setattr("repa.trainer.compiling.missing", lambda kind: "the package triton")
    assert (resolved(config).precision, resolved(config).compile) == ("bf16-mixed", "off")
    assert "TF32" in describe(config)
    assert "triton" in describe(config)
    assert resolved(resolved(config)) == resolved(config)


def test_a_start_records_it(settings: Settings, run_fit: Callable[..., Any], tmp_path: Path) -> None:
    run_fit(settings(max_steps=1, compile="auto"))
    (start,) = read_starts(tmp_path / "run")
    assert start["compile"] in ("off", "blocks")
    assert start["tf32"] is False
