"""Feature shards: their bytes follow from what they hold, and what is damaged is not there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from repa.data.errors import RepaError
from repa.trainer.evaluation.feature_shards import IMAGE, FeatureShards, repeated
from repa.trainer.evaluation.networks import BATCH

COUNT = BATCH + 3


def shards(folder: Path, identity: str = "x", **changes: int) -> FeatureShards:
    return FeatureShards(
        folder=folder / "f", root=folder, identity=identity, count=COUNT, widths={"pool": 5, **changes}
    )


def filled(folder: Path) -> tuple[FeatureShards, np.ndarray]:
    generator = np.random.default_rng(0)
    values = generator.standard_normal((COUNT, 5)).astype(np.float32)
    images = generator.integers(0, 256, (COUNT, 2, 2, 3), dtype=np.uint8)
    made = shards(folder)
    for first in reversed(made.batches):
        made.write(first, images[first : first + BATCH], {"pool": values[first : first + BATCH]})
    return made, values


def test_what_is_written_is_read(tmp_path: Path) -> None:
    assert shards(tmp_path).missing() == [0, BATCH]
    made, values = filled(tmp_path)
    assert (made.missing(), made.absent()) == ([], 0)
    found = made.read()
    assert np.array_equal(found["pool"], values)
    assert found[IMAGE].shape == (COUNT, 16)
    assert repeated(found[IMAGE]) is None
    found[IMAGE][COUNT - 1] = found[IMAGE][4]
    assert repeated(found[IMAGE]) == (4, COUNT - 1)


def test_those_of_others_are_not_taken(tmp_path: Path) -> None:
    filled(tmp_path)
    assert shards(tmp_path, "y").missing() == [0, BATCH]
    assert shards(tmp_path, "x", logits=2).missing() == [0, BATCH]
    with pytest.raises(RepaError):
        shards(tmp_path, "y").read()


@settings(max_examples=60)
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), cut=st.booleans())
def test_damage_is_noticed(
    tmp_path_factory: pytest.TempPathFactory, place: float, bit: int, cut: bool
) -> None:
    folder = tmp_path_factory.mktemp("damage")
    made, _ = filled(folder)
    (file,) = folder.rglob("00000032.safetensors")
    content = bytearray(file.read_bytes())
    position = int(place * len(content))
    if cut:
        del content[position:]
    else:
        content[position] ^= 1 << bit
    file.write_bytes(content)
    assert made.missing() == [BATCH]
