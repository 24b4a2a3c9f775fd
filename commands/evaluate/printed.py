"""An evaluation as it is printed, a table holding figures of one number of samples and one reference."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console

    from ...trainer.evaluation.results import Evaluation, SamplesSaid

_SHOWN_DIGITS = 12


def print_evaluation(evaluation: Evaluation, console: Console, out: Path) -> None:
    """Print figures with all that they depend on.

    Args:
        evaluation: the figures, which share samples and reference.
        console: where to.
        out: folder that they were written to.
    """
    from rich.table import Table

    from ...trainer.evaluation.results import DOCUMENT_FILE, TABLE_FILE

    samples, reference = evaluation.samples, evaluation.reference

    def say(line: str) -> None:
        console.print(line, highlight=False, markup=False, soft_wrap=True)

    say(
        f"{samples.num:,} samples of {samples.name} (sha256 {samples.sha256[:_SHOWN_DIGITS]}…){_how(samples)}"
    )
    if reference is not None:
        say(f"against {reference.kind} {reference.name} (sha256 {reference.sha256[:_SHOWN_DIGITS]}…)")
    table = Table()
    for heading in ("metric", f"value, N = {samples.num:,}", "±", "M", "k", "as"):
        table.add_column(heading, justify="left" if heading in ("metric", "as") else "right")
    for figure in evaluation.figures:
        table.add_row(
            figure.metric,
            f"{figure.value:.6g}",
            "" if figure.spread is None else f"{figure.spread:.2g}",
            "" if figure.m is None else f"{figure.m:,}",
            "" if figure.k is None else str(figure.k),
            figure.protocol,
        )
    console.print(table)
    for note in evaluation.notes:
        say(f"note: {note}")
    say(f"Wrote {out / DOCUMENT_FILE} and {out / TABLE_FILE}.")


def _how(samples: SamplesSaid) -> str:
    if samples.solver is None:
        return ""
    parts = [f"{samples.weights} weights", f"{samples.solver}, {samples.steps} steps"]
    if samples.shift is not None:
        parts.append(f"times shifted by {samples.shift:g}")
    guidance = f"guidance {samples.guidance:g}"
    if samples.guidance_cls is not None:
        guidance += f", class token {samples.guidance_cls:g}"
    if samples.guidance_channels is not None:
        guidance += f" on {samples.guidance_channels} channels"
    if samples.guidance != 1 and samples.interval is not None:
        guidance += f" for t in [{samples.interval[0]:g}, {samples.interval[1]:g}]"
    given = f"labels {samples.labels}" if samples.condition is None else samples.condition
    parts += [guidance, given, f"seed {samples.seed}"]
    return f": {', '.join(parts)}"
