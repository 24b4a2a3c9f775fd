"""Any order of writing, dying, damaging, repairing and reading: what is read is right, or an error says why.

The oracle is a cache written in one go: since bytes depend on nothing but the values, every file must be its
file there, and what is not is damage.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from repa.data.errors import CacheError, CorruptRowError
from repa.data.format.columns import source_of
from repa.data.format.layout import zarr_documents
from repa.data.format.manifest import Manifest
from repa.data.format.opening import open_manifest, read_keys, read_labels
from repa.data.format.survey import committed_shards
from repa.data.reading.reader import CacheReader
from repa.data.testing import expected_labels, expected_row
from repa.data.upkeep import repair, verify
from repa.data.upkeep.repair import plan_repair, restore_documents, restore_tables, withdraw
from repa.data.upkeep.verify import verify_cache
from repa.data.writing import store
from store_on_disk import (
    COLUMNS,
    INVALID,
    ROWS,
    SHARD_ROWS,
    SHARDS,
    SOURCES,
    VIEWS,
    CacheOnDisk,
    Killed,
    life_of,
    right_or,
    whole,
    write,
)


@pytest.fixture(autouse=True)
def _documents_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Zarr's documents are a pure function, and most of this test's time: compute each once."""
    made: dict[str, dict[str, bytes]] = {}

    def documents(manifest: Manifest, *, attributes: Any = None, labels: Any = None) -> dict[str, bytes]:
        key = repr((manifest, attributes, labels))
        if key not in made:
            made[key] = zarr_documents(manifest, attributes=attributes, labels=labels)
        return dict(made[key])

    for module in (store, verify, repair):
        monkeypatch.setattr(module, "zarr_documents", documents)


