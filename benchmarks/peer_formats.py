"""The formats that `peers` compares, each with the same rows and its ways to read them.

Rows are those of `repa bench loader`: a float32 latent [8, 32, 32] and float16 tokens [256, 768], batch 64.
All but WebDataset give them in random order.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from numpy.typing import NDArray

BATCH_SIZE = 64
LATENT = ((8, 32, 32), np.float32)
TOKENS = ((256, 768), np.float16)
LATENT_BYTES = 8 * 32 * 32 * 4
ROW_BYTES = LATENT_BYTES + 256 * 768 * 2
WORKERS = 2
# readers that take milliseconds a row are measured on so many
FEW = 4 * BATCH_SIZE

# latents [b, 8, 32, 32] and tokens [b, 256, 768] of a batch
Pair = tuple[Any, Any]


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A format and one way to read it.

    Attributes:
        store: name of the folder its rows are in; peers that share one share the rows.
        write: fills that folder with rows 0 … N−1.
        read: the batches of an epoch, of a folder and N rows.
        needs: module that must be installed.
        few: whether so few rows are read that it ends today.
    """

    store: str
    write: Callable[[Path, int], None]
    read: Callable[[Path, int], Iterable[Pair]]
    needs: str = "numpy"
    few: bool = False


def batches_of(count: int) -> Iterator[NDArray[np.int64]]:
    """Whole batches of a random permutation."""
    order = np.random.default_rng().permutation(count)
    for start in range(0, count - BATCH_SIZE + 1, BATCH_SIZE):
        yield order[start : start + BATCH_SIZE]


