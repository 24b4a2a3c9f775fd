"""The words of `repa preprocess` before and after, from the plan to where the time went."""

from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from ..data.edge import printable
from ..data.format.columns import SCALE_SUFFIX, scale_column, source_of, split_column
from ..data.format.foreign import foreign_lines
from ..data.format.manifest import DEVIATION_NOTE
from ..data.format.opening import open_manifest
from ..data.format.survey import invalid_reasons
from ..data.units import counted, human_bytes, human_rate, human_seconds
from .plan import present_manifest

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rich.console import Console

    from ..data.format.manifest import Manifest
    from .plan import Plan
    from .shard_loop.ranks import Rank
    from .shard_loop.worker import Tally
    from .source_plan import SourcePlan

_SHOWN = 10
_WHOLE_LINES = 80  # characters of a terminal in which no line of a column has to be cut
_ENDINGS = 4  # shown of what was passed over
_PICTURES = frozenset((".tif", ".tiff", ".bmp", ".gif", ".heic", ".avif", ".jp2", ".ppm", ".jfif", ".jpe"))


def say(console: Console, line: str, *, style: str = "") -> None:
    """Print a line as it is, with no markup in paths and no wrapping of what scripts may read."""
    console.print(Text(line, style=style), soft_wrap=True, highlight=False)


def show_plan(plan: Plan, rank: Rank, console: Console) -> None:
    """Print what there is, what is left to do, and whether it fits the disk."""
    images, config = plan.images, plan.config
    say(
        console,
        f"images  {printable(images.name)}: {len(images)} in {counted(len(images.class_names), 'class')}",
    )
    for line in passed_over(images.skipped):
        say(console, f"        passed over: {line}")
    for remark in images.remarks:
        say(console, f"        note: {printable(remark)}", style="yellow")
    views = "" if len(plan.manifest.views) == 1 else f"views {', '.join(plan.manifest.views)} · "
    share = f" · process {rank.rank} of {rank.world} ({rank.launcher})" if rank.world > 1 else ""
    if config.shards is not None:
        share = f" · {counted(len(plan.share), 'shard')} of them by --shards {config.shards}{share}"
    say(
        console,
        f"cache   {config.cache}: {counted(plan.manifest.num_shards, 'shard')} of "
        f"{counted(plan.manifest.shard_rows, 'image')} at "
        f"{config.resolution}×{config.resolution} · {views}batches of {config.batch_size}{share}",
    )
    if (present := present_manifest(config.cache)) is not None:
        for line in foreign_lines(present):
            say(console, f"        {line}", style="yellow")
    table = Table(box=None, pad_edge=False)
    whole = console.width >= _WHOLE_LINES
    for heading in ("source", "columns", "state", "to do", "to write"):
        table.add_column(
            heading,
            justify="right" if heading.startswith("to") else "left",
            no_wrap=whole and heading in {"source", "columns"},
            overflow="fold",
        )
    for source in plan.sources:
        table.add_row(
            source.source,
            "\n".join(
                _column(source, name, len(plan.manifest.views))
                for name in source.columns
                if not name.endswith(SCALE_SUFFIX)
            ),
            _state(plan, source),
            f"{counted(source.rows, 'image')}",
            f"{_most(source)}{human_bytes(source.bytes)}",
        )
    console.print(table)
    most = "at most " if any(source.at_most for source in plan.sources) else ""
    packed = " before compression" if config.compress else ""
    say(
        console,
        f"{most}{human_bytes(plan.bytes)} to write{packed}, {_room(plan)}",
    )


def _room(plan: Plan) -> str:
    """Say how much room there is, as far as that is known."""
    if plan.free_bytes is None:
        return f"straight into {plan.config.cache}"
    fits = "fits" if plan.bytes <= plan.free_bytes else "may not fit" if plan.fits else "does not fit"
    return f"{human_bytes(plan.free_bytes)} free on the disk of {plan.config.cache}: {fits}"


def _column(source: SourcePlan, name: str, views: int) -> str:
    """Describe a column as ``q int8[3,12,256,16] 1.5 MB``.

    The last is what its missing rows take in all views, scales included.
    """
    spec, scale = source.columns[name], source.columns.get(scale_column(name))
    row_bytes = spec.row_bytes + (scale.row_bytes if scale is not None else 0)
    size = f" {_most(source)}{human_bytes(source.rows * views * row_bytes)}" if source.rows else ""
    return f"{split_column(name)[1]} {spec.dtype}[{','.join(map(str, spec.shape))}]{size}"


