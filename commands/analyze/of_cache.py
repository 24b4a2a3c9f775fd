"""What a cache holds, in its teachers' tokens, their attention and its latents."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ...data.errors import CacheError, RepaError
from ...data.format.columns import (
    AUTOENCODER,
    MOMENTS,
    attention_source,
    column_name,
)
from ...data.format.foreign import autoencoder_of
from ...data.format.opening import open_manifest
from ...data.reading.reader import CacheReader
from ...data.storage.bucket import cache_path
from ...data.storage.files import make_folder, os_errors, write_file
from ...data.units import counted
from ...pipeline.images.names import default_cache
from ...trainer.evaluation.attention_maps import attention_entropy, attention_maps
from ...trainer.evaluation.moments import MomentSums
from ...trainer.evaluation.tokens import OBJECT_IMAGES, TokenSums, object_component
from ...trainer.methods.alignment import attention_target, target
from .chosen import batches, chosen_rows, chosen_teachers, columns_of
from .flags import DOCUMENT
from .tables import print_attention, print_latents, print_tokens

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from rich.console import Console
    from torch import Tensor

    from ...data.format.manifest import Manifest
    from ..shared.decoder import Decoder
    from .flags import AnalyzeFlags


def analyze_cache(flags: AnalyzeFlags, console: Console) -> None:
    """Measure a cache, print tables, and write the document and the pictures.

    Raises:
        RepaError: a mistake the user can mend.
    """
    where = flags.cache or str(default_cache())
    path = cache_path(where)
    manifest = open_manifest(path)
    tokens = chosen_teachers(manifest, flags.teachers or (), "patch", where=where)
    with_attention = chosen_teachers(manifest, (), "q", "k", where=where)
    attention = tuple(each for each in with_attention if each in (flags.teachers or with_attention))
    latents = AUTOENCODER in manifest.sources and MOMENTS in manifest.columns
    if not (tokens or attention or latents):
        raise RepaError(
            f"cache {where} has neither a teacher's tokens nor latents",
            "add them with `repa preprocess`",
            field="--cache",
        )
    columns = [*columns_of(manifest, tokens, "patch"), *columns_of(manifest, attention, "q", "k")]
    out = flags.out or Path(f"analysis-{Path(where).name}")
    with CacheReader(path, (*columns, *((MOMENTS,) if latents else ()))) as reader:
        rows = chosen_rows(reader, flags.num, flags.seed)
        drawn = _drawn_rows(reader, rows, flags)
        decoder = _decoder(manifest, flags) if latents and (len(drawn) or flags.data) else None
        document: dict[str, Any] = {
            "of": "cache",
            "cache": where,
            "identity": manifest.identity,
            "images": len(rows),
            "view": manifest.views[0],
            "seed": flags.seed,
        }
        document["teachers"] = _measure_tokens(reader, rows, tokens, flags.batch_size)
        document["attention"] = _measure_attention(reader, rows, attention, flags.batch_size)
        if latents:
            document["latents"] = _measure_latents(reader, rows, flags.batch_size)
        with os_errors("write", out):
            make_folder(out)
        pictures = _draw(reader, drawn, tokens, attention, decoder, out)
        if flags.data is not None:
            if decoder is None:
                raise RepaError(
                    f"cache {where} has no latents to compare with --data", "leave it out", field="--data"
                )
            document["decoded"], picture = _compare(reader, manifest, drawn, decoder, flags, out)
            pictures.append(picture)
    print_tokens(document["teachers"], console)
    print_attention(document["attention"], console)
    print_latents(document, console)
    document["pictures"] = pictures
    write_file(out / DOCUMENT, (json.dumps(document, indent=2) + "\n").encode(), out)
    console.print(
        f"Wrote {DOCUMENT} and {counted(len(pictures), 'picture')} to {out}.",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def _drawn_rows(reader: CacheReader, rows: NDArray[np.int64], flags: AnalyzeFlags) -> NDArray[np.int64]:
    """Choose the rows that are drawn.

    Raises:
        RepaError: one is not of the cache, or its image could not be decoded.
    """
    if not flags.rows:
        spread = np.linspace(0, len(rows) - 1, min(flags.pictures, len(rows))).astype(int)
        some: NDArray[np.int64] = rows[spread]
        return some
    for row in flags.rows:
        if row not in reader.valid_rows:
            raise RepaError(
                f"row {row} is not of cache {reader.path}, or its image could not be decoded",
                f"give rows from 0 to {reader.manifest.num_rows - 1}",
                field="--row",
            )
    return np.array(flags.rows, np.int64)


def _decoder(manifest: Manifest, flags: AnalyzeFlags) -> Decoder:
    """Return the autoencoder of the cache, loaded.

    Raises:
        RepaError: it cannot be had.
    """
    from ..shared.decoder import Decoder

    provenance = manifest.sources[AUTOENCODER]
    name = flags.vae or autoencoder_of(provenance)
    if name is None:
        raise RepaError(
            "the latents were imported, and nobody has said by which autoencoder they were encoded",
            "name it with --vae, or draw nothing with --pictures 0",
            field="--vae",
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    decoder = Decoder(name, device, random_weights=provenance.random_weights and flags.vae is None)
    decoder.load()
    return decoder


def _measure_tokens(
    reader: CacheReader, rows: NDArray[np.int64], teachers: Sequence[str], size: int
) -> dict[str, Any]:
    specs, found = reader.manifest.columns, {}
    for teacher in teachers:
        grid = reader.manifest.sources[teacher].grid
        names = columns_of(reader.manifest, (teacher,), "patch")
        # of a fixed number, so that the batch size changes nothing
        few = next(batches(reader, rows[:OBJECT_IMAGES], names, OBJECT_IMAGES))
        sums = TokenSums(
            grid, object_component(target(few.values, column_name(teacher, "patch"), specs), grid)
        )
        for batch in batches(reader, rows, names, size):
            sums.add(target(batch.values, column_name(teacher, "patch"), specs).float())
        found[teacher] = asdict(sums.report())
    return found


def _measure_attention(
    reader: CacheReader, rows: NDArray[np.int64], teachers: Sequence[str], size: int
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for teacher in teachers:
        notes = reader.manifest.sources[attention_source(teacher)].notes
        names = columns_of(reader.manifest, (teacher,), "q", "k")
        sums: dict[int, Tensor] = {}
        tokens = 1
        for batch in batches(reader, rows, names, size):
            for position, block in enumerate(notes["blocks"]):
                queries, keys = _queries_and_keys(reader, batch.values, teacher, position)
                tokens = queries.shape[-2]
                # an image at a time: of 1,024 tokens a batch of maps would be gigabytes
                entropies = [
                    attention_entropy(attention_maps(q.unsqueeze(0), k.unsqueeze(0), notes["logit_scale"]))
                    for q, k in zip(queries, keys, strict=True)
                ]
                total = torch.cat(entropies).double().sum(dim=0)
                sums[block] = sums[block] + total if block in sums else total
        found[teacher] = {
            "entropy_of_even_attention": math.log(tokens),
            "entropy": {str(block): (total / len(rows)).tolist() for block, total in sums.items()},
        }
    return found


def _queries_and_keys(
    reader: CacheReader, values: dict[str, Tensor], teacher: str, position: int
) -> tuple[Tensor, Tensor]:
    """Return queries and keys of one stored block, each ``[B, H, T, r]``."""
    notes = reader.manifest.sources[attention_source(teacher)].notes
    names = [column_name(teacher, kind) for kind in ("q", "k")]
    return attention_target(values, names, reader.manifest.columns, notes, at=position)


def _maps(reader: CacheReader, values: dict[str, Tensor], teacher: str, position: int) -> Tensor:
    """Return the attention ``[B, H, T, T]`` of one stored block."""
    notes = reader.manifest.sources[attention_source(teacher)].notes
    return attention_maps(*_queries_and_keys(reader, values, teacher, position), notes["logit_scale"])


def _measure_latents(reader: CacheReader, rows: NDArray[np.int64], size: int) -> dict[str, Any]:
    """Return mean and deviation of each channel of latents drawn from the posterior, over these rows."""
    sums = MomentSums()
    for batch in batches(reader, rows, (MOMENTS,), size):
        moments = batch.values[MOMENTS].double()
        half = moments.shape[1] // 2
        mean, std = moments[:, :half], moments[:, half:]
        # the spread of a draw is that of the means and the mean variance; both from one pass
        sums.add(torch.cat([mean, std.square()], dim=1).movedim(1, -1).flatten(0, -2))
    found = sums.moments()
    half = len(found.mean) // 2
    variance = found.covariance.diagonal()[:half] + found.mean[half:]
    return {"mean": found.mean[:half].tolist(), "std": np.sqrt(variance).tolist()}


def _draw(
    reader: CacheReader,
    rows: NDArray[np.int64],
    tokens: Sequence[str],
    attention: Sequence[str],
    decoder: Decoder | None,
    out: Path,
) -> list[str]:
    """Draw the chosen rows, and return the pictures' names."""
    if not len(rows):
        return []
    from .pictures import draw_attention, draw_components

    manifest = reader.manifest
    names = [*columns_of(manifest, tokens, "patch"), *columns_of(manifest, attention, "q", "k")]
    read = next(batches(reader, rows, [*names, *((MOMENTS,) if decoder else ())], len(rows)))
    images = None if decoder is None else _decoded(read.values[MOMENTS], decoder)
    pictures = []
    if tokens:
        parts = {
            each: (
                target(read.values, column_name(each, "patch"), manifest.columns).float(),
                manifest.sources[each].grid,
            )
            for each in tokens
        }
        draw_components(rows, images, parts, out / "tokens.png")
        pictures.append("tokens.png")
    for each in attention:
        source = manifest.sources[attention_source(each)]
        block = len(source.notes["blocks"]) - 1
        maps = _maps(reader, read.values, each, block)
        name = f"attention-{each}.png"
        title = f"{each}, block {source.notes['blocks'][block]}: where the marked token looks, head by head"
        draw_attention(rows, images, maps, source.grid, title, out / name)
        pictures.append(name)
    return pictures


