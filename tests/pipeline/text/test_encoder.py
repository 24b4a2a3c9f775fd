"""Text encoders, whose states are those of transformers by hand, joined as Stable Diffusion joins them."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from repa.data.errors import RepaError
from repa.pipeline.text.encoder import TextEncoder, load_text_encoder, text_sizes
from repa.pipeline.text.facts import TEXT_ENCODERS
from repa.pipeline.text.form import TextForm, deviation_note
from repa.pipeline.text.registry import find_text_encoder
from safetensors.torch import load_file
from tiny_text import save_clip, save_stable_diffusion_3, save_t5
from transformers import AutoTokenizer, CLIPTextModel, CLIPTextModelWithProjection, T5EncoderModel

if TYPE_CHECKING:
    from pathlib import Path

TEXTS = ["a red heart on dark", "", "two blue star"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text")
    save_clip(path / "clip", path / "clip", seed=1)
    save_t5(path / "t5", path / "t5", seed=3)
    save_stable_diffusion_3(path / "sd3")
    return path


def load(name: str, folder: Path) -> TextEncoder:
    return load_text_encoder(find_text_encoder(name), folder=folder)


def numbers(folder: Path, length: int) -> torch.Tensor:
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    found = tokenizer(TEXTS, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return found["input_ids"]


def penultimate(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    """Run all blocks but the last, without the final norm."""
    model: Any = CLIPTextModelWithProjection.from_pretrained(folder)
    own = getattr(model.text_model, "text_model", model.text_model)
    del own.encoder.layers[-1]
    own.final_layer_norm = torch.nn.Identity()
    with torch.inference_mode():
        return own(input_ids=tokens).last_hidden_state


def test_states_of_clip_are_those_after_the_final_norm(folder: Path) -> None:
    found = load("clip-l-text", folder / "clip").encode(TEXTS)
    model: Any = CLIPTextModel.from_pretrained(folder / "clip")
    tokens = numbers(folder / "clip", 77)
    with torch.inference_mode():
        expected = model(input_ids=tokens)
    np.testing.assert_array_equal(found["states"], expected.last_hidden_state.numpy())
    np.testing.assert_array_equal(found["pooled"], expected.pooler_output.numpy())
    # the pooled vector is the state of the token of the end
    end = [5 + 1, 1, 3 + 1]
    np.testing.assert_allclose(found["pooled"], found["states"][range(3), end], rtol=1e-6)
    assert found["mask"].dtype == np.uint8
    assert found["mask"].sum(1).tolist() == [each + 1 for each in end]


def test_penultimate_states_are_what_the_last_block_is_given(folder: Path) -> None:
    found = load("clip-l-penultimate-text", folder / "clip").encode(TEXTS)
    expected = penultimate(folder / "clip", numbers(folder / "clip", 77))
    np.testing.assert_allclose(found["states"], expected.numpy(), rtol=1e-5, atol=1e-6)
    assert found["pooled"].shape == (3, 12)


@pytest.mark.parametrize(("name", "length"), [("t5-xxl-text", 256), ("t5-xxl-512-text", 512)])
def test_t5_attends_to_its_padding_and_has_a_mask(folder: Path, name: str, length: int) -> None:
    found = load(name, folder / "t5").encode(TEXTS)
    model: Any = T5EncoderModel.from_pretrained(folder / "t5")
    with torch.inference_mode():
        expected = model(input_ids=numbers(folder / "t5", length)).last_hidden_state
    np.testing.assert_array_equal(found["states"], expected.numpy())
    assert found.keys() == {"states", "mask"}
    assert found["mask"].sum(1).tolist() == [6, 1, 4]


def test_stable_diffusion_3_pads_clip_and_lets_t5_follow(folder: Path) -> None:
    found = load("sd3-text", folder / "sd3").encode(TEXTS)
    own = folder / "sd3"
    first = penultimate(own / "text_encoder", numbers(own / "tokenizer", 77))
    second = penultimate(own / "text_encoder_2", numbers(own / "tokenizer_2", 77))
    last = load("t5-xxl-text", _part(own)).encode(TEXTS)["states"]
    states = found["states"]
    assert states.shape == (3, 77 + 256, 40)
    np.testing.assert_allclose(states[:, :77, :16], first.numpy(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(states[:, :77, 16:36], second.numpy(), rtol=1e-5, atol=1e-6)
    assert not states[:, :77, 36:].any()
    np.testing.assert_array_equal(states[:, 77:], last)
    assert found["pooled"].shape == (3, 12 + 14)


def _part(own: Path) -> Path:
    """Put network and tokenizer of the third encoder together, as the hub has T5 alone."""
    alone = own.parent / "alone"
    if not alone.exists():
        shutil.copytree(own / "text_encoder_3", alone)
        shutil.copytree(own / "tokenizer_3", alone / "tokenizer")
    return alone


def test_the_context_is_what_the_models_frozen_embedder_makes_of_it(folder: Path) -> None:
    own = folder / "sd3"
    text, context = (load(name, own) for name in ("sd3-512-text", "sd3-512-context"))
    tensors = load_file(own / "transformer" / "diffusion_pytorch_model.safetensors")
    states = torch.from_numpy(text.encode(TEXTS)["states"])
    expected = states @ tensors["context_embedder.weight"].T + tensors["context_embedder.bias"]
    np.testing.assert_allclose(context.encode(TEXTS)["states"], expected.numpy(), rtol=1e-4, atol=1e-5)
    # it is tied to that checkpoint
    assert context.weights_sha256 != text.weights_sha256
    assert text_sizes(context.facts, own) == context.sizes


def test_the_empty_caption_of_sdxl_is_zeros(folder: Path) -> None:
    found = load("sdxl-text", folder / "sd3").encode(TEXTS)
    assert found["states"].shape == (3, 77, 36)
    assert found["pooled"].shape == (3, 14)
    for values in found.values():
        assert not values[1].any()
        assert values[0].any()
        assert values[2].any()


def test_what_is_known_without_files_are_the_published_sizes() -> None:
    shapes = {
        name: {
            column.split("/")[1]: spec.shape for column, spec in row.sizes().columns(name, "float16").items()
        }
        for name, row in TEXT_ENCODERS.items()
    }
    assert shapes["clip-l-text"] == {"states": (77, 768), "pooled": (768,), "mask": (77,)}
    assert shapes["clip-g-text"] == {"states": (77, 1280), "pooled": (1280,), "mask": (77,)}
    assert shapes["t5-xxl-512-text"] == {"states": (512, 4096), "mask": (512,)}
    assert shapes["sdxl-text"] == {"states": (77, 2048), "pooled": (1280,)}
    assert shapes["sd3-text"] == {"states": (333, 4096), "pooled": (2048,)}
    assert shapes["sd3-512-context"] == {"states": (589, 1536), "pooled": (2048,)}


def test_drawn_weights_are_the_same_every_time_and_say_so() -> None:
    row = TEXT_ENCODERS["clip-l-text"]
    # as wide as the real one, and far less deep
    config = {**row.parts[0].config, "num_hidden_layers": 1, "vocab_size": 300, "eos_token_id": 299}
    facts = replace(row, parts=(replace(row.parts[0], config={**config, "bos_token_id": 298}),))
    one, other = (load_text_encoder(facts, random_weights=True) for _ in range(2))
    assert one.weights_sha256 == other.weights_sha256
    assert one.provenance(2).random_weights
    found = one.encode(["é", ""])
    assert found["states"].shape == (2, 77, 768)
    # beginning, two bytes, end
    assert found["mask"].sum(1).tolist() == [4, 2]


def test_int8_and_float16_lose_little_and_it_is_measured(folder: Path) -> None:
    encoder = load("clip-l-text", folder / "clip")
    tokens = torch.from_numpy(encoder.tokens(TEXTS))
    features = encoder.features(tokens)
    notes = {}
    for dtype in ("float16", "float32", "int8"):
        form = TextForm(name=encoder.name, sizes=encoder.sizes, dtype=dtype)
        stored = form.encode(features)
        assert {name: (spec.shape, spec.dtype) for name, spec in form.columns.items()} == {
            name: (tuple(each.shape[1:]), str(each.dtype).removeprefix("torch."))
            for name, each in stored.items()
        }
        notes[dtype] = deviation_note([(features["states"], form.restore(stored))], encoder.name)
    assert notes["float32"]["relative_rms"] == 0
    assert 0 < notes["float16"]["relative_rms"] < 1e-3
    assert notes["float16"]["relative_rms"] < notes["int8"]["relative_rms"] < 2e-2
    assert notes["int8"]["cosine_error_max"] < 1e-3
    assert notes["int8"]["captions"] == 3


def test_other_files_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RepaError) as caught:
        find_text_encoder("clip-l-txt")
    assert caught.value.field == "--text-encoder"
    assert "clip-l-text" in caught.value.remedy
    for name, place in (("clip-l-text", tmp_path / "none"), ("sd3-text", folder / "clip")):
        with pytest.raises(RepaError) as caught:
            load(name, place)
        assert caught.value.field == "--weights"
    # a tensor that is missing would be drawn in silence
    broken = tmp_path / "broken"
    shutil.copytree(folder / "clip", broken)
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 4}))
    with pytest.raises(RepaError, match="missing"):
        load("clip-l-text", broken)
    (broken / "config.json").write_text(json.dumps({**config, "hidden_size": 32}))
    with pytest.raises(RepaError) as caught:
        load("clip-l-text", broken)
    assert caught.value.field == "--weights"
