"""The networks of text encoders, loaded through transformers or drawn, one forward pass each."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...data.errors import RepaError
from ...data.units import counted
from ..encoders.weights import drawn_weights, one_line, some
from .files import remedy_for
from .tokenizers import transformers

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from .facts import TextFacts, TextPart

CONTEXT_EMBEDDER = "context_embedder"
_PREFIX = "text_model."  # some releases of transformers have it before the names of CLIP's tensors


class Network:
    """One frozen network of a text encoder.

    Args:
        part: what is known of it.
        model: of transformers, on the CPU.
        device: where it computes.
    """

    def __init__(self, part: TextPart, model: Any, device: torch.device) -> None:
        self._part = part
        self._model = model.eval().requires_grad_(False).to(device)

    def __call__(self, numbers: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return states float32 ``[B, S, E]`` and, of CLIP, the pooled vector float32 ``[B, E]``.

        Every position is attended to, padding too, as the models that were trained on these states have it.

        Args:
            numbers: of the tokens, int64 ``[B, S]``, on the device.
        """
        penultimate = self._part.layer == "penultimate"
        found = self._model(input_ids=numbers, output_hidden_states=penultimate)
        states = found.hidden_states[-2] if penultimate else found.last_hidden_state
        if self._part.family == "t5":
            return states.float(), None
        pooled = found.text_embeds if self._part.projected else found.pooler_output
        return states.float(), pooled.float()


def load_network(facts: TextFacts, part: TextPart, folder: Path) -> Any:
    """Load a network, every tensor from its file.

    Args:
        facts: of the encoder, for the errors.
        part: the network.
        folder: of its files.

    Raises:
        RepaError: transformers is not installed, or the files do not hold the network.
    """
    build = _class_of(part)
    with _quiet():
        try:
            model, report = build.from_pretrained(
                folder, local_files_only=True, output_loading_info=True, dtype=torch.float32
            )
        # a broken file or a wrong shape: OSError, ValueError, RuntimeError, SafetensorError, by version
        except Exception as error:
            raise RepaError(
                f"{folder} does not hold the network of text encoder {facts.name} ({one_line(error)})",
                remedy_for(facts),
                field="--weights",
            ) from error
    # of a whole CLIP the other half is left over; what is missing would be drawn in silence
    for kind in ("missing_keys", "mismatched_keys"):
        names = sorted(map(str, report.get(kind) or ()))
        if names:
            raise RepaError(
                f"the weights in {folder} are not those of text encoder {facts.name}: "
                f"{counted(len(names), 'tensor')} {kind.removesuffix('_keys')} ({some(names)})",
                remedy_for(facts),
                field="--weights",
            )
    return model


def draw_network(part: TextPart) -> Any:
    """Draw the weights of a network, the same every time.

    Raises:
        RepaError: transformers is not installed.
    """
    library = transformers()
    config: Any = library.T5Config if part.family == "t5" else library.CLIPTextConfig
    with drawn_weights(), _quiet():
        return _class_of(part)(config(**part.config))


def load_context_embedder(facts: TextFacts, file: Path) -> nn.Linear:
    """Load the linear map that a model puts between its text encoders and its blocks.

    Args:
        facts: of the encoder, for the errors.
        file: safetensors of the model's weights, of which these two tensors alone are read.

    Raises:
        RepaError: the file has no such tensors.
    """
    from safetensors import safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            weight = opened.get_tensor(f"{CONTEXT_EMBEDDER}.weight").float()
            bias = opened.get_tensor(f"{CONTEXT_EMBEDDER}.bias").float()
    # SafetensorError of a damaged file and of a name that is not there
    except Exception as error:
        raise RepaError(
            f"{file} holds no {CONTEXT_EMBEDDER} ({one_line(error)})", remedy_for(facts), field="--weights"
        ) from error
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
    return layer


def _class_of(part: TextPart) -> Any:
    library = transformers()
    if part.family == "t5":
        return library.T5EncoderModel
    return library.CLIPTextModelWithProjection if part.projected else library.CLIPTextModel


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from printing what is raised instead."""
    logs: Any = transformers().utils.logging
    verbosity, bars = logs.get_verbosity(), logs.is_progress_bar_enabled()
    logs.set_verbosity(logs.CRITICAL)
    logs.disable_progress_bar()
    try:
        yield
    finally:
        logs.set_verbosity(verbosity)
        if bars:
            logs.enable_progress_bar()


def joined_state(networks: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the tensors of several networks, by names that no release of transformers changes."""
    return {
        f"{own}.{name.removeprefix(_PREFIX)}": value
        for own, model in networks.items()
        for name, value in model.state_dict().items()
    }