def _decoded(moments: Tensor, decoder: Decoder) -> NDArray[np.uint8]:
    """Decode the posterior's mean, uint8 ``[B, R, R, 3]``."""
    half = moments.shape[1] // 2
    return decoder.decode(moments[:, :half].float()).permute(0, 2, 3, 1).cpu().numpy()


def _compare(
    reader: CacheReader,
    manifest: Manifest,
    rows: NDArray[np.int64],
    decoder: Decoder,
    flags: AnalyzeFlags,
    out: Path,
) -> tuple[dict[str, Any], str]:
    """Decode rows beside their images, and return the PSNR of each with the picture's name.

    Raises:
        RepaError: no row is drawn.
        CacheError: these are other images, or one cannot be read any more.
    """
    from ...pipeline.images.workers import decode_row
    from ...pipeline.replay.recorded import Given, recorded_images
    from .pictures import draw_decoded

    if not len(rows):
        raise RepaError("--pictures 0 leaves no image to compare", "give more", field="--pictures")
    images = recorded_images(
        Path(str(reader.path)), manifest, Given(data=flags.data, vae=flags.vae, weights={})
    )
    sources = []
    for row in rows.tolist():
        pixels = decode_row(images, row, manifest.resolution)
        if isinstance(pixels, str):
            raise CacheError(
                f"image {images.keys[row]} of {images.name} cannot be decoded any more ({pixels})",
                "restore the image",
                field="--data",
            )
        sources.append(pixels.transpose(1, 2, 0))
    real = np.stack(sources)
    made = _decoded(next(batches(reader, rows, (MOMENTS,), len(rows))).values[MOMENTS], decoder)
    error = np.square(real.astype(np.float64) - made).mean(axis=(1, 2, 3))
    psnr = 10 * np.log10(255**2 / np.maximum(error, 1e-12))
    draw_decoded(rows, real, made, psnr, out / "decoded.png")
    return {"rows": rows.tolist(), "psnr": psnr.tolist(), "mean_psnr": float(psnr.mean())}, "decoded.png"
