"""CLIP as a judge of samples, its embeddings of images and of their prompts, for the CLIP score.

It is transformers' model, from a folder or the hub, with the preprocessing that its folder describes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch

from ...data.errors import RepaError
from .precision import forward_pass
from .weights import one_line, weights_sha256

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

NAME: Final = "clip"
FLAG: Final = "--clip"
DEFAULT: Final = "openai/clip-vit-large-patch14"
_EXTRA: Final = "pip install -e '.[text]'"
_PROMPTS = 256


class ClipSimilarity:
    """Both towers of a CLIP model.

    Args:
        model: folder, or name on the hub.
        device: where it computes.

    Attributes:
        name: ``clip``.
        weights_sha256: of its weights.
        random_weights: whether they were drawn; a folder cannot say it.
        widths: ``pool``, channels of an embedding.
        device: where it computes.

    Raises:
        RepaError: transformers is not installed, or the model cannot be had.
    """

    name = NAME
    random_weights = False

    def __init__(self, model: str, *, device: str | torch.device = "cpu") -> None:
        transformers = _transformers()
        # a bar for the few seconds of a load would cut through this program's own
        transformers.utils.logging.disable_progress_bar()
        try:
            self._model = transformers.CLIPModel.from_pretrained(model, use_safetensors=True).eval()
            self._images = transformers.CLIPImageProcessor.from_pretrained(model)
            self._texts = transformers.AutoTokenizer.from_pretrained(model)
        # a folder that others made fails in as many ways as it has files
        except Exception as error:
            raise RepaError(
                f"{model} is no CLIP model that transformers can load ({one_line(error)})",
                f"give a folder with its configuration, weights, preprocessor and tokenizer with {FLAG}",
                field=FLAG,
            ) from error
        self.weights_sha256 = weights_sha256(self._model.state_dict())
        self.device = torch.device(device)
        self._model.to(self.device)
        self.widths: Mapping[str, int] = {"pool": self._model.config.projection_dim}

    def features(self, images: Tensor) -> dict[str, Tensor]:
        """Return ``pool``, the embeddings float32 ``[B, D]`` of images uint8 ``[B, 3, R, R]``."""
        pixels = self._images(images=list(images.cpu()), return_tensors="pt")["pixel_values"]
        with torch.inference_mode(), forward_pass("float32", self.device):
            return {"pool": _embeddings(self._model.get_image_features(pixel_values=pixels.to(self.device)))}

    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """Return the embeddings float32 ``[N, D]`` of prompts, cut to the length that the model takes."""
        parts = []
        for first in range(0, len(prompts), _PROMPTS):
            tokens = self._texts(
                list(prompts[first : first + _PROMPTS]),
                padding=True,
                truncation=True,
                max_length=self._model.config.text_config.max_position_embeddings,
                return_tensors="pt",
            )
            with torch.inference_mode(), forward_pass("float32", self.device):
                found = self._model.get_text_features(
                    input_ids=tokens["input_ids"].to(self.device),
                    attention_mask=tokens["attention_mask"].to(self.device),
                )
            parts.append(_embeddings(found).float().cpu())
        return torch.cat(parts)


def _embeddings(found: Any) -> Tensor:
    # transformers 5 returns an output object, earlier ones the tensor
    values: Tensor = found if isinstance(found, torch.Tensor) else found.pooler_output
    return values


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise RepaError(
            f"the CLIP score needs transformers, which is not installed ({error})",
            f"{_EXTRA}, or leave clip_score out",
            field="--metrics",
        ) from error
    return transformers
