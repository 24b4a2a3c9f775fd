"""Weights that are cut over the devices of a run, each device holding a part of every one (FSDP2).

The unit that is gathered, used and let go is a block of the backbone. What is left, its first and last layers
and the method's parameters, is one more unit, gathered for the whole of a step.
"""

from __future__ import annotations

import copy
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lightning.pytorch import LightningModule
    from torch.distributed.device_mesh import DeviceMesh

    from ..models.base import Backbone


class Shards:
    """The cut of a module's parameters. Nothing is cut until `cut` is called."""

    def __init__(self) -> None:
        self._copies: dict[Backbone, WeightlessCopy] = {}

    @property
    def cut_up(self) -> bool:
        """Whether every parameter is cut."""
        return bool(self._copies)

    def cut(self, module: LightningModule, networks: tuple[Backbone, ...], mesh: DeviceMesh) -> None:
        """Cut every parameter over the devices, in place. Names, and what a state dict holds, stay.

        Args:
            module: whose ``training_step`` runs the networks.
            networks: its networks.
            mesh: the devices, one axis.
        """
        self._copies = {each: WeightlessCopy(each) for each in networks}
        for network in networks:
            for block in network.blocks:
                fully_shard(block, mesh=mesh)
            if not any(each.requires_grad for each in network.parameters()):
                # most steps do without the averaged weights: they are gathered when they are called
                fully_shard(network, mesh=mesh)
        fully_shard(module, mesh=mesh)
        # losses call parts of networks and methods by other names than forward
        register_fsdp_forward_method(module, "training_step")

    @contextmanager
    def whole(self, network: Backbone) -> Iterator[Backbone]:
        """Give a network with all of its weights. Every rank must call it.

        Args:
            network: of those that are cut, if any are.
        """
        if not self.cut_up:
            yield network
            return
        with self._copies[network].filled(network) as gathered:
            yield gathered


def whole(tensor: Tensor) -> Tensor:
    """Return all of a tensor. Every rank must call it where the tensor is cut."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_part(tensor: Tensor) -> Tensor:
    """Return this rank's part of a tensor, all of one that is not cut."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def cut_as(tensor: Tensor, like: Tensor) -> Tensor:
    """Return a whole tensor, which every rank has, cut as another is."""
    if not isinstance(like, DTensor):
        return tensor
    there = tensor.to(like.device)
    # each rank takes its part of what it has itself: nothing is sent
    return distribute_tensor(there, like.device_mesh, like.placements, src_data_rank=None)


class WeightlessCopy:
    """A copy of a network that lies there without weights until they are gathered.

    What samples and measures calls networks as often as it wants on each rank, or on one rank alone; a
    network that is cut would wait for the others in each block.

    Args:
        network: not cut yet.
    """

    def __init__(self, network: Backbone) -> None:
        kept: dict[int, Any] = {
            id(each): nn.Parameter(torch.empty_like(each, device="meta"), requires_grad=False)
            for each in network.parameters()
        }
        # an open cache is no part of a network's state
        banks = (getattr(each, "bank", None) for each in network.modules())
        kept |= {id(each): each for each in banks if each is not None}
        self._network = copy.deepcopy(network, kept)

    @contextmanager
    def filled(self, network: Backbone) -> Iterator[Backbone]:
        """Give the copy with the weights of the network, now that it is cut. Every rank must call it.

        Args:
            network: the one that was copied.
        """
        state = {name: whole(each.detach()) for name, each in network.state_dict().items()}
        self._network.load_state_dict(state, assign=True)
        # tables that no state dict holds
        self._network.to(next(iter(state.values())).device)
        try:
            yield self._network
        finally:
            empty = {name: each.to("meta") for name, each in state.items()}
            self._network.load_state_dict(empty, assign=True)
