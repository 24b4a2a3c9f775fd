"""Parameters that train, and that no loss of a phase reaches."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor, nn

    from ..methods.base import Method, Phase
    from ..models.base import Backbone


class IdleParameters:
    """The idle parameters of each phase, found once."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, ...], list[nn.Parameter]] = {(): []}

    def of_phase(
        self, phase: Phase, method: Method, backbone: Backbone, module: nn.Module
    ) -> list[nn.Parameter]:
        """List them by what the method says and where it stops the backbone.

        Args:
            phase: of the method.
            method: says which of its parameters are idle.
            backbone: may be stopped early.
            module: has both, always the same one.
        """
        prefixes, stop = method.flags(phase).idle, method.capture(phase).stop_after
        if stop is not None:
            prefixes = (*prefixes, *(f"backbone.{each}" for each in backbone.left_out(stop)))
        if prefixes not in self._found:
            self._found[prefixes] = [
                parameter
                for name, parameter in module.named_parameters()
                if parameter.requires_grad and name.startswith(prefixes)
            ]
        return self._found[prefixes]


def zero_of(parameters: Iterable[nn.Parameter], device: torch.device) -> Tensor:
    """Compute 0 × the sum of parameters, as DDP waits for a gradient of each."""
    total = torch.zeros((), device=device)
    for parameter in parameters:
        total = total + 0.0 * parameter.float().sum()
    return total
