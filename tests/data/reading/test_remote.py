"""A cache in a bucket of a real S3 server (moto's) on loopback."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ports import free_port
from repa.data.errors import CacheError, CorruptRowError, RepaError
from repa.data.format.columns import ColumnSpec
from repa.data.format.opening import read_keys
from repa.data.reading.loader import CacheLoader
from repa.data.reading.reader import CacheReader
from repa.data.storage.bucket import Bucket, RemotePath, cache_path, is_remote
from repa.data.testing import expected_row, synthetic_cache
from repa.data.units import human_bytes
from repa.data.upkeep.info import cache_info
from s3_server import lead_to, obstore, upload

GenericError = obstore.exceptions.GenericError

MOMENTS = "sd-vae/moments"
PATCH = "demo/patch"
CLS = "demo/cls"
COLUMNS = {
    MOMENTS: ColumnSpec(shape=(8, 4, 4), dtype="float32"),
    PATCH: ColumnSpec(shape=(4, 16), dtype="float16"),
    CLS: ColumnSpec(shape=(16,), dtype="float16", compressor="zstd"),
}
VIEWS = ("original", "mirrored")
NUM_ROWS = 45
INVALID = {5: "text"}
URL = "s3://bucket/some/cache"


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("remote") / "cache"
    synthetic_cache(path, num_rows=NUM_ROWS, columns=COLUMNS, invalid=INVALID, views=VIEWS)
    return path


@pytest.fixture(scope="module")
def remote(server: str, local: Path) -> str:
    upload(local, URL)
    return URL


def read(reader: CacheReader, rows: np.ndarray, views: np.ndarray | None = None) -> dict[str, Any]:
    out = {
        column: np.zeros((len(rows), *reader.manifest.columns[column].shape), COLUMNS[column].numpy_dtype)
        for column in reader.columns
    }
    with ThreadPoolExecutor(8) as pool:
        reader.read_rows(rows, list(reader.columns), out, views=views, pool=pool, parts=8)
    return out


def test_rows_of_a_bucket_are_those_of_the_folder(remote: str, local: Path) -> None:
    reader = CacheReader(remote, list(COLUMNS))
    there = CacheReader(local, list(COLUMNS))
    assert str(reader.path) == remote
    assert reader.manifest == there.manifest
    assert reader.valid_rows.tolist() == there.valid_rows.tolist()
    assert reader.invalid_rows.tolist() == [5]
    assert reader.labels.tolist() == there.labels.tolist()
    assert read_keys(reader.path, reader.manifest) == read_keys(local, there.manifest)
    rows = np.random.default_rng(0).choice(reader.valid_rows, 60)
    views = np.random.default_rng(1).integers(0, 2, 60)
    for column, values in read(reader, rows, views).items():
        for place, (row, view) in enumerate(zip(rows.tolist(), views.tolist(), strict=True)):
            assert np.array_equal(values[place], expected_row(column, row, COLUMNS[column], view=view))


def test_rows_are_ranges_and_indexes_are_read_once(remote: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    whole = Bucket.read_range

    def watched(self: Bucket, name: str, start: int, length: int) -> Any:
        asked.append(length)
        return whole(self, name, start, length)

    reader = CacheReader(remote, [PATCH])
    monkeypatch.setattr(Bucket, "read_range", watched)
    monkeypatch.setattr(Bucket, "read", lambda *_: pytest.fail("an object was read whole"))
    rows = np.array([0, 1, 9, 17, 44])
    out = {PATCH: np.empty((5, 4, 16), dtype=np.float16)}
    reader.read_rows(rows, [PATCH], out)
    index, chunk = 16 * 8 * 2 + 4, COLUMNS[PATCH].row_bytes + 4
    assert sorted(asked) == sorted([index] * 4 + [chunk] * 5)
    read(reader, rows)
    assert len(asked) == 9 + 5


def test_loader_gives_the_batches_of_the_folder(remote: str, local: Path) -> None:
    batches = []
    for place in (remote, local):
        reader = CacheReader(place, [MOMENTS, PATCH])
        loader = CacheLoader(
            reader,
            rows=reader.valid_rows,
            batch_size=12,
            threads=2,
            last_image=72,
            columns_at=lambda step: [MOMENTS, PATCH],
        )
        assert loader.threads == (32 if place == remote else 2)
        batches.append(list(loader))
    for ours, theirs in zip(*batches, strict=True):
        assert ours.rows.tolist() == theirs.rows.tolist()
        for column in (MOMENTS, PATCH):
            assert ours.columns[column].equal(theirs.columns[column])


def test_what_a_cache_holds(remote: str, local: Path) -> None:
    ours, theirs = cache_info(cache_path(remote)), cache_info(local)
    assert ours.sources == theirs.sources
    assert (ours.invalid, ours.complete, ours.num_rows) == (theirs.invalid, True, NUM_ROWS)
    assert ours.total_bytes == theirs.total_bytes


def test_zarr_opens_it_too(remote: str) -> None:
    import zarr
    from zarr.storage import ObjectStore

    group = zarr.open_group(ObjectStore(obstore.store.from_url(remote), read_only=True), mode="r")
    assert np.array_equal(group[PATCH][9, 1], expected_row(PATCH, 9, COLUMNS[PATCH], view=1))


def test_corrupt_bytes_are_named(server: str, local: Path) -> None:
    url = "s3://bucket/corrupt"
    store = upload(local, url)
    name = f"{PATCH}/c/2/0/0/0"
    data = bytearray(obstore.get(store, name).bytes().to_bytes())
    data[2 * (COLUMNS[PATCH].row_bytes + 4) + 7] ^= 1  # row 17, first view
    obstore.put(store, name, bytes(data))
    with pytest.raises(CorruptRowError) as caught:
        read(CacheReader(url, [PATCH]), np.array([16, 17, 18]))
    assert (caught.value.row, caught.value.column, caught.value.path) == (17, PATCH, f"{url}/{name}")
    assert read(CacheReader(url, [PATCH], check_crc=False), np.array([17]))[PATCH].shape == (1, 4, 16)
    obstore.put(store, name, bytes(data[:-9]))
    with pytest.raises(CacheError, match=r"1 of the 6 shards of demo .* not wholly written.* shard 2"):
        CacheReader(url, [PATCH])
    reader = CacheReader(url, [MOMENTS])
    obstore.delete(store, f"{MOMENTS}/c/0/0/0/0/0")
    with pytest.raises(
        CacheError, match=rf"row 1 of {MOMENTS} cannot be read from {url}.*credentials"
    ) as gone:
        read(reader, np.array([1]))
    assert isinstance(gone.value.__cause__, FileNotFoundError)


def test_missing_places_are_one_line(server: str) -> None:
    for url in ("s3://bucket/nothing", "s3://no-such-bucket/cache"):
        with pytest.raises(CacheError, match=f"there is no cache at {url}; make one"):
            CacheReader(url, [])


def test_a_server_that_is_away_is_one_line(remote: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lead_to(monkeypatch, f"http://127.0.0.1:{free_port()}")
    with pytest.raises(RepaError, match="look at the connection, the endpoint and the credentials") as caught:
        CacheReader(remote, [])
    assert "\n" not in str(caught.value)
    assert "Debug" not in str(caught.value)


def test_an_answer_that_breaks_off_is_asked_for_again(remote: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three times in all, and nothing else is: the package does that itself."""
    whole, asked = obstore.get_range, []
    failure = "HTTP error: request or response body error"

    def breaks_off(*arguments: Any, **options: Any) -> Any:
        asked.append(options["start"])
        if asked.count(options["start"]) < successful:
            raise GenericError(failure)
        return whole(*arguments, **options)

    reader, rows = CacheReader(remote, [PATCH]), np.array([3])
    expected = read(reader, rows)[PATCH]
    monkeypatch.setattr(obstore, "get_range", breaks_off)
    successful = 3
    assert np.array_equal(read(reader, rows)[PATCH], expected)
    assert len(asked) == 3
    asked.clear()
    successful = 4
    with pytest.raises(CacheError, match=f"row 3 of {PATCH} cannot be read from .*: {failure}; look"):
        read(reader, rows)
    assert len(asked) == 3
    asked.clear()
    failure = "Error performing GET after 8 retries"
    with pytest.raises(CacheError, match=failure):
        read(reader, rows)
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "Error performing PUT http://169.254.169.254/latest/api/token in 13.9ms",
            "set AWS_ACCESS_KEY_ID and",
        ),
        (
            "Error performing GET http://localhost/x after 8 retries",
            "Error performing GET http://localhost/x",
        ),
    ],
)
def test_missing_credentials_are_said_to_be(
    remote: str, monkeypatch: pytest.MonkeyPatch, text: str, said: str
) -> None:
    def refused(*_: Any, **__: Any) -> Any:
        raise GenericError(text)

    monkeypatch.setattr(obstore, "get", refused)
    with pytest.raises(RepaError) as caught:
        CacheReader(remote, [])
    assert said in str(caught.value)
    assert ("no credentials" in str(caught.value)) == ("169.254" in text)


