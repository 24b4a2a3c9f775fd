"""The tables of `repa analyze`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rich.console import Console

_FEW = 6


def print_tokens(teachers: Mapping[str, Mapping[str, Any]], console: Console) -> None:
    """Print a line for each teacher."""
    if not teachers:
        return
    heading = ("teacher", "tokens", "LDS", "CDS", "SRSS", "RMSC", "rank", "of means", "norm", "outliers")
    table = _table("tokens", heading)
    for name, each in teachers.items():
        table.add_row(
            Text(name),
            "×".join(map(str, (*each["grid"], each["width"]))),
            *(_number(each[key]) for key in ("lds", "cds", "srss", "rmsc")),
            f"{each['effective_rank']:.1f}",
            f"{each['effective_rank_of_images']:.1f}",
            f"{each['norm_median']:.2f}",
            f"{each['outliers']:.2%}",
        )
    console.print(table)
    if any(each["lds"] is None for each in teachers.values()):
        _say(console, "–: the grid has no tokens 8 apart, which LDS, CDS and SRSS ask for")


def print_attention(teachers: Mapping[str, Mapping[str, Any]], console: Console) -> None:
    """Print the entropy of each stored block."""
    for name, each in teachers.items():
        table = _table(f"entropy of {name}'s heads", ("block", "mean", "least", "most"))
        for block, entropies in each["entropy"].items():
            mean = sum(entropies) / len(entropies)
            table.add_row(block, *(f"{value:.3f}" for value in (mean, min(entropies), max(entropies))))
        console.print(table)
        _say(console, f"in nats; even attention to all tokens has {each['entropy_of_even_attention']:.3f}")


def print_latents(document: Mapping[str, Any], console: Console) -> None:
    """Print the statistics of the latents, and how well they decode."""
    latents = document.get("latents")
    if latents is not None:
        table = _table("latents", ("channel", "mean", "std"))
        for channel, (mean, std) in enumerate(zip(latents["mean"], latents["std"], strict=True)):
            if channel == _FEW and len(latents["mean"]) > _FEW + 1:
                table.add_row("…", "", "")
                break
            table.add_row(str(channel), f"{mean:.4f}", f"{std:.4f}")
        console.print(table)
    if "decoded" in document:
        found = document["decoded"]
        _say(console, f"decoded images: {found['mean_psnr']:.2f} dB PSNR over {len(found['rows'])} rows")


def print_blocks(document: Mapping[str, Any], console: Console) -> None:
    """Print what each block of a run holds, a table for each time."""
    teachers: Sequence[str] = tuple(document["teachers"])
    measures = [f"{name} {teacher}" for teacher in teachers for name in ("CKNNA", "CKA")]
    for time, blocks in document["times"].items():
        table = _table(f"t = {time}", ("block", "norm", "probe", *measures))
        for block, each in blocks.items():
            numbers = (each[name][teacher] for teacher in teachers for name in ("cknna", "cka"))
            table.add_row(
                block, f"{each['norm']:.2f}", _number(each["probe"]), *(f"{value:.3f}" for value in numbers)
            )
        console.print(table)
    if document["condition"] == "own":
        _say(console, "–: the network was never trained without its condition, and a probe would find that")
    for teacher, each in document["teachers"].items():
        if each["probe"] is None:
            _say(console, "no probe: it wants two classes, and four images a class; give more with --num")
            break
        _say(console, f"the probe of {teacher} itself: {_number(each['probe'])}")


def _table(title: str, heading: Sequence[str]) -> Table:
    table = Table(box=None, pad_edge=False, title=title, title_justify="left")
    for number, name in enumerate(heading):
        table.add_column(Text(name), justify="right" if number else "left")
    return table


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _say(console: Console, line: str) -> None:
    console.print(line, highlight=False, markup=False, soft_wrap=True)
