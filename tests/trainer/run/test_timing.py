"""What steps cost: seconds with and without what is beside training, bytes of the cache, memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from repa.data.errors import RepaError
from repa.trainer.run.metrics import read_metrics
from repa.trainer.run.timing import TIMING_FILE

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Settings = Callable[..., Any]
    Fit = Callable[..., tuple[Any, str]]


def test_rows_of_two_starts_add_up(settings: Settings, run_fit: Fit, tmp_path: Path) -> None:
    quick = {"method": "none", "log_every": 2, "checkpoint_every": 2, "threads": 1}
    run_fit(settings(**quick, max_steps=2))
    file = tmp_path / "run" / TIMING_FILE
    # a row of before costs were recorded, and one that a kill cut short
    file.write_text("step,images_per_second\n2,4.5\n2,1")
    run_fit(settings(**quick, max_steps=4))
    old, new = read_metrics(file)
    assert old == {"step": 2, "images_per_second": 4.5}
    assert list(new) == ["step", "images_per_second", "seconds", "devices", "bytes_read", "peak_memory"]
    # batches of 8 images of moments float32 [8, 4, 4]: two were trained on, and a few more read ahead
    batches, rest = divmod(new["bytes_read"], 8 * (8 * 4 * 4) * 4)
    assert (2 <= batches <= 6, rest) == (True, 0)
    assert new["devices"] == 1
    assert 0 < 16 / new["images_per_second"] <= new["seconds"] < 3600
    assert 50e6 < new["peak_memory"] < 100e9


def test_a_damaged_file_is_no_run_of_nothing(settings: Settings, run_fit: Fit, tmp_path: Path) -> None:
    run_fit(settings(method="none", max_steps=2, checkpoint_every=2))
    file = tmp_path / "run" / TIMING_FILE
    file.write_text("step,images_per_second\n2,many\n")
    with pytest.raises(RepaError) as caught:
        run_fit(settings(method="none", max_steps=4, checkpoint_every=2))
    assert caught.value.field == TIMING_FILE
    assert file.read_text().endswith("many\n")
