"""What is refused before anything is sampled, for the commands that sample."""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING, Protocol

from ...data.errors import RepaError
from ...data.units import counted
from .flags import check_ranges

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from ...trainer.sampling.generate import TrainedModel
    from .banks import BankAsked
    from .texts import TextAsked


class SamplingFlags(Protocol):
    """What the flags of a command say of a sampling."""

    @property
    def family(self) -> str | None:
        """Family of a published checkpoint that does not say it."""

    @property
    def solver(self) -> str:
        """See `SamplerConfig`, as are the next six."""

    @property
    def steps(self) -> int:
        """Steps of the solver."""

    @property
    def shift(self) -> float:
        """Of the solver's times."""

    @property
    def guidance(self) -> float:
        """Scale of guidance."""

    @property
    def guidance_cls(self) -> float | None:
        """Scale for the vectors beside the latent."""

    @property
    def guidance_channels(self) -> str:
        """Channels of the latent that are guided."""

    @property
    def interval(self) -> tuple[float, float]:
        """Times between which guidance acts."""

    @property
    def seed(self) -> int:
        """Seed of the noise."""

    @property
    def weights(self) -> str:
        """Either ``ema`` or ``model``."""

    @property
    def vae(self) -> str | None:
        """Name of the autoencoder, None for the one the latents came from."""

    @property
    def teacher_weights(self) -> Path | None:
        """File of the teacher whose tokens a model makes, None for the hub's."""


def check_numbers(flags: SamplingFlags, *others: tuple[str, int, int, int]) -> None:
    """Refuse numbers out of their range.

    Args:
        flags: how to sample.
        others: flag, value, least and most of what else the command takes.

    Raises:
        RepaError: the first of them.
    """
    check_ranges(*others, ("--seed", flags.seed, 0, 2**63 - 1))
    for flag, weight in (("--guidance", flags.guidance), ("--guidance-cls", flags.guidance_cls)):
        if weight is not None and not 0 <= weight < math.inf:
            raise RepaError(f"{flag} {weight} is not valid", "give a finite number from 0", field=flag)


def check_devices(devices: int, gpus: int) -> None:
    """Refuse more processes than help.

    Raises:
        RepaError: more than there are GPUs, or without any than cores.
    """
    most = gpus or os.cpu_count() or 1
    if devices > most:
        raise RepaError(
            f"--devices {devices}, and this machine has {counted(most, 'GPU' if gpus else 'core')}",
            f"give at most {most}",
            field="--devices",
        )


def check_conditions(model: TrainedModel, bank: BankAsked, text: TextAsked) -> None:
    """Refuse flags of another kind of condition than the model's.

    Raises:
        RepaError: the first of them.
    """
    from ...trainer.models.conditioning import ClassTokenConditioner
    from ...trainer.models.text_conditioning import TextConditioner
    from ...trainer.sampling.bank import FLAG as BANK

    conditioner = model.backbone.y_embedder
    of_text = isinstance(conditioner, TextConditioner)
    wrong = ""
    if not of_text and text.given():
        wrong = text.given()
    elif of_text and text.given() and bank.given():
        raise RepaError(
            f"{text.given()} says what to show, and {bank.given()} too",
            "give one of the two",
            field=bank.given(),
        )
    elif not isinstance(conditioner, ClassTokenConditioner) and bank.given() not in (
        "",
        BANK if of_text else "",
    ):
        wrong = bank.given()
    if wrong:
        raise RepaError(
            f"{model.origin} is conditioned on {conditioner.column}, which {wrong} says nothing of",
            f"leave {wrong} out",
            field=wrong,
        )


def check_guidance(flags: SamplingFlags, model: TrainedModel, say: Callable[[str], None]) -> None:
    """Refuse guidance that the model cannot have, and say of one that it was not trained for.

    Raises:
        RepaError: it was never trained without a label, has no class token, or is guided on channels that it
            does not leave out.
    """
    from ...trainer.models.conditioning import LabelConditioner

    channels = model.latent_shape[0]
    if flags.guidance_channels != "all" and (channels <= 3 or flags.guidance == 1):
        raise RepaError(
            "no channel is guided with --guidance 1"
            if flags.guidance == 1
            else f"{model.origin} makes latents of {counted(channels, 'channel')}, no more",
            "leave --guidance-channels out",
            field="--guidance-channels",
        )
    given = {"--guidance": flags.guidance, "--guidance-cls": flags.guidance_cls}
    if flags.guidance_cls is not None and not model.backbone.config.token_widths:
        raise RepaError(
            f"{model.origin} makes no class token that --guidance-cls could act on",
            "leave it out",
            field="--guidance-cls",
        )
    guided = [flag for flag, weight in given.items() if weight not in (None, 1)]
    if guided and not model.guidable and not isinstance(model.backbone.y_embedder, LabelConditioner):
        say(
            f"note: {model.origin} was never trained without {model.backbone.y_embedder.column}: "
            f"{guided[0]} leads away from a condition that it does not know"
        )
    elif guided and not model.guidable:
        raise RepaError(
            f"{model.origin} was trained with label_dropout=0, so it has nothing to be guided away from",
            f"leave {guided[0]} at 1",
            field=guided[0],
        )
