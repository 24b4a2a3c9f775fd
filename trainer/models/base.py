"""The backbone contract, an architecture whose facts methods may know and a network they may look into.

A backbone is one file with a `BackboneConfig` and a `Backbone`, and one line in `registry`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .capture import NOTHING, BackboneFacts, Capture, Captured
from .conditioning import Conditioner

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Self


@dataclass(frozen=True, kw_only=True)
class BackboneConfig(ABC):
    """Architecture of a backbone in plain values, which checkpoints keep.

    Attributes:
        takes_sequences: whether its conditioner gives a sequence of tokens, and not one vector.
        most_tokens: how many vectors it can denoise beside the latent.
        names: what a name of the family looks like, for errors: ``"SiT-<size>/<patch> with …"``.
        input_size: side of the (square) latent.
        in_channels: channels of the latent.
        num_classes: classes, without the null class.
        token_widths: channels of each vector that is denoised beside the latent.
    """

    takes_sequences: ClassVar[bool] = False
    most_tokens: ClassVar[int] = 0
    names: ClassVar[str]

    input_size: int
    in_channels: int = 4
    num_classes: int = 1000
    token_widths: tuple[int, ...] = ()

    @classmethod
    @abstractmethod
    def knows(cls, name: str) -> bool:
        """Return whether a name, as of ``--model``, is one of the family's."""

    @classmethod
    @abstractmethod
    def named(
        cls, name: str, *, input_size: int, in_channels: int = 4, num_classes: int = 1000, **settings: Any
    ) -> Self:
        """Return the architecture of a name such as ``SiT-B/2``.

        Args:
            name: of ``--model``.
            input_size: side of the latent.
            in_channels: its channels.
            num_classes: classes, without the null class.
            settings: settings of the run that are fields of this class, ``qk_norm``.

        Raises:
            RepaError: the latent does not fit it.
        """

    @property
    @abstractmethod
    def facts(self) -> BackboneFacts:
        """What methods may know."""

    @property
    def prediction_channels(self) -> int:
        """Channels of the prediction, those of the latent unless a network predicts more."""
        return self.in_channels

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Shape ``(C, h, w)`` of one latent."""
        return self.in_channels, self.input_size, self.input_size


class Backbone(nn.Module, ABC):
    """The network from noisy latent, time and condition to a prediction, plus the activations asked for.

    A subclass is constructed from its config and, optionally, a conditioner; None stands for class labels.
    Its parameters are drawn from torch's global generator. One whose config says ``most_tokens`` takes a last
    argument in `forward`, the tuple of noisy vectors ``[B, D]`` of `BackboneConfig.token_widths`, and returns
    their predictions in `Captured.tokens`; it is given only where there are some. One whose facts say
    ``token_times`` takes ``groups`` by keyword, given only where an image has several times: the times are
    then those of the groups, ``[B, G]``, and each token is modulated by its group's embedding.

    Attributes:
        config: architecture.
        facts: what methods may know.
        y_embedder: the conditioner.
        blocks: the blocks, counted from 1 by all others.
        recompute_every: of so many blocks one keeps its inputs alone for the backward pass, see `run_block`;
            0 for none.
    """

    recompute_every: int = 0

    config: BackboneConfig
    facts: BackboneFacts
    y_embedder: Conditioner
    blocks: nn.ModuleList

    def left_out(self, stop_after: int) -> tuple[str, ...]:
        """Name what a forward pass does without that stops after a block, as prefixes of parameters' names.

        Here it is the blocks after and the final layer; a network with more than that says so.

        Args:
            stop_after: the block, counted from 1.
        """
        later = range(stop_after, len(self.blocks))
        return (*(f"blocks.{number}." for number in later), "final_layer.")

    def run_block(self, number: int, *inputs: Any, **named: Any) -> Any:
        """Return what a block makes of its inputs, for every block of every network.

        What `recompute_every` names is computed again in the backward pass (arXiv 1604.06174), with the
        random numbers and the autocast of the first time. Its outputs, such as those that are captured, are
        kept by who uses them.

        Args:
            number: of the block, counted from 1.
            inputs: of its forward pass.
            named: the same by keyword.
        """
        block = self.blocks[number - 1]
        if not self.recompute_every or number % self.recompute_every or not torch.is_grad_enabled():
            return block(*inputs, **named)
        return checkpoint(block, *inputs, use_reentrant=False, **named)

    def add_tables(self) -> None:
        """Register the buffers that the config decides and no state dict holds, none by default.

        The constructor calls it, and whoever has built the network on the meta device for a state dict.
        """

    @abstractmethod
    def forward(self, x: Tensor, t: Tensor, condition: Tensor, capture: Capture = NOTHING) -> Captured:
        """Predict what the objective trains.

        Args:
            x: noisy latent ``[B, C, h, w]``.
            t: times ``[B]`` in [0, 1]; data at 0, noise at 1.
            condition: what the conditioner embeds; labels int64 ``[B]`` by default.
            capture: activations to return.

        Returns:
            The prediction (None after an early stop), ``[B, C, h, w]`` with the config's
            `prediction_channels`, and the activations.

        Raises:
            ValueError: the capture names a block that does not run.
        """


def with_weights(make: Callable[[], Backbone], state: Mapping[str, Tensor]) -> Backbone:
    """Return a network with the weights of a state dict, which it shares.

    Args:
        make: builds the network.
        state: parameters and buffers, all of them.

    Raises:
        RuntimeError: the state dict is not of such a network.
    """
    # weights that are never used are never drawn: they take longer than to read the others
    with torch.device("meta"):
        network = make()
    network.add_tables()
    kept = network.state_dict().keys()
    if any(each.is_meta for name, each in network.named_buffers() if name not in kept):
        network = make()
    network.load_state_dict(state, strict=True, assign=True)
    return network
