"""Files of weights: what is read, what is refused, and the hash of a state dict."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import pytest
import torch
from repa.data.errors import RepaError
from repa.pipeline.demo import TEACHER_WEIGHTS
from repa.pipeline.encoders import load_encoder
from repa.pipeline.encoders.weights import read_state_dict, weights_sha256
from safetensors.torch import load_file, save_file

if TYPE_CHECKING:
    from pathlib import Path


class Stranger:
    """Something a pickle can hold."""


def wrong(how: str, path: Path) -> None:
    state = dict(load_file(TEACHER_WEIGHTS))
    if how == "missing":
        state.pop("norm.weight")
        save_file(state, path)
    elif how == "unexpected":
        save_file({**state, "blocks.0.ls1.gamma": torch.ones(128)}, path)
    elif how == "another shape":
        save_file({**state, "norm.weight": torch.ones(64)}, path)
    elif how == "another patch":
        save_file({**state, "patch_embed.proj.weight": torch.zeros(128, 3, 16, 16)}, path)
    elif how == "another table":
        save_file({**state, "pos_embed": torch.zeros(1, 18, 128)}, path)
    elif how == "text":
        path.write_text("<html>")
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "truncated":
        path.write_bytes(TEACHER_WEIGHTS.read_bytes()[:-50])
    elif how == "pickle":
        torch.save({"model": Stranger()}, path)
    elif how == "numbers":
        torch.save({"epoch": 3, "weight": torch.zeros(2)}, path)
    elif how == "list":
        torch.save([torch.zeros(2)], path)
    elif how == "folder":
        path.mkdir()


@pytest.mark.parametrize(
    ("how", "suffix", "message"),
    [
        ("missing", "safetensors", r"of its tensors are 1 missing \(norm\.weight\); bring"),
        ("unexpected", "safetensors", r"1 unexpected \(blocks\.0\.ls1\.gamma\)"),
        ("another shape", "safetensors", r"1 of another shape \(norm\.weight \[64\] for \[128\]\)"),
        ("another patch", "safetensors", "its patches have 16 pixels a side, not 8"),
        ("another table", "safetensors", "does not fit demo"),
        ("text", "safetensors", "neither safetensors nor a tensors-only PyTorch file"),
        ("text", "pth", r"tensors-only PyTorch file \(it holds other objects, or is damaged\); save"),
        ("empty", "pth", "neither safetensors nor a tensors-only PyTorch file"),
        ("empty", "safetensors", "neither safetensors nor a tensors-only PyTorch file"),
        ("truncated", "safetensors", "neither safetensors nor a tensors-only PyTorch file"),
        ("pickle", "pth", r"tensors-only PyTorch file \(it holds other objects, or is damaged\); save"),
        ("numbers", "pth", r"holds more than tensors \(epoch\)"),
        ("list", "pth", "holds no state dict"),
        ("folder", "pth", "is a folder"),
        ("nothing", "pth", "does not exist"),
    ],
)
def test_wrong_weights_are_one_line(how: str, suffix: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / f"weights.{suffix}"
    wrong(how, path)
    with pytest.raises(RepaError, match=message) as error:
        load_encoder("demo", resolution=64, weights=path)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)


def test_the_hash_is_of_names_types_shapes_and_bytes() -> None:
    state = {
        "b": torch.tensor(1.5, dtype=torch.bfloat16),
        "a": torch.arange(6, dtype=torch.float32).reshape(2, 3).T,
    }
    text = b"a\tfloat32\t3,2\n" + torch.tensor([0.0, 3, 1, 4, 2, 5]).numpy().tobytes()
    text += b"b\tbfloat16\t\n" + bytes([0xC0, 0x3F])
    assert weights_sha256(state) == hashlib.sha256(text).hexdigest()
    assert weights_sha256(dict(reversed(state.items()))) == weights_sha256(state)
    assert weights_sha256({**state, "a": state["a"].contiguous().reshape(2, 3)}) != weights_sha256(state)


def test_reading_gives_tensors_only(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "w.pth")
    assert torch.equal(read_state_dict(tmp_path / "w.pth")["w"], torch.ones(2))
