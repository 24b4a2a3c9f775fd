"""A teacher run over chosen images, to fit its storage form and to measure what that changes.

The forward passes run in lanes as in the shard loop, every batch on one thread of a CPU, and sums are taken
in the order of the images: on a CPU the same numbers come out whatever the number of cores.
"""

from __future__ import annotations

from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ...data.errors import RepaError
from ..lanes.batches import Batch
from ..lanes.lanes import Task
from .forms import AttentionForm, TokenForm, attention_form
from .measures import TokenErrors, attention_divergence
from .specs import AttentionSettings, bytes_per_image
from .truncation import balanced_projections, centred, second_moment, truncated

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from ..encoders.base import Encoder
    from ..lanes.lanes import Lanes
    from .calibration import ChosenImages

    Pixels = Mapping[int, NDArray[np.uint8]]
    Compute = Callable[[Tensor], dict[str, Tensor]]

_DIGITS = 6  # of the numbers that are recorded


class Passes:
    """Forward passes over images, batch after batch.

    Args:
        lanes: of the device.
        batch_size: images of a pass.
    """

    def __init__(self, lanes: Lanes, batch_size: int) -> None:
        self._lanes = lanes
        self._batch_size = batch_size

    def over(self, pixels: Pixels, compute: Compute) -> Iterator[dict[str, NDArray[Any]]]:
        """Apply ``compute`` to each batch ``[B, 3, R, R]`` of the images, in their order.

        Args:
            pixels: row → uint8 ``[3, R, R]``.
            compute: of a batch, on the device: name → ``[B, …]``.
        """
        task = Task(model="", sources=(), compute=compute)
        rows = list(pixels)
        waiting: deque[Any] = deque()
        for start in range(0, len(rows), self._batch_size):
            part = rows[start : start + self._batch_size]
            batch = Batch(shard=0, rows=part, images=[pixels[row] for row in part])
            waiting.append(self._lanes.submit(batch, [task]))
            if len(waiting) == self._lanes.ahead:
                yield dict(waiting.popleft().result().batch.columns)
        while waiting:
            yield dict(waiting.popleft().result().batch.columns)


def fit_attention(
    encoder: Encoder, blocks: tuple[int, ...], pixels: Pixels, passes: Passes
) -> tuple[Tensor, Tensor]:
    """Fit the projections of queries and centred keys for all ranks, see `balanced_projections`.

    Args:
        encoder: the teacher.
        blocks: its blocks, counted from 1.
        pixels: the images to fit to.
        passes: how they are run.

    Raises:
        RepaError: queries or keys that are not finite.
    """

    def moments(images: Tensor) -> dict[str, Tensor]:
        features = encoder.encode(images, blocks)
        # of a batch together: per image they would be as large as queries and keys themselves
        return {
            "q": second_moment(features["q"]).sum(0, keepdim=True),
            "k": second_moment(centred(features["k"])).sum(0, keepdim=True),
        }

    sums: dict[str, NDArray[np.float64]] = {}
    for batch in passes.over(pixels, moments):
        for name, values in batch.items():
            sums[name] = sums[name] + values[0] if name in sums else values[0]
    if not all(np.isfinite(values).all() for values in sums.values()):
        raise RepaError(
            f"queries or keys of encoder {encoder.name} are not finite",
            "try --compute-dtype float32, and check the weights",
        )
    return balanced_projections(*(torch.from_numpy(sums[name] / len(pixels)) for name in "qk"))


def attention_fidelity(
    encoder: Encoder, forms: Sequence[AttentionForm], pixels: Pixels, passes: Passes
) -> list[dict[str, Any]]:
    """Measure in one pass what storing attention in each of several forms changes.

    Args:
        encoder: the teacher.
        forms: of the same blocks.
        pixels: the held-out images.
        passes: how they are run.

    Returns:
        For each form: images, rank, bytes_per_image, and the divergence in nats per query row of each block
        and head: ``kl`` (mean and 99th percentile), ``kl_mean`` over all, ``kl_worst_head``, the largest
        mean.

    Raises:
        RepaError: a divergence that is not finite: the values, or what is stored of them, are not.
    """

    def divergences(images: Tensor) -> dict[str, Tensor]:
        features = encoder.encode(images, forms[0].blocks)
        exact = (features["q"], features["k"])
        return {
            str(number): attention_divergence(exact, form.decode(form.encode(features)), encoder.logit_scale)
            for number, form in enumerate(forms)
        }

    batches = list(passes.over(pixels, divergences))
    return [
        attention_summary(form, np.concatenate([batch[str(number)] for batch in batches]))
        for number, form in enumerate(forms)
    ]


