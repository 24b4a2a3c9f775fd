"""What another device may change, for every compute dtype, and TF32 as tensor cores might do it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from repa.data.format.manifest import COMPUTE_DTYPES
from repa.pipeline.columns.measures import TokenErrors, attention_divergence
from repa.pipeline.demo.shapes import DemoImages
from repa.pipeline.encoders import load_encoder
from repa.pipeline.encoders.vae import Autoencoder
from repa.pipeline.images.workers import decode_row
from repa.pipeline.replay.tolerances import TOLERANCES, tolerance_of
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_DROPPED = 13  # of the 23 binary digits that float32 keeps of a fraction, TF32 keeps 10


class EmulatedTF32(TorchFunctionMode):
    """Computes in float32 the products of factors that have TF32's digits alone.

    Args:
        rounded: round factors; else what is too much is cut off.
        convolutions: only their factors.
    """

    def __init__(self, *, rounded: bool, convolutions: bool = False) -> None:
        super().__init__()
        self._half = 1 << (_DROPPED - 1) if rounded else 0
        self._convolutions = convolutions

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        short, kwargs = self._short, kwargs or {}
        if func is F.conv2d or (func is F.linear and not self._convolutions):
            return func(short(args[0]), short(args[1]), *args[2:], **kwargs)
        if func is F.scaled_dot_product_attention and not self._convolutions:
            q, k, v = (short(each) for each in args[:3])
            return short(torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, dim=-1)) @ v
        return func(*args, **kwargs)

    def _short(self, values: torch.Tensor) -> torch.Tensor:
        bits = values.contiguous().view(torch.int32) + self._half
        return (bits >> _DROPPED << _DROPPED).view(torch.float32)


def off(one: torch.Tensor, other: torch.Tensor) -> float:
    """Largest difference relative to the largest magnitude of its row."""
    rows = (one - other).abs().flatten(1).amax(1) / other.abs().flatten(1).amax(1)
    return float(rows.max())


def outputs() -> dict[str, torch.Tensor]:
    images = DemoImages(count=4)
    pixels = torch.stack([torch.as_tensor(decode_row(images, row, 64)) for row in range(4)])
    moments = Autoencoder.load("demo").encode_moments(pixels)
    return {**load_encoder("demo", resolution=64).encode(pixels, (4, 5, 6)), "moments": moments}


def test_every_compute_dtype_has_one() -> None:
    assert TOLERANCES.keys() == set(COMPUTE_DTYPES)


def test_a_gpu_that_rounds_and_one_that_cuts_off_agree_within_that_of_tf32() -> None:
    exact = outputs()
    with EmulatedTF32(rounded=True):
        rounded = outputs()
    with EmulatedTF32(rounded=False):
        cut = outputs()
    with EmulatedTF32(rounded=False, convolutions=True):
        before = outputs()
    tolerance = TOLERANCES["tf32"]
    for one, other in ((rounded, cut), (exact, rounded), (exact, cut), (exact, before)):
        # it is no tolerance of float32's, and far from a hundred times too wide
        largest = max(off(one[name], other[name]) for name in exact)
        assert TOLERANCES["float32"].noise < largest < tolerance.noise
        errors, _ = TokenErrors(*exact["patch"].shape[1:])(one["patch"], other["patch"])
        assert errors.mean() < tolerance.cosine_mean
        assert errors.max() < tolerance.cosine_largest
        pairs = [(each["q"], each["k"]) for each in (one, other)]
        heads = attention_divergence(pairs[0], pairs[1], 64**-0.5).mean(dim=(0, 3))
        assert heads.max() < tolerance.divergence


@pytest.mark.parametrize("compute_dtype", COMPUTE_DTYPES)
def test_float32_of_before_repa_recorded_itself(compute_dtype: str) -> None:
    """A GPU had its convolutions in TF32."""
    provenance = replace(load_encoder("demo", resolution=64).provenance(4), compute_dtype=compute_dtype)
    assert tolerance_of(provenance) == TOLERANCES[compute_dtype]
    libraries = {name: each for name, each in provenance.libraries.items() if name != "repa"}
    wider = "tf32" if compute_dtype == "float32" else compute_dtype
    assert tolerance_of(replace(provenance, libraries=libraries)) == TOLERANCES[wider]
