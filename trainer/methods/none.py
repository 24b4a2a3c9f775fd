"""The baseline, plain SiT without alignment."""

from __future__ import annotations

from .base import Method, Step, Term


class NoAlignment(Method):
    """The velocity loss alone (SiT, arXiv 2401.08740)."""

    def losses(self, step: Step) -> dict[str, Term]:
        """Return no terms."""
        del step
        return {}
