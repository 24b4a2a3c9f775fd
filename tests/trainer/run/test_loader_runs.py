"""The loader under Lightning: what it may change on resume, how it ends when a thread of it fails."""

from __future__ import annotations

import shutil
import threading
from typing import TYPE_CHECKING, Any

import pytest
from repa.data.errors import CacheError, RepaError
from repa.data.reading.loader import THREAD_NAME
from repa.data.testing import synthetic_cache

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from repa.trainer.config import TrainConfig

    Settings = Callable[..., TrainConfig]
    Fit = Callable[..., Any]
    SameRun = Callable[[Path, Path, int], None]


def loader_threads() -> list[str]:
    return [each.name for each in threading.enumerate() if each.name.startswith(THREAD_NAME)]


def test_an_error_of_a_reader_thread_ends_the_run_with_its_cause(
    settings: Settings, run_fit: Fit, cache: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(cache, copy)
    config = settings(cache=str(copy), max_steps=20, threads=3)
    run_fit(settings(cache=str(copy), max_steps=2, checkpoint_every=2, threads=3))
    from repa.data.reading import reader as module

    opened = module.CacheReader._opened

    def gone(self: module.CacheReader, threads: int) -> Any:
        shutil.rmtree(copy / "demo" / "patch" / "c", ignore_errors=True)
        return opened(self, threads)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.CacheReader, "_opened", gone)
        with pytest.raises(CacheError, match=r"row \d+ of demo/patch cannot be read") as caught:
            run_fit(config)
    assert isinstance(caught.value.__cause__, FileNotFoundError)
    frames = []
    trace = caught.value.__traceback__
    while trace is not None:
        frames.append(trace.tb_frame.f_code.co_name)
        trace = trace.tb_next
    # from the training loop down into the thread that read
    assert "fit" in frames
    assert "_read_part" in frames
    assert loader_threads() == []


def test_how_rows_are_read_may_change_on_resume(
    settings: Settings, run_fit: Fit, tmp_path: Path, same_run: SameRun
) -> None:
    run_fit(settings(max_steps=8, checkpoint_every=8), "whole")
    run_fit(settings(max_steps=3, checkpoint_every=3, direct="off", check_crc=False), "changed")
    run_fit(settings(max_steps=8, checkpoint_every=8, direct="auto"), "changed")
    same_run(tmp_path / "whole", tmp_path / "changed", 8)


def test_a_run_in_blocks_resumes_in_blocks(
    settings: Settings, run_fit: Fit, tmp_path: Path, same_run: SameRun
) -> None:
    run_fit(settings(max_steps=8, checkpoint_every=8, order="blocks"), "whole")
    run_fit(settings(max_steps=3, checkpoint_every=3, order="blocks"), "parts")
    with pytest.raises(RepaError, match=r"order \(blocks → full\)"):
        run_fit(settings(max_steps=8), "parts")
    run_fit(settings(max_steps=8, checkpoint_every=8, order="blocks"), "parts")
    same_run(tmp_path / "whole", tmp_path / "parts", 8)
    assert loader_threads() == []


def test_a_cache_in_other_shards_resumes_no_run_in_blocks(
    settings: Settings, run_fit: Fit, tmp_path: Path
) -> None:
    for rows in (8, 4):
        synthetic_cache(tmp_path / f"shards{rows}", num_rows=40, invalid={5: "damaged"}, shard_rows=rows)
    first, other = str(tmp_path / "shards8"), str(tmp_path / "shards4")
    run_fit(settings(cache=first, max_steps=3, checkpoint_every=3, order="blocks"), "blocks")
    with pytest.raises(CacheError, match=r"the cache is not the one .* \(order changed\)"):
        run_fit(settings(cache=other, max_steps=8, order="blocks"), "blocks")
    # the full permutation is of the rows alone
    run_fit(settings(cache=first, max_steps=3, checkpoint_every=3), "full")
    outcome, *_ = run_fit(settings(cache=other, max_steps=4), "full")
    assert outcome.resumed_from == 3
