"""`repa cache verify` of a bucket: the findings of a folder; and what is not done to buckets."""

from __future__ import annotations

import random
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from ports import free_port
from repa.cli import main
from repa.data.errors import CacheError, RepaError
from repa.data.format.columns import ColumnSpec
from repa.data.storage.bucket import Bucket, cache_path
from repa.data.testing import synthetic_cache, synthetic_captions
from repa.data.upkeep import shard_check
from repa.data.upkeep.info import cache_info
from repa.data.upkeep.shard_check import Finding
from repa.data.upkeep.verify import verify_cache
from s3_server import lead_to, obstore, upload

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PATCH = "demo/patch"
COLUMNS = {
    "sd-vae/moments": ColumnSpec(shape=(8, 4, 4), dtype="float32"),
    PATCH: ColumnSpec(shape=(4, 16), dtype="float16"),
    "demo/cls": ColumnSpec(shape=(16,), dtype="float16", compressor="zstd"),
}
ROWS, SHARD_ROWS, VIEWS = 45, 8, ("original", "mirrored")
CHUNK = COLUMNS[PATCH].row_bytes + 4


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("verify") / "cache"
    synthetic_cache(
        path, num_rows=ROWS, shard_rows=SHARD_ROWS, columns=COLUMNS, invalid={5: "x", 40: "y"}, views=VIEWS
    )
    return path


@pytest.fixture(scope="module")
def remote(server: str, local: Path) -> str:
    upload(local, "s3://bucket/whole")
    return "s3://bucket/whole"


def described(findings: list[Finding], root: str) -> list[tuple[Any, ...]]:
    """Findings without where the cache lies, and without what to do, which differs."""
    return [
        (
            str(each.path).removeprefix(root),
            each.what.replace(root, "").rpartition("; ")[0],
            each.source,
            each.column,
            each.shard,
            each.row,
        )
        for each in findings
    ]


def test_a_whole_copy_has_no_findings(remote: str, local: Path) -> None:
    calls: list[tuple[int, int]] = []
    assert verify_cache(cache_path(remote), progress=lambda done, total: calls.append((done, total))) == []
    folder: list[tuple[int, int]] = []
    assert verify_cache(local, progress=lambda done, total: folder.append((done, total))) == []
    assert calls[-1] == folder[-1]


