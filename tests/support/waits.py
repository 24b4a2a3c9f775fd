"""What would make the host wait for a GPU, counted on the CPU, where nothing has to wait."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._python_dispatch import TorchDispatchMode

if TYPE_CHECKING:
    from collections.abc import Iterator

# a number on the host, a shape that depends on values, or a copy from memory that is not page-locked
_WAITING = {
    "_linalg_check_errors",
    "_local_scalar_dense",
    "_unique",
    "_unique2",
    "allclose",
    "bincount",
    "equal",
    "is_nonzero",
    "item",
    "lift_fresh",
    "masked_select",
    "nonzero",
    "unique_consecutive",
    "unique_dim",
}
_MASKED = {"index", "index_put", "index_put_", "_unsafe_index"}
_TO_THE_HOST = {
    "torch.Tensor.__array__",
    "torch.Tensor.cpu",
    "torch.Tensor.numpy",
    "torch.Tensor.tolist",
}


class _Operations(TorchDispatchMode):
    """Count operations, those of the backward pass too."""

    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self._waits = waits

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if name in _WAITING or (name in _MASKED and any(map(_is_mask, args[1]))):
            self._waits.add(name)
        if name == "repeat_interleave" and "output_size" not in (kwargs or {}):
            self._waits.add(name)
        return func(*args, **(kwargs or {}))


class _Calls(TorchFunctionMode):
    """Count calls that are no operation on the CPU, as a copy to the host."""

    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self._waits = waits

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = resolve_name(func)
        wanted = [*args[1:], *kwargs.values()] if name == "torch.Tensor.to" else []
        if name in _TO_THE_HOST or any(_is_host(each) for each in wanted):
            self._waits.add(str(name))
        return func(*args, **kwargs)


class Waits:
    """Counts, by the step that was going on, of what happens while `on`.

    Attributes:
        on: whether it counts.
        step: name of what goes on.
        found: (step, operation) → times.
    """

    def __init__(self) -> None:
        self.on = False
        self.step: Any = None
        self.found: Counter[tuple[Any, str]] = Counter()

    def add(self, name: str) -> None:
        """Count one."""
        if self.on:
            self.found[self.step, name] += 1

    def __enter__(self) -> Waits:
        self._modes = (_Operations(self), _Calls(self))
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*error)


def _is_mask(index: Any) -> bool:
    return isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8)


def _is_host(wanted: Any) -> bool:
    """Tell whether an argument of `Tensor.to` names the CPU by its name; a device at hand may be any."""
    return wanted == "cpu" if isinstance(wanted, str) else False


def names(found: Counter[tuple[Any, str]]) -> Iterator[str]:
    """Yield what was counted, without the step."""
    return (name for _, name in found)
