"""Live teachers: the bits of a float32 cache, and errors in one line when they are not the cache's own."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from repa.commands.preprocess import PreprocessFlags, preprocess
from repa.data.errors import CacheError, RepaError
from repa.data.format.opening import open_manifest
from repa.data.reading.reader import CacheReader
from repa.pipeline.encoders import load_encoder
from repa.pipeline.lanes.batches import batches
from repa.pipeline.replay.live import LiveTeachers
from repa.pipeline.replay.placement import Placement
from safetensors.torch import save_file

CPU = torch.device("cpu")
PATCH = "demo/patch"
BROKEN = ("a/03.png", "b/05.png")


def pixels(seed: int) -> NDArray[np.uint8]:
    return np.random.Generator(np.random.Philox(key=seed)).integers(256, size=(70, 80, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 images in two classes, two of them broken."""
    root = tmp_path_factory.mktemp("live") / "images"
    for label, name in enumerate("ab"):
        (root / name).mkdir(parents=True)
        for number in range(10):
            Image.fromarray(pixels(10 * label + number)).save(root / name / f"{number:02}.png")
    for name in BROKEN:
        (root / name).write_bytes(b"no image")
    return root


@pytest.fixture(scope="module")
def cache(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Their cache in float32: batches of 3 in shards of 8, whose last ones are smaller."""
    path = tmp_path_factory.mktemp("live") / "cache"
    flags = PreprocessFlags(
        data=str(images),
        cache=path,
        encoders=["demo"],
        vae="demo",
        resolution=64,
        batch_size=3,
        shard_rows=8,
        feature_dtype="float32",
    )
    preprocess(flags)
    return path


@pytest.fixture
def live(images: Path, cache: Path) -> Iterator[LiveTeachers]:
    teachers = LiveTeachers(cache, data=str(images), encoders=("demo",), blocks=(4, 6))
    yield teachers
    teachers.close()


def stored(cache: Path, rows: NDArray[np.int64]) -> NDArray[np.float32]:
    with CacheReader(cache, (PATCH,)) as reader:
        out = np.empty((len(rows), *reader.manifest.columns[PATCH].shape), np.float32)
        reader.read_rows(rows, (PATCH,), {PATCH: out})
    return out


def valid_rows(cache: Path) -> NDArray[np.int64]:
    with CacheReader(cache, (PATCH,)) as reader:
        return reader.valid_rows


def test_any_rows_in_any_order_are_the_cache_to_the_bit(live: LiveTeachers, cache: Path) -> None:
    threads = torch.get_num_threads()
    sources = live.load(CPU)
    assert torch.get_num_threads() == threads
    assert set(sources) == {"demo", "demo+attention"}
    valid = valid_rows(cache)
    assert len(valid) == 18
    generator = np.random.Generator(np.random.Philox(key=0))
    for count in (1, 5, 18):
        rows = generator.permutation(valid)[:count]
        live.prepare(rows)
        targets = live(rows, (PATCH,), np.zeros_like(rows))
        assert set(targets) == {PATCH}
        assert np.array_equal(targets[PATCH].numpy(), stored(cache, rows))
        assert not targets[PATCH].is_inference()
    # a row that is asked for twice, and rows that were not prepared
    rows = valid[[3, 3, 17]]
    assert np.array_equal(live(rows, (PATCH,), np.zeros_like(rows))[PATCH].numpy(), stored(cache, rows))


def test_queries_and_keys_are_the_encoders(live: LiveTeachers, images: Path) -> None:
    live.load(CPU)
    rows = np.array([9, 0], np.int64)
    targets = live(rows, (PATCH, "demo/q", "demo/k"), np.zeros_like(rows))
    assert {name: (values.dtype, tuple(values.shape[1:])) for name, values in targets.items()} == {
        name: (torch.float32, spec.shape) for name, spec in live.columns.items()
    }
    encoder = load_encoder("demo", resolution=64)
    from repa.pipeline.images.open import open_source
    from repa.pipeline.images.workers import decode_row

    source = open_source(str(images))
    batch = torch.stack([torch.from_numpy(decode_row(source, int(row), 64)) for row in rows])
    expected = encoder.encode(batch, attention=(4, 6))
    for kind in ("patch", "q", "k"):
        assert torch.allclose(targets[f"demo/{kind}"], expected[kind], atol=1e-4)
    notes = live.notes["demo+attention"]
    assert notes["blocks"] == [4, 6]
    assert notes["logit_scale"] == encoder.logit_scale
    assert (notes["head_width"], notes["rank"], notes["form"]) == (
        encoder.head_width,
        encoder.head_width,
        "exact",
    )


@pytest.mark.parametrize("batch_size", [1, 3, 4, 8, 20])
def test_passes_are_the_batches_of_preprocess(cache: Path, batch_size: int) -> None:
    """The counterpart of `batches`: every row in a batch of the same size at the same place."""
    manifest = open_manifest(cache)
    valid = valid_rows(cache)
    decoded = [(row, np.zeros(1, np.uint8) if row in valid else "broken") for row in range(manifest.num_rows)]
    stood = {
        row: (len(batch.rows), place)
        for batch in batches(iter(decoded), manifest, batch_size)
        for place, row in enumerate(batch.rows)
    }
    placement = Placement(valid, manifest.shard_rows, batch_size)
    rows = np.random.Generator(np.random.Philox(key=1)).permutation(np.concatenate([valid, valid[:5]]))
    found: list[int] = []
    for one in placement.passes(rows, exact=True):
        assert len(set(one.positions.tolist())) == len(one.positions) <= one.size
        for position, place in zip(one.rows.tolist(), one.positions.tolist(), strict=True):
            assert stood[int(rows[position])] == (one.size, place)
        found += one.rows.tolist()
    assert sorted(found) == list(range(len(rows)))
    plain = list(placement.passes(rows, exact=False))
    assert [one.size for one in plain[:-1]] == [batch_size] * (len(plain) - 1)
    assert np.concatenate([one.rows for one in plain]).tolist() == list(range(len(rows)))


def refused(match: str, kind: type[RepaError] = CacheError, **options: Any) -> None:
    with pytest.raises(kind, match=match) as caught:
        LiveTeachers(**options).load(CPU)
    assert "\n" not in str(caught.value)


def test_other_images_are_refused(images: Path, cache: Path, tmp_path: Path) -> None:
    refused("demo is not what cache .* was made from.*--data", cache=cache, data="demo", encoders=("demo",))
    fewer = shutil.copytree(images, tmp_path / "fewer")
    (fewer / "b" / "09.png").unlink()
    refused("19 images under other names than its 20", cache=cache, data=str(fewer), encoders=("demo",))
    changed = shutil.copytree(images, tmp_path / "changed")
    (changed / "b" / "09.png").write_bytes(b"another length")
    refused("same names, but of other classes or sizes", cache=cache, data=str(changed), encoders=("demo",))


def test_other_weights_are_refused(images: Path, cache: Path, tmp_path: Path) -> None:
    encoder = load_encoder("demo", resolution=64)
    state = {name: value.clone() for name, value in encoder._model.state_dict().items()}
    next(iter(state.values())).add_(1.0)
    save_file(state, tmp_path / "other.safetensors")
    options: dict[str, Any] = {"cache": cache, "data": str(images), "encoders": ("demo",)}
    refused(
        r"live teacher demo is not the one of cache .*--weights demo=FILE",
        weights={"demo": tmp_path / "other.safetensors"},
        **options,
    )
    refused("have blocks|there is demo 1 to 6", RepaError, blocks=(8, 10, 12), **options)
    refused("encoder 'nobody' is unknown", RepaError, **{**options, "encoders": ("nobody",)})


def test_an_image_that_broke_is_named(images: Path, cache: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(images, tmp_path / "copy")
    place = copy / "a" / "01.png"
    live = LiveTeachers(cache, data=str(copy), encoders=("demo",))
    live.load(CPU)
    place.write_bytes(b"x" * place.stat().st_size)
    with pytest.raises(
        CacheError, match=r"image a/01.png of .*, row 1 of cache .*, cannot be decoded any more"
    ):
        live(np.array([0, 1]), (PATCH,), np.zeros(2, np.int64))
    place.unlink()
    with pytest.raises(RepaError, match=r"a/01.png has vanished"):
        live(np.array([1]), (PATCH,), np.zeros(1, np.int64))
    live.close()
