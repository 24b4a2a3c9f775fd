"""What each block of a network holds of noisy images at given times."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from ...data.format.columns import LABEL
from ..models.capture import Capture
from ..sampling.generate import known_latents
from ..step.randomness import generator_for

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import Tensor

    from ..sampling.generate import TrainedModel
    from ..step.beside import Beside


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
    model: TrainedModel, batches: Iterable[Mapping[str, Tensor]], time: float, beside: Beside, *, seed: int
) -> dict[int, BlockFeatures]:
    """Return block → its features of noisy images, the class token left out.

    The same posterior draw and noise are used at every time. Labels are left out, as a probe would find them
    in every block; a network that was never trained without them is given each image's own.

    Args:
        model: the network with its objective and scale.
        batches: the columns of the latents, the conditioner's column and those of `beside`, by name.
        time: t in [0, 1], data at 0.
        beside: what the network denoises beside the latent, noised to the same time.
        seed: of the draws.
    """
    backbone = model.backbone
    device = next(backbone.parameters()).device
    beside = beside.to(device)
    depth = backbone.facts.depth
    capture = Capture(hidden=tuple(range(1, depth + 1)), stop_after=depth)
    found = {block: BlockFeatures() for block in capture.hidden}
    conditioner, latents = backbone.y_embedder, known_latents(model)
    first = 0
    for columns in batches:
        count, *shape = latents.shape(columns)
        # of each image by itself, so that the batch size changes nothing
        draws = [
            torch.randn((2, *shape), generator=generator_for(seed, "analysis", first + i))
            for i in range(count)
        ]
        posterior, noise = torch.stack(draws, dim=1)
        noises = {name: _vectors(seed, name, first, (count, width)) for name, width in beside.widths.items()}
        first += count
        x0 = latents.x0(columns, posterior).to(device)
        t = torch.full((len(x0),), time, device=device)
        noised = model.objective.noised(x0, noise.to(device), t)
        vectors = beside.noised(
            {name: columns[name].to(device) for name in beside.columns},
            {name: each.to(device) for name, each in noises.items()},
            t,
            model.objective,
        )
        tokens = (tuple(each.x_t for each in vectors.values()),) if vectors else ()
        named = {name: values.to(device) for name, values in columns.items() if name in conditioner.columns}
        values = conditioner.values(named, columns[LABEL].to(device))
        condition = conditioner.null(len(x0)) if model.guidable else conditioner.whole(values)
        captured = backbone.forward(noised.x_t, noised.t, condition, capture, *tokens)
        for block, hidden in captured.hidden.items():
            grid = hidden.float()
            found[block].pooled.append(grid.mean(dim=1).cpu())
            found[block].norms.append(torch.linalg.vector_norm(grid, dim=-1).mean(dim=1).cpu())
    return found


def _vectors(seed: int, name: str, first: int, shape: tuple[int, int]) -> Tensor:
    """Draw the noise ``[B, D]`` of one vector beside the latent, that of each image by itself."""
    count, width = shape
    return torch.stack(
        [torch.randn(width, generator=generator_for(seed, "analysis", name, first + i)) for i in range(count)]
    )
