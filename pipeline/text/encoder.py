"""A text encoder at work, from captions to states, pooled vectors and masks."""

from __future__ import annotations

import copy
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ...data.errors import RepaError
from ...data.format.columns import TEXT_STATES
from ...data.format.manifest import Provenance
from ..encoders.precision import forward_pass
from ..encoders.weights import library_versions, weights_sha256
from .files import TextFiles, files_in, files_of, read_config, remedy_for
from .networks import (
    CONTEXT_EMBEDDER,
    Network,
    draw_network,
    joined_state,
    load_context_embedder,
    load_network,
)
from .tokenizers import ByteTokenizer, PublishedTokenizer, Tokenizer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from .facts import TextFacts, TextSizes

POOLED, MASK = "pooled", "mask"
_NUMBERS, _MASKS = 0, 1


class TextEncoder:
    """A frozen text encoder on one device. Make it with `load_text_encoder`.

    Args:
        facts: what is known of it.
        sizes: of its columns.
        tokenizers: one a part.
        networks: one a part, of transformers, on the CPU.
        context: the context embedder, where it has one.
        device: where it computes.
        compute_dtype: of the forward passes, see `COMPUTE_DTYPES`.
        location: folder or hub name, for the manifest.
        random_weights: whether the weights were drawn.

    Attributes:
        name: of the source of its columns.
        weights_sha256: of the networks and the context embedder.
        tokenizer_sha256: of what decides the token numbers.
        random_weights: whether the weights were drawn.
    """

    def __init__(
        self,
        facts: TextFacts,
        sizes: TextSizes,
        tokenizers: Sequence[Tokenizer],
        networks: Sequence[Any],
        context: torch.nn.Linear | None,
        *,
        device: torch.device,
        compute_dtype: str,
        location: str,
        random_weights: bool,
    ) -> None:
        self.facts = facts
        self.sizes = sizes
        self.name = facts.name
        self.random_weights = random_weights
        self.device = device
        self.compute_dtype = compute_dtype
        self._location = location
        self._tokenizers = tuple(tokenizers)
        named = {part.folders[0]: each for part, each in zip(facts.parts, networks, strict=True)}
        if context is not None:
            named[CONTEXT_EMBEDDER] = context
        self.weights_sha256 = weights_sha256(joined_state(named))
        hashes = [each.sha256 for each in self._tokenizers]
        self.tokenizer_sha256 = ",".join(dict.fromkeys(hashes))
        self._networks = [
            Network(part, each, device) for part, each in zip(facts.parts, networks, strict=True)
        ]
        self._context = None if context is None else context.requires_grad_(False).to(device)

    def tokens(self, texts: Sequence[str]) -> NDArray[np.int64]:
        """Return token numbers, masks and which texts are empty, for `features`.

        It is not for several threads at once, as tokenizers are not.

        Returns:
            int64 ``[B, 2, T + 1]``, numbers and mask of the tokens of all parts, and 1 where a text is empty.
        """
        found = [
            each(texts, part.length) for each, part in zip(self._tokenizers, self.facts.parts, strict=True)
        ]
        empty = np.array([[int(text == "")] for text in texts], np.int64).reshape(-1, 1)
        rows = [np.concatenate([*(pair[which] for pair in found), empty], 1) for which in (_NUMBERS, _MASKS)]
        return np.stack(rows, axis=1)

    def features(self, tokens: Tensor) -> dict[str, Tensor]:
        """Return kind → values of token numbers.

        Args:
            tokens: int64 ``[B, 2, T + 1]``, see `tokens`, on the device.

        Returns:
            ``states`` float32 ``[B, S, E]``; where the encoder has them ``pooled`` float32 ``[B, E]`` and
            ``mask`` uint8 ``[B, S]``.
        """
        ends = tuple(accumulate(part.length for part in self.facts.parts))
        numbers = torch.tensor_split(tokens[:, _NUMBERS, :-1], ends[:-1], dim=1)
        with torch.inference_mode(), forward_pass(self.compute_dtype, self.device):
            found = [each(own.contiguous()) for each, own in zip(self._networks, numbers, strict=True)]
            states = self._joined([own for own, _ in found])
            if self._context is not None:
                states = self._context(states).float()
        pooled = [own for _, own in found if own is not None]
        values = {TEXT_STATES: states}
        if pooled:
            side_by_side = self.facts.joined == "side by side"
            values[POOLED] = pooled[-1] if side_by_side else torch.cat(pooled, dim=1)
        if self.facts.zeros:
            kept = 1 - tokens[:, _NUMBERS, -1].to(states.dtype)
            values = {kind: each * kept.view(-1, *[1] * (each.ndim - 1)) for kind, each in values.items()}
        values = {kind: each.contiguous() for kind, each in values.items()}
        if self.facts.masked:
            values[MASK] = tokens[:, _MASKS, :-1].to(torch.uint8).contiguous()
        return values

    def encode(self, texts: Sequence[str]) -> dict[str, NDArray[Any]]:
        """Return kind → values of texts, as `features` has them, on the host."""
        tokens = torch.from_numpy(self.tokens(texts)).to(self.device)
        return {kind: values.cpu().numpy() for kind, values in self.features(tokens).items()}

    def in_float32(self) -> TextEncoder:
        """Return the same encoder computing in float32."""
        other = copy.copy(self)
        other.compute_dtype = "float32"
        return other

    def provenance(self, batch_size: int) -> Provenance:
        """Return what the manifest keeps."""
        layers = [part.layer for part in self.facts.parts]
        return Provenance(
            model=Path(self._location).name if Path(self._location).is_absolute() else self._location,
            weights_sha256=self.weights_sha256,
            random_weights=self.random_weights,
            input_size=self.sizes.length,
            mean=(),
            std=(),
            compute_dtype=self.compute_dtype,
            batch_size=batch_size,
            grid=(1, self.sizes.length),
            libraries=library_versions("torch", "transformers", "tokenizers"),
            notes={
                "location": self._location,
                "tokenizer_sha256": self.tokenizer_sha256,
                "tokens": self.sizes.length,
                "layer": layers[0] if len(set(layers)) == 1 else ", ".join(layers),
                "empty": "zeros" if self.facts.zeros else "encoded",
            },
        )

    def _joined(self, states: list[Tensor]) -> Tensor:
        if self.facts.joined == "side by side":
            return torch.cat(states, dim=2)
        if self.facts.joined == "stable diffusion 3":
            clip, last = torch.cat(states[:-1], dim=2), states[-1]
            return torch.cat([F.pad(clip, (0, last.shape[2] - clip.shape[2])), last], dim=1)
        return states[0]


