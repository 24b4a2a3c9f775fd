"""What each block of a network holds of noisy images at given times."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from ...data.errors import RepaError
from ...data.format.columns import LABEL, MOMENTS
from ...data.reading.latents import sample_posterior, scale_latent
from ..models.capture import Capture
from ..step.randomness import generator_for

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import Tensor

    from ..sampling.generate import TrainedModel


@dataclass(kw_only=True)
class BlockFeatures:
    """Hold the output of one block, pooled over its tokens.

    Attributes:
        pooled: parts of float32 ``[N, D]``, mean over the grid's tokens.
        norms: parts of float32 ``[N]``, mean norm of an image's tokens.
    """

    pooled: list[Tensor] = field(default_factory=list)
    norms: list[Tensor] = field(default_factory=list)

    @property
    def features(self) -> Tensor:
        """The mean token of each image, ``[N, D]``."""
        return torch.cat(self.pooled)

    @property
    def norm(self) -> float:
        """The mean norm of a token."""
        return float(torch.cat(self.norms).double().mean())


@torch.no_grad()
def block_features(
    model: TrainedModel, batches: Iterable[Mapping[str, Tensor]], time: float, *, seed: int
) -> dict[int, BlockFeatures]:
    """Return block → its features of noisy images, the class token left out.

    The same posterior draw and noise are used at every time. Labels are left out, as a probe would find them
    in every block; a network that was never trained without them is given each image's own.

    Args:
        model: the network with its objective and scale.
        batches: moments ``[B, 2C, h, w]`` and the conditioner's column, by name.
        time: t in [0, 1], data at 0.
        seed: of the draws.

    Raises:
        RepaError: the network also denoises a vector, whose noise nobody has chosen here.
    """
    backbone = model.backbone
    if backbone.config.token_widths:
        raise RepaError(
            f"{model.origin} denoises a vector beside the latent, and the analysis has latents alone",
            "analyze a run of another method",
            field="--run",
        )
    device = next(backbone.parameters()).device
    depth = backbone.facts.depth
    capture = Capture(hidden=tuple(range(1, depth + 1)), stop_after=depth)
    found = {block: BlockFeatures() for block in capture.hidden}
    conditioner = backbone.y_embedder
    first = 0
    for columns in batches:
        moments = columns[MOMENTS].float()
        shape = (2, moments.shape[1] // 2, *moments.shape[2:])
        # of each image by itself, so that the batch size changes nothing
        draws = [
            torch.randn(shape, generator=generator_for(seed, "analysis", first + i))
            for i in range(len(moments))
        ]
        posterior, noise = torch.stack(draws, dim=1)
        first += len(moments)
        x0 = scale_latent(sample_posterior(moments, posterior), *model.scale).to(device)
        noised = model.objective.noised(x0, noise.to(device), torch.full((len(x0),), time, device=device))
        values = columns[LABEL if conditioner.column == LABEL else conditioner.column].to(device)
        drop = torch.full((len(x0),), model.guidable, device=device)
        condition = conditioner.condition(values, drop)
        captured = backbone.forward(noised.x_t, noised.t, condition, capture)
        for block, hidden in captured.hidden.items():
            tokens = hidden.float()
            found[block].pooled.append(tokens.mean(dim=1).cpu())
            found[block].norms.append(torch.linalg.vector_norm(tokens, dim=-1).mean(dim=1).cpu())
    return found
