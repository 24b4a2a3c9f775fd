"""The reads of each phase of a run, in columns and in bytes of a step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...data.reading.loader import HELD, PREFETCH
from ...data.tars.cache import TarCache
from ..input.datamodule import columns_of_phase
from ..input.online import live_columns, read_columns

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..config import TrainConfig
    from .checked import Checked


def describe_phases(checked: Checked, config: TrainConfig) -> list[Mapping[str, Any]]:
    """Return each phase with its steps, columns (read, live, missing) and bytes, for ``--dry-run``.

    ``loader_bytes`` are of the buffers that a rank's rows are read into, 0 where tars are read.
    """
    if checked.method is None or checked.manifest is None:
        return []
    taken = checked.method.first_steps()
    begins = 0 if taken is None else taken.step
    images = config.batch_size // ((checked.world_size or 1) * config.accumulate)
    buffers = 0 if isinstance(checked.reader, TarCache) else PREFETCH + HELD
    rows: list[Mapping[str, Any]] = []
    for phase in checked.method.phases():
        needed = columns_of_phase(checked.method, phase, checked.condition_columns, checked.latent_columns)
        columns = read_columns(needed, checked.live)
        specs = checked.manifest.columns
        row_bytes = sum(specs[name].row_bytes for name in columns if name in specs)
        stop = config.max_steps if phase.stop is None else min(phase.stop, config.max_steps)
        first = max(phase.start, begins)
        steps = max(stop - first, 0)
        rows.append(
            {
                "phase": phase.name,
                "first": first,
                "last": first + steps - 1,
                "steps": steps,
                "columns": columns,
                "live": live_columns(needed, checked.live),
                "missing": tuple(name for name in columns if name not in specs),
                "step_bytes": row_bytes * config.batch_size,
                "all_bytes": row_bytes * config.batch_size * steps,
                "loader_bytes": row_bytes * images * buffers,
            }
        )
    return rows