def test_objects_are_read_in_pieces_and_each_byte_once(remote: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, int, int]] = []
    read = Bucket.read_range

    def watched(self: Bucket, name: str, start: int, length: int) -> Any:
        asked.append((name, start, length))
        return read(self, name, start, length)

    monkeypatch.setattr(Bucket, "read_range", watched)
    path = cache_path(remote)
    assert verify_cache(path, [PATCH]) == []
    index = 16 * SHARD_ROWS * len(VIEWS) + 4
    shards = -(-ROWS // SHARD_ROWS)
    assert len(asked) == 2 * shards  # the index, and all rows in one piece
    assert sum(length == index for _, _, length in asked) == shards
    rows = ROWS - 2  # that have data
    assert sum(length for _, _, length in asked) == rows * len(VIEWS) * CHUNK + shards * index

    asked.clear()
    monkeypatch.setattr(shard_check, "_PIECE", 3 * CHUNK)
    monkeypatch.setattr(shard_check, "_AHEAD", 2)
    assert verify_cache(cache_path(remote), [PATCH], threads=2) == []
    pieces = [length for _, _, length in asked if length != index]
    assert max(pieces) == 3 * CHUNK
    assert sum(pieces) == rows * len(VIEWS) * CHUNK


def spoil(folder: Path, randomness: random.Random) -> None:
    """Damage a copy of the cache at one place, in one of the ways that copying may."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name != ".lock")
    file = randomness.choice(files)
    data = bytearray(file.read_bytes())
    kind = randomness.choice(("flip", "cut", "lost", "longer", "stray", "other"))
    if kind == "flip":
        data[randomness.randrange(len(data))] ^= 1 << randomness.randrange(8)
    elif kind == "cut":
        del data[randomness.randrange(len(data)) :]
    elif kind == "longer":
        data += b"x"
    elif kind == "stray":
        file = file.with_name("stray.bin")
    elif kind == "other":
        others = [each for each in files if each.suffix == file.suffix]
        data = bytearray(randomness.choice(others).read_bytes())
    if kind == "lost":
        file.unlink()
    else:
        file.write_bytes(data)


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture
def spoiled(remote: str, local: Path) -> Iterator[Callable[[Path], str]]:
    """Make the copy in the bucket equal to a folder, until the test is over: only what differs is sent."""
    store = obstore.store.from_url(remote)
    there = whole = bytes_of(local)

    def become(contents: dict[str, bytes]) -> None:
        nonlocal there
        for name in there.keys() | contents.keys():
            if name not in contents:
                obstore.delete(store, name)
            elif contents[name] != there.get(name):
                obstore.put(store, name, contents[name])
        there = contents

    def copied(folder: Path) -> str:
        become(bytes_of(folder))
        return remote

    yield copied
    become(whole)


@pytest.mark.parametrize("seed", range(24))
def test_findings_are_those_of_the_folder(
    spoiled: Callable[[Path], str], local: Path, tmp_path: Path, seed: int
) -> None:
    randomness = random.Random(seed)
    copy = tmp_path / "cache"
    shutil.copytree(local, copy)
    for _ in range(3):
        spoil(copy, randomness)
    url = spoiled(copy)
    try:
        here = verify_cache(copy)
    except CacheError:  # its manifest is gone
        with pytest.raises(CacheError):
            verify_cache(cache_path(url))
        return
    found = verify_cache(cache_path(url))
    assert described(found, url) == described(here, str(copy))
    assert [each.remedy for each in found] == [each.remedy for each in here]


def test_folders_that_consoles_mark_are_no_strays(server: str, local: Path) -> None:
    url = "s3://bucket/marked"
    store = upload(local, url)
    obstore.put(store, "commits/demo/", b"")
    obstore.put(store, "demo", b"")
    assert verify_cache(cache_path(url)) == []
    obstore.put(store, "demo", b"something")
    assert [str(each) for each in verify_cache(cache_path(url))] == [
        f"{url}/demo is not the cache's; delete it"
    ]


def run(*words: str) -> int:
    with pytest.raises(SystemExit) as left:
        main(list(words))
    code = left.value.code
    assert code is None or isinstance(code, int)
    return code or 0


def test_the_command_says_what_it_says_of_a_folder(
    remote: str, local: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert run("cache", "verify", remote) == 0
    said = capsys.readouterr().out.strip()
    assert said.startswith(f"{remote}: ")
    assert said.endswith("all is as committed")
    store = upload(local, "s3://bucket/bad")
    name = f"{PATCH}/c/2/0/0/0"
    data = bytearray(obstore.get(store, name).bytes().to_bytes())
    data[2 * CHUNK + 7] ^= 1
    obstore.put(store, name, bytes(data))
    obstore.delete(store, "commits/sd-vae/1.json")
    assert run("cache", "verify", "s3://bucket/bad") == 1
    lines = capsys.readouterr().out.strip().splitlines()
    assert lines[0].startswith(
        "shard 1 of sd-vae is not committed: s3://bucket/bad/commits/sd-vae/1.json is missing"
    )
    assert lines[1] == (
        f"row 17 of {PATCH}: s3://bucket/bad/{name} has data that do not match their checksum; "
        "encode it again with `repa cache repair`"
    )
    assert lines[-1].endswith("2 findings")
    assert run("cache", "verify", "s3://bucket/nothing") == 1
    assert capsys.readouterr().err.startswith("error: there is no cache at s3://bucket/nothing")


def test_a_server_that_goes_away_is_one_line(remote: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """That is no finding: nobody knows what is there."""
    path = cache_path(remote)
    assert verify_cache(path, ["demo/cls"]) == []
    read = Bucket.read_range

    def broken(self: Bucket, name: str, start: int, length: int) -> Any:
        if "/3/" in name:
            raise ConnectionAbortedError(103, "connection refused", f"{self.url}/{name}")
        return read(self, name, start, length)

    monkeypatch.setattr(Bucket, "read_range", broken)
    with pytest.raises(
        RepaError, match=r"cannot read s3://.*/3/.*connection refused; look at the conn"
    ) as gone:
        verify_cache(path)
    assert not isinstance(gone.value, CacheError)
    assert "\n" not in str(gone.value)
    lead_to(monkeypatch, f"http://127.0.0.1:{free_port()}")
    with pytest.raises(RepaError, match="look at the connection, the endpoint and the credentials"):
        verify_cache(cache_path(remote))


def test_ctrl_c_does_not_wait_for_the_rest_of_what_was_begun(
    remote: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = cache_path(remote)
    monkeypatch.setattr(shard_check, "_PIECE", CHUNK)
    asked: list[str] = []
    others = -(-ROWS // SHARD_ROWS) - 1
    stopped, gate = threading.Event(), threading.Event()
    read, shutdown = Bucket.read_range, ThreadPoolExecutor.shutdown

    def watched(self: Bucket, name: str, start: int, length: int) -> Any:
        asked.append(name)
        # the first shard ends while the others have only begun
        if "/c/0/" not in name:
            assert gate.wait(600)
        return read(self, name, start, length)

    def stop(done: int, total: int) -> None:
        while sum("/c/0/" not in name for name in asked) < others:
            time.sleep(0.01)
        stopped.set()
        raise KeyboardInterrupt

    def waiting(self: ThreadPoolExecutor, wait: bool = True, **options: Any) -> None:
        if wait and stopped.is_set():
            gate.set()  # the others go on when somebody waits for them, and not before
        shutdown(self, wait, **options)

    monkeypatch.setattr(Bucket, "read_range", watched)
    monkeypatch.setattr(ThreadPoolExecutor, "shutdown", waiting)
    with pytest.raises(KeyboardInterrupt):
        verify_cache(path, [PATCH], progress=stop)
    first = (SHARD_ROWS - 1) * len(VIEWS) + 1
    assert len(asked) == first + others  # their indexes, and no rows


def test_export_from_a_bucket_is_that_of_the_folder(
    remote: str, local: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("webdataset")
    for place, out in ((remote, "ours"), (str(local), "theirs")):
        assert run("cache", "export", place, "--out", str(tmp_path / out)) == 0
    assert f"{ROWS - 2} images" in capsys.readouterr().out
    files = sorted(file.name for file in (tmp_path / "theirs").iterdir())
    assert len(files) == 6
    for name in files:
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()


@pytest.mark.parametrize(
    "words",
    [
        "cache verify s3://bucket/whole --reencode 3",
        "cache verify s3://bucket/whole --fidelity",
        "cache merge LOCAL s3://bucket/whole --cache out",
        "cache merge LOCAL LOCAL --cache s3://bucket/out",
        "cache import x.tar --cache s3://bucket/out",
        "cache export LOCAL --out s3://bucket/out",
        "train --cache LOCAL --run s3://bucket/run",
        "sample --run s3://bucket/run",
        "sample --ckpt none.pt --out s3://bucket/out",
    ],
)
def test_what_writes_or_needs_a_folder_refuses_in_one_line(
    local: Path,
    tmp_path: Path,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(*words.replace("LOCAL", str(local)).split()) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: s3://bucket/")
    assert "is in a bucket, where only" in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []  # no folder `s3:`


def test_captions_in_a_bucket_are_checked_too(server: str, tmp_path: Path) -> None:
    synthetic_cache(tmp_path / "cache", num_rows=4)
    synthetic_captions(tmp_path / "cache")
    upload(tmp_path / "cache", "s3://bucket/captioned")
    assert verify_cache(cache_path("s3://bucket/captioned")) == []
    found = cache_info(cache_path("s3://bucket/captioned"))
    here = cache_info(tmp_path / "cache")
    assert found.captions is not None
    assert here.captions is not None
    assert found.captions.total_bytes == here.captions.total_bytes < here.total_bytes
    (tmp_path / "cache" / "captions" / "keys.txt").write_bytes(b"")
    upload(tmp_path / "cache", "s3://bucket/damaged-captions")
    findings = verify_cache(cache_path("s3://bucket/damaged-captions"))
    assert findings
    assert all("/captions/" in str(each.path) for each in findings)