def _most(source: SourcePlan) -> str:
    return "≤ " if source.at_most and source.rows else ""


def passed_over(skipped: Sequence[tuple[str, str]]) -> list[str]:
    """Say what was passed over, a line for each reason, with its count, endings and an example.

    Args:
        skipped: (path, why) of every file.
    """
    reasons: defaultdict[str, list[str]] = defaultdict(list)
    for path, why in skipped:
        reasons[why].append(path)
    lines = []
    for why, paths in reasons.items():
        endings = Counter(PurePosixPath(path).suffix.lower() or "no ending" for path in paths)
        kinds = ", ".join(f"{count} {ending}" for ending, count in endings.most_common(_ENDINGS))
        more = ", …" if len(endings) > _ENDINGS else ""
        advice = "; convert them to PNG to have them encoded" if _PICTURES.intersection(endings) else ""
        lines.append(
            f"{counted(len(paths), 'file')} {why} ({printable(kinds)}{more}; first {printable(paths[0])})"
            f"{advice}"
        )
    return lines


def _state(plan: Plan, source: SourcePlan) -> str:
    done = len(plan.share) - len(source.missing)
    weights = ", random weights" if source.drawn else ""
    if source.declared is None:
        return f"new{weights}"
    if not source.missing:
        return f"complete{weights}"
    return f"{done} of {counted(len(plan.share), 'shard')}{weights}"


def warn_of_random_weights(sources: Sequence[SourcePlan], console: Console) -> None:
    """Say loudly that what will be written means nothing."""
    drawn = [source.source for source in sources if source.missing and source.drawn]
    if drawn:
        say(
            console,
            f"WARNING: --random-weights: {', '.join(drawn)} will hold the output of untrained networks, good "
            "for trying things out only; the cache records it and training will warn of it",
            style="bold red",
        )


def chosen_forms(manifest: Manifest, sources: Sequence[str]) -> list[str]:
    """Return a line for each source whose attention was made as small as was asked for.

    Args:
        manifest: of the cache.
        sources: those to look at.
    """
    lines = []
    views = " and view" if len(manifest.views) > 1 else ""
    for source in sources:
        provenance = manifest.sources.get(source)
        notes: Mapping[str, Any] = {} if provenance is None else provenance.notes
        fidelity, tolerance, most = notes.get("fidelity"), notes.get("tolerance"), notes.get("bytes")
        if fidelity is None or (tolerance is None and most is None):
            continue
        asked = f"--attention-bytes {most}" if tolerance is None else f"--attention-kl {tolerance:g}"
        near = fidelity.get("gradient_cosine_near")
        gradient = "" if near is None else f", gradient near the teacher at cosine {near:.6g}"
        lines.append(
            f"{source}: {asked} took {human_bytes(fidelity['bytes_per_image'])} per image{views}: "
            f"{fidelity['kl_worst_head']:.3g} nats in the worst head, {fidelity['kl_mean']:.3g} on average"
            f"{gradient}"
        )
    return lines


def deviations(manifest: Manifest, sources: Sequence[str]) -> list[str]:
    """Return a line for each source that says how far its compute dtype lies from float32.

    Args:
        manifest: of the cache.
        sources: those to look at.
    """
    lines = []
    for source in sources:
        provenance = manifest.sources.get(source)
        note = None if provenance is None else provenance.notes.get(DEVIATION_NOTE)
        if provenance is None or note is None:
            continue
        computed = provenance.compute_dtype
        if "relative_rms" in note:
            found = (
                f"its latents are off those of float32 by {note['relative_rms']:.3g} of their root mean "
                f"square, by {note['relative_max']:.3g} at most"
            )
        elif "kl_mean" in note:
            found = (
                f"KL(float32 ‖ {computed}) {note['kl_mean']:.3g} nats on average, "
                f"{note['kl_worst_head']:.3g} in the worst head"
            )
        else:
            found = (
                f"1 − cosine of a token with that of float32 {note['cosine_error_mean']:.3g} on average, "
                f"{note['cosine_error_max']:.3g} at most"
            )
        where = f"measured on {counted(note['images'], 'image')} before it was written"
        lines.append(f"{source}: computed in {computed}: {found}; {where}")
    return lines


