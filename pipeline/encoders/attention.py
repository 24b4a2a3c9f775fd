"""Queries and keys of a ViT's blocks, seen on their way into PyTorch's attention.

Every block of timm's vision transformers calls `torch.nn.functional.scaled_dot_product_attention` with its
queries and keys as they are compared: after q/k norms and rotary positions, before the scale. A
`torch.overrides.TorchFunctionMode` sees these calls, in the order of the blocks, and lets them through. So
the model's source stays as it is, no module is hooked, and no attention map is formed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from ...data.errors import RepaError
from ...data.units import counted

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor, nn

_PARAMETERS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")


class AttentionCapture(TorchFunctionMode):
    """Keeps queries and keys of some blocks while a ViT runs within it. The context manager is for one pass.

    It acts on the thread it was entered in alone, as every such mode does.

    Args:
        name: of the encoder, for errors.
        blocks: blocks to keep, counted from 1, ascending.
        depth: blocks of the model: so many calls must come.
        heads: H.
        head_width: Dh.
        tokens: T, patches.
        prefix_tokens: class and register tokens before the patches, which are cut.
    """

    def __init__(
        self,
        name: str,
        blocks: Sequence[int],
        *,
        depth: int,
        heads: int,
        head_width: int,
        tokens: int,
        prefix_tokens: int,
    ) -> None:
        super().__init__()
        self._name = name
        self._indexes = {block: index for index, block in enumerate(blocks)}
        self._depth = depth
        self._shape = (heads, tokens, head_width)
        self._prefix_tokens = prefix_tokens
        self._calls = 0
        self._kept: tuple[Tensor, Tensor] | None = None

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Look at calls of attention, and pass every call on as it is."""
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            self._see({**dict(zip(_PARAMETERS, args, strict=False)), **kwargs})
        return func(*args, **kwargs)

    def result(self) -> tuple[Tensor, Tensor]:
        """Return queries and keys, each float32 ``[B, L, H, T, Dh]``, of the patch tokens.

        Raises:
            RepaError: the model did not call PyTorch's attention once for each block.
        """
        if self._calls != self._depth:
            self._refuse(
                f"calls PyTorch's attention {counted(self._calls, 'time')} for "
                f"{counted(self._depth, 'block')}"
            )
        assert self._kept is not None, "there is at least one block"
        return self._kept

    def _see(self, call: dict[str, Any]) -> None:
        self._calls += 1
        index = self._indexes.get(self._calls)
        if index is None:
            return
        query, key = call["query"], call["key"]
        self._check(query, key, call)
        if self._kept is None:
            shape = (len(query), len(self._indexes), *self._shape)
            self._kept = (torch.empty(shape, device=query.device), torch.empty(shape, device=query.device))
        for kept, values in zip(self._kept, (query, key), strict=True):
            kept[:, index].copy_(values[:, :, self._prefix_tokens :])

    def _check(self, query: Tensor, key: Tensor, call: dict[str, Any]) -> None:
        """Refuse whatever would make the map another than the softmax of q·kᵀ over √Dh."""
        heads, tokens, head_width = self._shape
        expected = [len(query), heads, self._prefix_tokens + tokens, head_width]
        scale = call.get("scale")
        what = ""
        if list(query.shape) != expected or query.shape != key.shape:
            what = f"has queries {list(query.shape)} and keys {list(key.shape)}, not {expected},"
        elif call.get("attn_mask") is not None or call.get("is_causal", False):
            what = "masks its attention"
        elif call.get("dropout_p", 0.0):
            what = "drops attention out"
        elif scale is not None and abs(scale * head_width**0.5 - 1) > 1e-6:
            what = f"scales its logits by {scale:g}, not by 1/√{head_width},"
        if what:
            self._refuse(f"{what} in block {self._calls}")

    def _refuse(self, what: str) -> None:
        raise RepaError(
            f"encoder {self._name} {what}: its attention maps cannot be captured", "leave --attention out"
        )


def use_fused_attention(model: nn.Module) -> None:
    """Have every block of a timm model call PyTorch's attention, whatever the environment says."""
    module: Any
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = True
