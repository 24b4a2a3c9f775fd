"""`repa cache verify --fidelity` compares what is stored with the teachers, called live."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...data.errors import RepaError
from ...data.format.columns import model_of
from ...pipeline.images.names import DEFAULT_DATA, DEMO_DATA, default_cache

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from rich.console import Console
    from rich.table import Table

    from ...pipeline.replay.fidelity import Comparison


def verify_fidelity(
    *,
    cache: Path | None = None,
    data: str | None = None,
    rows: int | None = None,
    weights: Sequence[str] = (),
    seed: int = 0,
    console: Console | None = None,
) -> None:
    """Encode random rows again, print how far what is stored lies from them, beside what was recorded.

    Args:
        cache: the cache; by default the only one under ``caches/``.
        data: the images it was made from; by default ``images``, of a cache of the demo ``demo``.
        rows: how many rows; 64.
        weights: ``NAME=FILE`` of an encoder's weights.
        seed: of the choice of rows.
        console: where to print; standard output by default.

    Raises:
        RepaError: no cache, other images, weights that are not the recorded ones, a row that is corrupt.
        SystemExit: with status 1 when what is stored is farther from the teacher than was recorded.
    """
    from rich.text import Text

    from ..shared.terminal import PlainConsole

    console = console or PlainConsole()
    path = cache or default_cache()
    if rows is not None and rows < 1:
        raise RepaError(f"--rows {rows} compares nothing", "give at least 1")
    import torch

    from ...data.format.opening import open_manifest
    from ...pipeline.replay.fidelity import DEFAULT_ROWS, check_fidelity
    from ..shared.encoders import parse_weights

    demo = open_manifest(path).source_kind == DEMO_DATA
    found = check_fidelity(
        path,
        data=data or (DEMO_DATA if demo else DEFAULT_DATA),
        rows=rows or DEFAULT_ROWS,
        weights=parse_weights(weights),
        seed=seed,
        device="cuda" if torch.cuda.is_available() else "cpu",
    )
    for source in dict.fromkeys(each.source for each in found):
        console.print(_table(source, [each for each in found if each.source == source]))
    lost = [each for each in found if not each.kept]
    verdict = (
        f"farther from the teacher than allowed: {len(lost)} of {len(found)}: the cache is not what "
        "its manifest says; write it again in another folder"
        if lost
        else "all is as close to the teacher as recorded"
    )
    console.print(Text(f"{path}: {verdict}", style="bold red" if lost else ""), soft_wrap=True)
    if lost:
        raise SystemExit(1)


def _table(source: str, found: Sequence[Comparison]) -> Table:
    from rich.table import Table
    from rich.text import Text

    unit = "KL(teacher ‖ stored), nats" if source != model_of(source) else "1 − cosine"
    table = Table(box=None, pad_edge=False, title=f"{source}: {unit}", title_justify="left")
    for heading in ("", "recorded", "measured", "largest", "limit", ""):
        table.add_column(heading, justify="right" if heading else "left")
    for each in found:
        table.add_row(
            each.what,
            "" if each.recorded is None else f"{each.recorded:.3g}",
            f"{each.measured:.3g}",
            f"{each.largest:.3g}",
            f"{each.limit:.3g}",
            Text("" if each.kept else "over", style="bold red"),
        )
    return table