def text_deviations(manifest: Manifest, sources: Sequence[str] | None = None) -> list[str]:
    """Return a line for each text encoder that says how far what is stored lies from float32.

    Args:
        manifest: of the cache of captions.
        sources: those to look at; None for all.
    """
    lines = []
    for name, provenance in manifest.sources.items():
        note = provenance.notes.get(DEVIATION_NOTE)
        if note is None or (sources is not None and name not in sources):
            continue
        lines.append(
            f"{name}: states are off those of float32 by {note['relative_rms']:.3g} of their root mean "
            f"square; 1 − cosine of a token {note['cosine_error_mean']:.3g} on average, "
            f"{note['cosine_error_max']:.3g} at most, on {counted(note['captions'], 'caption')}"
        )
    return lines


def show_summary(plan: Plan, rank: Rank, tallies: Sequence[Tally], seconds: float, console: Console) -> None:
    """Print what was written, what was left out and why, and where the time went.

    Args:
        plan: what was to do.
        rank: this process.
        tallies: of every process it started, or its own.
        seconds: from the start to now.
        console: where to.
    """
    images = sum(tally.images for tally in tallies)
    loop = max((tally.loop_seconds for tally in tallies), default=0.0)
    rate = f", {human_rate(images / loop)}" if loop else ""
    whose = f" (process {rank.rank} of {rank.world}; the others write the rest)" if rank.world > 1 else ""
    say(
        console,
        f"wrote {counted(images, 'image')} to {plan.config.cache} in {human_seconds(seconds)}{rate}{whose}",
    )
    manifest, sources = open_manifest(plan.config.cache), [each.source for each in plan.sources]
    for line in (*chosen_forms(manifest, sources), *deviations(manifest, sources)):
        say(console, f"  {line}")
    written: Counter[str] = Counter()
    rows: Counter[str] = Counter()
    for tally in tallies:
        written.update(tally.written.bytes)
        rows.update(tally.written.rows)
    for column, count in written.items():
        each = count // max(1, rows[source_of(column)])
        say(
            console,
            f"  {column}: {counted(rows[source_of(column)], 'image')}, {human_bytes(count)}, "
            f"{counted(each, 'byte')} each",
        )
    _show_invalid(plan, console)
    if images:
        _show_time(tallies, console)


def _show_invalid(plan: Plan, console: Console) -> None:
    reasons = invalid_reasons(plan.config.cache, open_manifest(plan.config.cache))
    if not reasons:
        return
    counts = ", ".join(
        f"{count} × {reason}" for reason, count in Counter(reasons.values()).most_common(_SHOWN)
    )
    say(
        console,
        f"  {counted(len(reasons), 'image')} could not be decoded, left out: {counts}",
        style="yellow",
    )
    for row, reason in list(reasons.items())[:_SHOWN]:
        say(console, f"    {printable(plan.images.keys[row])} (row {row}): {printable(reason)}")
    if len(reasons) > _SHOWN:
        say(console, f"    and {len(reasons) - _SHOWN} more, see `repa cache info {plan.config.cache}`")


def _show_time(tallies: Sequence[Tally], console: Console) -> None:
    """Print means over the processes that had work, side by side, so that they add up to the wall clock."""
    working = [tally for tally in tallies if tally.loop_seconds]
    count = len(working)
    busy: defaultdict[str, float] = defaultdict(float)
    for tally in working:
        for model, seconds in tally.written.busy_seconds.items():
            busy[model] += seconds / tally.lanes
    loop = sum(tally.loop_seconds for tally in working)
    idle = max(0.0, loop - sum(busy.values()))
    decode = sum(tally.decode_seconds for tally in working)
    disk = sum(tally.written.write_seconds for tally in working)
    load = sum(tally.load_seconds for tally in working)
    parts = [f"loading models {human_seconds(load / count)}"]
    calibrate = sum(tally.calibrate_seconds for tally in working)
    if calibrate >= 0.1 * count:
        parts.append(f"calibrating {human_seconds(calibrate / count)}")
    parts += [f"{model} {human_seconds(value / count)}" for model, value in busy.items()]
    parts.append(f"device idle {human_seconds(idle / count)}")
    say(
        console,
        f"  time: {' · '.join(parts)} (beside it: waited {human_seconds(decode / count)} for images, "
        f"wrote {human_seconds(disk / count)})",
    )
