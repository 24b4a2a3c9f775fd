"""What `torch.compile` compiles of a run, the backbone, whole or block by block, and the method's losses.

Modules are compiled in place, so that the keys of their state dicts stay as they are. Shapes are constants of
the graphs: all batches of a run are of one size, and what is not, an evaluation, runs `uncompiled`.
"""

from __future__ import annotations

import os
import shutil
import sys
import threading
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from functools import wraps
from importlib.util import find_spec
from typing import TYPE_CHECKING, Literal, ParamSpec, TypeAlias, TypeVar

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

P = ParamSpec("P")
T = TypeVar("T")

Compile: TypeAlias = Literal["auto", "blocks", "whole", "off"]
"""The setting: each block by itself, the backbone in one piece, nothing, or as fits the device."""

BACKEND = "inductor"
"""What makes code of the graphs; tests take one that waits for no compiler."""

_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict, nn.Identity)
_LEAST_CAPABILITY = (7, 0)  # of a GPU, for Triton

_losses_compiled: ContextVar[bool] = ContextVar("losses are compiled", default=False)


def chosen(setting: Compile, device: str) -> Compile:
    """Return what a setting means on a kind of device, without ``auto``.

    Blocks on CUDA: one graph does for all blocks of a kind, so that a run starts sooner than with a graph of
    the whole, and its steps take as long (see docs/training-speed.md). Elsewhere a compiler of C++ would be
    waited for, for little.

    Args:
        setting: of the run.
        device: ``cuda``, ``mps`` or ``cpu``.
    """
    if setting != "auto":
        return setting
    return "blocks" if device == "cuda" and not missing(device) else "off"


def missing(device: str) -> str:
    """Say what `torch.compile` lacks on a kind of device, nothing where it has all.

    Args:
        device: ``cuda``, ``mps`` or ``cpu``.
    """
    if device == "cpu":
        name = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
        return "" if shutil.which(name) else f"a C++ compiler ({name})"
    if device == "cuda":
        if torch.cuda.get_device_capability() < _LEAST_CAPABILITY:
            return "a GPU that Triton writes for"
        if find_spec("triton") is None:
            return "the package triton"
        compilers = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
        return "" if any(map(shutil.which, compilers)) else f"a C compiler ({' or '.join(compilers)})"
    return ""


def compile_backbone(network: nn.Module, blocks: nn.ModuleList, how: Compile) -> None:
    """Compile a backbone in place.

    Args:
        network: the backbone.
        blocks: its blocks.
        how: as of `chosen`.
    """
    for module in blocks if how == "blocks" else [network] if how == "whole" else []:
        module.compile(backend=BACKEND, dynamic=False)


def compile_children(module: nn.Module) -> None:
    """Compile what a module calls, each child by itself, as the projectors of a method.

    Args:
        module: is not compiled itself.
    """
    for child in module.children():
        if isinstance(child, _CONTAINERS):
            compile_children(child)
        else:
            child.compile(backend=BACKEND, dynamic=False)


def fused(function: Callable[P, T]) -> Callable[P, T]:
    """Have a function of tensors compiled while `compiled_losses` are wanted.

    Args:
        function: without side effects.
    """
    compiled: dict[str, Callable[P, T]] = {}

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        # within another compiled function it is part of that one's graph
        if torch.compiler.is_compiling() or not _losses_compiled.get():
            return function(*args, **kwargs)
        if BACKEND not in compiled:
            compiled[BACKEND] = torch.compile(function, backend=BACKEND, dynamic=False)
        return compiled[BACKEND](*args, **kwargs)

    return call


@contextmanager
def compiled_losses(wanted: bool) -> Iterator[None]:
    """Have `fused` functions compiled inside, where it is wanted."""
    before = _losses_compiled.set(wanted)
    try:
        yield
    finally:
        _losses_compiled.reset(before)


@contextmanager
def uncompiled() -> Iterator[None]:
    """Run what is inside as it is written, for batches of other sizes than those of training.

    Threads may be inside at once, as those that sample for an evaluation on a CPU are.
    """
    # without dynamo, which takes a second to import, nothing is compiled yet
    if "torch._dynamo" not in sys.modules:
        yield
        return
    _as_written.enter()
    try:
        yield
    finally:
        _as_written.leave()


class _AsWritten:
    """The whole process's word that nothing is to be compiled, as long as anybody is inside.

    PyTorch's own gives back what it found, so that of two threads the later one would leave it on for good.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._stance = ExitStack()

    def enter(self) -> None:
        """Have nothing compiled from now on."""
        with self._lock:
            if not self._inside:
                self._stance.enter_context(torch.compiler.set_stance("force_eager"))
            self._inside += 1

    def leave(self) -> None:
        """Compile again, if nobody else is inside."""
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._stance.close()


_as_written = _AsWritten()
