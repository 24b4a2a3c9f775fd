"""Several processes at one cache: a shard has one writer, and declaring alike twice declares once."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from repa.data.errors import CacheError
from repa.data.format.opening import open_manifest
from repa.data.testing import SYNTHETIC_COLUMNS, folder_contents, synthetic_cache
from repa.data.writing.writer import SourceWriter

if TYPE_CHECKING:
    from pathlib import Path


def refused(error: BaseException) -> None:
    assert "\n" not in str(error)


HOLDER = """
import sys
from pathlib import Path
from repa.data.writing.writer import SourceWriter
from repa.data.format.opening import open_manifest
path = Path(sys.argv[1])
with SourceWriter(path, open_manifest(path), "demo", [1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_writer_of_a_shard_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    manifest = synthetic_cache(tmp_path, num_rows=20)
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with (
            pytest.raises(CacheError, match="another process is writing shard 1 of demo") as caught,
            SourceWriter(tmp_path, manifest, "demo", range(3)),
        ):
            pass
        refused(caught.value)
        with SourceWriter(tmp_path, manifest, "demo", [0, 2]) as writer:
            assert writer.remaining == []
            with (
                pytest.raises(CacheError, match="this process is already writing demo"),
                SourceWriter(tmp_path, manifest, "demo", []),
            ):
                pass
        with SourceWriter(tmp_path, manifest, "sd-vae", range(3)):
            pass
        other.kill()
        other.wait()
        with SourceWriter(tmp_path, manifest, "demo", range(3)):
            pass


SEVERAL = """
import sys
from pathlib import Path
from repa.data.testing import synthetic_cache
try:
    synthetic_cache(Path(sys.argv[1]), num_rows=4, columns={})
    from repa.data.writing.store import ensure_source
    from repa.data.testing import synthetic_provenance, SYNTHETIC_COLUMNS
    for source in ("sd-vae", "demo"):
        columns = {n: s for n, s in SYNTHETIC_COLUMNS.items() if n.startswith(source + "/")}
        ensure_source(Path(sys.argv[1]), source, synthetic_provenance(source, columns), columns)
except Exception as error:
    sys.exit(repr(error))
"""


def test_several_processes_may_declare_the_same_at_once(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    running = [subprocess.Popen([sys.executable, "-c", SEVERAL, str(shared)]) for _ in range(4)]
    assert [process.wait(timeout=600) for process in running] == [0, 0, 0, 0]
    alone = tmp_path / "alone"
    subprocess.run([sys.executable, "-c", SEVERAL, str(alone)], check=True, timeout=600)
    contents = folder_contents(alone)
    assert set(open_manifest(shared).columns) == set(SYNTHETIC_COLUMNS)
    # the order in which sources are declared is each process's own, so it is the same
    assert folder_contents(shared) == contents