def attention_summary(form: AttentionForm, divergence: NDArray[np.float64]) -> dict[str, Any]:
    """Summarise divergences ``[N, L, H, T]`` as the fidelity that is recorded, see `attention_fidelity`.

    Raises:
        RepaError: a divergence is not finite.
    """
    if not np.isfinite(divergence).all():
        raise RepaError(
            f"queries or keys of encoder {form.model} are not finite, or larger than {form.dtype} holds",
            "try --compute-dtype float32 and --feature-dtype float32, and check the weights",
        )
    means = divergence.mean(axis=(0, 3))
    tails = np.quantile(divergence, 0.99, axis=(0, 3))
    table = [
        {
            "block": block,
            "head": head + 1,
            "mean": rounded(means[index, head]),
            "p99": rounded(tails[index, head]),
        }
        for index, block in enumerate(form.blocks)
        for head in range(form.heads)
    ]
    return {
        "images": len(divergence),
        "rank": form.rank,
        "bytes_per_image": bytes_per_image(form.columns),
        "kl": table,
        "kl_mean": rounded(means.mean()),
        "kl_worst_head": rounded(means.max()),
    }


def choose_rank(
    encoder: Encoder, settings: AttentionSettings, chosen: ChosenImages, passes: Passes
) -> tuple[AttentionForm, dict[str, Any]]:
    """Choose the form that settings ask for, calibrated and measured.

    Args:
        encoder: the teacher.
        settings: what is asked for.
        chosen: images to fit to and to measure on.
        passes: how they are run.

    Returns:
        The form, and its fidelity; see `attention_fidelity`.

    Raises:
        RepaError: no rank meets the tolerance; values that are not finite.
    """
    ranks, width = settings.ranks(encoder.head_width), encoder.head_width
    balanced = fit_attention(encoder, settings.blocks, chosen.fit, passes) if ranks[0] < width else None
    forms = [
        attention_form(encoder, settings, truncated(balanced, rank) if balanced and rank < width else None)
        for rank in ranks
    ]
    measured = attention_fidelity(encoder, forms, chosen.held_out, passes)
    if settings.tolerance is None:
        return forms[0], measured[0]
    for form, fidelity in zip(forms, measured, strict=True):
        if fidelity["kl_worst_head"] <= settings.tolerance:
            return form, fidelity
    best = min(measured, key=lambda fidelity: float(fidelity["kl_worst_head"]))
    worst = max(best["kl"], key=lambda entry: float(entry["mean"]))
    raise RepaError(
        f"no rank of encoder {encoder.name}'s attention meets --attention-kl {settings.tolerance:g}: the "
        f"best, {best['rank']} of {encoder.head_width}, reaches {worst['mean']:g} nats in block "
        f"{worst['block']}, head {worst['head']}",
        "allow more, or leave --attention-kl out for float16",
    )


def token_fidelity(encoder: Encoder, form: TokenForm, pixels: Pixels, passes: Passes) -> dict[str, Any]:
    """Measure what storing tokens changes, see `TokenErrors`.

    Args:
        encoder: the teacher.
        form: of its tokens.
        pixels: the held-out images.
        passes: how they are run.

    Returns:
        images, bytes_per_image, ``cosine_error_mean`` and ``_max`` (1 − cos(z, ẑ) of a token),
        ``repa_loss_change``, the mean of |cos(p, z) − cos(p, ẑ)|, and ``repa_loss_change_bound``, the mean of
        what no prediction can exceed.

    Raises:
        RepaError: tokens that are not finite.
    """
    errors = TokenErrors(form.tokens, form.width)
    batches = list(passes.over(pixels, partial(_token_errors, encoder, form, errors)))
    return token_summary(
        form,
        np.concatenate([batch["error"] for batch in batches]),
        np.concatenate([batch["change"] for batch in batches]),
    )


def _token_errors(
    encoder: Encoder, form: TokenForm, errors: TokenErrors, images: Tensor
) -> dict[str, Tensor]:
    features = encoder.encode(images)
    error, change = errors(features["patch"], form.decode(form.encode(features)))
    return {"error": error, "change": change}


def token_summary(form: TokenForm, error: NDArray[np.float64], change: NDArray[np.float64]) -> dict[str, Any]:
    """Summarise token errors, each ``[N, T]``, as the fidelity that is recorded, see `token_fidelity`.

    Raises:
        RepaError: an error is not finite.
    """
    if not (np.isfinite(error).all() and np.isfinite(change).all()):
        raise RepaError(
            f"tokens of encoder {form.model} are not finite",
            "try --compute-dtype float32, and check the weights",
        )
    return {
        "images": len(error),
        "bytes_per_image": bytes_per_image(form.columns),
        "cosine_error_mean": rounded(error.mean()),
        "cosine_error_max": rounded(error.max()),
        "repa_loss_change": rounded(np.abs(change).mean()),
        "repa_loss_change_bound": rounded(np.sqrt(2 * error).mean()),
    }


def rounded(value: float | np.float64) -> float:
    """Round to six digits, as numbers are recorded and compared."""
    return float(f"{value:.{_DIGITS}g}")
