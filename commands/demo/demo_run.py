"""One run of the demo, with its method and its folders."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class DemoRun:
    """What one method leaves in the demo.

    Attributes:
        method: name of the method.
        model: name of its backbone.
        folder: its run folder.
        samples: folder of its samples.
    """

    method: str
    model: str
    folder: Path
    samples: Path
