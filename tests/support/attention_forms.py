"""Caches of the demo's images with its teacher's attention, and the teacher itself beside them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from repa.commands.preprocess import PreprocessFlags, preprocess
from repa.data.format.int8 import dequantise
from repa.data.format.opening import open_manifest
from repa.data.reading.reader import CacheReader
from repa.pipeline.demo.shapes import DemoImages
from repa.pipeline.encoders import load_encoder
from repa.pipeline.images.workers import decode_row
from rich.console import Console
from slow_factors import logits_slowly

IMAGES, BATCH, SHARD = 21, 4, 8
BLOCKS = (4, 5, 6)
HELD_OUT = list(range(IMAGES))[2::3]
ATTENTION = "demo+attention"
FACTOR_BYTES = 5000


def demo(cache: Path, **changes: Any) -> str:
    """Run the command on a few of the demo's images; returns what it printed."""
    output = io.StringIO()
    arguments: dict[str, Any] = {
        "data": "demo",
        "cache": cache,
        "limit": IMAGES,
        "batch_size": BATCH,
        "shard_rows": SHARD,
        "attention": "haste",
    }
    preprocess(PreprocessFlags(**{**arguments, **changes}), console=Console(file=output, width=200))
    return output.getvalue()


def read(cache: Path, *kinds: str) -> dict[str, torch.Tensor]:
    """Columns of all rows as stored, by kind."""
    columns = tuple(f"demo/{kind}" for kind in kinds)
    with CacheReader(cache, columns) as reader:
        specs = reader.manifest.columns
        out = {name: np.empty((IMAGES, *specs[name].shape), specs[name].numpy_dtype) for name in columns}
        reader.read_rows(np.arange(IMAGES), columns, out)
    return {kind: torch.from_numpy(out[f"demo/{kind}"]) for kind in kinds}


def notes(cache: Path, source: str = ATTENTION) -> dict[str, Any]:
    return dict(open_manifest(cache).sources[source].notes)


def teacher_features() -> dict[str, torch.Tensor]:
    """The teacher's features in float32, on the batches of the cache, on one thread."""
    encoder = load_encoder("demo", resolution=64)
    images = DemoImages(count=IMAGES)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    parts: list[dict[str, torch.Tensor]] = []
    try:
        for start in range(0, IMAGES, SHARD):
            stop = min(start + SHARD, IMAGES)
            for first in range(start, stop, BATCH):
                rows = range(first, min(first + BATCH, stop))
                pixels = [decode_row(images, row, 64) for row in rows]
                batch = torch.from_numpy(np.stack([each for each in pixels if not isinstance(each, str)]))
                parts.append(encoder.encode(batch, BLOCKS))
    finally:
        torch.set_num_threads(threads)
    return {kind: torch.cat([part[kind] for part in parts]) for kind in ("patch", "cls", "q", "k")}


def write_forms(folder: Path) -> dict[str, Path]:
    """One cache of each form."""
    forms: dict[str, dict[str, Any]] = {
        "float16": {},
        "float32": {"feature_dtype": "float32"},
        "int8": {"feature_dtype": "int8"},
        "rank": {"attention_rank": 12},
        "factored": {"attention_bytes": FACTOR_BYTES},
    }
    for name, flags in forms.items():
        demo(folder / name, **flags)
    return {name: folder / name for name in forms}


def products(queries: torch.Tensor, keys: torch.Tensor) -> np.ndarray:
    """Products of all queries with all keys, in float64."""
    return np.asarray(np.einsum("nlhsd,nlhtd->nlhst", queries.double().numpy(), keys.double().numpy()))


def factored_products(cache: Path, stored: dict[str, torch.Tensor]) -> np.ndarray:
    """The same from packed factors, read byte by byte."""
    noted = notes(cache)
    rows = zip(*(stored[kind].numpy() for kind in ("q", "k", "q-scale")), strict=True)
    return np.stack(
        [
            logits_slowly(noted["tokens"], noted["components"], *(part.tobytes() for part in row))
            for row in rows
        ]
    )


def divergences(teacher: dict[str, torch.Tensor], cache: Path) -> np.ndarray:
    """KL per query row of the stored columns ``[N, L, H, T]``, with numpy and from the definition."""
    columns = open_manifest(cache).columns
    kinds = [kind for kind in ("q", "q-scale", "k", "k-scale") if f"demo/{kind}" in columns]
    stored = read(cache, *kinds)
    if columns["demo/q"].dtype == "uint8":
        kept = factored_products(cache, stored)
    else:
        pair = {
            kind: dequantise(stored[kind], stored[f"{kind}-scale"]) if "q-scale" in stored else stored[kind]
            for kind in ("q", "k")
        }
        kept = products(pair["q"], pair["k"])
    maps = []
    for logits in (products(teacher["q"], teacher["k"]) / 8, kept / 8):
        exponentials = np.exp(logits - logits.max(-1, keepdims=True))
        maps.append(exponentials / exponentials.sum(-1, keepdims=True))
    return np.asarray((maps[0] * np.log(maps[0] / maps[1])).sum(-1))


def other_weights(file: Path) -> list[str]:
    from repa.pipeline.demo import TEACHER_WEIGHTS
    from safetensors.torch import load_file, save_file

    state = load_file(TEACHER_WEIGHTS)
    state["norm.bias"] = state["norm.bias"] + 1
    save_file(state, file)
    return [f"demo={file}"]
