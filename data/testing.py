"""Synthetic caches for tests, real ones in every byte, whose values are known without reading them.

Public, so that a method written outside this package can be tested on a cache of its columns::

    manifest = synthetic_cache(tmp_path / "cache", num_rows=20)
    expected_row("demo/patch", 7, manifest.columns["demo/patch"], seed=0)
"""

from __future__ import annotations

import hashlib
from math import isqrt
from typing import TYPE_CHECKING, Any

import numpy as np

from .format.columns import (
    ATTENTION_KINDS,
    AUTOENCODER,
    MOMENTS,
    SCALE_SUFFIX,
    ColumnSpec,
    attention_source,
    model_of,
    source_of,
    split_column,
)
from .format.manifest import FORMAT_VERSION, ORIGINAL_VIEW, Manifest, Provenance
from .format.opening import labels_sha256, open_manifest
from .writing.captions import ensure_captions
from .writing.store import ensure_cache, ensure_source, keys_sha256
from .writing.writer import SourceWriter

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from .storage.bucket import CachePath

SYNTHETIC_COLUMNS: Mapping[str, ColumnSpec] = {
    MOMENTS: ColumnSpec(shape=(8, 4, 4), dtype="float32"),
    "demo/patch": ColumnSpec(shape=(4, 16), dtype="float16"),
    "demo/cls": ColumnSpec(shape=(16,), dtype="float16"),
}
SYNTHETIC_TEXT: Mapping[str, ColumnSpec] = {"demo-text/states": ColumnSpec(shape=(6, 12), dtype="float16")}
_NO_INVALID: Mapping[int, str] = {}
_NO_NOTES: Mapping[str, Mapping[str, Any]] = {}
_STEPS = 32  # int8 steps of a standard deviation


def expected_row(
    column: str, row: int, spec: ColumnSpec, seed: int = 0, *, view: int = 0
) -> NDArray[np.generic]:
    """Compute what `synthetic_cache` stores as a function of these arguments alone.

    Args:
        column: name of the column.
        row: index of the image.
        spec: the column's.
        seed: of the cache.
        view: index of the view.

    Returns:
        ``[*shape]`` in the column's dtype: standard normal, but for the second half of a moments column along
        its first axis, a standard deviation in [0.05, 0.55); a column of scales, in [0.5, 1.5) / 32; an int8
        column, 32 times a standard normal, rounded.
    """
    name = f"{seed} {column} {row} {view}".encode()
    key = np.frombuffer(hashlib.sha256(name).digest()[:16], dtype="<u8")
    generator = np.random.Generator(np.random.Philox(key=key))
    values = generator.standard_normal(spec.shape, dtype=np.float32)
    kind = split_column(column)[1]
    if kind.endswith(SCALE_SUFFIX):
        values = (0.5 + generator.random(spec.shape, dtype=np.float32)) / np.float32(_STEPS)
    elif kind == "mask":
        values = (values > 0).astype(np.float32)
    elif spec.dtype == "int8":
        values = np.clip(np.rint(_STEPS * values), -127, 127)
    elif kind == "moments":
        half = spec.shape[0] // 2
        values[half:] = 0.05 + 0.5 * generator.random(values[half:].shape, dtype=np.float32)
    return values.astype(spec.numpy_dtype)


def expected_labels(num_rows: int, num_classes: int, seed: int = 0) -> NDArray[np.int32]:
    """Draw the labels of a `synthetic_cache`, int32 ``[N]``, even classes in an order drawn from the seed."""
    labels = np.arange(num_rows, dtype=np.int32) % num_classes
    return np.random.Generator(np.random.Philox(key=seed)).permutation(labels)


def synthetic_cache(
    path: CachePath,
    *,
    num_rows: int,
    columns: Mapping[str, ColumnSpec] = SYNTHETIC_COLUMNS,
    shard_rows: int = 8,
    num_classes: int = 3,
    seed: int = 0,
    invalid: Mapping[int, str] = _NO_INVALID,
    grid: tuple[int, int] | None = None,
    views: tuple[str, ...] = (ORIGINAL_VIEW,),
    resolution: int = 32,
    random_weights: bool = False,
    notes: Mapping[str, Mapping[str, Any]] = _NO_NOTES,
    written: bool = True,
    format_version: int = FORMAT_VERSION,
) -> Manifest:
    """Write a complete cache of deterministic values, or add the columns that an earlier call did not.

    Args:
        path: its folder.
        num_rows: N.
        columns: name → spec of the columns, of any number of sources.
        shard_rows: rows of a shard.
        num_classes: classes of the labels.
        seed: of the values, see `expected_row` and `expected_labels`.
        invalid: row → reason of rows without data, in every source.
        grid: rows and columns of the teachers' patch tokens; by default the square of the column's tokens.
        views: names of the views.
        resolution: side in pixels of the images there never were.
        random_weights: what the provenance says of the weights.
        notes: source → notes of its provenance, over those of `synthetic_provenance`.
        written: whether to write the rows; if not, the columns are declared and no shard is there.
        format_version: of the cache; 1 is what was written before there was another.

    Returns:
        The manifest, as on disk.
    """
    fingerprint = hashlib.sha256(f"{seed} {num_rows} {num_classes}".encode()).hexdigest()
    keys = [f"images/{row:06d}.png" for row in range(num_rows)]
    labels = expected_labels(num_rows, num_classes, seed)
    manifest = ensure_cache(
        path,
        Manifest(
            num_rows=num_rows,
            views=views,
            shard_rows=shard_rows,
            resolution=resolution,
            crop="adm-center",
            exif_orientation="ignored",
            source_kind="synthetic",
            source_fingerprint=f"sha256:{fingerprint}",
            keys_sha256=keys_sha256(keys),
            labels_sha256="" if format_version == 1 else labels_sha256(labels),
            format_version=format_version,
            class_names=tuple(f"class {index}" for index in range(num_classes)),
        ),
        keys,
        labels,
    )
    sources: dict[str, dict[str, ColumnSpec]] = {}
    for column, spec in columns.items():
        sources.setdefault(source_of(column), {})[column] = spec
    for source, specs in sources.items():
        provenance = synthetic_provenance(
            source,
            specs,
            grid=grid,
            resolution=resolution,
            random_weights=random_weights,
            notes=notes.get(source),
        )
        manifest = ensure_source(path, source, provenance, specs)
        if written:
            _write_source(path, manifest, source, seed, invalid)
    return manifest


