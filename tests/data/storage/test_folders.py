"""Writing below a folder of a disk and a prefix of a bucket, by one protocol."""

from __future__ import annotations

import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from repa.data.errors import CacheError, RepaError
from repa.data.storage import bucket_folder, leases
from repa.data.storage.bucket import Bucket, RemotePath, cache_path
from repa.data.storage.files import os_errors
from repa.data.storage.folder import ChangedError, Seen, TakenError
from repa.data.storage.leases import Lease, NumbersLease, put_if
from repa.data.storage.writable import file_in_the_way, free_bytes, open_writable, refusing_folder
from s3_server import unfinished_uploads

if TYPE_CHECKING:
    from repa.data.storage.bucket import CachePath
    from repa.data.storage.folder import Folder

GONE = {"boot": "", "namespace": "", "pid": 0, "start": 0}


@pytest.fixture(params=["disk", "bucket"])
def root(request: pytest.FixtureRequest, tmp_path: Path, server: str) -> CachePath:
    """A folder with nothing in it, of each kind."""
    if request.param == "disk":
        return tmp_path / "root"
    return cache_path(f"s3://bucket/folders/{request.node.name}".replace("[", "-").replace("]", ""))


@pytest.fixture
def folder(root: CachePath) -> Folder:
    return open_writable(root)


@pytest.fixture
def bucket(request: pytest.FixtureRequest, server: str) -> Bucket:
    return Bucket(f"s3://bucket/leases/{request.node.name}")


def test_small_files_are_put_listed_and_removed(root: CachePath, folder: Folder) -> None:
    assert folder.names(root) == [] == folder.names(root / "absent")
    assert not folder.exists(root / "a")
    folder.put(root / "a", b"1")
    folder.put(root / "b" / "c" / "d", b"2")
    folder.put(root / "b" / "e", b"")
    folder.settle()
    assert folder.names(root) == ["a", "b"]
    assert folder.names(root / "b") == ["c", "e"]
    assert folder.exists(root / "b" / "c" / "d")
    folder.put(root / "a", b"3")
    assert (root / "a").read_bytes() == b"3"
    folder.remove([root / "a", root / "never"])
    assert not folder.exists(root / "a")
    with folder.locked(root / "z" / ".lock") as held:
        folder.remove_all(root / "b", held)
        folder.remove_all(root / "never", held)
    folder.remove([root / "z" / ".lock"])
    folder.remove_if_empty(root / "z")
    assert not folder.exists(root / "b" / "e")
    folder.remove_if_empty(root)
    assert folder.names(root) == []


def test_a_large_file_is_seen_when_it_is_published_and_not_before(
    root: CachePath, folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bucket_folder, "PART_BYTES", 5 << 20)
    pieces = [bytes([each]) * (700 << 10) for each in range(20)]
    file = folder.begin(root / "c" / "0", 1)
    for first in range(0, 20, 2):
        file.append([memoryview(piece) for piece in pieces[first : first + 2]])
    file.append([b"end"])
    assert not folder.exists(root / "c" / "0")
    file.finish()
    assert not folder.exists(root / "c" / "0")
    file.publish()
    file.abandon()
    assert (root / "c" / "0").read_bytes() == b"".join(pieces) + b"end"
    assert folder.names(root / "c") == ["0"]
    with pytest.raises(ValueError, match="finished"):
        file.append([b"more"])


def test_memory_that_was_appended_may_be_used_again(root: CachePath, folder: Folder) -> None:
    for size in (10, 300_000):
        memory = bytearray(size)
        file = folder.begin(root / "c", 1)
        for value in (1, 2, 3):
            memory[:] = bytes([value]) * size
            file.append([memoryview(memory)])
        file.finish()
        file.publish()
        assert (root / "c").read_bytes() == b"".join(bytes([value]) * size for value in (1, 2, 3))


@pytest.mark.parametrize("size", [0, 10, 12 << 20])
def test_nothing_is_left_of_what_is_abandoned(
    root: CachePath, folder: Folder, server: str, size: int
) -> None:
    folder.put(root / "c", b"before")
    file = folder.begin(root / "c", size)
    if size:
        file.append([bytes(size)])
    file.abandon()
    assert (root / "c").read_bytes() == b"before"
    assert folder.names(root) == ["c"]
    assert not unfinished_uploads(server, root)
    with pytest.raises(ValueError, match="finished"):
        file.append([b"more"])


