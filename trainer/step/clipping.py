"""Clipping of the gradient, which AdamW's kernel does on its way where it can."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from .sharding import whole

if TYPE_CHECKING:
    from torch.optim import Optimizer

# that of Metal takes the factor and passes over it in silence
_SCALING_KERNELS = ("cpu", "cuda")
_NO_DIVISION_BY_ZERO = 1e-6  # as of `torch.nn.utils.clip_grad_norm_`


def clip(optimizer: Optimizer, largest: float | None, *, cut_up: bool) -> Tensor:
    """Clip the gradients of an optimiser's parameters, before its step or in it, and return their norm.

    What is larger than the largest norm c is divided by (norm + 1e-6) / c. A fused AdamW does it in the pass
    in which it reads the gradients, see `forget`; otherwise they are multiplied here, in a pass of their own.
    Either way they are clipped once the step is done.

    Args:
        optimizer: whose parameters have their gradients.
        largest: norm; None leaves every gradient.
        cut_up: whether the gradients are cut over devices.

    Returns:
        The norm before, a scalar.
    """
    parameters = [each for group in optimizer.param_groups for each in group["params"]]
    norm = whole(nn.utils.get_total_norm([each.grad for each in parameters if each.grad is not None]))
    if largest is None:
        return norm
    # gradient scaling of float16 has the same attribute, and an AdamW that is not fused
    fused = all(group["fused"] for group in optimizer.param_groups)
    if fused and not cut_up and norm.device.type in _SCALING_KERNELS:
        scaled: Any = optimizer
        scaled.grad_scale = ((norm.float() + _NO_DIVISION_BY_ZERO) / largest).clamp(min=1)
    else:
        nn.utils.clip_grads_with_norm_(parameters, largest, norm)
    return norm


def forget(optimizer: Optimizer) -> None:
    """Have an optimiser that clipped in its step clip no more, so that another step takes what it gets.

    Args:
        optimizer: after its step.
    """
    stepped: Any = optimizer
    stepped.grad_scale = None
