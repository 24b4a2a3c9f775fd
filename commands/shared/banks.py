"""Which vectors of which bank a model samples with, as the flags of a command say it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ...data.edge import shortened
from ...data.errors import RepaError
from ...data.storage.bucket import cache_path, is_remote
from ...data.tars.names import names_tars
from ...trainer.models.conditioning import ClassTokenConditioner
from ...trainer.sampling.bank import FLAG, StoredBank, open_cache_bank
from ...trainer.sampling.bank_draws import MIXTURES, default_alphas, mixed, rows_of_noise
from ...trainer.sampling.bank_file import read_bank
from ...trainer.sampling.generate import conditions
from ...trainer.sampling.sampler import sample_noises
from ...trainer.step.randomness import generator_for

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from ...trainer.sampling.generate import TrainedModel

UNIFORM, BY_NOISE = "uniform", "noise"
_NOISES = 256


@dataclass(frozen=True, kw_only=True)
class BankAsked:
    """What flags say of vectors.

    Attributes:
        bank: cache or file; empty takes the run's cache.
        like: rows or images whose vectors are taken in turn; none draws them.
        mix: kind of mixture of two of them; empty mixes nothing.
        alphas: shares of the second; none takes those of the kind.
        draw: law of the rows, ``uniform`` or ``noise``.
        encoder_weights: texts ``NAME=FILE``, for images.
    """

    bank: str = ""
    like: tuple[str, ...] = ()
    mix: str = ""
    alphas: tuple[float, ...] = ()
    draw: str = UNIFORM
    encoder_weights: tuple[str, ...] = ()

    def check(self) -> None:
        """Refuse what cannot be, before anything is loaded.

        Raises:
            RepaError: the first flag that does not fit the others.
        """
        if self.draw not in (UNIFORM, BY_NOISE):
            raise RepaError(
                f"--draw {shortened(self.draw)} is unknown", f"choose {UNIFORM} or {BY_NOISE}", field="--draw"
            )
        if self.like and self.draw != UNIFORM:
            raise RepaError("--draw draws rows, and --like says them", "give one of the two", field="--draw")
        if self.mix and self.mix not in MIXTURES:
            raise RepaError(
                f"--mix {shortened(self.mix)} is unknown", f"choose {', '.join(MIXTURES)}", field="--mix"
            )
        if self.mix and len(self.like) != 2:
            raise RepaError(
                f"--mix mixes two vectors, and --like names {len(self.like)}",
                "give --like twice",
                field="--like",
            )
        if self.alphas and not self.mix:
            raise RepaError(
                "--alpha is of a mixture", f"give --mix {'|'.join(MIXTURES)} too", field="--alpha"
            )
        if wrong := [each for each in self.alphas if not 0 <= each <= 1]:
            raise RepaError(f"--alpha {wrong[0]} is no share", "give a number from 0 to 1", field="--alpha")
        if self.encoder_weights and not any(not _is_row(each) for each in self.like):
            raise RepaError(
                "--encoder-weights is of images that --like names", "leave it out", field="--encoder-weights"
            )

    def given(self) -> str:
        """Name the first flag that was given, nothing without one."""
        flags = {
            FLAG: self.bank,
            "--like": self.like,
            "--mix": self.mix,
            "--alpha": self.alphas,
            "--draw": self.draw != UNIFORM,
            "--encoder-weights": self.encoder_weights,
        }
        return next((flag for flag, value in flags.items() if value), "")


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """The conditions of samples and where they come from.

    Attributes:
        condition: of each ``[N, …]``.
        bank: digest of the bank.
        vectors: which of its vectors, in words.
        sha256: of the conditions.
    """

    condition: Tensor
    bank: str
    vectors: str
    sha256: str


def run_cache(run: Path | None) -> str:
    """Return the cache that a run was trained from, nothing where it does not say or names tars."""
    from ...trainer.run.folder import CONFIG_FILE
    from ...trainer.settings_file import load_yaml

    if run is None or not (run / CONFIG_FILE).exists():
        return ""
    cache = str(load_yaml(run / CONFIG_FILE).get("cache", ""))
    return "" if names_tars(cache) else cache


def choose_vectors(model: TrainedModel, asked: BankAsked, num: int, *, seed: int, run: Path | None) -> Chosen:
    """Choose the condition of each sample of a model that is conditioned on class tokens.

    Args:
        model: the model.
        asked: what flags say.
        num: N, number of samples.
        seed: of the draws and of the noise.
        run: folder of the run that it is of; None if it is of none.

    Raises:
        RepaError: there is no bank, it is of another teacher, or it has not what is asked for.
    """
    conditioner = model.backbone.y_embedder
    assert isinstance(conditioner, ClassTokenConditioner), "the caller has looked"
    bank = open_bank(asked.bank or run_cache(run), model)
    if asked.mix:
        first, second = _like(asked, bank)
        alphas = torch.tensor(asked.alphas or default_alphas(asked.mix)).double()
        coins = torch.rand(
            (len(alphas), bank.width),
            generator=generator_for(seed, "mask of two vectors"),
            dtype=torch.float64,
        )
        found = mixed(asked.mix, first.double(), second.double(), alphas, coins).float()
        shares = ", ".join(f"{each:g}" for each in alphas.tolist())
        vectors, said = found, f"{asked.mix} mixture of {' and '.join(asked.like)} at {shares}"
    elif asked.like:
        vectors, said = torch.stack(_like(asked, bank)), f"like {', '.join(asked.like)}"
    elif asked.draw == BY_NOISE:
        vectors, said = bank.vectors(_rows_by_noise(model, bank, num, seed)), "rows by the initial noise"
    else:
        conditioner.bank = bank
        return _chosen(conditions(conditioner, num, seed=seed), bank, "rows drawn uniformly")
    in_turn = vectors.repeat(-(-num // len(vectors)), 1)[:num]
    device = conditioner.linear.weight.device
    return _chosen(conditioner.whole(in_turn.to(device)).cpu(), bank, said)


def open_bank(place: str, model: TrainedModel) -> StoredBank:
    """Open the bank that a model samples with.

    Args:
        place: a file, or a cache or its address in a bucket.
        model: whose condition it must fit.

    Raises:
        RepaError: there is none, it is damaged, or its vectors are not those that the model was trained with.
    """
    conditioner = model.backbone.y_embedder
    assert isinstance(conditioner, ClassTokenConditioner), "the caller has looked"
    if not place:
        raise RepaError(
            f"{model.origin} is conditioned on {conditioner.column} of images, and nothing says of which",
            "give a cache, or a file of `repa bank build`, with --bank",
            field=FLAG,
        )
    if names_tars(place):
        raise RepaError(
            f"{place} are tars, whose rows cannot be read at random",
            "make a cache of them with `repa cache import`",
            field=FLAG,
        )
    in_file = not is_remote(place) and Path(place).is_file()
    try:
        bank = read_bank(Path(place)) if in_file else open_cache_bank(cache_path(place), conditioner.column)
    except RepaError as error:
        raise type(error)(error.what, error.remedy, field=FLAG) from error
    tokens = conditioner.linear.in_features
    if bank.said.column != conditioner.column or bank.width != tokens:
        raise RepaError(
            f"{bank.name} has {bank.said.column} of {bank.width} channels, and {model.origin} is conditioned "
            f"on {conditioner.column} of {tokens}",
            "give a bank of that column",
            field=FLAG,
        )
    if model.condition_weights_sha256 not in (None, bank.said.teacher.weights_sha256):
        raise RepaError(
            f"the vectors of {bank.name} are of a teacher with other weights than {model.origin} was trained "
            "with",
            "give a bank of the same weights",
            field=FLAG,
        )
    return bank


def _chosen(condition: Tensor, bank: StoredBank, said: str) -> Chosen:
    raw = condition.float().contiguous().numpy().astype("<f4").tobytes()
    return Chosen(
        condition=condition, bank=bank.said.digest, vectors=said, sha256=hashlib.sha256(raw).hexdigest()
    )


def _rows_by_noise(model: TrainedModel, bank: StoredBank, num: int, seed: int) -> Tensor:
    """Return the row of each sample by its initial noise, every row as frequent as any other."""
    frequencies = torch.ones(len(bank))
    parts = []
    for first in range(0, num, _NOISES):
        samples = range(first, min(first + _NOISES, num))
        parts.append(rows_of_noise(next(sample_noises(seed, samples, model.latent_shape)), frequencies))
    return torch.cat(parts)


def _is_row(text: str) -> bool:
    return text.isascii() and text.isdigit()


def _like(asked: BankAsked, bank: StoredBank) -> list[Tensor]:
    """Return the vector ``[D]`` of each row or image.

    Raises:
        RepaError: there is no such row, or the image cannot be encoded as those of the bank were.
    """
    images = [each for each in asked.like if not _is_row(each)]
    encoded = dict(zip(images, _encoded(images, asked, bank), strict=True)) if images else {}
    found = []
    for each in asked.like:
        if each in encoded:
            found.append(encoded[each])
            continue
        # more digits than any cache has rows are none of them
        row = int(each[:20])
        found.append(bank.vectors(torch.tensor([bank.position_of(row)]))[0])
    return found


def _encoded(images: Sequence[str], asked: BankAsked, bank: StoredBank) -> list[Tensor]:
    """Return the class tokens of image files, by the very preprocessing and the weights of the bank's cache.

    Raises:
        RepaError: a file is no image, or the teacher cannot be had.
    """
    from .like import class_tokens

    return class_tokens(images, bank.said, asked.encoder_weights)