def test_a_part_is_so_large_that_there_are_not_too_many(server: str) -> None:
    path = cache_path("s3://bucket/large") / "c"
    file: Any = open_writable(path).begin(path, 1 << 40)
    assert (1 << 40) / file._part_bytes < 10_000
    assert open_writable(path).begin(path, 1)._part_bytes == bucket_folder.PART_BYTES  # type: ignore[attr-defined]


def test_numbers_are_held_all_or_none(root: CachePath) -> None:
    first, second = open_writable(root), open_writable(again(root))
    claim = first.claim(root / "of", [1, 2, 3])
    with pytest.raises(TakenError) as caught:
        second.claim(again(root) / "of", [3, 4])
    # POSIX locks do not exclude writers of one process
    assert caught.value.number == (None if is_disk(root) else 3)
    if not is_disk(root):
        other = second.claim(again(root) / "of", [4])
        other.check()
        other.release()
    claim.check()
    claim.release()
    second.claim(again(root) / "of", [3, 4]).release()
    assert [name for name in first.names(root / "of") if name != ".lock"] == []


def test_a_lock_is_held_by_one_at_a_time(root: CachePath) -> None:
    inside, most = 0, 0

    def hold(part: int | None) -> None:
        nonlocal inside, most
        own = again(root)
        with open_writable(own).locked(own / ".lock", part) as held:
            held.check()
            inside += 1
            most = max(most, inside)
            time.sleep(0.02)
            inside -= 1

    for part in (None, 7):
        threads = [threading.Thread(target=hold, args=(part,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert most == 1
    assert open_writable(root).names(root) == [".lock"]
    assert (root / ".lock").read_bytes() == b""


def test_what_was_seen_is_replaced_and_nothing_else(bucket: Bucket) -> None:
    path = RemotePath(bucket)
    folder = open_writable(path)
    nothing = folder.seen(path / "a")
    assert nothing == Seen(None)
    first = folder.put_if(path / "a", b"1", nothing)
    assert folder.seen(path / "a") == first
    # the answer to a first try may have been lost
    assert folder.put_if(path / "a", b"1", nothing) == first
    with pytest.raises(ChangedError):
        folder.put_if(path / "a", b"2", nothing)
    folder.put(path / "a", b"3")
    with pytest.raises(ChangedError):
        folder.put_if(path / "a", b"2", first)
    folder.remove([path / "a"])
    with pytest.raises(ChangedError):
        folder.put_if(path / "a", b"2", first)
    assert not folder.exists(path / "a")


def test_the_lease_of_a_killed_process_of_this_machine_is_taken_at_once(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = leases.this_process()
    assert here is not None
    with monkeypatch.context() as doomed:
        doomed.setattr(leases, "this_process", lambda: {**here, "start": here["start"] - 1})
        NumbersLease(bucket, "of", [1])
        Lease(bucket, "lock").wait()
        Lease(bucket, ".lock.3").wait()
    assert len(bucket.children("of/.writers")[1]) == 1
    lease = Lease(bucket, "lock")
    lease.wait()
    lease.check()
    lease.release(keep=True)
    path = RemotePath(bucket)
    claim = open_writable(path).claim(path / "of", [1])
    assert len(bucket.children("of/.writers")[1]) == 1
    claim.release()
    assert bucket.below("") == ["lock"]


def test_the_lease_of_another_machine_is_taken_when_it_has_not_been_renewed(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(leases, "this_process", lambda: GONE)
        left = NumbersLease(bucket, "of", [1])
        Lease(bucket, "lock").wait()
    with pytest.raises(TakenError) as caught:
        NumbersLease(bucket, "of", [1, 2])
    assert caught.value.number == 1
    waiting = threading.Thread(target=Lease(bucket, "lock").wait, daemon=True)
    waiting.start()
    waiting.join(0.3)
    assert waiting.is_alive()
    with monkeypatch.context() as later:
        later.setattr(leases, "LEASE_SECONDS", -1)
        NumbersLease(bucket, "of", [1, 2])
        waiting.join(10)
        assert not waiting.is_alive()
        with pytest.raises(CacheError):
            left.check()


def test_a_holder_shows_that_it_lives_and_sees_when_it_was_taken_for_dead(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "_RENEW_SECONDS", 0.02)
    lease = Lease(bucket, "lock")
    lease.wait()
    first = bucket.describe("lock")
    deadline = time.monotonic() + 30
    while bucket.describe("lock") == first:
        assert time.monotonic() < deadline
    lease.check()
    bucket.put("lock", b"another's")
    while True:
        try:
            lease.check()
        except CacheError:
            break
        assert time.monotonic() < deadline
    lease.release(keep=True)
    assert bucket.read("lock") == b"another's"


@pytest.mark.parametrize("data", [b"", b"{}", b"[]", b"\xff", b'{"process": {"pid": -1}}', b"[" * 100_000])
def test_what_is_no_lease_is_nobody_who_has_gone(data: bytes) -> None:
    assert not leases.is_gone(data)


def test_a_store_that_knows_no_conditions_is_refused(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    path = RemotePath(bucket)
    assert refusing_folder(path) is None
    assert bucket.below("") == []
    put = Bucket.put
    monkeypatch.setattr(Bucket, "put", lambda self, name, data, mode="overwrite": put(self, name, data))
    with pytest.raises(CacheError) as caught:
        refusing_folder(path)
    assert caught.value.field == "--cache"
    assert bucket.below("") == []


def test_what_a_disk_says_of_room_a_bucket_does_not(tmp_path: Path, bucket: Bucket) -> None:
    assert (free_bytes(tmp_path / "absent") or 0) > 0
    assert free_bytes(RemotePath(bucket)) is None
    (tmp_path / "file").touch()
    assert file_in_the_way(tmp_path / "file" / "below") == tmp_path / "file"
    assert file_in_the_way(tmp_path / "absent") is None
    assert file_in_the_way(RemotePath(bucket)) is None


def test_the_listing_follows_what_this_process_writes(bucket: Bucket) -> None:
    path = RemotePath(bucket)
    folder = open_writable(path)
    assert bucket.sizes() == {}
    folder.put(path / "a", b"123")
    file = folder.begin(path / "b", 1)
    file.append([b"12"])
    file.publish()
    assert bucket.sizes() == {"a": 3, "b": 2}
    folder.remove([path / "a"])
    assert bucket.sizes() == {"b": 2}
    Bucket(bucket.url).put("c", b"")
    assert bucket.sizes() == {"b": 2}
    bucket.look_again()
    assert bucket.sizes() == {"b": 2, "c": 0}


def test_a_bucket_that_is_away_is_one_line(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    path = RemotePath(Bucket("s3://no-such-bucket/cache"))
    folder = open_writable(path)
    with ExitStack() as stack:
        file = folder.begin(path / "large", 1)
        file.append([b"1"])
        for action in (
            lambda: folder.put(path / "a", b"1"),
            lambda: folder.locked(path / "a").__enter__(),
            lambda: folder.claim(path, [1]),
            lambda: file.publish(),
        ):
            with pytest.raises(RepaError) as caught, os_errors("write", path):
                action()
            assert "\n" not in str(caught.value)
            assert caught.value.remedy
        stack.callback(file.abandon)
    with pytest.raises(ChangedError):
        put_if(bucket, "a", b"1", {"e_tag": '"none"'})


def again(root: CachePath) -> CachePath:
    """The same root, as another process comes to it."""
    return cache_path(str(root))


def is_disk(root: CachePath) -> bool:
    return not isinstance(root, RemotePath)


@pytest.mark.parametrize(
    "given", ["S3://bucket/x", "s3:/bucket/x", "s3://", "s3:///x", "s4://b/x", "gcs://b/x"]
)
def test_what_is_meant_as_an_address_is_no_folder(
    given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CacheError) as caught:
        cache_path(given)
    assert caught.value.field == "--cache"
    assert cache_path(f"./{given}") == Path(given)
    Path(given).mkdir(parents=True)
    assert cache_path(given) == Path(given)
