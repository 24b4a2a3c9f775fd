"""Tiny text encoders with drawn weights and tokenizers of a few words, in the layout of the hub."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from pathlib import Path

WORDS = ("a", "red", "blue", "heart", "star", "on", "dark", "light", "two", "thing", "of", "kind")
CLIP = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "max_position_embeddings": 77,
    "projection_dim": 12,
    "bos_token_id": 1,
    "eos_token_id": 3,
    "pad_token_id": 0,
}
T5 = {"vocab_size": 40, "d_model": 40, "d_kv": 8, "d_ff": 16, "num_layers": 2, "num_heads": 2}


def save_tokenizer(folder: Path, *, begins: bool) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<begin>", "<unknown>", "<end>"]
    vocabulary = {word: number for number, word in enumerate([*special, *WORDS])}
    own = Tokenizer(models.WordLevel(vocabulary, unk_token="<unknown>"))
    own.pre_tokenizer = pre_tokenizers.Whitespace()
    single = "<begin> $A <end>" if begins else "$A <end>"
    own.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[("<begin>", 1), ("<end>", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=own, pad_token="<pad>", eos_token="<end>", bos_token="<begin>", unk_token="<unknown>"
    ).save_pretrained(folder)


def save_clip(folder: Path, tokenizer: Path, *, seed: int = 0, projected: bool = True, **sizes: int) -> None:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    kind: Any = CLIPTextModelWithProjection if projected else CLIPTextModel
    torch.manual_seed(seed)
    kind(CLIPTextConfig(**{**CLIP, **sizes})).save_pretrained(folder)
    save_tokenizer(tokenizer, begins=True)


def save_t5(folder: Path, tokenizer: Path, *, seed: int = 0) -> None:
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(seed)
    T5EncoderModel(T5Config(**T5)).save_pretrained(folder)
    save_tokenizer(tokenizer, begins=False)


def save_stable_diffusion_3(folder: Path) -> None:
    """Save the three encoders and the file of the context embedder, 40 → 10."""
    from safetensors.torch import save_file

    save_clip(folder / "text_encoder", folder / "tokenizer", seed=1)
    save_clip(folder / "text_encoder_2", folder / "tokenizer_2", seed=2, hidden_size=20, projection_dim=14)
    save_t5(folder / "text_encoder_3", folder / "tokenizer_3", seed=3)
    torch.manual_seed(4)
    (folder / "transformer").mkdir()
    tensors = {
        "context_embedder.weight": torch.randn(10, 40),
        "context_embedder.bias": torch.randn(10),
        "other": torch.zeros(1),
    }
    save_file(tensors, folder / "transformer" / "diffusion_pytorch_model.safetensors")
