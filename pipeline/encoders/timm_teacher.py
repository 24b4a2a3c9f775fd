"""The facts of a ViT of timm. Needs neither torch nor timm."""

from __future__ import annotations

from collections.abc import Mapping  # noqa: TC003 — dataclasses read it
from dataclasses import dataclass, field
from typing import Final, Literal

from .base import IMAGENET, Teacher

DEMO: Final = "demo"


@dataclass(frozen=True, kw_only=True)
class TimmTeacher(Teacher):
    """A ViT of timm, and where the facts about it are from. See `Teacher` for what all have.

    Attributes:
        timm_name: architecture, and tag of the weights, in timm.
        hub: repository of the weights on the Hugging Face hub; None: by ``--weights`` or shipped.
        prefix_tokens: class and register tokens, which stand before the patches and are cut.
        class_feature: how ``cls`` is formed: the class ``token`` after the final norm, or for a teacher
            without one its ``attention-pool`` or ``mean`` over the patch tokens.
        patch_feature: what patch tokens are taken after: the ``final norm``, or the ``last block`` of a model
            whose norm comes after pooling.
        normalisation: mean and standard deviation per channel, of pixels in [0, 1].
        checkpoint_prefix: names in the official checkpoint that begin so are the encoder, without it; the
            rest (a momentum copy, heads) is dropped.
        options: what the architecture is given beside its timm name.
        source: where the facts are from.
    """

    name: str
    timm_name: str
    hub: str | None
    patch_size: int
    width: int
    depth: int
    heads: int
    prefix_tokens: int
    class_feature: Literal["token", "attention-pool", "mean"] = "token"
    patch_feature: Literal["final norm", "last block"] = "final norm"
    normalisation: tuple[tuple[float, float, float], tuple[float, float, float]] = IMAGENET
    pixels_per_token: int = 16
    largest_resolution: int | None = None
    checkpoint_prefix: str = ""
    options: Mapping[str, int] = field(default_factory=dict)
    source: str
