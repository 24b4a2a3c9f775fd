"""Tensors that say they are on CUDA and hold nothing, and what a GPU would refuse or wait for of them.

PyTorch's fake tensors know devices, shapes and dtypes, and refuse to mix devices and to give numbers away.
What they let pass is refused here: products of two dtypes, a generator or an index of another device, and,
where it is asked for, copies between host and device.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from repa.data.format import factors
from repa.data.reading import latents
from repa.pipeline.columns import factoring
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pytest

DEVICE = torch.device("cuda", 0)
_PRODUCTS = {
    *("mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward"),
    *("_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention"),
}
_READS = {"_local_scalar_dense", "is_nonzero"}
_COPIES = {"_to_copy", "copy_", "lift_fresh"}
_INDEXED = {"index", "index_put", "index_put_", "_unsafe_index"}


class RefusedError(RuntimeError):
    """A GPU would refuse it, or wait."""


class Generator(torch.Generator):
    """A generator that says it is on a device which is not there, for fake tensors draw nothing."""

    def __new__(cls, device: torch.device | str = "cpu") -> Generator:
        """Make one of the host's."""
        del device
        return super().__new__(cls)

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._said = torch.device(device)

    @property
    def device(self) -> torch.device:
        """Where it says it is."""
        return self._said


class Refusals(TorchDispatchMode):
    """Refuse what fake tensors let pass.

    Attributes:
        copies: whether copies between host and device are refused too, each of which a step would wait for.
        reads: whether numbers may be read, which are then all 1.
    """

    def __init__(self) -> None:
        super().__init__()
        self.copies = self.reads = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call an operation, and look at what went in and what comes out."""
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        if name in _PRODUCTS and len({each.dtype for each in given if each.is_floating_point()}) > 1:
            raise RefusedError(f"{name} of {[each.dtype for each in given]}")
        if name in _INDEXED:
            of, at = args[0], [each for each in args[1] if each is not None]
            if {each.device.type for each in at} - {of.device.type}:
                raise RefusedError(f"{name} by indices of another device, which are copied")
        if self.reads and name in _READS:
            return True if args[0].dtype is torch.bool else 1.0
        result = func(*args, **kwargs)
        made = [each for each in tree_leaves(result) if isinstance(each, Tensor)]
        if self.copies and name in _COPIES and len({each.device.type for each in (*given, *made)}) > 1:
            raise RefusedError(f"{name} between host and device")
        return result


class _Generators(TorchFunctionMode):
    """Refuse generators of another device, which operations no longer see as they were given."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        generator = (kwargs or {}).get("generator")
        made = [each.device.type for each in tree_leaves(result) if isinstance(each, Tensor)]
        if generator is not None and {generator.device.type} != set(made):
            raise RefusedError(f"{func} with a generator of {generator.device.type}")
        return result


class _Mode(FakeTensorMode):
    """Asks the driver for nothing, also where CUDA is said to be there."""

    @property
    def avoid_device_init(self) -> bool:
        return True


@contextmanager
def fake_cuda(patch: pytest.MonkeyPatch) -> Iterator[Refusals]:
    """Let CUDA look as if it were there, and make all tensors fake.

    Args:
        patch: of the test.

    Yields:
        What refuses.
    """
    mode = _Mode(allow_non_fake_inputs=True)
    with patch.context() as within:
        within.setattr(torch, "Generator", Generator)
        for name, value in (
            ("is_available", True),
            ("is_bf16_supported", True),
            ("device_count", 1),
            ("get_device_capability", (9, 0)),
            ("get_device_name", "NVIDIA H100 80GB HBM3"),
        ):
            within.setattr(torch.cuda, name, lambda *_, value=value, **__: value)
        within.setattr(Tensor, "backward", backward)
        # by this number a block that is computed again knows for whom, and is so once
        within.setattr(torch._C, "_current_graph_task_id", lambda: _passes[0])
        with mode, _Generators(), Refusals() as refusals:
            yield refusals
    # what is kept for later would be fake
    for kept in (latents._of_channels, factors.places, factoring._of_layout):
        kept.cache_clear()


def moved(module: nn.Module) -> nn.Module:
    """Put parameters and buffers on the fake device, as `Module.to` does, in place."""
    for each in module.modules():
        for name, parameter in each._parameters.items():
            if parameter is not None:
                each._parameters[name] = nn.Parameter(fake(parameter.data), parameter.requires_grad)
        for name, values in each._buffers.items():
            if values is not None:
                each._buffers[name] = fake(values)
        if hasattr(each, "_device"):
            each._device = DEVICE
    return module


def fake(values: Tensor) -> Tensor:
    """Return a fake tensor of the same shape, dtype and strides on the device."""
    return torch.empty_strided(values.shape, values.stride(), dtype=values.dtype, device=DEVICE)


_passes = [0]


def backward(loss: Tensor) -> None:
    """Add the gradients of a loss to the parameters, node by node.

    PyTorch's engine asks the driver for streams.
    """
    _passes[0] += 1
    start = loss.grad_fn
    waiting: dict[Any, int] = {}
    seen, stack = {start}, [start]
    while stack:
        for node, _ in stack.pop().next_functions:
            if node is not None:
                waiting[node] = waiting.get(node, 0) + 1
                if node not in seen:
                    seen.add(node)
                    stack.append(node)
    arrived: dict[Any, dict[int, Tensor]] = {start: {0: torch.ones_like(loss)}}
    ready = [start]
    with torch.no_grad():
        while ready:
            _run(ready.pop(), arrived, waiting, ready)


def _run(node: Any, arrived: dict[Any, dict[int, Tensor]], waiting: dict[Any, int], ready: list[Any]) -> None:
    """Run a node of the graph, and note which others are ready then."""
    incoming = arrived.pop(node, {})
    if hasattr(node, "variable"):
        leaf = node.variable
        leaf.grad = incoming[0] if leaf.grad is None else leaf.grad + incoming[0]
        return
    count = len(node._input_metadata)
    given = [incoming.get(number) for number in range(count)]
    outgoing: Any = (None,) * len(node.next_functions)
    if incoming:
        outgoing = (
            node.apply(*given)
            if isinstance(node, torch.autograd.function.BackwardCFunction)
            else node(*given)
        )
    outgoing = outgoing if isinstance(outgoing, tuple) else (outgoing,)
    for (following, place), gradient in zip(node.next_functions, outgoing, strict=False):
        if following is None:
            continue
        if gradient is not None:
            wanted = following._input_metadata[place]
            gradient = gradient.sum_to_size(wanted.shape).to(wanted.dtype)
            there = arrived.setdefault(following, {})
            there[place] = gradient if place not in there else there[place] + gradient
        waiting[following] -= 1
        if not waiting[following]:
            ready.append(following)


def is_fake(values: Any) -> bool:
    """Tell whether something is a fake tensor on the device."""
    return isinstance(values, FakeTensor) and values.device == DEVICE