def row_values(row: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Make the values of a row.

    Its number comes first in either array, the rest are bits that do not compress.
    """
    generator = np.random.default_rng(row)
    latent = generator.standard_normal(LATENT[0], dtype=np.float32)
    tokens = generator.integers(0, 2**10, TOKENS[0], dtype=np.uint16).view(np.float16)
    latent[0, 0, 0], tokens[0, 0] = row, row % 2048
    return latent, tokens


def check(batch: Pair) -> None:
    """Compare a batch's latents and tokens with one another, and one row with what was written.

    Raises:
        ValueError: they are not of one row.
    """
    latents, tokens = (np.asarray(part) for part in batch)
    rows = latents[:, 0, 0, 0].astype(int)
    expected = row_values(int(rows[-1]))
    if not (
        np.array_equal(rows % 2048, tokens[:, 0, 0].astype(int))
        and np.array_equal(latents[-1], expected[0])
        and np.array_equal(tokens[-1], expected[1])
    ):
        raise ValueError("the rows read are not those written")


def write_plain(folder: Path, count: int) -> None:
    """Write all rows in one file, latent and tokens together."""
    with open(folder / "rows.bin", "wb") as file:
        for row in range(count):
            for part in row_values(row):
                file.write(part.tobytes())


def read_plain(folder: Path, count: int) -> Iterator[Pair]:
    """Read by one thread that copies from a memory map into one reused buffer."""
    plain = np.memmap(folder / "rows.bin", dtype=np.uint8, mode="r", shape=(count, ROW_BYTES))
    buffer = np.ones((BATCH_SIZE, ROW_BYTES), dtype=np.uint8)
    for rows in batches_of(count):
        for position, row in enumerate(rows.tolist()):
            buffer[position] = plain[row]
        yield (
            buffer[:, :LATENT_BYTES].view(np.float32).reshape(-1, *LATENT[0]),
            buffer[:, LATENT_BYTES:].view(np.float16).reshape(-1, *TOKENS[0]),
        )


def write_cache(folder: Path, count: int) -> None:
    """Write a cache of repa."""
    from repa.data.format.columns import MOMENTS, ColumnSpec
    from repa.data.testing import synthetic_cache
    from repa.data.writing.writer import SourceWriter

    columns = {
        MOMENTS: ColumnSpec(shape=LATENT[0], dtype="float32"),
        "dinov2-b/patch": ColumnSpec(shape=TOKENS[0], dtype="float16"),
    }
    cache = folder / "cache"
    manifest = synthetic_cache(cache, num_rows=count, columns=columns, shard_rows=1024, written=False)
    for part, (column, source) in enumerate(zip(columns, manifest.sources, strict=True)):
        with SourceWriter(cache, manifest, source, range(manifest.num_shards)) as writer:
            for number in writer.remaining:
                with writer.shard(number) as shard:
                    for row in shard.rows:
                        shard.write(row, column, row_values(row)[part][None])
                    shard.commit()


def read_cache(folder: Path, count: int, *, check_crc: bool, direct: str = "auto") -> Iterator[Pair]:
    """Read by the loader of repa, with two threads."""
    from repa.data.format.columns import MOMENTS
    from repa.data.reading.loader import CacheLoader
    from repa.data.reading.reader import CacheReader

    columns = (MOMENTS, "dinov2-b/patch")
    reader = CacheReader(folder / "cache", columns, check_crc=check_crc, direct=direct)
    loader = CacheLoader(
        reader,
        rows=reader.valid_rows,
        batch_size=BATCH_SIZE,
        columns_at=lambda step: columns,
        last_image=count // BATCH_SIZE * BATCH_SIZE,
    )
    for batch in loader:
        yield batch.columns[columns[0]], batch.columns[columns[1]]


def read_zarr(folder: Path, count: int, *, pipeline: str = "") -> Iterator[Pair]:
    """Read zarr-python's arrays row by row, by its own codecs or another pipeline's."""
    import zarr

    if pipeline:
        zarr.config.set({"codec_pipeline.path": pipeline})
    group: Any = zarr.open_group(folder / "cache", mode="r")
    arrays = group["sd-vae/moments"], group["dinov2-b/patch"]
    buffers = [np.empty((BATCH_SIZE, *shape), dtype=dtype) for shape, dtype in (LATENT, TOKENS)]
    for rows in batches_of(count):
        for array, buffer in zip(arrays, buffers, strict=True):
            for position, row in enumerate(rows.tolist()):
                buffer[position] = array[row, 0]
        yield buffers[0], buffers[1]


def read_tensorstore(folder: Path, count: int) -> Iterator[Pair]:
    """Read by TensorStore, batches of rows into given buffers."""
    import tensorstore

    context = tensorstore.Context({"cache_pool": {"total_bytes_limit": 0}})
    buffers = [np.ones((BATCH_SIZE, *shape), dtype=dtype) for shape, dtype in (LATENT, TOKENS)]
    targets = [tensorstore.array(buffer, copy=False) for buffer in buffers]
    stores = [
        tensorstore.open(
            {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{folder / 'cache' / column}/"}},
            context=context,
        ).result()
        for column in ("sd-vae/moments", "dinov2-b/patch")
    ]
    for rows in batches_of(count):
        index = tensorstore.d[0][rows.tolist()]
        for pending in [
            target.write(store[index][:, 0]) for target, store in zip(targets, stores, strict=True)
        ]:
            pending.result()
        yield buffers[0], buffers[1]


class FileDataset:
    """Rows as pairs of .npy files, for torch's DataLoader.

    Args:
        folder: where they are.
        count: how many.
    """

    def __init__(self, folder: Path, count: int) -> None:
        self.folder = folder
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, row: int) -> tuple[NDArray[Any], NDArray[Any]]:
        return np.load(self.folder / f"{row}.latent.npy"), np.load(self.folder / f"{row}.tokens.npy")


def write_files(folder: Path, count: int) -> None:
    """Write two .npy files per sample."""
    for row in range(count):
        for name, part in zip(("latent", "tokens"), row_values(row), strict=True):
            np.save(folder / f"{row}.{name}.npy", part)


def read_files(folder: Path, count: int, *, workers: int) -> Iterator[Pair]:
    """Read by torch's DataLoader, shuffled."""
    from torch.utils.data import DataLoader

    dataset: Any = FileDataset(folder, count)
    yield from DataLoader(dataset, BATCH_SIZE, shuffle=True, num_workers=workers, drop_last=True)


def write_tars(folder: Path, count: int) -> None:
    """Write tars of 512 samples, raw bytes."""
    import webdataset

    for start in range(0, count, 512):
        with webdataset.TarWriter(str(folder / f"{start:08d}.tar")) as tar:
            for row in range(start, min(start + 512, count)):
                latent, tokens = row_values(row)
                tar.write(
                    {"__key__": f"{row:08d}", "latent.bin": latent.tobytes(), "tokens.bin": tokens.tobytes()}
                )


def from_tar(sample: dict[str, Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return the arrays of a sample. Torch wants memory it may write to."""
    return (
        np.frombuffer(bytearray(sample["latent.bin"]), np.float32).reshape(LATENT[0]),
        np.frombuffer(bytearray(sample["tokens.bin"]), np.float16).reshape(TOKENS[0]),
    )


def read_tars(folder: Path, count: int, *, workers: int) -> Iterator[Pair]:
    """Read by WebDataset in sequence, without a shuffle buffer."""
    import webdataset

    tars = sorted(str(path) for path in folder.glob("*.tar"))
    dataset = webdataset.WebDataset(tars, shardshuffle=False, empty_check=False).map(from_tar)
    loader = webdataset.WebLoader(
        dataset.batched(BATCH_SIZE, partial=False), batch_size=None, num_workers=workers
    )
    yield from loader


def write_litdata(folder: Path, count: int) -> None:
    """Write LitData's chunks of 64 MB.

    `litdata.optimize` waits minutes for a network that it does not need.
    """
    from litdata.streaming import Cache

    cache = Cache(str(folder / "data"), chunk_bytes="64MB")
    for row in range(count):
        cache[row] = litdata_row(row)
    cache.done()
    cache.merge()


def litdata_row(row: int) -> dict[str, Any]:
    """Return a sample as LitData wants it."""
    import torch

    latent, tokens = row_values(row)
    return {"latent": torch.from_numpy(latent), "tokens": torch.from_numpy(tokens)}


def read_litdata(folder: Path, count: int, *, workers: int) -> Iterator[Pair]:
    """Read by LitData's loader, shuffled."""
    from litdata import StreamingDataLoader, StreamingDataset

    dataset = StreamingDataset(str(folder / "data"), shuffle=True, drop_last=True)
    for batch in StreamingDataLoader(dataset, batch_size=BATCH_SIZE, num_workers=workers, drop_last=True):
        yield batch["latent"], batch["tokens"]


def write_mds(folder: Path, count: int) -> None:
    """Write MDS shards of 64 MiB."""
    from streaming import MDSWriter

    columns = {"latent": "ndarray:float32:8,32,32", "tokens": "ndarray:float16:256,768"}
    with MDSWriter(out=str(folder / "data"), columns=columns) as out:
        for row in range(count):
            latent, tokens = row_values(row)
            out.write({"latent": latent, "tokens": tokens})


def read_mds(folder: Path, count: int, *, workers: int) -> Iterator[Pair]:
    """Read by MosaicML Streaming's dataset, shuffled, in torch's DataLoader."""
    from streaming import StreamingDataset
    from streaming.base.util import clean_stale_shared_memory
    from torch.utils.data import DataLoader

    clean_stale_shared_memory()
    dataset = StreamingDataset(local=str(folder / "data"), shuffle=True, batch_size=BATCH_SIZE)
    for batch in DataLoader(dataset, BATCH_SIZE, num_workers=workers, drop_last=True):
        yield batch["latent"], batch["tokens"]


def _worker_variants(
    name: str, store: str, write: Callable[[Path, int], None], read: Callable[..., Iterable[Pair]], needs: str
) -> dict[str, Peer]:
    return {
        f"{name}, {workers} workers": Peer(
            store=store, write=write, read=partial(read, workers=workers), needs=needs
        )
        for workers in (0, WORKERS)
    }


PEERS: dict[str, Peer] = {
    "copy from a memory map (limit)": Peer(store="plain", write=write_plain, read=read_plain),
    "repa, 2 threads, crc32c off": Peer(
        store="repa", write=write_cache, read=partial(read_cache, check_crc=False)
    ),
    "repa, 2 threads, crc32c on": Peer(
        store="repa", write=write_cache, read=partial(read_cache, check_crc=True)
    ),
    "repa, 2 threads, crc32c on, O_DIRECT": Peer(
        store="repa", write=write_cache, read=partial(read_cache, check_crc=True, direct="on")
    ),
    "tensorstore, into given buffers": Peer(
        store="repa", write=write_cache, read=read_tensorstore, needs="tensorstore"
    ),
    "zarrs, row by row": Peer(
        store="repa",
        write=write_cache,
        read=partial(read_zarr, pipeline="zarrs.ZarrsCodecPipeline"),
        needs="zarrs",
        few=True,
    ),
    "zarr-python, row by row": Peer(store="repa", write=write_cache, read=read_zarr, few=True),
    **_worker_variants("one .npy a sample", "files", write_files, read_files, "torch"),
    **_worker_variants("webdataset, in sequence", "tars", write_tars, read_tars, "webdataset"),
    **_worker_variants("litdata", "litdata", write_litdata, read_litdata, "litdata"),
    **_worker_variants("MDS", "mds", write_mds, read_mds, "streaming"),
}
