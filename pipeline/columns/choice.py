"""The choice of the form of attention that settings ask for, fitted to some images and measured on others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ...data.errors import RepaError
from ...data.units import counted
from .allocation import Allocation
from .factored import FactoredForm, Form, factored_form
from .factoring import start_basis, weighted_moments
from .fitting import attention_fidelity, finite_or_refused, fit_attention, tokens_of
from .forms import attention_form
from .measures import attention_divergence
from .truncation import truncated

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from ..encoders.base import Encoder
    from .calibration import ChosenImages
    from .fitting import Passes, Pixels
    from .specs import AttentionSettings

ROUNDS = 2  # in which the components of the heads are held against what they lose
ROUND_IMAGES = 32
MARGIN = 0.95  # of the tolerance, aimed at: other images lose a little more
TIGHTENED = (MARGIN, 0.8, 0.5, 0.2, 0.0)
"""What is aimed at, in one try after the other, of what should meet a tolerance; last with all components."""
LEAST_GRADIENT_COSINE = 0.99
"""Of a student near the teacher: a form that meets a tolerance must not turn its gradient further."""


def choose_form(
    encoder: Encoder, settings: AttentionSettings, chosen: ChosenImages, passes: Passes
) -> tuple[Form, dict[str, Any]]:
    """Choose the form that settings ask for, calibrated and measured.

    Args:
        encoder: the teacher.
        settings: what is asked for.
        chosen: images to fit to and to measure on.
        passes: how they are run.

    Returns:
        The form, and its fidelity; see `attention_summary`.

    Raises:
        RepaError: no form meets what is asked for; values that are not finite.
    """
    if settings.factored:
        return _Factors(encoder, settings, chosen, passes).choose()
    projections = None
    if settings.rank is not None and settings.rank < encoder.head_width:
        balanced = fit_attention(encoder, settings.blocks, chosen.fit, passes)
        projections = truncated(balanced, settings.rank)
    form = attention_form(encoder, settings, projections)
    return form, attention_fidelity(encoder, [form], chosen.held_out, passes)[0]


class _Factors:
    """Fits the basis to start from and the components of every head."""

    def __init__(
        self, encoder: Encoder, settings: AttentionSettings, chosen: ChosenImages, passes: Passes
    ) -> None:
        self._encoder = encoder
        self._settings = settings
        self._chosen = chosen
        self._passes = passes
        moments = self._moments()
        self._basis = start_basis(*(torch.from_numpy(moments[name]) for name in ("queries", "keys")))
        self._allocation = Allocation(moments["spectrum"], tokens_of(encoder), encoder.logit_scale)

    def choose(self) -> tuple[Form, dict[str, Any]]:
        least, most = self._allocation.least_bytes, self._settings.bytes
        if most is not None and most < least:
            raise RepaError(
                f"--attention-bytes {most} is too small: one component a head of encoder "
                f"{self._encoder.name}'s {counted(len(self._settings.blocks), 'block')} takes {least:,}",
                "give more",
                field="--attention-bytes",
            )
        step = max(1, len(self._chosen.fit) // ROUND_IMAGES)
        images = dict(list(self._chosen.fit.items())[::step][:ROUND_IMAGES])
        for _ in range(ROUNDS):
            self._allocate()
            self._allocation.learn(self._losses(self._form(), images))
        if most is not None:
            self._allocate()
            return self._measured()
        return self._within_tolerance()

    def _within_tolerance(self) -> tuple[Form, dict[str, Any]]:
        """Return the first form that keeps the tolerance on the held-out images too."""
        tolerance = self._settings.tolerance
        assert tolerance is not None, "one of the two is asked for"
        aim, size = MARGIN * tolerance, self._allocate()
        form, fidelity = self._measured()
        for share in TIGHTENED:
            reached, near = float(fidelity["kl_worst_head"]), float(fidelity["gradient_cosine_near"])
            if reached <= tolerance and near >= LEAST_GRADIENT_COSINE:
                return form, fidelity
            # what the gradient is off by is about in proportion to the divergence that there is
            lost = min(1.0, tolerance / max(reached, 1e-30))
            turned = min(1.0, (1 - LEAST_GRADIENT_COSINE) / max(1 - near, 1e-12))
            aim = share * min(aim * lost, min(aim, reached) * turned)
            before, size = size, self._allocation.for_loss(aim)
            if size != before:
                form, fidelity = self._measured()
        near = fidelity["gradient_cosine_near"]
        worst = max(fidelity["kl"], key=lambda entry: float(entry["mean"]))
        if worst["mean"] <= tolerance and near >= LEAST_GRADIENT_COSINE:
            return form, fidelity
        raise RepaError(
            f"no form of encoder {self._encoder.name}'s attention meets --attention-kl {tolerance:g}: the "
            f"best, {fidelity['bytes_per_image']:,} bytes an image, reaches {worst['mean']:g} nats in block "
            f"{worst['block']}, head {worst['head']}, and turns a near student's gradient to a cosine of "
            f"{near:g}",
            "allow more, or leave --attention-kl out for float16",
            field="--attention-kl",
        )

    def _allocate(self) -> int:
        if self._settings.bytes is not None:
            return self._allocation.for_bytes(self._settings.bytes)
        assert self._settings.tolerance is not None, "one of the two is asked for"
        return self._allocation.for_loss(MARGIN * self._settings.tolerance)

    def _form(self) -> FactoredForm:
        return factored_form(self._encoder, self._settings, self._allocation.layout, self._basis)

    def _measured(self) -> tuple[Form, dict[str, Any]]:
        form = self._form()
        return form, attention_fidelity(self._encoder, [form], self._chosen.held_out, self._passes)[0]

    def _moments(self) -> dict[str, NDArray[np.float64]]:
        """Return means over the images to fit to, of all blocks, see `weighted_moments`."""
        blocks, scale = self._settings.blocks, self._encoder.logit_scale
        names = ("queries", "keys", "spectrum")

        def compute(images: Tensor) -> dict[str, Tensor]:
            features = self._encoder.encode(images, blocks)
            found = [
                weighted_moments(features["q"][:, index], features["k"][:, index], scale)
                for index in range(len(blocks))
            ]
            # of a batch together: per image they would be as large as queries and keys themselves
            return {
                name: torch.stack([each.sum(0) for each in values]).unsqueeze(0)
                for name, values in zip(names, zip(*found, strict=True), strict=True)
            }

        sums: dict[str, NDArray[np.float64]] = {}
        for batch in self._passes.over(self._chosen.fit, compute):
            for name, values in batch.items():
                sums[name] = sums[name] + values[0] if name in sums else values[0]
        finite_or_refused(self._encoder, sums)
        return {name: values / len(self._chosen.fit) for name, values in sums.items()}

    def _losses(self, form: FactoredForm, images: Pixels) -> NDArray[np.float64]:
        """Return the mean divergence of each block and head, ``[L, H]``, over some images."""

        def compute(pixels: Tensor) -> dict[str, Tensor]:
            features = self._encoder.encode(pixels, form.blocks)
            exact, stored = (features["q"], features["k"]), form.decode(form.encode(features))
            return {"kl": attention_divergence(exact, stored, self._encoder.logit_scale).mean(-1)}

        batches = [batch["kl"] for batch in self._passes.over(images, compute)]
        means: NDArray[np.float64] = np.concatenate(batches).mean(axis=0)
        return means
