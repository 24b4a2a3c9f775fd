"""What `repa cache info` prints of compression and fidelity."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import pytest
from repa.commands.cache.info import info
from repa.data.format.columns import ColumnSpec
from repa.data.format.layout import shard_file
from repa.data.testing import SYNTHETIC_COLUMNS, synthetic_cache
from rich.console import Console

if TYPE_CHECKING:
    from pathlib import Path

ATTENTION = {
    "demo/q": ColumnSpec(shape=(2, 3, 4, 8), dtype="int8"),
    "demo/q-scale": ColumnSpec(shape=(2, 3, 8), dtype="float32"),
}
TOKENS = {"images": 64, "bytes_per_image": 12_345, "cosine_error_mean": 1.25e-5, "cosine_error_max": 0.0031}
DIVERGENCE = {
    "images": 48,
    "rank": 4,
    "bytes_per_image": 2_048,
    "kl_mean": 0.0025,
    "kl_worst_head": 0.008,
    "kl": [
        {"block": 8, "head": 1, "mean": 0.001, "p99": 0.01},
        {"block": 8, "head": 2, "mean": 0.002, "p99": 0.04},
        {"block": 8, "head": 3, "mean": 0.0015, "p99": 0.02},
        {"block": 10, "head": 1, "mean": 0.008, "p99": 0.03},
        {"block": 10, "head": 2, "mean": 0.001, "p99": 0.09},
        {"block": 10, "head": 3, "mean": 0.003, "p99": 0.01},
    ],
}


def printed(cache: Path) -> list[str]:
    output = io.StringIO()
    info(cache=cache, console=Console(file=output, width=200))
    return [each.rstrip() for each in output.getvalue().splitlines()]


def line(lines: list[str], start: str) -> str:
    (found,) = [each for each in lines if each.strip().startswith(start)]
    return found.strip()


@pytest.fixture
def compressed(tmp_path: Path) -> Path:
    columns = {
        "demo/patch": ColumnSpec(shape=(64, 64), dtype="float16", compressor="zstd"),
        "demo/cls": SYNTHETIC_COLUMNS["demo/cls"],
    }
    synthetic_cache(tmp_path / "cache", num_rows=20, columns=columns, shard_rows=8)
    return tmp_path / "cache"


def test_ratio_and_speeds_of_compressed_columns(compressed: Path) -> None:
    lines = printed(compressed)
    spec = ColumnSpec(shape=(64, 64), dtype="float16", compressor="zstd")
    stored = sum(shard_file(compressed, "demo/patch", spec, shard).stat().st_size for shard in range(3))
    start = lines.index("compression")
    name, codec, ratio, rows, reads, reads_unit, plain, plain_unit = lines[start + 2].split()
    assert (name, codec, rows) == ("demo/patch", "zstd", "20")
    assert ratio == f"{20 * 64 * 64 * 2 / stored:.3f}"
    assert float(reads) > 0
    assert float(plain) > 0
    assert {reads_unit, plain_unit} <= {"kB/s", "MB/s", "GB/s"}
    assert lines[start + 3].startswith("ratio: bytes of data to bytes on disk; speeds measured just now")


def test_no_word_of_compression_without_it(tmp_path: Path) -> None:
    synthetic_cache(tmp_path, num_rows=4)
    lines = printed(tmp_path)
    assert "compression" not in lines
    assert not any("KL" in each or "cosine" in each for each in lines)


def test_a_column_that_cannot_be_read_or_is_not_complete_has_no_speed(compressed: Path) -> None:
    spec = ColumnSpec(shape=(64, 64), dtype="float16", compressor="zstd")
    file = shard_file(compressed, "demo/patch", spec, 0)
    data = bytearray(file.read_bytes())
    data[5] ^= 1
    file.write_bytes(data)
    lines = printed(compressed)
    assert line(lines, "demo/patch was not read: row 0 of demo/patch is corrupt (wrong checksum)")
    (compressed / "commits" / "demo" / "0.json").unlink()
    lines = printed(compressed)
    assert len(lines[lines.index("compression") + 2].split()) == 3
    assert not any("was not read" in each for each in lines)


def test_fidelity_of_tokens_and_attention(tmp_path: Path) -> None:
    notes: dict[str, dict[str, Any]] = {
        "demo": {"fidelity": {**TOKENS, "repa_loss_change": 4.5e-4}},
        "demo+attention": {
            "blocks": [8, 10],
            "rank": 4,
            "form": "truncated",
            "calibration": {"images": 96, "sha256": "0" * 64},
            "fidelity": DIVERGENCE,
        },
    }
    synthetic_cache(tmp_path, num_rows=4, columns={**SYNTHETIC_COLUMNS, **ATTENTION}, notes=notes)
    lines = printed(tmp_path)
    assert line(lines, "demo: ") == (
        "demo: 1 − cosine of a stored token 1.25e-05 on average, 0.0031 at most, changes the REPA loss by "
        "0.00045, 12.3 kB per image; measured on 64 held-out images when it was written"
    )
    assert line(lines, "demo+attention: blocks") == (
        "demo+attention: blocks 8, 10 · rank 4 of 8 · truncated · keys centred · fitted to 96 images"
    )
    assert line(lines, "demo+attention: KL") == (
        "demo+attention: KL(teacher ‖ stored) 0.0025 nats on average, 0.008 in the worst head, 2.05 kB per "
        "image; measured on 48 held-out images when it was written"
    )
    # block, mean of its heads, its worst head's, which, the largest 99th percentile
    assert line(lines, "8 ").split() == ["8", "0.0015", "0.002", "2", "0.04"]
    assert line(lines, "10 ").split() == ["10", "0.004", "0.008", "1", "0.09"]


def test_attention_in_full_says_its_form_alone(tmp_path: Path) -> None:
    synthetic_cache(tmp_path, num_rows=4, columns={"demo/q": ColumnSpec(shape=(1, 2, 4, 8), dtype="float16")})
    assert line(printed(tmp_path), "demo+attention: ") == (
        "demo+attention: blocks 1 · rank 8 of 8 · exact · keys as computed"
    )
