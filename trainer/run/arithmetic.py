"""The arithmetic of a run, where its settings leave it to the machine, and PyTorch's switches of it."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import torch

from ..compiling import chosen, missing

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..config import TrainConfig


def resolve_precision(config: TrainConfig) -> Literal["32-true", "bf16-mixed", "16-mixed"]:
    """Return what ``auto`` means on this machine.

    bf16-mixed where a CUDA device computes it, since it needs no loss scaling; else 32-true.
    """
    if config.precision != "auto":
        return config.precision
    return "bf16-mixed" if device_kind(config) == "cuda" and computes_bf16() else "32-true"


def computes_bf16() -> bool:
    """Tell whether the CUDA device computes bfloat16 itself, for PyTorch would emulate it, slowly."""
    return bool(torch.cuda.is_bf16_supported(including_emulation=False))


def device_kind(config: TrainConfig) -> str:
    """Tell where Lightning will put the run, ``cuda``, ``mps`` or ``cpu``."""
    accelerator = config.trainer.get("accelerator", "auto")
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return "cuda"
    if accelerator in ("auto", "gpu", "mps") and torch.backends.mps.is_available():
        return "mps"
    return "cpu"


def resolved(config: TrainConfig) -> TrainConfig:
    """Return settings whose precision and compilation are what ``auto`` means on this machine."""
    return replace(
        config, precision=resolve_precision(config), compile=chosen(config.compile, device_kind(config))
    )


def products_of(config: TrainConfig) -> Literal["high", "highest"]:
    """Return how precise products of float32 are on CUDA, ``highest`` for float32 and ``high`` for TF32.

    A run that is float32 throughout is a reference, and stays exact. What mixed precision leaves in float32
    has mostly come out of half precision, whose numbers TF32 holds exactly.
    """
    if config.matmul_precision != "auto":
        return config.matmul_precision
    return "highest" if resolve_precision(config) == "32-true" else "high"


def describe(config: TrainConfig) -> str:
    """Return the arithmetic of a run in a line.

    Args:
        config: of the run, as typed.
    """
    kind = device_kind(config)
    parts = [f"precision {resolve_precision(config)}"]
    if kind == "cuda":
        parts.append(f"products of float32 in {'TF32' if products_of(config) == 'high' else 'float32'}")
    how = chosen(config.compile, kind)
    lacks = missing(kind) if kind == "cuda" and config.compile == "auto" else ""
    parts.append(f"compile {how}" + (f", for there is not {lacks}" if lacks else ""))
    return "; ".join(parts)


@contextmanager
def float32_products(config: TrainConfig) -> Iterator[None]:
    """Compute products and convolutions of float32 as a run wants on CUDA, and put back what was set.

    The switches are the process's, and a library that trains must leave them as they were.

    Args:
        config: of the run.
    """
    if device_kind(config) != "cuda":
        yield
        return
    # the older switches: PyTorch's own code refuses to read them once the newer ones were set otherwise
    cudnn = torch.backends.cudnn
    before = torch.get_float32_matmul_precision(), cudnn.allow_tf32
    products = products_of(config)
    torch.set_float32_matmul_precision(products)
    cudnn.allow_tf32 = products == "high"
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        cudnn.allow_tf32 = before[1]