class StoreMachine(CacheOnDisk, RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="repa-machine-"))
        self.path = self.folder / "cache"
        self.turn = 0
        self.group = None

    def teardown(self) -> None:
        """However it ended: it can be repaired, and is what it would have been."""
        try:
            if self.group is not None:
                self.verify()
                self.bring_the_manifest_back()
                self.verify()
                self.repair(None)
                for source in self.manifest().sources:
                    assert self.readable({source})
                    self.read({source})
        finally:
            shutil.rmtree(self.folder)

    def run_to(self, steps: int | None, work: Callable[[], object]) -> bool:
        """Do something for so many steps; True when it came to its end."""
        group = self.path / "zarr.json"
        before = group.read_bytes() if group.exists() else None
        try:
            with life_of(steps):
                work()
            return True
        except Killed:
            return False
        finally:
            after = group.read_bytes() if group.exists() else None
            if after != before:
                self.group = after

    def refusal(self) -> Path | None:
        """The file for which a writer must refuse to go on."""
        if self.group is None:
            return None
        try:
            assert open_manifest(self.path) == self.manifest()
        except CacheError:
            assert not self.sound("zarr.json")
            return self.path / "zarr.json"
        return None if self.sound("label/c/0") else self.path / "label/c/0"

    @initialize(finished=st.booleans())
    def begin(self, finished: bool) -> None:
        """With nothing, or at once with a finished cache: damage is done to those most of the time."""
        if finished:
            for name, content in whole()[1].items():
                (self.path / name).parent.mkdir(parents=True, exist_ok=True)
                (self.path / name).write_bytes(content)
            self.group = whole()[1]["zarr.json"]

    @rule(count=st.integers(0, len(SOURCES)), steps=st.none() | st.integers(0, 90))
    def write_or_resume(self, count: int, steps: int | None) -> None:
        if (refused_for := self.refusal()) is not None:
            folder = self.path if refused_for.name == "zarr.json" else refused_for
            with pytest.raises(CacheError, match=re.escape(str(folder))):
                write(self.path, SOURCES[:count])
            return
        finished = self.run_to(steps, lambda: write(self.path, SOURCES[:count]))
        if finished:
            manifest = self.manifest()
            assert set(SOURCES[:count]) <= manifest.sources.keys()
            for source in SOURCES[:count]:
                assert committed_shards(self.path, manifest, source) == list(range(SHARDS))

    @precondition(lambda self: self.group is not None)
    @rule(data=st.data(), anywhere=st.integers(0, 2).map(lambda drawn: drawn == 0))
    def flip_a_bit(self, data: st.DataObject, anywhere: bool) -> None:
        files = {name: file for name, file in self.files().items() if anywhere or "/c/" in name}
        if not files:
            return
        file = files[data.draw(st.sampled_from(sorted(files)), label="file")]
        content = bytearray(file.read_bytes())
        bit = data.draw(st.integers(0, 8 * len(content) - 1), label="bit")
        content[bit // 8] ^= 1 << bit % 8
        file.write_bytes(content)

    @precondition(lambda self: self.group is not None)
    @rule(data=st.data())
    def lose_or_cut_a_file(self, data: st.DataObject) -> None:
        names = sorted(name for name in self.files() if name != "zarr.json")
        if not names:
            return
        file = self.path / data.draw(st.sampled_from(names), label="file")
        kept = data.draw(st.none() | st.integers(0, file.stat().st_size), label="kept")
        if kept is None:
            file.unlink()
        else:
            os.truncate(file, kept)

    @precondition(lambda self: self.group is not None and not self.sound("zarr.json"))
    @rule()
    def bring_the_manifest_back(self) -> None:
        assert self.group is not None
        (self.path / "zarr.json").write_bytes(self.group)

    @precondition(lambda self: self.group is not None)
    @rule()
    def verify(self) -> None:
        findings = verify_cache(self.path)
        for finding in findings:
            assert "\n" not in str(finding)
            assert str(finding.path) in str(finding)
        names = {finding: str(finding.path.relative_to(self.path)) for finding in findings}
        strays = {name for finding, name in names.items() if "is not the cache's" in finding.what}
        found = {*names.values()} - strays
        if not self.sound("zarr.json"):
            # when the manifest itself is damaged nothing else can be said
            assert found == {"zarr.json"} or (open_manifest(self.path) and "zarr.json" in found)
            return
        assert found == {name for name in self.names() if not self.sound(name)}
        assert all(name.endswith(".partial") or not self.is_declared(name) for name in strays)
        for source, shard in self.shards():
            for column, name in self.shard_files(source, shard).items():
                if name in found:
                    rows = {finding.row for finding, each in names.items() if each == name}
                    # a file cut off, or a damaged index, is no row's damage alone
                    assert rows == {row for row, _ in self.bad_rows(column, shard) or [(None, 0)]}, name

    @precondition(lambda self: self.group is not None)
    @rule(sources=st.sets(st.sampled_from(SOURCES), min_size=1))
    def read(self, sources: set[str]) -> None:
        wanted = [column for column in COLUMNS if source_of(column) in sources]
        if not self.readable(sources):
            with right_or(CacheError) as caught:
                CacheReader(self.path, wanted)
            if caught:
                assert "\n" not in str(caught[0])
                assert str(self.path) in str(caught[0])
                return
        reader = CacheReader(self.path, wanted)
        assert np.array_equal(reader.labels, expected_labels(ROWS, 3))
        assert list(reader.valid_rows) == [row for row in range(ROWS) if row not in INVALID]
        with reader:
            for row in reader.valid_rows.tolist():
                for column in wanted:
                    self.read_row(reader, column, row)

    def read_row(self, reader: CacheReader, column: str, row: int) -> None:
        bad = self.bad_rows(column, row // SHARD_ROWS)
        name = self.shard_files(source_of(column), row // SHARD_ROWS)[column]
        spec = COLUMNS[column]
        for view in range(len(VIEWS)):
            out = {column: np.empty((1, *spec.shape), dtype=spec.numpy_dtype)}
            with right_or(CorruptRowError) as caught:
                reader.read_rows(np.array([row]), [column], out, views=np.array([view]))
            if caught:
                error = caught[0]
                assert (error.row, error.column, error.path) == (row, column, str(self.path / name))
                assert all(part in str(error) for part in (f"row {row} ", column, error.path))
                assert bad is None or (row, view) in bad
            else:
                assert bad is None or (row, view) not in bad
                assert np.array_equal(out[column][0], expected_row(column, row, spec, view=view))

    @precondition(lambda self: self.group is not None)
    @rule(steps=st.none() | st.integers(0, 60))
    def repair(self, steps: int | None) -> None:
        findings = verify_cache(self.path)
        with right_or(CacheError) as caught:
            plan = plan_repair(self.path, findings)
        if caught:
            assert str(self.path) in str(caught[0])
            assert not self.sound("zarr.json")
            return
        manifest = open_manifest(self.path)
        assert all(set(plan.rows[source]).isdisjoint(INVALID) for source in plan.rows)

        def mend() -> None:
            restore_documents(self.path, plan)
            keys = [f"images/{row:06d}.png" for row in range(ROWS)]
            restore_tables(self.path, manifest, keys, expected_labels(ROWS, 3))
            withdraw(self.path, manifest, plan.shards)
            # of a source at a time, as declared: the normal way of writing
            for source in plan.sources:
                write(self.path, (source,))

        if self.run_to(steps, mend):
            assert verify_cache(self.path) == list(plan.strays)
            assert read_keys(self.path, manifest)[3] == "images/000003.png"
            assert np.array_equal(read_labels(self.path, manifest), expected_labels(ROWS, 3))
            for source in manifest.sources:
                for shard in range(SHARDS):
                    for name in (self.record(source, shard), *self.shard_files(source, shard).values()):
                        assert self.sound(name), name

    @invariant()
    def the_manifest_is_old_or_new(self) -> None:
        if self.group is not None and self.sound("zarr.json"):
            assert set(self.manifest().sources) <= set(SOURCES)

    @invariant()
    def what_is_read_is_right(self) -> None:
        """Hypothesis leaves rules out of a run: reading and verifying must be in all of them."""
        self.turn += 1
        if self.group is not None:
            self.read({SOURCES[self.turn % len(SOURCES)]})
            if self.turn % 4 == 0:
                self.verify()


StoreMachine.TestCase.settings = settings(
    max_examples=30,
    stateful_step_count=12,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],  # a failing run of 12 steps says enough; shrinking it takes minutes
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
TestStore = StoreMachine.TestCase
