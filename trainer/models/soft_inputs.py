"""Soft tokens as an input of a denoiser's call.

No class of diffusers is changed or copied. A U-Net gets attention processors, a transformer of Stable
Diffusion 3 gets wrapped blocks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .denoiser_facts import SD3

if TYPE_CHECKING:
    from collections.abc import Sequence

_SOFT = "soft_tokens"


def arguments_with(kind: str, text: Tensor, soft: Tensor | None) -> dict[str, Any]:
    """Return the arguments of a call that bring text and soft tokens.

    Keys of these models have no position, so that where among the states a U-Net finds the tokens makes no
    difference.

    Args:
        kind: of the denoiser.
        text: states ``[B, S, E]``.
        soft: soft tokens, as of `Denoiser.predict`.
    """
    if soft is None:
        return {"encoder_hidden_states": text}
    if kind == SD3:
        return {"encoder_hidden_states": text, "joint_attention_kwargs": {_SOFT: soft}}
    return {"encoder_hidden_states": torch.cat([text, soft], dim=1)}


def take_soft_tokens(model: nn.Module, kind: str, *, blocks: Sequence[str], text_length: int) -> None:
    """Prepare a denoiser of diffusers for soft tokens. A call without any is still the plain model's.

    Args:
        model: is changed in place.
        kind: one of `KINDS`.
        blocks: of a U-Net, which of ``down``, ``mid`` and ``up`` see the tokens.
        text_length: of a U-Net, S, states of a text; what follows them are soft tokens.
    """
    if kind == SD3:
        wrapped: Any = model.transformer_blocks
        for number, block in enumerate(wrapped):
            inner = block.block if isinstance(block, SoftBlock) else block
            wrapped[number] = SoftBlock(inner, number)
        return
    unet: Any = model
    processors = {}
    for name, processor in unet.attn_processors.items():
        inner = processor.inner if isinstance(processor, TextAlone) else processor
        hidden = ".attn2." in name and not name.startswith(tuple(f"{each}_block" for each in blocks))
        processors[name] = TextAlone(inner, text_length) if hidden else inner
    unet.set_attn_processor(processors)


class TextAlone:
    """An attention processor that leaves soft tokens out, for blocks that must not see them.

    Args:
        inner: the processor that was there.
        text_length: S, states that it is to see.
    """

    def __init__(self, inner: Any, text_length: int) -> None:
        self.inner = inner
        self.text_length = text_length

    def __call__(
        self, attn: nn.Module, hidden_states: Tensor, encoder_hidden_states: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Attend to the text alone.

        Args:
            attn: the attention.
            hidden_states: queries ``[B, T, D]``.
            encoder_hidden_states: text and soft tokens ``[B, S + n, E]``.
            args: passed on.
            kwargs: passed on.
        """
        text = encoder_hidden_states[:, : self.text_length]
        attended: Tensor = self.inner(attn, hidden_states, text, *args, **kwargs)
        return attended


class SoftBlock(nn.Module):
    """A block of Stable Diffusion 3 that finds its soft tokens before its text.

    What the block makes of them is dropped, and the next block gets its own. The tokens pass the block's own
    normalisation, which no attention processor could do.

    Args:
        block: of diffusers.
        number: its index, from 0.

    Attributes:
        context_pre_only: of the block, which ControlNets ask.
    """

    def __init__(self, block: Any, number: int) -> None:
        super().__init__()
        self.block = block
        self.number = number
        self.context_pre_only = block.context_pre_only

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor | None, Tensor]:
        """Run the block with the soft tokens ``[B, L, n, D]`` of the call, if it brings some for this block.

        Args:
            hidden_states: image tokens ``[B, T, D]``.
            encoder_hidden_states: text tokens ``[B, S, D]``.
            temb: embedding of time and pooled text ``[B, D]``.
            joint_attention_kwargs: of the call; blocks that get no tokens drop the key, which diffusers does
                not know.
        """
        given = dict(joint_attention_kwargs or {})
        soft: Tensor | None = given.pop(_SOFT, None)
        if soft is not None and self.number < soft.shape[1]:
            mine = soft[:, self.number]
            encoder_hidden_states = torch.cat([mine, encoder_hidden_states], dim=1)
            text, image = self.block(hidden_states, encoder_hidden_states, temb, given)
            # the last block returns no text
            return None if text is None else text[:, mine.shape[1] :], image
        unchanged: tuple[Tensor | None, Tensor] = self.block(
            hidden_states, encoder_hidden_states, temb, given
        )
        return unchanged
