"""What a set of patch tokens is like, summed while the images stream by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ...data.errors import RepaError
from .moments import MomentSums
from .spectrum import effective_rank
from .structure import (
    correlation_decay,
    local_distant_similarity,
    measurable,
    region_self_similarity,
    spatial_contrast,
)

if TYPE_CHECKING:
    from torch import Tensor

OUTLIER = 2.0
"""A token whose norm is this many times the median is counted as an outlier; our choice."""
OBJECT_IMAGES = 64
"""Images whose tokens say which direction is that of objects."""


@dataclass(frozen=True, kw_only=True)
class TokenReport:
    """Hold what was measured of a teacher's patch tokens.

    Attributes:
        images: how many.
        grid: rows and columns of the tokens.
        width: D.
        lds: see `local_distant_similarity`, mean over images; None where the grid is too small.
        cds: see `correlation_decay`; None likewise.
        srss: see `region_self_similarity`, the object found by `object_component`; None likewise.
        rmsc: see `spatial_contrast`.
        effective_rank: of all tokens.
        effective_rank_of_images: of the images' mean tokens.
        norm_median: of the tokens.
        norm_largest: of the tokens.
        outliers: share of tokens whose norm is over twice the median.
    """

    images: int
    grid: tuple[int, int]
    width: int
    lds: float | None
    cds: float | None
    srss: float | None
    rmsc: float
    effective_rank: float
    effective_rank_of_images: float
    norm_median: float
    norm_largest: float
    outliers: float


@dataclass(frozen=True)
class Components:
    """Hold the first principal components of some tokens.

    Attributes:
        mean: ``[D]``.
        directions: ``[n, D]``, of unit length, the largest variance first.
    """

    mean: Tensor
    directions: Tensor

    def of(self, tokens: Tensor) -> Tensor:
        """Return the components of tokens ``[…, D]`` as ``[…, n]``."""
        return (tokens.double() - self.mean) @ self.directions.T


def principal_components(tokens: Tensor, count: int = 3) -> Components:
    """Return the directions in which tokens vary most.

    Args:
        tokens: ``[B, T, D]``.
        count: how many; at most D.
    """
    flat = tokens.double().flatten(0, 1)
    mean = flat.mean(dim=0)
    centred = flat - mean
    _, vectors = torch.linalg.eigh(centred.T @ centred)
    return Components(mean, vectors.flip(1)[:, :count].T)


def object_component(tokens: Tensor, grid: tuple[int, int]) -> Components:
    """Return the first principal component, positive on objects.

    DINOv2 (arXiv 2304.07193, figure 1) finds objects so. The sign itself is arbitrary, so the side that has
    the smaller share of the images' edges is taken as the object.

    Args:
        tokens: ``[B, T, D]``, row-major.
        grid: rows and columns.
    """
    first = principal_components(tokens, 1)
    edge = torch.ones(grid, dtype=torch.bool)
    edge[1:-1, 1:-1] = False
    on_edge = first.of(tokens[:, edge.flatten().to(tokens.device)]) > 0
    return Components(first.mean, -first.directions if on_edge.double().mean() > 0.5 else first.directions)


class TokenSums:
    """Sum what a `TokenReport` says.

    Args:
        grid: rows and columns of the tokens.
        objects: positive on objects, see `object_component`.
    """

    def __init__(self, grid: tuple[int, int], objects: Components) -> None:
        self._grid = grid
        self._object = objects
        self._structure: dict[str, list[Tensor]] = {}
        self._tokens, self._images = MomentSums(), MomentSums()
        self._norms: list[Tensor] = []

    def add(self, tokens: Tensor) -> None:
        """Add the tokens of some images.

        Args:
            tokens: ``[B, T, D]``, row-major.

        Raises:
            RepaError: they do not lie on the grid, or are not finite.
        """
        if tokens.shape[1] != self._grid[0] * self._grid[1]:
            raise RepaError(
                f"{tokens.shape[1]} tokens do not lie on a grid of {self._grid[0]}×{self._grid[1]}",
                "the cache's manifest is wrong about its teacher; write that source again",
                field="grid",
            )
        self._tokens.add(tokens.flatten(0, 1))
        self._images.add(tokens.double().mean(dim=1))
        self._norms.append(torch.linalg.vector_norm(tokens.float(), dim=-1).flatten().cpu())
        found = {"rmsc": spatial_contrast(tokens)}
        if measurable(self._grid):
            mask = self._object.of(tokens)[..., 0] > 0
            found["lds"] = local_distant_similarity(tokens, self._grid)
            found["cds"] = correlation_decay(tokens, self._grid)
            found["srss"] = region_self_similarity(tokens, self._grid, mask)
        for name, values in found.items():
            self._structure.setdefault(name, []).append(values.cpu())

    def report(self) -> TokenReport:
        """Return what was measured.

        Raises:
            RepaError: there are fewer than 2 images.
        """
        tokens, images = self._tokens.moments(), self._images.moments()
        norms = torch.cat(self._norms)
        median = float(norms.median())
        return TokenReport(
            images=images.count,
            grid=self._grid,
            width=len(tokens.mean),
            lds=self._mean("lds"),
            cds=self._mean("cds"),
            srss=self._mean("srss"),
            rmsc=float(torch.cat(self._structure["rmsc"]).mean()),
            effective_rank=effective_rank(tokens),
            effective_rank_of_images=effective_rank(images),
            norm_median=median,
            norm_largest=float(norms.max()),
            outliers=float((norms > OUTLIER * median).double().mean()),
        )

    def _mean(self, name: str) -> float | None:
        """Return the mean over images that have the number, None where none has."""
        values = torch.cat(self._structure[name]) if name in self._structure else torch.empty(0)
        values = values[~values.isnan()]
        return float(values.mean()) if len(values) else None
