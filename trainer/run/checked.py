"""The findings of the checks before step 0, which make up a run or say why it cannot start."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from ...data.errors import RepaError
from ...data.format.columns import MOMENTS
from ...data.units import counted
from ..methods.base import Problem

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import numpy as np
    import torch
    from numpy.typing import NDArray

    from ...data.format.manifest import Manifest, Provenance
    from ...data.reading.latents import LatentScale
    from ...data.reading.reader import CacheReader
    from ...data.tars.cache import TarCache
    from ..input.online import LiveTargets
    from ..methods.base import Method
    from ..models.base import BackboneConfig
    from ..models.conditioning import ConditionColumn
    from ..step.latents import TokenSource

T = TypeVar("T")

RANDOM_WEIGHTS = "good for trying things out, not for results"


class ProblemsError(RepaError):
    """A run cannot start, and the message lists every problem and its remedy.

    Attributes:
        problems: all of them.
    """

    def __init__(self, problems: list[Problem]) -> None:
        self.problems = problems
        super().__init__("\n".join(self.lines))

    @property
    def lines(self) -> tuple[str, ...]:
        """One line for all, then two for each problem, what is wrong and the remedy."""
        each = (
            line
            for number, problem in enumerate(self.problems, start=1)
            for line in (f"  {number}. {problem.what}", f"     → {problem.remedy}")
        )
        return f"the run cannot start: {counted(len(self.problems), 'problem')}", *each


@dataclass(kw_only=True)
class Checked:
    """What the checks found, None where a problem kept it from being found.

    Attributes:
        problems: everything that keeps the run from starting.
        warnings: lines that the user should read, but that stop nothing.
        manifest: of the cache.
        backbone: architecture.
        condition: what the conditioner is built from; None where a method's own does not say.
        condition_columns: the columns that it embeds, without the label.
        method: the method, freshly initialised from the seed.
        scale: of the latents, where they are the autoencoder's.
        tokens: whose tokens are in their place; None of a run on latents of the autoencoder.
        latent_columns: the columns that latents are made of.
        reader: of every column that some phase reads.
        live: computes the targets of an online run.
        live_sources: what its columns come from, once it is loaded.
        train_rows: rows to train on.
        held_out_rows: rows that are not.
        world_size: processes of the run.
        device: training device of this process.
        threads: that read for it.
    """

    problems: list[Problem] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    manifest: Manifest | None = None
    backbone: BackboneConfig | None = None
    condition: ConditionColumn | None = None
    condition_columns: tuple[str, ...] = ()
    method: Method | None = None
    scale: LatentScale | None = None
    tokens: TokenSource | None = None
    latent_columns: tuple[str, ...] = (MOMENTS,)
    reader: CacheReader | TarCache | None = None
    live: LiveTargets | None = None
    live_sources: Mapping[str, Provenance] = field(default_factory=dict)
    train_rows: NDArray[np.int64] | None = None
    held_out_rows: NDArray[np.int64] | None = None
    world_size: int | None = None
    device: torch.device | None = None
    threads: int | None = None

    def add(self, what: str, remedy: str, *, field: str = "") -> None:
        """Add a problem, once."""
        problem = Problem(what=what, remedy=remedy, field=field)
        if problem not in self.problems:
            self.problems.append(problem)

    def attempt(self, action: Callable[[], T]) -> T | None:
        """Return what an action returns, or None where its mistake became a problem."""
        try:
            return action()
        except RepaError as error:
            self.add(error.what, error.remedy, field=error.field)
            return None
