"""`repa bank info` prints what a bank is of."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console

    from ...trainer.sampling.bank import StoredBank

_SHOWN = 12


def info(file: Path, *, console: Console | None = None) -> None:
    """Print what a file of a bank says of itself.

    Args:
        file: the file.
        console: where to print; standard output by default.

    Raises:
        RepaError: it is no bank.
    """
    from ...trainer.sampling.bank_file import read_bank
    from ..shared.terminal import PlainConsole

    say_bank(read_bank(file), file, console or PlainConsole())


def say_bank(bank: StoredBank, file: Path, console: Console) -> None:
    """Print rows, size, provenance and error of a bank.

    Args:
        bank: of the file.
        file: where it lies.
        console: where to print.
    """
    from ...data.edge import printable
    from ...data.units import human_bytes

    said = bank.said
    lines = [
        f"{file}: {len(bank):,} vectors of {bank.width} channels, {human_bytes(file.stat().st_size)}",
        f"of {said.column} (weights sha256 {said.teacher.weights_sha256[:_SHOWN]}…), view {said.view}, "
        f"{said.resolution} pixels, cache {said.cache[:_SHOWN]}…, digest {said.digest[:_SHOWN]}…",
    ]
    if said.factored is not None:
        error = said.factored
        lines.append(
            f"rank {error.rank}: 1 − cosine to the cache's vectors {error.cosine_mean:.3g} on average, "
            f"{error.cosine_most:.3g} at most; error {error.relative:.3g} of the deviation from the mean"
        )
    for line in lines:
        console.print(printable(line), highlight=False, markup=False, soft_wrap=True)
