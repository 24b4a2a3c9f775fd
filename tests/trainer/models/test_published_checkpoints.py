"""Published checkpoints: every form loads strictly, every wrong file is refused in one line."""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from repa.data.errors import RepaError
from repa.trainer.models.published import load_published
from repa.trainer.models.sit import SiT, SiTConfig
from safetensors.torch import load_file, save_file

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

CONFIG = SiTConfig(depth=2, width=32, heads=2, patch_size=2, input_size=8, num_classes=5)


def state_of(config: SiTConfig = CONFIG, seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    state = {key: torch.randn_like(value) for key, value in SiT(config).state_dict().items()}
    return state | {"projectors.0.0.weight": torch.randn(6, 32), "projectors.0.0.bias": torch.randn(6)}


def save(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def nested(**others: Any) -> dict[str, Any]:
    flags = argparse.Namespace(path_type="cosine", model="SiT-B/2", data_dir="/data", enc_type="dinov2-vit-b")
    optimiser = {"state": {0: {"step": torch.tensor(7.0)}}, "param_groups": [{"lr": 1e-4, "params": [0]}]}
    content = {
        "model": state_of(seed=1),
        "ema": state_of(seed=2),
        "opt": optimiser,
        "args": flags,
        "steps": 400_000,
    }
    return content | others


@pytest.mark.parametrize(("weights", "seed"), [("ema", 2), ("model", 1)])
def test_the_published_form(tmp_path: Path, weights: str, seed: int) -> None:
    found = load_published(save(tmp_path / "0400000.pt", nested()), weights=weights, heads=2)
    assert found.config == CONFIG
    assert (found.weights, found.objective, found.steps) == (weights, {"path": "cosine"}, 400_000)
    expected = state_of(seed=seed)
    assert set(found.projectors) == {"0.0.weight", "0.0.bias"}
    assert torch.equal(found.projectors["0.0.bias"], expected["projectors.0.0.bias"])
    model = found.build()
    assert not model.training
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["pos_embed"]
    for key, value in model.state_dict().items():
        assert torch.equal(value, expected[key]), key
    with torch.no_grad():
        model.pos_embed.zero_()  # the memory map is private: nothing reaches the file
    again = load_published(tmp_path / "0400000.pt", weights=weights, heads=2)
    assert again.backbone["pos_embed"].any()


@pytest.mark.parametrize("name", ["bare.pt", "bare.safetensors", "old-format.pth"])
def test_bare_state_dicts(tmp_path: Path, name: str) -> None:
    path, state = tmp_path / name, state_of()
    if name.endswith(".safetensors"):
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=not name.startswith("old"))
    found = load_published(path, heads=2)
    assert found.config == CONFIG
    assert (found.weights, found.objective, found.steps) == (None, {}, None)
    assert all(torch.equal(found.backbone[key], state[key]) for key in found.backbone)


def test_the_golden_file_gives_the_golden_model(shared: Path) -> None:
    file = shared / "golden" / "repa_sit.safetensors"
    found = load_published(file, heads=4)
    assert found.config == SiTConfig(depth=4, width=48, heads=4, patch_size=2, input_size=16)
    model = found.build()
    assert model.pos_embed.dtype == torch.float64
    stored = load_file(file)
    assert all(torch.equal(value, stored[key]) for key, value in model.state_dict().items())
    assert {f"projectors.{key}" for key in found.projectors} == set(stored) - set(model.state_dict())


@pytest.mark.parametrize("name", ["SiT-S/2", "SiT-B/4", "SiT-XL/2", "SiT-T/1"])
def test_known_sizes_need_no_heads(tmp_path: Path, name: str) -> None:
    config = SiTConfig.named(name, input_size=32 if name != "SiT-T/1" else 8, num_classes=10)
    with torch.device("meta"):
        shapes = {key: value.shape for key, value in SiT(config).state_dict().items()}
    # one number each, repeated: 0.7 billion parameters in a file of a few kilobytes
    state = {key: torch.zeros(1).expand(shape) for key, shape in shapes.items()}
    assert load_published(save(tmp_path / "sit.pt", state)).config == config


def test_qk_norm_tells_the_heads(tmp_path: Path) -> None:
    config = replace(CONFIG, qk_norm=True)
    assert load_published(save(tmp_path / "sit.pt", state_of(config))).config == config


def test_legacy_names_of_the_later_blocks(tmp_path: Path) -> None:
    state = state_of()
    renamed = {key.replace("blocks.1.", "decoder_blocks.0."): value for key, value in state.items()}
    assert renamed.keys() != state.keys()
    found = load_published(save(tmp_path / "legacy.pt", renamed), heads=2)
    assert torch.equal(found.backbone["blocks.1.attn.proj.weight"], state["blocks.1.attn.proj.weight"])


class Evil:
    """Runs code when unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("evil",)


def wrong_files(folder: Path) -> dict[str, tuple[Path, str]]:
    state = state_of()
    double = {"final_layer.linear.weight": torch.zeros(32, 32), "final_layer.linear.bias": torch.zeros(32)}
    texts = folder / "text.pt"
    texts.write_text("not a checkpoint\n")
    empty = folder / "empty.pt"
    empty.touch()
    cut = save(folder / "cut.pt", state)
    cut.write_bytes(cut.read_bytes()[:5000])
    cut_safe = folder / "cut.safetensors"
    save_file(state, cut_safe)
    cut_safe.write_bytes(cut_safe.read_bytes()[:5000])
    without = {key: value for key, value in state.items() if "blocks.1.mlp" not in key}
    return {
        "absent": (folder / "absent.pt", "cannot read .*No such file"),
        "folder": (folder, "cannot read .*directory"),
        "text": (texts, "no checkpoint of tensors"),
        "empty": (empty, "no checkpoint of tensors"),
        "cut": (cut, "no checkpoint of tensors"),
        "cut safetensors": (cut_safe, "no checkpoint of tensors"),
        "list": (save(folder / "list.pt", [1, 2]), "holds a list"),
        "code": (
            save(folder / "evil.pt", {"ema": Evil()}),
            r"plain values \(it holds other objects, or is damaged\)",
        ),
        "other model": (
            save(folder / "vit.pt", {"cls_token": torch.zeros(1)}),
            "no weights of a SiT .*cls_token",
        ),
        "no weights": (save(folder / "config.pt", {"lr": 0.1}), "holds no weights .it has lr"),
        "missing": (save(folder / "missing.pt", without), r"4 keys missing \(blocks.1.mlp.fc1.weight"),
        "unexpected": (
            save(folder / "more.pt", state | {"head.bias": torch.zeros(2)}),
            "1 key unexpected .head.bias",
        ),
        "shape": (
            save(folder / "shape.pt", state | {"t_embedder.mlp.0.bias": torch.zeros(3)}),
            "1 key of another shape .t_embedder.mlp.0.bias",
        ),
        "first SiT or DiT": (
            save(folder / "sit.pt", state | double),
            "predicts two channels .*DiT and the first SiT",
        ),
    }


@pytest.mark.parametrize(
    "kind",
    [
        "absent",
        "folder",
        "text",
        "empty",
        "cut",
        "cut safetensors",
        "list",
        "code",
        "other model",
        "no weights",
        "missing",
        "unexpected",
        "shape",
        "first SiT or DiT",
    ],
)
def test_wrong_files_are_refused_in_one_line(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path, message = wrong_files(tmp_path)[kind]
    with pytest.raises(RepaError, match=message) as caught:
        load_published(path, heads=2)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "evil").exists()


def test_unknown_sizes_and_weights(tmp_path: Path) -> None:
    path = save(tmp_path / "sit.pt", state_of())
    with pytest.raises(RepaError, match=r"depth 2 and width 32, which is no known size .*XL 28×1152"):
        load_published(path)
    with pytest.raises(RepaError, match="ema or model"):
        load_published(path, weights="best")
    only = save(tmp_path / "only.pt", {"model": state_of()})
    with pytest.raises(RepaError, match=r"holds no 'ema' weights, only 'model'"):
        load_published(only, heads=2)


@pytest.mark.filterwarnings("ignore:Validating sparse tensor")
@pytest.mark.parametrize(
    "changed",
    [
        lambda value: value.to(torch.int8),
        lambda value: value.to(torch.float8_e4m3fn),
        lambda value: value.to(torch.complex64),
        lambda value: value.to_sparse(),
        lambda value: value.to("meta"),
    ],
)
def test_weights_in_no_form_that_trains_are_refused(
    tmp_path: Path, changed: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    state = state_of()
    key = "blocks.1.attn.proj.weight"
    with pytest.raises(RepaError, match=key) as caught:
        load_published(save(tmp_path / "sit.pt", {**state, key: changed(state[key])}), heads=2)
    assert caught.value.field == "--ckpt"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_other_precision_load(tmp_path: Path, dtype: torch.dtype) -> None:
    state = {key: value.to(dtype) for key, value in state_of().items()}
    found = load_published(save(tmp_path / "sit.pt", state), heads=2)
    assert {value.dtype for value in found.backbone.values()} == {dtype}


def test_arbitrary_bytes_never_escape_as_another_error(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    path = save(tmp_path / "random.pt", state_of())
    legacy = tmp_path / "legacy.pt"
    torch.save({"lr": 0.1, "steps": [1, 2]}, legacy, _use_new_zipfile_serialization=False)
    start = legacy.read_bytes()
    for _ in range(300):
        noise = torch.randint(256, (60,), generator=generator, dtype=torch.uint8).numpy().tobytes()
        cut = int(torch.randint(len(start), (1,), generator=generator))
        path.write_bytes(start[:cut] + noise + start[cut + 60 :])
        with pytest.raises(RepaError):
            load_published(path, heads=2)
