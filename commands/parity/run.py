"""`repa parity` compares a method's losses and gradients from a cache with those of the teacher called live.

Same initial weights, images, noise, times and conditions on both sides; they differ in the targets alone, so
what differs in the losses and in the gradients of the backbone is what storing the targets costs.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from ...data.errors import RepaError
from ...data.units import counted
from ...pipeline.images.names import default_cache
from ..shared.live import live_teachers

if TYPE_CHECKING:
    from rich.console import Console

    from ...trainer.config import TrainConfig
    from .flags import ParityFlags
    from .found import Parity


def parity(flags: ParityFlags, *, console: Console | None = None) -> dict[str, Parity]:
    """Compare the first batches of a run with cached and with live targets, in each view of the cache.

    From a cache of float32 targets that was written on the same machine the two are equal to the bit.

    Args:
        flags: of the command.
        console: where to print; standard output by default.

    Returns:
        View → both sides of the same images in that view.

    Raises:
        RepaError: a mistake the user can mend.
    """
    from ...trainer.config import build
    from ...trainer.run.arithmetic import resolve_precision
    from ..shared.terminal import PlainConsole
    from .comparison import Comparison, checked_run

    if flags.batches < 1:
        raise RepaError(f"--batches {flags.batches} is too small", "give at least 1")
    given = {
        "method": flags.method,
        "model": flags.model,
        "cache": str(flags.cache or default_cache()),
        "batch_size": flags.batch_size,
        "max_steps": flags.batches,
        "seed": flags.seed,
    }
    config = build(None, given, (*(flags.assignments or ()), "targets=cache"))
    config = replace(config, precision=resolve_precision(config))
    checked = checked_run(config)
    teachers = live_teachers(replace(config, targets="online"), flags, exact=True)
    try:
        comparison = Comparison(config, checked, teachers)
        found = {view: comparison.run(number) for number, view in enumerate(comparison.manifest.views)}
    finally:
        teachers.close()
    for view, each in found.items():
        _print(each, view if len(found) > 1 else None, config, console or PlainConsole())
    return found


def _print(found: Parity, view: str | None, config: TrainConfig, console: Console) -> None:
    from rich.table import Table

    images = config.batch_size * config.max_steps
    terms = Table(
        title=f"{config.method_name}, {config.model}: {counted(config.max_steps, 'batch')}, "
        f"{counted(images, 'image', ',')}{'' if view is None else f', {view}'}",
        title_justify="left",
    )
    headings = (
        "term",
        "cached",
        "live",
        "largest difference",
        "gradient: least cosine",
        "largest difference",
    )
    for heading in headings:
        terms.add_column(heading, justify="left" if heading == "term" else "right")
    for name, term in found.terms.items():
        means = [f"{sum(values) / len(values):.8f}" for values in (term.cached, term.live)]
        cosine = f"{min(term.gradient_cosine):.8f}" if term.gradient_cosine else "–"
        difference = f"{max(term.gradient_difference):.3g}" if term.gradient_difference else "–"
        terms.add_row(name, *means, f"{term.largest:.3g}", cosine, difference)
    console.print(terms)
    columns = Table()
    for heading in (
        "column",
        "stored as",
        "largest difference",
        "mean cosine error",
        "attention: KL mean",
        "worst head",
    ):
        columns.add_column(heading, justify="left" if heading in ("column", "stored as") else "right")
    for name, column in found.columns.items():
        values = (column.largest, column.cosine_error, column.kl_mean, column.kl_worst_head)
        columns.add_row(name, column.stored, *("–" if value is None else f"{value:.3g}" for value in values))
    console.print(columns)