def synthetic_captions(
    path: CachePath,
    *,
    columns: Mapping[str, ColumnSpec] = SYNTHETIC_TEXT,
    captions: Sequence[Sequence[str]] | None = None,
    seed: int = 0,
) -> Manifest:
    """Give the images of a cache captions, and these the columns of text encoders that there never were.

    Args:
        path: folder of the cache.
        columns: name → spec of the captions' columns.
        captions: of each image; by default image i has 1 + i % 3 of them, and some have the same.
        seed: of the values, see `expected_row`; a row is a caption's, row 0 the empty one's.

    Returns:
        The captions' manifest, as on disk.
    """
    if captions is None:
        count = open_manifest(path).num_rows
        captions = [
            [f"a thing of kind {(row + each) % 5}" for each in range(1 + row % 3)] for row in range(count)
        ]
    where = ensure_captions(path, captions)
    manifest = open_manifest(where)
    for source in dict.fromkeys(map(source_of, columns)):
        specs = {column: spec for column, spec in columns.items() if source_of(column) == source}
        manifest = ensure_source(where, source, synthetic_provenance(source, specs), specs)
        _write_source(where, manifest, source, seed, _NO_INVALID)
    return manifest


def synthetic_provenance(
    source: str,
    columns: Mapping[str, ColumnSpec],
    *,
    grid: tuple[int, int] | None = None,
    resolution: int = 32,
    random_weights: bool = False,
    notes: Mapping[str, Any] | None = None,
) -> Provenance:
    """Make the provenance that a `synthetic_cache` gives a source.

    Args:
        source: name of the source.
        columns: its columns; the moments' latent, the patch tokens or the queries give the grid.
        grid: of a teacher, instead.
        resolution: side in pixels of what the model saw.
        random_weights: what to say of the weights.
        notes: in place of what `synthetic_notes` say, or besides.
    """
    shapes = {split_column(column)[1]: spec.shape for column, spec in columns.items()}
    if source == AUTOENCODER and "moments" in shapes:
        grid = (shapes["moments"][1], shapes["moments"][2])
    elif grid is None:
        queries = shapes.get("q", ())
        tokens = shapes["patch"][0] if "patch" in shapes else queries[2] if len(queries) > 1 else 1
        grid = (isqrt(tokens), tokens // isqrt(tokens))
    model = model_of(source)
    return Provenance(
        model=f"synthetic/{model}",
        weights_sha256=hashlib.sha256(model.encode()).hexdigest(),
        random_weights=random_weights,
        input_size=resolution,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        compute_dtype="float32",
        batch_size=1,
        grid=grid,
        libraries={},
        notes={**synthetic_notes(source, columns), **(notes or {})},
    )


def synthetic_notes(source: str, columns: Mapping[str, ColumnSpec]) -> dict[str, Any]:
    """Make the notes of a source.

    They are an autoencoder's factors, or what an attention source's q and k are.

    Args:
        source: name of the source.
        columns: its columns. Queries ``[L, H, T, r]`` are those of blocks 1 to L at their full rank; int8
            ones come with centred keys, as a real cache's do.
    """
    if source == AUTOENCODER:
        return {"scaling_factor": 0.18215, "shift_factor": 0.0}
    queries = columns.get(f"{model_of(source)}/{ATTENTION_KINDS[0]}")
    if source != attention_source(model_of(source)) or queries is None:
        return {}
    if len(queries.shape) == 1:
        # how factors lie in their bytes is for the caller to say
        return {}
    blocks, _, _, rank = queries.shape
    return {
        "blocks": list(range(1, blocks + 1)),
        "logit_scale": rank**-0.5,
        "head_width": rank,
        "rank": rank,
        "form": "exact",
        "keys": "centred" if queries.dtype == "int8" else "as computed",
        "calibration": None,
        "fidelity": None,
    }


def _write_source(
    path: CachePath, manifest: Manifest, source: str, seed: int, invalid: Mapping[int, str]
) -> None:
    views = range(len(manifest.views))
    with SourceWriter(path, manifest, source, range(manifest.num_shards)) as writer:
        for number in writer.remaining:
            with writer.shard(number) as shard:
                for row in shard.rows:
                    if row in invalid:
                        shard.mark_invalid(row, invalid[row])
                        continue
                    for column, spec in manifest.source_columns(source).items():
                        values = [expected_row(column, row, spec, seed, view=view) for view in views]
                        shard.write(row, column, np.stack(values))
                shard.commit()


def folder_contents(path: Path) -> dict[str, str]:
    """Relative path → sha256 of every file under a folder, empty folders too, to compare two trees.

    Empty files are not opened: closing a lock file would drop the locks this process holds on it.
    """
    contents = {}
    for each in sorted(path.rglob("*")):
        data = each.read_bytes() if each.is_file() and each.stat().st_size else b""
        contents[str(each.relative_to(path))] = (
            "folder" if each.is_dir() else hashlib.sha256(data).hexdigest()
        )
    return contents
