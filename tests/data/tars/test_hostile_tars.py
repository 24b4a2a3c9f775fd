"""Tars that others changed: one line or success, and nothing is written but the cache that is imported."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import tarfile
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest
from hostile_json import hostile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from repa.data.errors import CacheError, RepaError
from repa.data.tars.cache import TarCache
from repa.data.tars.export import export_cache, import_cache
from repa.data.tars.reader import open_tar
from repa.data.tars.shards import tar_key
from repa.data.testing import folder_contents, synthetic_cache

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def members(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {info.name: tar.extractfile(info).read() for info in tar}  # type: ignore[union-attr]


def rewrite(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def hostile_export(source: Path, out: Path, change: Callable[[dict[str, Any]], Any]) -> str:
    """An export of whose tars every header was changed; its pattern."""
    out.mkdir()
    for path in sorted(source.glob("*.tar")):
        shutil.copy(path, out / path.name)
        files = members(out / path.name)
        header = json.loads(files["__repa__/shard.json"])
        rewrite(out / path.name, {**files, "__repa__/shard.json": json.dumps(change(header)).encode()})
    return f"{out}/*.tar"


def test_a_source_that_is_a_path_is_refused(tmp_path: Path) -> None:
    """The name of a source became that of its calibration's file, anywhere on the disk."""
    synthetic_cache(tmp_path / "cache", num_rows=11)
    export_cache(tmp_path / "cache", tmp_path / "out")

    def change(header: dict[str, Any]) -> dict[str, Any]:
        sources = header["manifest"]["sources"]
        note = {"sha256": hashlib.sha256(b"theirs").hexdigest(), "images": 0}
        sources["../../ours"] = {**sources["demo"], "notes": {"calibration": note}}
        header["invalid"]["../../ours"] = {}
        return header

    pattern = hostile_export(tmp_path / "out", tmp_path / "evil", change)
    before = folder_contents(tmp_path)
    with pytest.raises(CacheError) as caught:
        import_cache(pattern, tmp_path / "new")
    assert caught.value.field == "source"
    with pytest.raises(CacheError):
        TarCache(pattern, ("demo/patch",))
    assert folder_contents(tmp_path) == before


@pytest.mark.parametrize(("field", "value"), [("keys", "other"), ("labels", 2)])
def test_keys_and_labels_are_those_of_the_manifest(tmp_path: Path, field: str, value: Any) -> None:
    synthetic_cache(tmp_path / "cache", num_rows=11)
    export_cache(tmp_path / "cache", tmp_path / "out")

    def change(header: dict[str, Any]) -> dict[str, Any]:
        return {**header, field: [value] * len(header[field])}

    with pytest.raises(CacheError) as caught:
        import_cache(hostile_export(tmp_path / "out", tmp_path / "evil", change), tmp_path / "new")
    assert caught.value.field == f"{field}_sha256"
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("key", ["/etc/x", "../x", "a/../../x", ".."])
def test_no_member_of_a_tar_leads_out_of_its_folder(key: str) -> None:
    with pytest.raises(CacheError):
        tar_key(key)
    assert tar_key("a/..b/c..d") == "a/..b/c%2E%2Ed"


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_header_is_read_or_refused(tmp_path: Path, data: st.DataObject) -> None:
    if not (tmp_path / "out").exists():
        synthetic_cache(tmp_path / "cache", num_rows=11, invalid={3: "broken"})
        export_cache(tmp_path / "cache", tmp_path / "out")
    for each in ("evil", "new"):
        shutil.rmtree(tmp_path / each, ignore_errors=True)
    pattern = hostile_export(tmp_path / "out", tmp_path / "evil", lambda header: data.draw(hostile(header)))
    with suppress(RepaError):
        import_cache(pattern, tmp_path / "new")
    with suppress(RepaError):
        tars = TarCache(pattern, ("demo/patch",))
        for shard in range(tars.manifest.num_shards):
            list(tars.samples(shard, lambda row: ("demo/patch",)))
    assert {each.name for each in tmp_path.iterdir()} <= {"cache", "out", "evil", "new"}


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(st.integers(0, 511), st.integers(0, 255)), max_size=4),
    st.integers(0, 12),
    st.booleans(),
)
def test_any_block_is_read_or_refused(
    tmp_path: Path, changes: list[tuple[int, int]], number: int, mended: bool
) -> None:
    """A block of a tar with other bytes, and with the checksum of a header made right again."""
    if not (tmp_path / "out").exists():
        synthetic_cache(tmp_path / "cache", num_rows=5)
        export_cache(tmp_path / "cache", tmp_path / "out")
    raw = bytearray((tmp_path / "out" / "shard-000000.tar").read_bytes())
    block = bytearray(raw[512 * number : 512 * number + 512])
    for where, value in changes:
        block[where] = value
    if mended:
        block[148:156] = b" " * 8
        block[148:156] = b"%06o\0 " % sum(block)
    raw[512 * number : 512 * number + 512] = block
    (tmp_path / "evil.tar").write_bytes(raw)
    with suppress(RepaError), open_tar(str(tmp_path / "evil.tar")) as reader:
        for _ in reader:
            reader.read(1 << 20)
    shutil.rmtree(tmp_path / "new", ignore_errors=True)
    with suppress(RepaError):
        import_cache(str(tmp_path / "evil.tar"), tmp_path / "new")
