"""Training from tars that come from elsewhere: a server on loopback, commands, and what breaks on the way."""

from __future__ import annotations

import shutil
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from repa.data.errors import RepaError
from repa.data.tars.cache import TarCache
from repa.data.tars.export import export_cache
from repa.data.tars.order import tar_permutation
from repa.data.testing import synthetic_cache
from repa.trainer.input.tar_stream import TarLoader
from repa.trainer.run.metrics import read_metrics

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from repa.data.reading.loader import Batch
    from repa.trainer.config import TrainConfig

COLUMNS = ("sd-vae/moments", "demo/patch")
TARS = "shard-{000000..000004}.tar"
BROKEN = 20_000  # bytes of a tar that the server gives when asked for ?broken


class Handler(SimpleHTTPRequestHandler):
    """Files of a folder; says nothing, and breaks off where it is asked to."""

    def log_message(self, *_: object) -> None:
        pass

    def copyfile(self, source: Any, outputfile: Any) -> None:
        if "?broken" in self.path:
            outputfile.write(source.read(BROKEN))
            return
        super().copyfile(source, outputfile)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("export")
    synthetic_cache(path / "cache", num_rows=40, shard_rows=8)
    export_cache(path / "cache", path / "out")
    return path / "out"


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    if shutil.which("curl") is None:
        pytest.skip("webdataset opens URLs by curl")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def batches(pattern: str, count: int = 9, **changes: Any) -> list[Batch]:
    cache = TarCache(pattern, COLUMNS)
    tars = TarLoader(cache, batch_size=8, columns_at=lambda step: COLUMNS, buffer=6, **changes)
    try:
        return [batch for _, batch in zip(range(count), tars, strict=False)]
    finally:
        tars.close()


@pytest.mark.parametrize("images_seen", [0, 24])
def test_batches_are_those_of_the_files(folder: Path, address: str, images_seen: int) -> None:
    local = batches(f"{folder}/{TARS}", images_seen=images_seen)
    for place in (
        f"{address}/{TARS}",
        f"pipe:curl -s -f {address}/{TARS}",
        f"pipe:cat '{folder}/{TARS}' | cat",
        f"file://{folder}/{TARS}",
    ):
        for ours, theirs in zip(batches(place, images_seen=images_seen), local, strict=True):
            assert (ours.step, ours.rows.tolist()) == (theirs.step, theirs.rows.tolist())
            assert ours.label.equal(theirs.label)
            assert all(torch.equal(ours.columns[name], theirs.columns[name]) for name in COLUMNS)


@pytest.mark.parametrize("command", ["", "pipe:curl -s -f "])
def test_a_connection_that_breaks_is_one_line(folder: Path, address: str, command: str) -> None:
    """Of the tar and of the member that it broke off in, after the batches before it."""
    bad = int(tar_permutation(0, 0, 5)[2])
    names = ",".join(f"shard-00000{number}.tar{'?broken' if number == bad else ''}" for number in range(5))
    place = f"{command}{address}/shard-00000{bad}.tar?broken"
    with pytest.raises(RepaError) as caught:
        batches(f"{command}{address}/{{{names}}}")
    # the fourth of the tar's eight samples
    assert str(caught.value) == (
        f"cannot read {place}: its command ended with status 18, after images/{8 * bad + 3:06d}%2Epng.cls; "
        "try its command or URL by itself"
    )
    assert "\n" not in str(caught.value)
    left = [thread for thread in threading.enumerate() if thread.name == "repa-tars"]
    for thread in left:
        thread.join(600)
    assert not any(thread.is_alive() for thread in left)


def test_a_tar_that_is_away_is_one_line(folder: Path, address: str) -> None:
    missing = "{000000,000001,000002,000003,000009}"
    with pytest.raises(
        RepaError, match=r"cannot read http.*shard-000009\.tar: .* status 22; try its"
    ) as caught:
        batches(f"{address}/shard-{missing}.tar")
    assert "\n" not in str(caught.value)


def test_a_run_reads_them_and_goes_on_from_files(
    settings: Callable[..., TrainConfig],
    run_fit: Callable[..., Any],
    folder: Path,
    address: str,
    tmp_path: Path,
    same_run: Callable[[Path, Path, int], None],
) -> None:
    def config(pattern: str, steps: int) -> TrainConfig:
        return settings(cache=pattern, max_steps=steps, checkpoint_every=steps, shuffle_buffer=6)

    run_fit(config(f"{folder}/{TARS}", 7), "whole")
    run_fit(config(f"{address}/{TARS}", 3), "parts")
    outcome, _ = run_fit(config(f"{address}/{TARS}", 7), "parts")
    assert outcome.resumed_from == 3
    assert len(read_metrics(tmp_path / "parts" / "metrics.csv")) == 7
    same_run(tmp_path / "whole", tmp_path / "parts", 7)
