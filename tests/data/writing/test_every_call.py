"""A writer killed at each of its calls to the disk, and every flipped bit of what it left."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest
from repa.data.errors import RepaError
from repa.data.upkeep.verify import verify_cache
from store_on_disk import SOURCES, Killed, life_of, same, whole, write

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.thorough

FLIPS = 840


def files_of(root: Path) -> dict[str, bytes]:
    return {str(file.relative_to(root)): file.read_bytes() for file in root.rglob("*") if file.is_file()}


def write_one_after_another(root: Path) -> None:
    for count in range(1, len(SOURCES) + 1):
        write(root, SOURCES[:count])


def test_a_kill_at_every_call_leaves_what_the_same_command_finishes(tmp_path: Path) -> None:
    kills, done = 0, False
    while not done:
        root = tmp_path / f"killed-{kills}"
        try:
            with life_of(kills):
                write_one_after_another(root)
            done = True
        except Killed:
            kills += 1
            write_one_after_another(root)
            assert files_of(root) == whole()[1]
    assert kills > 100


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    root = tmp_path / "cache"
    write(root, SOURCES)
    files = {name: content for name, content in files_of(root).items() if content}
    draw, flipped = random.Random(1), 0
    for name, content in files.items():
        for _ in range(-(-FLIPS // len(files))):
            bit = draw.randrange(8 * len(content))
            damaged = bytearray(content)
            damaged[bit // 8] ^= 1 << bit % 8
            if same(name, bytes(damaged), content):
                continue
            (root / name).write_bytes(damaged)
            flipped += 1
            try:
                found = bool(verify_cache(root))
            except RepaError:
                found = True
            assert found, (name, bit)
        (root / name).write_bytes(content)
    assert flipped > FLIPS * 0.9