def text_sizes(facts: TextFacts, folder: Path | None) -> TextSizes:
    """Return the sizes of a text encoder's columns, without its weights.

    Args:
        facts: of the encoder.
        folder: of its files; None takes what is known of the published ones.

    Raises:
        RepaError: the folder is not the encoder's.
    """
    if folder is None:
        return facts.sizes()
    files = files_in(facts, folder)
    return _sizes(facts, files)


def load_text_encoder(
    facts: TextFacts,
    *,
    folder: Path | None = None,
    device: str | torch.device = "cpu",
    compute_dtype: str = "float32",
    random_weights: bool = False,
) -> TextEncoder:
    """Load a text encoder, or draw its weights.

    Args:
        facts: of the encoder.
        folder: of its files, see `files_in`; None: the shipped ones, else the hub's or their local copy.
        device: where it computes.
        compute_dtype: one of `COMPUTE_DTYPES`.
        random_weights: draw the weights where no folder is given and none is shipped; captions are then
            tokenized by bytes.

    Raises:
        RepaError: transformers is not installed, or the files are not the encoder's, or not to be had.
    """
    settings: dict[str, Any] = {"device": torch.device(device), "compute_dtype": compute_dtype}
    if folder is None and facts.shipped is None and random_weights:
        networks = [draw_network(part) for part in facts.parts]
        tokenizers = [ByteTokenizer(part) for part in facts.parts]
        context = _drawn_context(facts) if facts.embedded else None
        return TextEncoder(
            facts,
            facts.sizes(),
            tokenizers,
            networks,
            context,
            location=facts.hub,
            random_weights=True,
            **settings,
        )
    files = files_of(facts, folder)
    sizes = _sizes(facts, files)
    pairs = list(zip(facts.parts, files.parts, strict=True))
    context = None if files.context is None else load_context_embedder(facts, files.context)
    return TextEncoder(
        facts,
        sizes,
        [PublishedTokenizer(facts, own.tokenizer) for _, own in pairs],
        [load_network(facts, part, own.network) for part, own in pairs],
        context,
        location=str(folder.resolve()) if folder is not None else facts.hub,
        random_weights=False,
        **settings,
    )


def _drawn_context(facts: TextFacts) -> torch.nn.Linear:
    from ..encoders.weights import drawn_weights

    with drawn_weights():
        return torch.nn.Linear(facts.parts[-1].sizes()[0], facts.sizes().width)


def _sizes(facts: TextFacts, files: TextFiles) -> TextSizes:
    configs = [read_config(facts, own.network) for own in files.parts]
    try:
        sizes = facts.sizes(configs)
    except (KeyError, TypeError, ValueError) as error:
        raise RepaError(
            f"the configuration of text encoder {facts.name} lacks {error}",
            remedy_for(facts),
            field="--weights",
        ) from error
    if files.context is None:
        return sizes
    from dataclasses import replace

    return replace(sizes, width=load_context_embedder(facts, files.context).out_features)
