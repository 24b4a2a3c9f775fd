"""What the evaluator asks of a feature network. The command line injects it, for none is loaded here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Protocol

import torch

from ...data.errors import RepaError

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

INCEPTION: Final = "inception"
CLIP: Final = "clip"
POOL: Final = "pool"
"""The features that sets are compared by: Inception's ``pool_3``, an encoder's class vector."""
SPATIAL: Final = "spatial"
"""The features of sFID, of Inception alone."""
LOGITS: Final = "logits"
"""The class logits without bias, of Inception alone."""

BATCH: Final = 32
"""Images of a forward pass. It is fixed, for the rounding of matrix products depends on it."""


class FeatureNetwork(Protocol):
    """A frozen network on one device.

    Attributes:
        name: ``inception``, or of the encoder.
        weights_sha256: of its weights.
        random_weights: whether they were drawn, not trained.
        widths: what it gives and how many numbers of it an image has, for example ``{"pool": 2048}``.
        device: where it computes.
    """

    name: str
    weights_sha256: str
    random_weights: bool
    widths: Mapping[str, int]
    device: torch.device

    def features(self, images: Tensor) -> dict[str, Tensor]:
        """Return features float32 ``[B, D]`` by name, of images uint8 ``[B, 3, R, R]`` on its device."""
        ...


def features_of(
    network: FeatureNetwork, images: NDArray[np.uint8], *, first: int = 0
) -> dict[str, NDArray[np.float32]]:
    """Compute the features of a batch.

    Args:
        network: what computes.
        images: uint8 ``[B, R, R, 3]``.
        first: number of the first of them, for the error.

    Returns:
        Name → float32 ``[B, D]``.

    Raises:
        RepaError: a feature is not finite.
    """
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    with torch.inference_mode():
        found = network.features(pixels.to(network.device))
        features = {name: found[name].float().cpu() for name in network.widths}
    for values in features.values():
        finite = torch.isfinite(values).all(dim=1).tolist()
        if not all(finite):
            raise RepaError(
                f"{network.name} gives image {first + finite.index(False)} features that are not finite",
                "look at the image, and at the network's weights",
                field="--metrics",
            )
    return {name: values.numpy() for name, values in features.items()}
