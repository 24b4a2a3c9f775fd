"""The arithmetic of a forward pass, which autocast and PyTorch's switches of TF32 decide.

On a GPU PyTorch computes convolutions of float32 in TF32 unless it is told not to, and products of matrices
in float32 unless it is told otherwise. Neither is left to it, nor to what else the process has set: within a
pass ``float32`` is float32, and ``tf32`` is TF32 in both.
"""

from __future__ import annotations

import threading
from collections import Counter
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from ...data.errors import RepaError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

TF32 = "tf32"

_AUTOCAST = {"bfloat16": torch.bfloat16, "float16": torch.float16}
_IEEE = "ieee"


@contextmanager
def forward_pass(compute_dtype: str, device: torch.device) -> Iterator[None]:
    """Compute what is inside in a compute dtype, whatever the process has set outside of it.

    Args:
        compute_dtype: one of `COMPUTE_DTYPES`.
        device: where it computes.

    Raises:
        RepaError: the device has no such arithmetic.
    """
    require_arithmetic(compute_dtype, device)
    lower = _AUTOCAST.get(compute_dtype)
    with (
        _SWITCHES[device.type].held(TF32 if compute_dtype == TF32 else _IEEE),
        torch.autocast(device.type, dtype=lower, enabled=lower is not None),
    ):
        yield


def require_arithmetic(compute_dtype: str, device: torch.device) -> None:
    """Refuse TF32 where no tensor cores compute it, for there the switch would do nothing.

    Args:
        compute_dtype: one of `COMPUTE_DTYPES`.
        device: where it is to compute.

    Raises:
        RepaError: the device has no such arithmetic.
    """
    if compute_dtype != TF32:
        return
    if device.type == "cuda":
        with torch.cuda.device(device):
            if torch.cuda.is_tf32_supported():
                return
        here = f"{torch.cuda.get_device_name(device)} has none of them"
    else:
        here = f"the models are to run on the {device.type.upper()}"
    raise RepaError(
        f"TF32 is computed by tensor cores of GPUs from NVIDIA's Ampere generation on, and {here}",
        "run it on such a GPU, or encode with --compute-dtype float32",
        field="--compute-dtype",
    )


class Float32Switches:
    """PyTorch's switches of what computes float32, which are those of the whole process.

    Passes that want them alike share them, one that wants them otherwise waits, and the last to leave puts
    back what was there.

    Args:
        objects: of `torch.backends`, each with ``fp32_precision``; called when first needed.
    """

    def __init__(self, objects: Callable[[], Sequence[Any]]) -> None:
        self._objects = objects
        self._changed = threading.Condition()
        self._mode: str | None = None
        self._passes: Counter[int] = Counter()  # of each thread
        self._before: list[tuple[Any, str]] = []

    @contextmanager
    def held(self, mode: str) -> Iterator[None]:
        """Hold them at ``ieee`` or ``tf32``.

        Raises:
            RuntimeError: this thread holds them at the other, and would wait for itself.
        """
        own = threading.get_ident()
        with self._changed:
            if self._passes[own] and self._mode != mode:
                raise RuntimeError(f"a pass in {mode} within one in {self._mode}")
            self._changed.wait_for(lambda: self._mode in (None, mode))
            if self._mode is None:
                self._turn(mode)
            self._passes[own] += 1
        try:
            yield
        finally:
            with self._changed:
                self._passes[own] -= 1
                if not self._passes[own]:
                    del self._passes[own]
                if not self._passes:
                    self._put_back()
                    self._changed.notify_all()

    def _turn(self, mode: str) -> None:
        for each in self._objects():
            before = each.fp32_precision
            # "none" is float32 too; one that is as wanted stays free to follow the switch above it, if later
            # that is set
            if before != mode and not (mode == _IEEE and before == "none"):
                self._before.append((each, before))
                each.fp32_precision = mode
        self._mode = mode

    def _put_back(self) -> None:
        for each, before in self._before:
            each.fp32_precision = before
        self._before, self._mode = [], None


def _of_cuda() -> Sequence[Any]:
    backends: Any = torch.backends
    return backends.cuda.matmul, backends.cudnn.conv


def _of_cpu() -> Sequence[Any]:
    # oneDNN takes bfloat16 for products of float32 after `torch.set_float32_matmul_precision("medium")`
    backends: Any = torch.backends
    return backends.mkldnn.matmul, backends.mkldnn.conv


_SWITCHES = {"cuda": Float32Switches(_of_cuda), "cpu": Float32Switches(_of_cpu)}
