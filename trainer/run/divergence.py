"""Training that has diverged is seen before it is saved, and the error says the way on."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from torch import nn

from ...data.errors import RepaError
from ..step.checkpoints import SOFTREPA_FILE, checkpoints_of, load_checkpoint
from .metrics import first_not_finite

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path

    from torch import Tensor


def refuse_divergence(values: Mapping[str, float], step: int, run: Path) -> None:
    """Look at what was recorded of the steps up to one.

    The norm of the gradient is passed over: float16 steps over the ones that overflow.

    Args:
        values: by name.
        step: finished steps.
        run: folder of the run.

    Raises:
        RepaError: one is not finite.
    """
    bad = first_not_finite({key: value for key, value in values.items() if key != "gradient_norm"})
    if bad is not None:
        raise RepaError(
            f"{bad} is {values[bad]} in the steps before {step}: training diverged", way_on(run), field=bad
        )


def refuse_weights(
    weights: Iterable[Tensor], step: int, run: Path, over_ranks: Callable[[Tensor], Tensor]
) -> None:
    """Look at the weights themselves, as the loss that would tell comes one step late.

    Args:
        weights: that are to be saved.
        step: finished steps.
        run: folder of the run.
        over_ranks: mean over the ranks, not finite if one is not.

    Raises:
        RepaError: one is not finite.
    """
    if not math.isfinite(float(over_ranks(largest(weights)))):
        raise RepaError(
            f"weights are not finite after step {step}: training diverged", way_on(run), field="weights"
        )


def refuse_lost(path: Path, run: Path) -> None:
    """Look at the weights of a checkpoint, which a version that did not may have saved after they diverged.

    Args:
        path: the checkpoint.
        run: folder of its run.

    Raises:
        RepaError: a weight is not finite; the remedy names the newest step whose weights are.
    """
    if _is_good(path):
        return
    good = next((step for step, each in reversed(checkpoints_of(run).items()) if _is_good(each)), None)
    raise RepaError(
        f"the weights in {path} are not finite: training had diverged",
        "begin another --run" if good is None else f"go on from an older one with --from-step {good}",
        field="--from-step",
    )


def _is_good(path: Path) -> bool:
    weights = load_checkpoint(path)["state_dict"].values()
    return math.isfinite(float(largest(each for each in weights if each.is_floating_point())))


def largest(weights: Iterable[Tensor]) -> Tensor:
    """Return the largest magnitude among weights, not a number if one is none, as one device value."""
    # a rank may have no part of a weight that is cut
    some = [each.detach() for each in weights if each.numel()]
    return nn.utils.get_total_norm(some, norm_type=math.inf)


def way_on(run: Path) -> str:
    """Return what can be done about a run that has diverged."""
    lower = "a lower --lr, a lower --set clip or --set precision=32-true"
    newest = max(checkpoints_of(run), default=None)
    if (run / SOFTREPA_FILE).exists():
        # its tokens have neither clipping nor a precision of their own
        return "begin another --run with a lower --lr"
    if newest is None:
        return f"start another --run with {lower}"
    return (
        f"the checkpoint of step {newest} is good: go on from it with a lower --lr or --set clip, or begin "
        f"another --run with --init {run} and {lower}"
    )