def test_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore.store", None)
    with pytest.raises(RepaError, match=r"needs the package obstore; .*pip install 'repa\[remote\]'"):
        cache_path(URL)


def test_reader_travels_to_a_spawned_process(remote: str) -> None:
    reader = CacheReader(remote, [PATCH], check_crc=False)
    copy = pickle.loads(pickle.dumps(reader))
    assert (copy.path, copy.columns, copy.check_crc) == (reader.path, (PATCH,), False)
    rows = np.array([3, 30])
    assert np.array_equal(read(copy, rows)[PATCH], read(reader, rows)[PATCH])


def read_in_child(reader: CacheReader, queue: Any) -> None:
    try:
        read(reader, np.array([1]))
    except CacheError as error:
        queue.put(str(error))


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_process_is_told_instead_of_hanging(remote: str) -> None:
    reader = CacheReader(remote, [PATCH])
    read(reader, np.array([1]))
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=read_in_child, args=(reader, queue))
    child.start()
    message = queue.get(timeout=600)
    child.join()
    queue.close()
    queue.join_thread()
    assert "was opened before this process was forked" in message
    assert np.array_equal(read(reader, np.array([1]))[PATCH][0], expected_row(PATCH, 1, COLUMNS[PATCH]))


@pytest.mark.parametrize(
    ("place", "remote"),
    [
        ("s3://bucket/path", True),
        ("gs://bucket", True),
        ("./s3:/bucket/path", False),
        ("caches/demo", False),
        ("s3", False),
        ("pipe:cat s3://bucket/a.tar", False),
    ],
)
def test_addresses(place: str, remote: bool) -> None:
    assert is_remote(place) is remote
    if not remote:
        assert cache_path(place) == Path(place)


