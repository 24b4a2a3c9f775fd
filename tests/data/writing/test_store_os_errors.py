"""What the operating system refuses becomes one line that names the path, and nothing is lost."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from repa.data.errors import CacheError, RepaError
from repa.data.format.commits import read_commit
from repa.data.format.layout import shard_file
from repa.data.format.opening import open_manifest, read_labels
from repa.data.storage import local_folder
from repa.data.storage.files import os_errors
from repa.data.testing import expected_row, folder_contents, synthetic_cache
from repa.data.upkeep.info import cache_info
from repa.data.upkeep.verify import verify_cache
from repa.data.writing.writer import SourceWriter

if TYPE_CHECKING:
    from repa.data.format.manifest import Manifest


def one_line(error: BaseException, *parts: str) -> None:
    message = str(error)
    assert "\n" not in message
    for part in parts:
        assert part in message, message


def write_shard(path: Path, manifest: Manifest, shard: int) -> None:
    with SourceWriter(path, manifest, "demo", [shard]) as writer, writer.shard(shard) as opened:
        for row in opened.rows:
            for name, spec in manifest.source_columns("demo").items():
                opened.write(row, name, expected_row(name, row, spec)[None])
        opened.commit()


def test_a_file_where_the_cache_or_its_parent_should_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"mine")
    for path in (tmp_path / "file", tmp_path / "file" / "cache"):
        with pytest.raises(RepaError, match="Not a directory") as caught:
            synthetic_cache(path, num_rows=2)
        one_line(caught.value, str(tmp_path / "file"), "choose another folder")
        with pytest.raises(RepaError) as caught:
            open_manifest(path)
        one_line(caught.value, str(path))
    assert (tmp_path / "file").read_bytes() == b"mine"


def test_a_folder_of_the_system_refuses() -> None:
    # the kernel's own folder: nobody, root included, may make a folder there
    for folder in ("/proc/repa-cache", "/sys/repa-cache"):
        with pytest.raises(RepaError) as caught:
            synthetic_cache(Path(folder), num_rows=2)
        one_line(caught.value, folder, "cannot write")


def full_disk_for(patch: pytest.MonkeyPatch, partial: Path) -> None:
    """Have a file be made on a full disk: every write to /dev/full fails as there."""
    make = local_folder.create_file

    def create(path: Path) -> int:
        return os.open("/dev/full", os.O_WRONLY) if path == partial else make(path)

    patch.setattr(local_folder, "create_file", create)


def test_a_full_disk_leaves_the_shard_uncommitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = synthetic_cache(tmp_path, num_rows=20)
    whole = folder_contents(tmp_path)
    (tmp_path / "commits" / "demo" / "1.json").unlink()
    patch = shard_file(tmp_path, "demo/patch", manifest.columns["demo/patch"], 1)
    partial = patch.with_name(".0.partial")
    with monkeypatch.context() as full:
        full_disk_for(full, partial)
        with pytest.raises(RepaError, match="No space left on device") as caught:
            write_shard(tmp_path, manifest, 1)
    one_line(caught.value, "demo/patch", "free some space", "run the same command again")
    assert read_commit(tmp_path, "demo", 1) is None
    assert not partial.exists()
    write_shard(tmp_path, manifest, 1)
    assert folder_contents(tmp_path) == whole


def test_a_write_in_parts_is_completed_and_a_failed_one_is_not_built_upon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = synthetic_cache(tmp_path, num_rows=20)
    whole = folder_contents(tmp_path)
    (tmp_path / "commits" / "demo" / "1.json").unlink()
    writev = os.writev

    def some(descriptor: int, parts: list[bytes]) -> int:
        return writev(descriptor, [bytes(parts[0])[:7]])

    with monkeypatch.context() as patch:
        patch.setattr(os, "writev", some)
        write_shard(tmp_path, manifest, 1)
    assert folder_contents(tmp_path) == whole

    spec = manifest.columns["demo/cls"]
    full_disk_for(monkeypatch, shard_file(tmp_path, "demo/cls", spec, 1).with_name(".0.partial"))
    with SourceWriter(tmp_path, manifest, "demo", [1]) as writer, writer.shard(1) as opened:
        with pytest.raises(RepaError, match="No space left"):
            opened.write(8, "demo/cls", expected_row("demo/cls", 8, spec)[None])
        with pytest.raises(ValueError, match="a write to it has failed"):
            opened.write(9, "demo/cls", expected_row("demo/cls", 9, spec)[None])
    assert folder_contents(tmp_path) == whole


@pytest.mark.parametrize("name", ["replace", "fsync", "mkdir", "open"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO])
def test_every_call_may_be_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, code: int
) -> None:
    manifest = synthetic_cache(tmp_path, num_rows=20)
    whole = folder_contents(tmp_path)
    (tmp_path / "commits" / "demo" / "1.json").unlink()
    shutil.rmtree(tmp_path / "demo" / "cls" / "c" / "1")

    def refuse(*args: Any, **options: Any) -> Any:
        raise OSError(code, os.strerror(code), str(tmp_path))

    with monkeypatch.context() as patch:
        patch.setattr(os, name, refuse)
        with pytest.raises(RepaError) as caught:
            write_shard(tmp_path, manifest, 1)
    one_line(caught.value, str(tmp_path), os.strerror(code), "; ")
    write_shard(tmp_path, manifest, 1)
    assert folder_contents(tmp_path) == whole


def test_an_error_without_a_file_names_the_path_it_was_about(tmp_path: Path) -> None:
    with pytest.raises(RepaError) as caught, os_errors("write", tmp_path):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
    assert str(caught.value) == (
        f"cannot write {tmp_path}: Too many open files; raise the limit of open files, `ulimit -n`"
    )


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (errno.ENOENT, "No such file or directory; look at its name, or have it put there"),
        (errno.EISDIR, "Is a directory; a folder stands where a file is needed; name a file"),
        (errno.ENAMETOOLONG, "File name too long; choose a shorter name"),
        (errno.ESTALE, "Stale file handle; mend that, then run the same command again"),
    ],
)
def test_every_error_says_what_to_do(tmp_path: Path, code: int, said: str) -> None:
    with pytest.raises(RepaError) as caught, os_errors("read", tmp_path):
        raise OSError(code, os.strerror(code), str(tmp_path / "x"))
    assert str(caught.value) == f"cannot read {tmp_path}/x: {said}"


def test_missing_and_damaged_files_are_named(tmp_path: Path) -> None:
    manifest = synthetic_cache(tmp_path, num_rows=20)
    label = tmp_path / "label" / "c" / "0"
    values = label.read_bytes()
    for damaged in (values[:-1], values + b"\0", b"", np.roll(np.frombuffer(values, np.uint8), 1).tobytes()):
        label.write_bytes(damaged)
        with pytest.raises(CacheError, match="does not match its checksum") as caught:
            read_labels(tmp_path, manifest)
        one_line(caught.value, str(label))
    label.unlink()
    with pytest.raises(CacheError, match="is missing") as caught:
        read_labels(tmp_path, manifest)
    one_line(caught.value, str(label))
    group = tmp_path / "zarr.json"
    text = group.read_text()
    for damaged_text, message in [
        (text.replace("0.18215", "0.18216"), "does not match its checksum"),
        (text[:-10], "damaged"),
        ("[]", "damaged"),
        ('{"attributes": {"repa": 3}}', "has lost the manifest, which says what is in cache"),
    ]:
        group.write_text(damaged_text)
        for refuse in (open_manifest, cache_info):
            with pytest.raises(CacheError, match=message) as caught:
                refuse(tmp_path)
            one_line(caught.value, str(tmp_path))
        assert [finding.path for finding in verify_cache(tmp_path)] == [group]
