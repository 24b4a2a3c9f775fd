"""Which captions a model of text samples with, as the flags of a command say it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from ...data.errors import RepaError
from ...data.format.captions import captions_path, read_captions
from ...data.format.columns import TEXT_STATES, source_of
from ...data.reading.reader import CacheReader
from ...data.storage.bucket import cache_path
from ...data.storage.files import os_errors, read_file
from ...data.tars.names import names_tars
from ...pipeline.text.encoder import load_text_encoder
from ...pipeline.text.registry import find_text_encoder
from ...trainer.models.text_conditioning import TextConditioner
from ...trainer.step.randomness import generator_for
from .banks import run_cache
from .encoders import parse_weights

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray
    from torch import Tensor

    from ...pipeline.text.encoder import TextEncoder
    from ...trainer.sampling.generate import TrainedModel

_ROWS = 256
_MOST_BYTES = 1 << 24
_WEIGHTS = "--encoder-weights"


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


@dataclass(frozen=True, kw_only=True)
class TextAsked:
    """What flags say of text.

    Attributes:
        prompts: taken in turn.
        file: of prompts, one a line, after those.
        weights: texts ``NAME=FOLDER``, of the text encoder.
    """

    prompts: tuple[str, ...] = ()
    file: Path | None = None
    weights: tuple[str, ...] = ()

    def given(self) -> str:
        """Name the first flag that was given, nothing without one."""
        flags = {"--prompt": self.prompts, "--prompts": self.file}
        return next((flag for flag, value in flags.items() if value), "")

    def read(self) -> tuple[str, ...]:
        """Return the prompts.

        Raises:
            RepaError: the file cannot be read, or there are none in it.
        """
        if self.file is None:
            return self.prompts
        with os_errors("read", self.file):
            content = read_file(self.file, _MOST_BYTES)
        try:
            lines = content.decode().splitlines()
        except UnicodeDecodeError as error:
            raise RepaError(
                f"{self.file} is not UTF-8 ({error.reason})", "save it as such", field="--prompts"
            ) from None
        found = (*self.prompts, *(line.strip() for line in lines if line.strip()))
        if not found:
            raise RepaError(f"{self.file} has no prompts", "write one a line", field="--prompts")
        return found


def encoded_prompts(model: TrainedModel, asked: TextAsked, num: int, *, device: str) -> ChosenTexts:
    """Encode prompts as the captions that a model was trained with, and round them as float16 columns are.

    Args:
        model: conditioned on text.
        asked: what flags say.
        num: N, number of samples; the prompts are taken in turn.
        device: where to encode.

    Raises:
        RepaError: the text encoder cannot be had, or has other weights than the model was trained with.
    """
    conditioner = model.backbone.y_embedder
    assert isinstance(conditioner, TextConditioner), "the caller has looked"
    prompts = asked.read()
    encoder = text_encoder(
        source_of(conditioner.column),
        asked.weights,
        device=device,
        random_weights=model.condition_random_weights,
        sha256=model.condition_weights_sha256,
        origin=str(model.origin),
    )
    # one by one, as the batch that a prompt is in may change its last bits
    states = [torch.from_numpy(encoder.encode([each])[TEXT_STATES]).half() for each in dict.fromkeys(prompts)]
    of_prompt = dict(zip(dict.fromkeys(prompts), states, strict=True))
    in_turn = [prompts[number % len(prompts)] for number in range(num)]
    return ChosenTexts(
        condition=torch.cat([of_prompt[each] for each in in_turn]),
        prompts=tuple(in_turn[: len(prompts)]),
        bank=None,
        said="prompts",
    )


def text_encoder(
    source: str,
    weights: Sequence[str],
    *,
    device: str,
    random_weights: bool,
    sha256: str | None,
    origin: str,
) -> TextEncoder:
    """Load the text encoder that captions were encoded with.

    Args:
        source: its name.
        weights: texts ``NAME=FOLDER``, of its folder.
        device: where it computes.
        random_weights: whether its weights were drawn, where no folder is given.
        sha256: of the weights that it must have; None where that is not known.
        origin: what was trained with it, for the error.

    Raises:
        RepaError: it cannot be had, or has other weights.
    """
    facts = find_text_encoder(source)
    folders = parse_weights(weights, flag=_WEIGHTS)
    if needless := [name for name in folders if name != facts.name]:
        raise RepaError(
            f"the text encoder is {facts.name}, not {needless[0]}", "leave its weights out", field=_WEIGHTS
        )
    encoder = load_text_encoder(
        facts,
        folder=folders.get(facts.name),
        device=device,
        random_weights=random_weights and facts.name not in folders,
    )
    if sha256 not in (None, encoder.weights_sha256):
        raise RepaError(
            f"{origin} was trained with another {facts.name} than this one, whose weights have sha256 "
            f"{encoder.weights_sha256[:12]}…",
            f"give its folder with {_WEIGHTS} {facts.name}=FOLDER",
            field=_WEIGHTS,
        )
    return encoder


def drawn_captions(
    reader: CacheReader, num: int, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], tuple[str, ...]]:
    """Draw a caption of each of the images of a cache, evenly spaced ones where these are more.

    Args:
        reader: of the cache, with columns of captions.
        num: N, number of captions; of fewer images each is taken in turn.
        seed: draws which caption of an image.

    Returns:
        Rows of the images ``[N]``, the numbers of the captions among theirs ``[N]``, and the captions.
    """
    assert reader.captions is not None, "its columns are of captions"
    valid = reader.valid_rows
    rows = valid[np.arange(num) * len(valid) // num] if num <= len(valid) else np.resize(valid, num)
    generator = generator_for(seed, "caption of an image")
    words = torch.randint(2**62, (num,), generator=generator).numpy().astype(np.uint64)
    numbers = reader.captions.numbers(rows, words)
    texts = read_captions(reader.path)
    return rows, numbers, tuple(texts[row] for row in reader.captions.rows_of(rows, numbers).tolist())


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
        source = reader.manifest.sources[source_of(conditioner.column)]
        shape = tuple(conditioner.null_states.shape)
        specs = reader.manifest.columns
        if (
            model.condition_weights_sha256 not in (None, source.weights_sha256)
            or specs[conditioner.column].shape != shape
        ):
            raise RepaError(
                f"{conditioner.column} of {place} is of another text encoder than {model.origin} was "
                "trained with",
                "give a cache of the same encoder",
                field="--bank",
            )
        rows, numbers, prompts = drawn_captions(reader, num, seed)
        parts = []
        for first in range(0, num, _ROWS):
            part = slice(first, first + _ROWS)
            out = {
                name: np.empty((len(rows[part]), *specs[name].shape), specs[name].numpy_dtype)
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