def test_names_within_a_bucket() -> None:
    path = RemotePath(Bucket("s3://bucket/a/"), "b")
    assert str(path / "c") == str(path.joinpath("c")) == os.fspath(path / "c") == "s3://bucket/a/b/c"
    assert path / "c" == RemotePath(Bucket("s3://bucket/a"), "b/c")
    assert len({path / "c", path.joinpath("c"), path}) == 2
    assert str(RemotePath(Bucket("s3://bucket/a/"))) == "s3://bucket/a"


def run_command(*words: str) -> None:
    from repa.cli import main

    with pytest.raises(SystemExit) as left:
        main(list(words))
    assert not left.value.code


def test_info_says_in_the_bucket_of_what_is_there(
    remote: str, local: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    run_command("cache", "info", remote)
    shown = capsys.readouterr().out
    size = human_bytes(sum(file.stat().st_size for file in local.rglob("*") if file.is_file()))
    assert shown.startswith(f"{remote}  {size} in the bucket\n")
    heading = next(line for line in shown.splitlines() if line.startswith("column "))
    assert heading.split("  ")[-2:] == ["in the bucket", "shards"]
    assert (
        "ratio: bytes of data to bytes in the bucket; speeds measured just now: random rows, one thread, "
        "requested from the bucket and decoded, and beside that uncompressed from a temporary folder\n"
    ) in shown
    assert "disk" not in shown
    run_command("cache", "info", str(local))
    assert f"{local}  {size} on disk\n" in capsys.readouterr().out


def test_info_and_training_from_a_bucket(
    remote: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command line from an address to the loss of every step, which is that of the folder's."""
    url, folder = "s3://bucket/train", tmp_path / "cache"
    synthetic_cache(folder, num_rows=24)
    upload(folder, url)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    run_command("cache", "info", url)
    shown = capsys.readouterr().out
    assert url in shown
    assert "24 images of 32×32 in 3 classes · 3 shards of 8" in shown
    words = (
        "--method repa --model SiT-T/2 --max-steps 2 --batch-size 4 --set log_every=1 --set preview_every=0 "
    )
    words += "--set method.projector_width=8"
    for place, run in ((url, "remote"), (str(folder), "local")):
        run_command("train", "--cache", place, "--run", run, *words.split())
    losses = [
        [line.split(",")[:3] for line in (tmp_path / run / "metrics.csv").read_text().splitlines()]
        for run in ("remote", "local")
    ]
    assert len(losses[0]) >= 3
    assert losses[0] == losses[1]
