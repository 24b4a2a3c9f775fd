"""`repa bench` compares what caching costs and saves on this machine, side by side in one run."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ...data.errors import RepaError
from .measured import BenchSettings, Measured, describe_machine, print_table

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from rich.console import Console


SPEEDS = ("loader", "attention", "writer", "preprocess", "train")
"""The parts that need no teacher's weights and no images."""
FIDELITY = "fidelity"
PARTS = (*SPEEDS, FIDELITY)


def bench(
    parts: Sequence[str],
    settings: BenchSettings,
    *,
    folder: Path | None = None,
    console: Console | None = None,
) -> dict[str, list[Measured]]:
    """Run parts of the benchmark and print their tables.

    Args:
        parts: of `PARTS`; `SPEEDS` if empty.
        settings: what is measured.
        folder: where the temporary caches go, on the disk that is to be measured; the system's by default.
        console: where to print.

    Returns:
        Part → the lines of its tables, in each the reference first.

    Raises:
        RepaError: an unknown part or setting, or one that no part looks at.
    """
    _check(parts, settings)
    from ...pipeline.encoders import find_teacher
    from ..shared.terminal import PlainConsole
    from .attention import bench_attention
    from .fidelity import bench_fidelity, print_fidelity
    from .loader import bench_loader
    from .preprocess import bench_preprocess
    from .ranks import bench_ranks
    from .train import bench_train
    from .writer import bench_writer

    settings = replace(settings, encoder=find_teacher(settings.encoder, may_import=True).name)
    if folder is not None and not folder.is_dir():
        raise RepaError(f"--folder {folder} is no folder", "make it first", field="--folder")
    console = console or PlainConsole()
    console.print(describe_machine(), highlight=False)
    results: dict[str, list[Measured]] = {}
    jobs: dict[str, Callable[[BenchSettings, Path], Iterable[tuple[str, str, list[Measured]]]]] = {
        "loader": bench_loader if settings.processes == 1 else bench_ranks,
        "attention": bench_attention,
        "writer": bench_writer,
        "preprocess": lambda *given: [bench_preprocess(*given)],
        "train": lambda *given: [bench_train(*given)],
        FIDELITY: bench_fidelity,
    }
    with tempfile.TemporaryDirectory(prefix="repa-bench-", dir=folder) as scratch:
        for part in parts or SPEEDS:
            room = Path(scratch) / part
            room.mkdir()
            results[part] = []
            show = print_fidelity if part == FIDELITY else print_table
            for title, unit, lines in jobs[part](settings, room):
                show(console, title, unit, lines)
                results[part] += lines
    return results


def _check(parts: Sequence[str], settings: BenchSettings) -> None:
    """Refuse unknown parts, and settings that no part looks at.

    Raises:
        RepaError: the first of them.
    """
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        raise RepaError(
            f"bench has no part {', '.join(unknown)}", f"the parts are {', '.join(PARTS)}", field="parts"
        )
    if settings.processes > 1 and "loader" not in (parts or SPEEDS):
        raise RepaError(
            f"--processes {settings.processes} is for loader: the other parts measure one process",
            "name the part loader, or leave --processes out",
            field="--processes",
        )
    if FIDELITY in parts:
        return
    given = {
        "--data": settings.data,
        "--attention": settings.attention,
        "--weights": settings.weights,
        "--random-weights": settings.random_weights,
    }
    for flag, value in given.items():
        if value:
            raise RepaError(
                f"{flag} is for {FIDELITY}: the other parts need no images and no trained weights",
                f"name the part {FIDELITY}, or leave {flag} out",
                field=flag,
            )
