"""What `repa cache info` says of compression and of how well stored targets stand for the teacher's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...data.errors import RepaError
from ...data.format.columns import AUTOENCODER
from ...data.units import counted
from ...pipeline.summary import deviations

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rich.console import Console

    from ...data.upkeep.info import CacheInfo, ColumnInfo

_COMPRESSION = (
    "ratio: bytes of data to bytes {where}; speeds measured just now: random rows, one thread, {how}"
)
_HOW = (
    "from the page cache, decoded as they are and written uncompressed to a temporary folder",
    "requested from the bucket and decoded, and beside that uncompressed from a temporary folder",
)


def print_compression(found: CacheInfo, console: Console) -> None:
    """Print the ratio and read speed of every compressed column. Nothing is printed when there is none."""
    from rich.table import Table

    compressed = [
        (column, source.shards_committed == found.num_shards)
        for source in found.sources
        for column in source.columns
        if column.compressor is not None
    ]
    if not compressed:
        return
    table = Table(box=None, pad_edge=False, title="compression", title_justify="left")
    for heading in ("column", "codec", "ratio", "rows", "reads", "uncompressed"):
        table.add_column(heading, justify="left" if heading in {"column", "codec"} else "right")
    problems = []
    for column, complete in compressed:
        try:
            speeds = _speeds(found, column) if complete else ("", "", "")
        except RepaError as error:
            problems.append(f"{column.name} was not read: {error}")
            speeds = ("", "", "")
        ratio = "" if column.ratio is None else f"{column.ratio:.3f}"
        table.add_row(column.name, column.compressor, ratio, *speeds)
    console.print(table)
    note = _COMPRESSION.format(where=found.where, how=_HOW[found.remote])
    console.print(note, highlight=False, style="dim")
    for problem in problems:
        console.print(problem, highlight=False, markup=False, soft_wrap=True, style="yellow")


def _speeds(found: CacheInfo, column: ColumnInfo) -> tuple[str, str, str]:
    from ...data.units import human_bytes
    from ..measure.read_speed import measure_read_speed

    speed = measure_read_speed(found.path, column.name)
    if speed is None:
        return "", "", ""
    return str(speed.rows), f"{human_bytes(speed.stored)}/s", f"{human_bytes(speed.plain)}/s"


def print_notes(found: CacheInfo, console: Console) -> None:
    """Print what sources say of what they are computed in, of their stored form and of its fidelity."""
    for line in deviations(found.manifest, tuple(found.manifest.sources)):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    for source, provenance in found.manifest.sources.items():
        notes = provenance.notes
        fidelity = notes.get("fidelity")
        if source == AUTOENCODER:
            continue
        if "distilled" in notes:
            line = f"{source}: {_copy(notes['distilled'])}"
            console.print(line, highlight=False, markup=False, soft_wrap=True)
        if "blocks" in notes:
            console.print(f"{source}: {_attention_form(notes)}", highlight=False)
        if fidelity is None:
            continue
        where = f"measured on {counted(fidelity['images'], 'held-out image')} when it was written"
        if "kl" in fidelity:
            _print_attention_fidelity(source, fidelity, where, console)
        else:
            _print_token_fidelity(source, fidelity, where, console)
    views = len(found.manifest.views)
    if views > 1 and any("fidelity" in each.notes for each in found.manifest.sources.values()):
        line = f"where it says per image, fitted or measured: each of an image's {views} views counts as one"
        console.print(line, highlight=False, soft_wrap=True, style="dim")


def _copy(distilled: Mapping[str, Any]) -> str:
    """Describe what `repa distill` wrote of a copy."""
    fidelity, speed = distilled["fidelity"], distilled["speed"]
    return (
        f"a copy of {distilled['teacher']} (weights {distilled['teacher_sha256'][:12]}) with "
        f"{distilled['idle']:.0%} of its hidden channels idle, another teacher: patch tokens at cosine "
        f"{fidelity['patch_cosine_mean']:.3f} to it, those of another image at "
        f"{fidelity['shuffled_cosine']:.3f}, REPA's loss of a token {fidelity['repa_loss_change']:.3f} off, "
        f"{fidelity['neighbour_agreement']:.0%} of the {fidelity['neighbours']} nearest images in common, on "
        f"{counted(fidelity['images'], 'held-out image')}; ×{speed['ratio']:.2f} its speed on "
        f"{speed['device']}"
    )


def _attention_form(notes: Mapping[str, Any]) -> str:
    """Describe a form as in ``blocks 8, 10, 12 · rank 32 of 64 · …``."""
    rank = f"rank {notes['rank']} of {notes['head_width']}"
    if notes.get("components"):
        heads = [head for block in notes["components"] for head in block]
        ranks = sorted(sum(head) for head in heads)
        whole = sum(head[0] for head in heads) / max(1, sum(ranks))
        rank = (
            f"{ranks[0]} to {ranks[-1]} of {notes['head_width']} components a head, each image by itself, "
            f"{whole:.0%} of them int8, the others int4"
        )
    parts = [
        f"blocks {', '.join(map(str, notes['blocks']))}",
        rank,
        notes["form"],
        f"keys {notes['keys']}",
    ]
    calibration = notes.get("calibration")
    if calibration is not None and calibration["images"]:
        parts.append(f"fitted to {counted(calibration['images'], 'image')}")
    return " · ".join(parts)


def _print_attention_fidelity(source: str, fidelity: Mapping[str, Any], where: str, console: Console) -> None:
    from rich.table import Table

    from ...data.units import human_bytes

    console.print(
        f"{source}: KL(teacher ‖ stored) {fidelity['kl_mean']:.3g} nats on average, "
        f"{fidelity['kl_worst_head']:.3g} in the worst head, "
        f"{human_bytes(fidelity['bytes_per_image'])} per image; {where}",
        highlight=False,
    )
    if fidelity.get("gradient_cosine_near") is not None:
        students = [
            f"{name} the gradient at cosine {fidelity[f'gradient_cosine_{student}']:.6g} (lowest block), "
            f"the loss changed by {fidelity[f'loss_change_{student}']:.2g} nats"
            for student, name in (
                ("initial", "of a student at the start"),
                ("near", "of one 15° from the teacher"),
            )
        ]
        console.print(f"{source}: with stored targets {'; '.join(students)}", highlight=False)
    table = Table(box=None, pad_edge=False)
    for heading in ("block", "mean KL", "worst head's", "head", "worst 99th percentile"):
        table.add_column(heading, justify="right")
    for block in dict.fromkeys(entry["block"] for entry in fidelity["kl"]):
        heads: Sequence[Mapping[str, Any]] = [each for each in fidelity["kl"] if each["block"] == block]
        worst = max(heads, key=lambda entry: float(entry["mean"]))
        mean = sum(entry["mean"] for entry in heads) / len(heads)
        tail = max(entry["p99"] for entry in heads)
        table.add_row(str(block), f"{mean:.3g}", f"{worst['mean']:.3g}", str(worst["head"]), f"{tail:.3g}")
    console.print(table)


def _print_token_fidelity(source: str, fidelity: Mapping[str, Any], where: str, console: Console) -> None:
    from ...data.units import human_bytes

    console.print(
        f"{source}: 1 − cosine of a stored token {fidelity['cosine_error_mean']:.3g} on average, "
        f"{fidelity['cosine_error_max']:.3g} at most, changes the REPA loss by "
        f"{fidelity['repa_loss_change']:.3g}, {human_bytes(fidelity['bytes_per_image'])} per image; {where}",
        highlight=False,
    )
