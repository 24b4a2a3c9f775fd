"""The closed-form start, in which each block of the student is fitted to what the teacher's block gave.

Block after block, the student's tokens after its own attention are x. Of the teacher's hidden channels those
stay active that no linear path replaces, see `channels`. They are copied; the second layer's weights for them
and the linear path are one ridge regression. What it is of lies between the teacher's tokens after that block
less x, which mends errors of earlier blocks and learns those of the fitted images by heart, and what the
teacher's network makes of x, which mends nothing. The path is laid through the idle channels where they are
enough for any path; where they are fewer, they are the teacher's and their weights are fitted. Nothing is
differentiated.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...data.errors import CacheError
from ..encoders.idle_blocks import layer_scale
from ..encoders.precision import forward_pass
from ..encoders.weights import INITIALISATION_SEED
from .channels import ChannelChoice
from .least_squares import LeastSquares

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from ..encoders.channel_idle import IdleFeedForward
    from ..encoders.timm_vit import TimmEncoder
    from .pairs import Pairs

PENALTY = 1e-4
"""Of the first layer after a BatchNorm, relative to the variance of each feature. Ours."""
IMITATION = 0.7
"""Share in what is fitted of what the teacher's network makes of the student's tokens. Ours, as measured:
0 and 1 are both worse on held-out images, see ``docs/distill.md``."""
FITTED_PENALTY = 1e-3
"""Of the second layer and the linear path. Ours, measured with it."""
CHOICE_TOKENS = 4
"""At most, evenly spaced, for each channel in and within the network, of those it is chosen by. Ours."""
LEAST_COSINE = 0.98
"""Mean cosine of an image's cached tokens to those of the teacher at hand. Ours, far below what int8, half
precision or another device change, and far above what another image or crop gives."""


@torch.no_grad()
def fit_in_closed_form(
    teacher: TimmEncoder, student: Any, pairs: Iterable[Pairs], report: Callable[[int], None]
) -> None:
    """Fit the feed-forward networks of a student of `make_idle`.

    All tokens of the images are in memory up to three times, of one block of the student and two of the
    teacher.

    Args:
        teacher: with its own weights.
        student: a ViT whose blocks are the teacher's but for these networks; changed in place.
        pairs: images to fit to.
        report: is told the number of images as each block is done.

    Raises:
        CacheError: the teacher gives other tokens than the cache has.
    """
    with forward_pass("float32", teacher.device):
        states: list[Tensor] = []
        options: list[Mapping[str, Any]] = []
        seen = 0
        for batch in pairs:
            first, options, tokens = _into_blocks(teacher, batch.images)
            _check(teacher, tokens, batch, seen)
            states.append(first.cpu())
            seen += len(batch.images)
        theirs = states
        for own, block, keywords in zip(student.blocks, teacher.model.blocks, options, strict=True):
            theirs = [block(each.to(teacher.device), **keywords).cpu() for each in theirs]
            network, own.mlp = own.mlp, _Nothing()
            # without its network a block gives its tokens after attention
            states = [own(each.to(teacher.device), **keywords).cpu() for each in states]
            own.mlp = network
            fit = _BlockFit(block, own, states, theirs, teacher.device)
            states = fit.run()
            report(seen)


class _Nothing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


class _BlockFit:
    """The fit of one block.

    Args:
        teacher: the teacher's block.
        student: the student's.
        states: tokens of the student after attention, batches ``[B, N, D]``.
        wanted: tokens of the teacher after the block.
        device: where it is computed.
    """

    def __init__(
        self, teacher: Any, student: Any, states: list[Tensor], wanted: list[Tensor], device: torch.device
    ) -> None:
        self._teacher, self._student = teacher, student
        self._states, self._wanted, self._device = states, wanted, device
        self._network: IdleFeedForward = student.mlp
        scale = layer_scale(student)
        self._scale = torch.ones(1, device=device) if scale is None else scale

    def run(self) -> list[Tensor]:
        """Set the network's weights, and return the tokens of the student after the block."""
        self._set_first_norm()
        order = self._order()
        self._set_first_layer(order)
        self._set_second_layer()
        return [(x + self._scale * self._network(self._normed(x))).cpu() for x in self._each(self._states)]

    def _each(self, batches: list[Tensor]) -> Iterator[Tensor]:
        return (each.to(self._device) for each in batches)

    def _normed(self, x: Tensor) -> Tensor:
        """Return tokens as the network takes them, after the norm that the block keeps, if it does."""
        found: Tensor = self._student.norm2(x)
        return found

    def _inputs(self, x: Tensor) -> Tensor:
        """Return tokens ``[B·N, D]`` as the first layer takes them."""
        z = self._normed(x).flatten(0, 1)
        return z if self._network.norm1 is None else self._network.norm1(z)

    def _teacher_hidden(self, x: Tensor) -> Tensor:
        """Return what the teacher's first layer makes of tokens, ``[B·N, H]``."""
        found: Tensor = self._teacher.mlp.fc1(self._teacher.norm2(x)).flatten(0, 1)
        return found

    def _set_first_norm(self) -> None:
        if self._network.norm1 is not None:
            mean, variance = _moments(x.flatten(0, 1) for x in self._each(self._states))
            _set_statistics(self._network.norm1, mean, variance)

    def _order(self) -> Tensor:
        """Return the teacher's hidden channels, those that stay active first, ``[H]``."""
        network = self._network
        width, hidden = network.fc1.in_features, network.fc1.out_features
        choice = ChannelChoice(width, hidden, self._device)
        tokens = sum(x.shape[0] * x.shape[1] for x in self._states)
        step = -(-tokens // (CHOICE_TOKENS * (width + hidden)))
        seen = 0
        for x in self._each(self._states):
            some = x.flatten(0, 1)[-seen % step :: step]
            seen += x.shape[0] * x.shape[1]
            z = self._teacher.norm2(some)
            choice.add(z, self._teacher.mlp.act(self._teacher.mlp.fc1(z)))
        return choice.order(self._scale.unsqueeze(-1) * self._teacher.mlp.fc2.weight, network.active)

    def _set_first_layer(self, order: Tensor) -> None:
        """Copy the teacher's first layer, or fit one that gives the same after a BatchNorm."""
        fc1, own = self._teacher.mlp.fc1, self._network.fc1
        weight, bias = fc1.weight, fc1.bias
        if self._network.norm1 is not None:
            fit = LeastSquares(fc1.in_features, fc1.out_features, self._device)
            for x in self._each(self._states):
                fit.add(self._inputs(x), self._teacher_hidden(x))
            weight, bias = fit.solve(PENALTY)
        own.weight.copy_(weight[order])
        own.bias.copy_(bias[order])

    def _set_second_layer(self) -> None:
        network = self._network
        active, hidden, width = network.active, network.fc1.out_features, network.fc1.in_features
        # as many idle channels as there are channels, or more, give any linear path
        free = hidden - active >= width
        linear = width if free else hidden - active
        fit = LeastSquares(active + linear, width, self._device)
        teacher = self._teacher
        scale = torch.where(self._scale == 0, 1.0, self._scale)
        for x, wanted in zip(self._each(self._states), self._each(self._wanted), strict=True):
            z = self._inputs(x)
            h = network.fc1(z)
            features = torch.cat([network.act(h[:, :active]), z if free else h[:, active:]], dim=1)
            target = torch.lerp((wanted - x) / scale, teacher.mlp(teacher.norm2(x)), IMITATION)
            fit.add(features, target.flatten(0, 1))
        weights, bias = fit.solve(FITTED_PENALTY)
        idle = weights[:, active:]
        if free:
            # orthonormal columns lose nothing to rounding, as the teacher's would
            across = _orthonormal(hidden - active, width).to(self._device)
            network.fc1.weight[active:] = across.float()
            network.fc1.bias[active:] = 0
            idle = idle @ across.mT
        network.fc2.weight.copy_(torch.cat([weights[:, :active], idle], dim=1))
        network.fc2.bias.copy_(bias)
        if network.norm2 is not None:
            mean, variance = _moments(self._hidden(x) for x in self._each(self._states))
            _set_statistics(network.norm2, mean, variance)
            # at the start it changes nothing
            network.norm2.weight.copy_((variance + network.norm2.eps).sqrt())
            network.norm2.bias.copy_(mean)

    def _hidden(self, x: Tensor) -> Tensor:
        h = self._network.fc1(self._inputs(x))
        active = self._network.active
        return torch.cat([self._network.act(h[:, :active]), h[:, active:]], dim=1)


def _orthonormal(rows: int, columns: int) -> Tensor:
    """Return a matrix of orthonormal columns, float64 ``[rows, columns]``, the same every time."""
    drawn = torch.randn(
        (rows, columns), dtype=torch.float64, generator=torch.Generator().manual_seed(INITIALISATION_SEED)
    )
    found: Tensor = torch.linalg.qr(drawn).Q
    return found


def _moments(batches: Iterator[Tensor]) -> tuple[Tensor, Tensor]:
    """Return mean and variance of each channel, float64 ``[C]``, of batches ``[N, C]``."""
    count, total, squares = 0, torch.zeros(()), torch.zeros(())
    for each in batches:
        values = each.double()
        count += len(values)
        total = total.to(values) + values.sum(dim=0)
        squares = squares.to(values) + values.square().sum(dim=0)
    mean = total / count
    return mean, (squares / count - mean.square()).clamp_min(0)


def _set_statistics(norm: nn.BatchNorm1d, mean: Tensor, variance: Tensor) -> None:
    assert norm.running_mean is not None, "statistics are tracked"
    assert norm.running_var is not None, "statistics are tracked"
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(variance)


def _into_blocks(
    encoder: TimmEncoder, images: Tensor
) -> tuple[Tensor, list[Mapping[str, Any]], Mapping[str, Tensor]]:
    """Run the teacher, and return what its blocks are called with beside what it gives.

    Returns:
        Tokens before the first block ``[B, N, D]``, the other arguments of each block, and the features.
    """
    calls: list[tuple[Tensor, Mapping[str, Any]]] = []

    def keep(_: nn.Module, args: tuple[Tensor, ...], keywords: dict[str, Any]) -> None:
        calls.append((args[0] if not calls else torch.empty(0), keywords))

    hooks = [block.register_forward_pre_hook(keep, with_kwargs=True) for block in encoder.model.blocks]
    try:
        features = encoder.in_float32().compute(images)
    finally:
        for hook in hooks:
            hook.remove()
    return calls[0][0], [keywords for _, keywords in calls], features


def _check(teacher: TimmEncoder, features: Mapping[str, Tensor], batch: Pairs, seen: int) -> None:
    """Refuse images whose cached tokens this teacher does not give.

    Raises:
        CacheError: the first of them.
    """
    cosine = F.cosine_similarity(features["patch"], batch.patch, dim=-1).mean(dim=1)
    wrong = (~(cosine >= LEAST_COSINE)).nonzero()
    if len(wrong):
        number = int(wrong[0])
        raise CacheError(
            f"the tokens of {teacher.name} in the cache are not those of image {seen + number} of those "
            f"fitted to: their cosine is {float(cosine[number]):.3f}",
            "give the images and the weights that the cache was made with, or run `repa cache verify`",
            field="--data",
        )
