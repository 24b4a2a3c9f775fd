"""`repa cache info` and `repa cache verify` look into a cache and check it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...data.units import counted
from ...pipeline.images.names import default_cache
from .notes import print_compression, print_notes

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from rich.console import Console
    from rich.table import Table

    from ...data.storage.bucket import CachePath
    from ...data.upkeep.info import CacheInfo
    from ...data.upkeep.verify import Finding

_SHOWN = 20


def info(*, cache: Path | str | None = None, as_json: bool = False, console: Console | None = None) -> None:
    """Print what a cache holds.

    Said are columns, sizes, progress, where they come from and how faithful they are.

    Random rows of compressed columns are read, to say how fast that goes.

    Args:
        cache: the cache, or its address in a bucket; by default the only one under ``caches/``.
        as_json: print one JSON document of it, and nothing else.
        console: where to print; standard output by default.

    Raises:
        CacheError: there is no cache, or it is damaged.
    """
    from ...data.format.foreign import foreign_lines
    from ...data.storage.bucket import cache_path
    from ...data.units import human_bytes
    from ...data.upkeep.info import cache_info
    from ..shared.terminal import PlainConsole

    console = console or PlainConsole()
    found = cache_info(cache_path(cache or default_cache()))
    if as_json:
        from .document import info_document

        # as it is: no colours, no markup, no line broken where the terminal ends
        console.file.write(f"{info_document(found)}\n")
        return
    manifest = found.manifest
    console.print(
        f"{found.path}  {human_bytes(found.total_bytes)} {found.where}", soft_wrap=True, style="bold"
    )
    console.print(
        f"{counted(found.num_rows, 'image')} of {found.resolution}×{found.resolution} in "
        f"{counted(found.num_classes, 'class')} · {counted(found.num_shards, 'shard')} of "
        f"{manifest.shard_rows} · views {', '.join(manifest.views)} · "
        f"crop {manifest.crop}, EXIF orientation {manifest.exif_orientation} · from a {manifest.source_kind}",
        highlight=False,
    )
    console.print(_columns(found))
    print_compression(found, console)
    console.print(_sources(found))
    for line in foreign_lines(manifest):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    print_notes(found, console)
    if found.captions is not None:
        _captions(found, found.captions, console)
    if manifest.outdated:
        console.print(f"it {manifest.outdated}", style="yellow", markup=False, soft_wrap=True)
    if not found.complete:
        writer = "repa cache import" if foreign_lines(manifest) else "repa preprocess"
        remedy = "copy the rest there" if found.remote else f"the same `{writer}` goes on with it"
        console.print(f"not complete: {remedy}", style="yellow")
    if found.invalid:
        _invalid(found, console)


def _captions(found: CacheInfo, captions: CacheInfo, console: Console) -> None:
    """Print what there is of the captions."""
    from ...data.units import human_bytes
    from ...pipeline.summary import text_deviations

    record = found.captions_record
    parts = [f"{counted(captions.num_rows, 'distinct caption', ',')}, the empty one among them"]
    if "kind" in record:
        parts.append(f"from {record['kind']}")
    if record.get("captions_per_image"):
        parts.append(f"at most {record['captions_per_image']} of an image, {record['left_out']} left out")
    if record.get("images_without"):
        parts.append(f"{counted(record['images_without'], 'image', ',')} without one")
    console.print(
        f"captions: {' · '.join(parts)} · {human_bytes(captions.total_bytes)} {found.where}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    console.print(_columns(captions, "per caption"))
    console.print(_text_sources(captions))
    for line in text_deviations(captions.manifest):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _text_sources(captions: CacheInfo) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, title="text encoders", title_justify="left")
    for heading in ("source", "model", "weights", "tokenizer", "tokens", "layer", "batch", "computed in"):
        table.add_column(heading, overflow="fold")
    for name, provenance in captions.manifest.sources.items():
        drawn = provenance.random_weights
        notes = provenance.notes
        table.add_row(
            name,
            Text(provenance.model),
            Text("random!" if drawn else provenance.weights_sha256[:12], style="bold red" if drawn else ""),
            str(notes.get("tokenizer_sha256", "unknown"))[:12],
            str(notes.get("tokens", provenance.input_size)),
            str(notes.get("layer", "unknown")),
            str(provenance.batch_size),
            provenance.compute_dtype,
        )
    return table


def _columns(found: CacheInfo, each: str = "per image") -> Table:
    from rich.table import Table
    from rich.text import Text

    from ...data.units import human_bytes

    table = Table(box=None, pad_edge=False, title="columns", title_justify="left")
    for heading in ("column", "dtype", "shape", each, found.where, "shards"):
        left = heading in {"column", "dtype", "shape"}
        table.add_column(heading, justify="left" if left else "right", overflow="fold")
    for source in found.sources:
        for column in source.columns:
            complete = source.shards_committed == found.num_shards
            table.add_row(
                column.name,
                column.dtype,
                Text(str(list(column.shape))),
                human_bytes(column.bytes_per_image),
                human_bytes(column.file_bytes),
                Text(f"{source.shards_committed}/{found.num_shards}", style="" if complete else "yellow"),
            )
    return table


def _sources(found: CacheInfo) -> Table:
    from rich.table import Table
    from rich.text import Text

    from ...data.format.manifest import FOREIGN_NOTE

    table = Table(box=None, pad_edge=False, title="sources", title_justify="left")
    for heading in ("source", "model", "weights", "input", "grid", "batch", "computed in"):
        table.add_column(heading, overflow="fold")
    for name, provenance in found.manifest.sources.items():
        drawn = provenance.random_weights
        foreign = FOREIGN_NOTE in provenance.notes
        weights = "random!" if drawn else "foreign" if foreign else provenance.weights_sha256[:12]
        table.add_row(
            name,
            Text(provenance.model),
            Text(weights, style="bold red" if drawn else "yellow" if foreign else ""),
            f"{provenance.input_size} px",
            "×".join(map(str, provenance.grid)),
            str(provenance.batch_size or "unknown"),
            provenance.compute_dtype,
        )
    return table


def _invalid(found: CacheInfo, console: Console) -> None:
    from rich.text import Text

    from ...data.format.opening import read_keys

    keys = read_keys(found.path, found.manifest)
    console.print(f"{counted(len(found.invalid), 'image')} could not be decoded, left out:", style="yellow")
    for row, reason in list(found.invalid.items())[:_SHOWN]:
        console.print(Text(f"  {keys[row]} (row {row}): {reason}"), soft_wrap=True)
    if len(found.invalid) > _SHOWN:
        console.print(f"  and {len(found.invalid) - _SHOWN} more, in the commit records")


@dataclass(frozen=True, kw_only=True)
class Checked:
    """What a check of every byte has found.

    Attributes:
        findings: what is wrong.
        bytes: of shards that were read.
        seconds: it took.
    """

    findings: Sequence[Finding]
    bytes: int
    seconds: float


def check_bytes(path: CachePath, console: Console) -> Checked:
    """Check every byte of a cache, with a bar of the progress.

    Args:
        path: folder of the cache, or its prefix in a bucket.
        console: where the bar goes.

    Raises:
        CacheError: there is no cache.
        RepaError: the bucket cannot be read.
    """
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    from ...data.upkeep.verify import verify_cache

    total = 0
    started = time.perf_counter()
    bars = Progress(
        TextColumn("checking"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )

    def progress(done: int, of: int) -> None:
        nonlocal total
        total = of
        bars.update(task, completed=done, total=of)

    with bars:
        task = bars.add_task("checking", total=None)
        findings = verify_cache(path, progress=progress)
    return Checked(findings=findings, bytes=total, seconds=time.perf_counter() - started)


def verify(*, cache: Path | str | None = None, console: Console | None = None) -> None:
    """Check every byte of a cache and print what is wrong.

    Args:
        cache: the cache, or its address in a bucket; by default the only one under ``caches/``.
        console: where to print; standard output by default.

    Raises:
        CacheError: there is no cache.
        RepaError: the bucket cannot be read.
        SystemExit: with status 1 when anything is wrong or missing.
    """
    from rich.text import Text

    from ...data.storage.bucket import cache_path
    from ...data.units import human_bytes
    from ..shared.terminal import PlainConsole

    console = console or PlainConsole()
    path = cache_path(cache or default_cache())
    found = check_bytes(path, console)
    findings = found.findings
    for finding in findings:
        console.print(Text(str(finding)), soft_wrap=True)
    checked = (
        f"{human_bytes(found.bytes)} of shards, metadata, keys and labels checked in {found.seconds:.1f} s"
    )
    rate = f" ({human_bytes(found.bytes / found.seconds)}/s)" if found.bytes else ""
    verdict = counted(len(findings), "finding") if findings else "all is as committed"
    console.print(Text(f"{path}: {checked}{rate}: {verdict}"), soft_wrap=True)
    if findings:
        raise SystemExit(1)
