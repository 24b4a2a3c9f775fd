"""The CLIP score of samples and their prompts, by a small CLIP that is saved here."""

from __future__ import annotations

import io
import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image
from repa.commands.evaluate.command import evaluate
from repa.commands.evaluate.flags import EvaluateFlags
from repa.data.errors import RepaError
from repa.trainer.evaluation.clip_score import clip_score
from rich.console import Console
from tiny_text import WORDS, save_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

transformers = pytest.importorskip("transformers")

PROMPTS = ["a red heart", "a blue star on dark", "a red star"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a CLIP of drawn weights, its tokenizer and its preprocessing."""
    folder = tmp_path_factory.mktemp("clip")
    save_tokenizer(folder, begins=True)
    transformers.CLIPImageProcessor(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
    ).save_pretrained(folder)
    torch.manual_seed(5)
    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config={
            **small,
            "vocab_size": 40,
            "max_position_embeddings": 6,
            "eos_token_id": 3,
            "bos_token_id": 1,
            "pad_token_id": 0,
        },
        vision_config={**small, "image_size": 16, "patch_size": 8},
        projection_dim=12,
    )
    model = transformers.CLIPModel(config)
    # so that cosines are above 0, where the score is not 0 for all
    model.text_projection.weight.data[0] += 0.3
    model.visual_projection.weight.data[0] *= torch.tensor([1.0, -1.0]).repeat(8) * 4
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    """Five images of noise, with a record that names three prompts in turn."""
    folder = tmp_path / "samples"
    folder.mkdir()
    random = np.random.default_rng(0)
    for number in range(5):
        image = Image.fromarray(random.integers(0, 256, (32, 32, 3), dtype=np.uint8))
        image.save(folder / f"{number:06d}.png")
    (folder / "sampling.json").write_text(json.dumps({"prompts": PROMPTS}))
    return folder


def measured(out: Path, **options: Any) -> dict[str, Any]:
    flags = {"reference": str(options["samples"]), "metrics": "clip_score", "out": out} | options
    evaluate(EvaluateFlags(**flags), console=Console(file=io.StringIO()))
    document = json.loads((out / "evaluation.json").read_text())
    (figure,) = document["evaluations"][-1]["figures"]
    return dict(figure)


def test_it_is_what_transformers_own_logits_say(clip: Path, samples: Path, tmp_path: Path) -> None:
    figure = measured(tmp_path / "out", samples=samples, clip=str(clip))
    model = transformers.CLIPModel.from_pretrained(clip).eval()
    images = [Image.open(samples / f"{number:06d}.png").convert("RGB") for number in range(5)]
    pixels = transformers.CLIPImageProcessor.from_pretrained(clip)(images=images, return_tensors="pt")
    scores = []
    for number in range(5):
        # each prompt alone, without padding, cut to six tokens with those of its begin and end
        words = PROMPTS[number % 3].split()[:4]
        tokens = torch.tensor([[1, *(4 + WORDS.index(word) for word in words), 3]])
        with torch.no_grad():
            logits = model(input_ids=tokens, pixel_values=pixels["pixel_values"][number : number + 1])
        scores.append(100 * max((logits.logits_per_image / model.logit_scale.exp()).item(), 0))
    assert np.count_nonzero(scores) > 0
    assert figure["value"] == pytest.approx(np.mean(scores), rel=1e-5)
    assert figure["spread"] == pytest.approx(np.std(scores) / 5**0.5, rel=1e-4)
    assert (figure["metric"], figure["network"], figure["n"]) == ("clip_score", "clip", 5)


def test_closed_forms() -> None:
    images = np.array([[2.0, 0.0], [0.0, 1.0], [3.0, 4.0]])
    texts = np.array([[1.0, 0.0], [0.0, -5.0], [3.0, 0.0]])
    found = clip_score(images, texts)
    assert found["clip_score"] == pytest.approx((100 + 0 + 60) / 3)
    assert found["clip_score_deviation"] == pytest.approx(np.std([100, 0, 60]) / 3**0.5)


def test_samples_without_prompts_and_folders_without_clip_are_told(
    clip: Path, samples: Path, tmp_path: Path
) -> None:
    with pytest.raises(RepaError) as caught:
        measured(tmp_path / "out", samples=samples, clip=str(tmp_path))
    assert caught.value.field == "--clip"
    with pytest.raises(RepaError) as caught:
        measured(tmp_path / "out", samples=samples, clip=str(clip), metrics="precision")
    assert caught.value.field == "--clip"
    (samples / "sampling.json").unlink()
    with pytest.raises(RepaError) as caught:
        measured(tmp_path / "out", samples=samples, clip=str(clip))
    assert caught.value.field == "--metrics"
