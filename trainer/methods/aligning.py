"""Alignment that ends at a step, one mechanism for every method that aligns (HASTE's τ, arXiv 2505.16792)."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ..models.capture import NOTHING, Capture
from .base import Flags, Method, MethodConfig, Phase, Step, Term

if TYPE_CHECKING:
    from collections.abc import Mapping

ALIGN = "align"
PLAIN = "plain"


@dataclass(frozen=True, kw_only=True)
class AligningConfig(MethodConfig):
    """Settings of a method that aligns.

    Attributes:
        stop: τ, the first step without alignment; none means never.
    """

    stop: int | None = None


class Aligning(Method):
    """Base of methods that align until step τ, and read, capture and add nothing from then on.

    A subclass may cut the steps before τ into phases of its own: what is not `PLAIN` aligns.

    A subclass answers for the phase that aligns, in ``aligned_…``. What it does beyond τ too it adds to this
    class's answers to the questions themselves, for example in ``columns``, and says with `idle_after` which
    parameters have no part in it. It requires ``AlignsFirst("stop")``.

    Attributes:
        idle_after: prefixes of parameter names that no loss reaches from τ on, see `Flags.idle`.
    """

    config: AligningConfig
    config_class: ClassVar[type[MethodConfig]] = AligningConfig
    presets: ClassVar[Mapping[str, MethodConfig]] = {}
    idle_after: ClassVar[tuple[str, ...]] = ("method.",)

    def aligned_columns(self) -> tuple[str, ...]:
        """Name the columns that the alignment reads."""
        return ()

    @abstractmethod
    def aligned_capture(self) -> Capture:
        """Ask for the activations that are aligned."""

    @abstractmethod
    def aligned_losses(self, step: Step) -> dict[str, Term]:
        """Return the terms of the alignment, by name."""

    def aligned_flags(self) -> Flags:
        """Say what else the alignment needs."""
        return Flags()

    def phases(self) -> tuple[Phase, ...]:
        """Align before τ, and nothing after."""
        if self.config.stop is None:
            return (Phase(name=ALIGN),)
        stop = max(self.config.stop, 0)
        return Phase(name=ALIGN, stop=stop), Phase(name=PLAIN, start=stop)

    def columns(self, phase: Phase) -> tuple[str, ...]:
        """Return the columns of the alignment before τ, nothing after."""
        return self.aligned_columns() if phase.name != PLAIN else ()

    def capture(self, phase: Phase) -> Capture:
        """Ask for the activations of the alignment before τ, nothing after."""
        return self.aligned_capture() if phase.name != PLAIN else NOTHING

    def flags(self, phase: Phase) -> Flags:
        """Say what the alignment needs before τ, and that its parameters are idle after."""
        return self.aligned_flags() if phase.name != PLAIN else Flags(idle=self.idle_after)

    def losses(self, step: Step) -> dict[str, Term]:
        """Return the terms of the alignment before τ, none after."""
        return self.aligned_losses(step) if self.phase_at(step.index).name != PLAIN else {}
