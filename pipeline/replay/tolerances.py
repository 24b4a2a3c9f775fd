"""What another device or another release of a library may change of a feature, by its compute dtype.

The numbers are ours and generous: what is damaged, or of another image, is off by as much as its magnitude.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from ..encoders.precision import TF32
from ..encoders.weights import REPA

if TYPE_CHECKING:
    from ...data.format.manifest import Provenance


class Tolerance(NamedTuple):
    """What may change.

    Attributes:
        noise: of a number, relative to the largest magnitude of its row.
        divergence: of a head's attention, mean KL in nats.
        cosine_mean: of a source's tokens, mean 1 − cosine.
        cosine_largest: of one token, 1 − cosine.
    """

    noise: float
    divergence: float
    cosine_mean: float
    cosine_largest: float


TOLERANCES = {
    "float32": Tolerance(noise=1e-4, divergence=1e-6, cosine_mean=1e-9, cosine_largest=1e-9),
    # tensor cores may round factors to TF32 or cut them off: emulated on a trained DINOv2-S, the latter is
    # 1.3e-2, 4e-5, 1e-5 and 4e-4 off float32
    TF32: Tolerance(noise=3e-2, divergence=1e-4, cosine_mean=3e-5, cosine_largest=1e-3),
    "float16": Tolerance(noise=1e-2, divergence=1e-4, cosine_mean=1e-6, cosine_largest=1e-6),
    "bfloat16": Tolerance(noise=5e-2, divergence=5e-3, cosine_mean=3e-5, cosine_largest=3e-5),
}
"""By compute dtype."""


def tolerance_of(provenance: Provenance) -> Tolerance:
    """Return what may change of the columns of a source.

    Before repa recorded itself among the libraries, a GPU computed the convolutions of float32 in TF32.
    """
    before = provenance.compute_dtype == "float32" and REPA not in provenance.libraries
    return TOLERANCES[TF32 if before else provenance.compute_dtype]
