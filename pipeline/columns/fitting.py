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
from .measures import GradientErrors, TokenErrors, attention_divergence
from .specs import bytes_per_image
from .truncation import balanced_projections, centred, second_moment

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from ..encoders.base import Encoder
    from ..lanes.lanes import Lanes
    from .factored import Form
    from .forms import TokenForm

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
            pixels: number → uint8 ``[3, R, R]``.
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
    finite_or_refused(encoder, sums)
    return balanced_projections(*(torch.from_numpy(sums[name] / len(pixels)) for name in "qk"))


def finite_or_refused(encoder: Encoder, sums: Mapping[str, NDArray[np.float64]]) -> None:
    """Refuse sums of queries or keys that are not finite.

    Raises:
        RepaError: some are not.
    """
    if not all(np.isfinite(values).all() for values in sums.values()):
        raise RepaError(
            f"queries or keys of encoder {encoder.name} are not finite",
            "try --compute-dtype float32, and check the weights",
        )


def attention_fidelity(
    encoder: Encoder, forms: Sequence[Form], pixels: Pixels, passes: Passes
) -> list[dict[str, Any]]:
    """Measure in one pass what storing attention in each of several forms changes.

    Args:
        encoder: the teacher.
        forms: of the same blocks.
        pixels: the held-out images.
        passes: how they are run.

    Returns:
        For each form what `attention_summary` says.

    Raises:
        RepaError: a divergence that is not finite: the values, or what is stored of them, are not.
    """
    gradients = GradientErrors(forms[0].heads, tokens_of(encoder), encoder.head_width, encoder.logit_scale)

    def errors(images: Tensor) -> dict[str, Tensor]:
        features = encoder.encode(images, forms[0].blocks)
        exact = (features["q"], features["k"])
        found: dict[str, Tensor] = {}
        for number, form in enumerate(forms):
            stored = form.decode(form.encode(features))
            found[f"{number}"] = attention_divergence(exact, stored, encoder.logit_scale)
            for student, (cosine, change) in gradients(exact, stored).items():
                found[f"{number} {student} cosine"], found[f"{number} {student} change"] = cosine, change
        return found

    batches = list(passes.over(pixels, errors))
    joined = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
    return [
        attention_summary(
            form,
            joined[f"{number}"],
            {
                student: (joined[f"{number} {student} cosine"], joined[f"{number} {student} change"])
                for student in gradients.STUDENTS
            },
        )
        for number, form in enumerate(forms)
    ]


def attention_summary(
    form: Form,
    divergence: NDArray[np.float64],
    gradients: Mapping[str, tuple[NDArray[np.float64], NDArray[np.float64]]],
) -> dict[str, Any]:
    """Summarise what was measured as the fidelity that is recorded.

    Args:
        form: of the attention.
        divergence: nats of each query row, ``[N, L, H, T]``.
        gradients: student → cosine of the gradients and change of the loss, each ``[N, L]``, see
            `GradientErrors`.

    Returns:
        images, rank, bytes_per_image, and the divergence in nats per query row of each block and head:
        ``kl`` (mean and 99th percentile), ``kl_mean`` over all, ``kl_worst_head``, the largest mean; and of
        each student ``gradient_cosine_…``, the mean of the block where it is lowest, and ``loss_change_…``,
        the mean magnitude in nats.

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
    summary = {
        "images": len(divergence),
        "rank": form.rank,
        "bytes_per_image": bytes_per_image(form.columns),
        "kl": table,
        "kl_mean": rounded(means.mean()),
        "kl_worst_head": rounded(means.max()),
    }
    for student, (cosine, change) in gradients.items():
        summary[f"gradient_cosine_{student}"] = rounded(cosine.mean(axis=0).min())
        summary[f"loss_change_{student}"] = rounded(np.abs(change).mean())
    return summary


def tokens_of(encoder: Encoder) -> int:
    """Count the patch tokens of an encoder, T."""
    return encoder.grid[0] * encoder.grid[1]


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
