"""Tensors written part by part, against the library's own files."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from repa.trainer.sampling.streamed_tensors import StreamedTensor, write_tensors
from safetensors.numpy import save_file

if TYPE_CHECKING:
    from pathlib import Path

NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=8)
DRAWN = st.sampled_from(["int64", "float32", "float16"]).flatmap(
    lambda dtype: arrays(dtype, array_shapes(min_dims=1, max_dims=3, max_side=4))
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tensors")


@given(
    tensors=st.dictionaries(NAMES.filter(lambda name: name != "__metadata__"), DRAWN, min_size=1, max_size=4),
    word=st.text(max_size=8),
    size=st.integers(1, 3),
)
def test_the_bytes_are_the_library_s(
    folder: Path, tensors: dict[str, np.ndarray[Any, Any]], word: str, size: int
) -> None:
    save_file(tensors, folder / "library", metadata={"word": word})
    streamed = [
        StreamedTensor(
            name, array.dtype.name, array.shape, [array[i : i + size] for i in range(0, len(array), size)]
        )
        for name, array in tensors.items()
    ]
    with (folder / "ours").open("wb") as file:
        write_tensors(file, streamed, {"word": word})
    assert (folder / "ours").read_bytes() == (folder / "library").read_bytes()


@pytest.mark.parametrize("part", [np.zeros((1, 2), np.float16), np.zeros((2, 2), np.float32)])
def test_parts_that_are_not_the_tensor_are_refused(folder: Path, part: np.ndarray[Any, Any]) -> None:
    with (folder / "wrong").open("wb") as file, pytest.raises(ValueError, match="part"):
        write_tensors(file, [StreamedTensor("a", "float16", (2, 2), [part])], {})
