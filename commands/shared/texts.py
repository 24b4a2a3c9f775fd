"""Which captions a model of text samples with, as the flags of a command say it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from ...data.errors import RepaError
from ...data.format.captions import captions_path, read_captions
from ...data.format.columns import source_of
from ...data.reading.reader import CacheReader
from ...data.storage.bucket import cache_path
from ...data.tars.names import names_tars
from ...trainer.models.text_conditioning import TextConditioner
from ...trainer.step.randomness import generator_for
from .banks import run_cache

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from ...trainer.sampling.generate import TrainedModel

_ROWS = 256


@dataclass(frozen=True, kw_only=True)
class ChosenTexts:
    """The captions of samples and their states.

    Attributes:
        condition: states of each sample, ``[N, S, E]``, in the dtype in which they are stored.
        prompts: caption of each sample.
        bank: identity of the captions' cache; None for prompts that were given.
        said: where the captions come from, in words.
    """

    condition: Tensor
    prompts: tuple[str, ...]
    bank: str | None
    said: str

    @property
    def sha256(self) -> str:
        """The hex sha256 of the states as float32."""
        digest = hashlib.sha256()
        for first in range(0, len(self.condition), _ROWS):
            part = self.condition[first : first + _ROWS]
            digest.update(part.float().contiguous().numpy().astype("<f4").tobytes())
        return digest.hexdigest()


def captions_of_images(
    model: TrainedModel, place: str, num: int, *, seed: int, run: Path | None
) -> ChosenTexts:
    """Take a caption of each of the images of a cache, evenly spaced ones where these are more.

    Args:
        model: conditioned on text.
        place: the cache; empty takes the run's.
        num: N, number of samples; of fewer images each is taken in turn.
        seed: draws which caption of an image.
        run: folder of the run that the model is of; None if it is of none.

    Raises:
        CacheError: there is no cache, or it has no captions or not these columns.
        RepaError: nothing names one, or its text encoder is another than the model's.
    """
    conditioner = model.backbone.y_embedder
    assert isinstance(conditioner, TextConditioner), "the caller has looked"
    place = place or run_cache(run)
    if not place or names_tars(place):
        raise RepaError(
            f"the model is conditioned on {conditioner.column}, and no text was given",
            "give --prompt, or a cache whose captions to take with --bank",
            field="--prompt",
        )
    path = cache_path(place)
    with CacheReader(path, conditioner.columns) as reader:
        assert reader.captions is not None, "its columns are of captions"
        source = reader.manifest.sources[source_of(conditioner.column)]
        shape = tuple(conditioner.null_states.shape)
        spec = reader.manifest.columns[conditioner.column]
        if model.condition_weights_sha256 not in (None, source.weights_sha256) or spec.shape != shape:
            raise RepaError(
                f"{conditioner.column} of {place} is of another text encoder than {model.origin} was "
                "trained with",
                "give a cache of the same encoder",
                field="--bank",
            )
        valid = reader.valid_rows
        rows = valid[np.arange(num) * len(valid) // num] if num <= len(valid) else np.resize(valid, num)
        generator = generator_for(seed, "caption of an image")
        words = torch.randint(2**62, (num,), generator=generator).numpy().astype(np.uint64)
        numbers = reader.captions.numbers(rows, words)
        texts = read_captions(path)
        prompts = tuple(texts[row] for row in reader.captions.rows_of(rows, numbers).tolist())
        parts = []
        for first in range(0, num, _ROWS):
            part = slice(first, first + _ROWS)
            out = {
                name: np.empty(
                    (len(rows[part]), *reader.manifest.columns[name].shape),
                    reader.manifest.columns[name].numpy_dtype,
                )
                for name in conditioner.columns
            }
            reader.read_rows(rows[part], conditioner.columns, out, captions=numbers[part])
            named = {name: torch.from_numpy(values) for name, values in out.items()}
            parts.append(conditioner.values(named, torch.empty(0)))
        assert reader.texts is not None, "its columns are of captions"
        identity = reader.texts.manifest.identity
    condition = torch.cat(parts)
    return ChosenTexts(
        condition=condition, prompts=prompts, bank=identity, said=f"captions of {captions_path(path)}"
    )
