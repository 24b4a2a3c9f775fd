"""The shipped text encoder: small, what the script builds, and it tells prompts apart."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from repa.pipeline.demo import TEXT_FOLDER, TEXT_LENGTH, TEXT_OPTIONS, TEXT_WIDTH
from repa.pipeline.demo.captions import FULL_PHRASES, captions, say, told, vocabulary
from repa.pipeline.demo.shapes import CLASS_NAMES, COLOUR_NAMES
from repa.pipeline.demo.train_text import (
    SPECIAL,
    build_text_model,
    build_tokenizer,
    contrastive_loss,
    save,
    tokenize,
)
from repa.pipeline.text.encoder import load_text_encoder, text_sizes
from repa.pipeline.text.registry import find_text_encoder
from safetensors import safe_open


@pytest.fixture(scope="module")
def encoder() -> Any:
    return load_text_encoder(find_text_encoder("demo-text"))


def test_shipped_files_are_small_float16_and_name_no_path() -> None:
    assert sum(file.stat().st_size for file in TEXT_FOLDER.iterdir()) < 300_000
    with safe_open(TEXT_FOLDER / "model.safetensors", framework="pt") as opened:
        assert {opened.get_slice(name).get_dtype() for name in opened.keys()} == {"F16"}  # noqa: SIM118
    config = json.loads((TEXT_FOLDER / "config.json").read_text())
    assert "_name_or_path" not in config
    assert {name: config[name] for name in TEXT_OPTIONS} == TEXT_OPTIONS


def test_the_script_writes_what_is_shipped_but_for_the_numbers(tmp_path: Any) -> None:
    save(build_text_model(), build_tokenizer(), tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {file.name for file in TEXT_FOLDER.iterdir()}
    own, shipped = (json.loads((at / "tokenizer.json").read_text()) for at in (tmp_path, TEXT_FOLDER))
    for each in (own, shipped):
        del each["padding"], each["truncation"]
    assert own == shipped
    assert TEXT_OPTIONS["vocab_size"] == len(SPECIAL) + len(vocabulary())
    for file in (*tmp_path.iterdir(), *TEXT_FOLDER.iterdir()):
        assert file.stat().st_mode & 0o444 == 0o444


def test_every_caption_is_known_and_fits() -> None:
    every = sorted({caption for index in range(300) for caption in captions(index, 0)})
    numbers = tokenize(build_tokenizer(), every)
    assert not (numbers == SPECIAL.index("<unknown>")).any()
    assert (numbers == SPECIAL.index("<end>")).sum(1).eq(1).all()
    assert numbers.shape == (len(every), TEXT_LENGTH)


def test_prompts_are_told_apart_and_phrases_are_not(encoder: Any) -> None:
    pairs = [(shape, colour) for shape in CLASS_NAMES for colour in COLOUR_NAMES]
    pooled = {
        phrase: torch.from_numpy(encoder.encode([say(phrase, *pair) for pair in pairs])["pooled"])
        for phrase in FULL_PHRASES
    }
    one = torch.nn.functional.normalize(pooled[FULL_PHRASES[0]], dim=1)
    for phrase in FULL_PHRASES[1:]:
        other = torch.nn.functional.normalize(pooled[phrase], dim=1)
        assert ((one @ other.T).argmax(1) == torch.arange(len(pairs))).float().mean() > 0.95, phrase


def test_an_unknown_word_changes_little(encoder: Any) -> None:
    found = encoder.encode(["a green star on dark", "a green star on velvet", "a red star on dark"])["pooled"]
    known, unknown, red = found / np.linalg.norm(found, axis=1, keepdims=True)
    assert known @ unknown > 0.9 > known @ red
    assert told("a green star on velvet") == told("a green star on dark")


def test_columns_are_what_the_source_says(encoder: Any) -> None:
    found = encoder.encode(["A Red heart", ""])
    columns = text_sizes(find_text_encoder("demo-text"), None).columns("demo-text", "float16")
    assert found["states"].shape == (2, *columns["demo-text/states"].shape) == (2, TEXT_LENGTH, TEXT_WIDTH)
    assert found["pooled"].shape == (2, *columns["demo-text/pooled"].shape)
    assert found["mask"].tolist() == [[1] * 5 + [0] * 7, [1] * 2 + [0] * 10]
    assert np.array_equal(found["states"][0], encoder.encode(["a red HEART"])["states"][0])
    assert np.abs(found["states"]).max() < 100.0


def test_random_weights_load_what_is_shipped(encoder: Any) -> None:
    other = load_text_encoder(find_text_encoder("demo-text"), random_weights=True)
    assert (other.weights_sha256, other.random_weights) == (encoder.weights_sha256, False)


def test_contrastive_loss_by_hand() -> None:
    similarity = torch.tensor([[2.0, 1.0], [0.0, 3.0]], dtype=torch.float64)
    true = torch.tensor([[True, True], [False, True]])
    # texts: the first is true of both, the second of the second; images: the first has one, the second both
    texts = (0.0 + np.log(1 + np.exp(-3.0))) / 2
    images = (np.log(1 + np.exp(-2.0)) + 0.0) / 2
    assert contrastive_loss(similarity, true).item() == pytest.approx((texts + images) / 2, abs=1e-12)
