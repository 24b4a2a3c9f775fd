"""A denoiser with its soft tokens, in the place of the denoiser of a pipeline of diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...data.edge import shortened
from ...data.errors import RepaError
from ..models.denoiser_facts import SD3, kind_of
from ..models.soft_inputs import arguments_with, take_soft_tokens
from .file import read_soft_tokens

if TYPE_CHECKING:
    from os import PathLike

    from .file import SoftTokensNotes
    from .tokens import SoftTokens


class SoftDenoiser(nn.Module):
    """A denoiser that adds trained tokens to the text of every call, with and without guidance.

    A pipeline calls it as the denoiser itself. The time of a call chooses the row of the time table. What
    else is asked of it, its configuration, its dtype, the denoiser answers.

    Args:
        denoiser: of diffusers; its attention processors or blocks are changed in place.
        tokens: trained.
        notes: what they are of.

    Raises:
        RepaError: the denoiser is of another kind or width than they were trained for.
    """

    def __init__(self, denoiser: nn.Module, tokens: SoftTokens, notes: SoftTokensNotes) -> None:
        super().__init__()
        config: Any = denoiser.config
        kind = kind_of({"_class_name": type(denoiser).__name__, **config}, where="the denoiser")
        width = config["caption_projection_dim" if kind == SD3 else "cross_attention_dim"]
        if kind != notes.kind or width != tokens.tokens.shape[-1]:
            raise RepaError(
                f"tokens of width {tokens.tokens.shape[-1]} for {notes.kind} do not fit a denoiser of kind "
                f"{kind} and width {shortened(width)}",
                f"give a denoiser as {notes.model}",
                field="denoiser",
            )
        if kind == SD3 and tokens.tokens.shape[0] > config["num_layers"]:
            raise RepaError(
                f"tokens for {tokens.tokens.shape[0]} blocks do not fit a denoiser of {config['num_layers']}",
                f"give a denoiser as {notes.model}",
                field="denoiser",
            )
        take_soft_tokens(denoiser, kind, blocks=notes.blocks, text_length=notes.text_length)
        self.denoiser = denoiser
        self.soft = tokens.requires_grad_(False)
        self.kind = kind
        self.text_length = notes.text_length

    def __getattr__(self, name: str) -> Any:
        """Ask the denoiser for what is not here."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("denoiser"), name)

    def forward(
        self,
        sample: Tensor | None = None,
        timestep: Any = None,
        encoder_hidden_states: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Call the denoiser with the tokens of the time beside the text.

        Args:
            sample: noisy latents ``[B, C, h, w]``, which Stable Diffusion 3 calls ``hidden_states``.
            timestep: times, in steps of the chain.
            encoder_hidden_states: text ``[B, S, E]``.
            kwargs: of the denoiser.

        Raises:
            RepaError: a U-Net's text has another length than the tokens were trained with.
            TypeError: there is no text, or no time.
        """
        text = encoder_hidden_states
        if text is None or timestep is None:
            raise TypeError("a denoiser with soft tokens wants timestep and encoder_hidden_states")
        if self.kind != SD3 and text.shape[1] != self.text_length:
            raise RepaError(
                f"the text has {text.shape[1]} states, and the tokens were trained with {self.text_length}",
                "give prompts of that length",
                field="encoder_hidden_states",
            )
        times = torch.as_tensor(timestep, device=text.device).reshape(-1).expand(len(text))
        given = {**kwargs, **arguments_with(self.kind, text, self.soft(times).to(text.dtype))}
        if self.kind != SD3:
            return self.denoiser(sample, timestep, **given)
        own = kwargs.get("joint_attention_kwargs") or {}
        given["joint_attention_kwargs"] = {**own, **given["joint_attention_kwargs"]}
        if sample is not None:
            given["hidden_states"] = sample
        return self.denoiser(timestep=timestep, **given)


def load_soft_tokens(denoiser: nn.Module, file: str | PathLike[str]) -> SoftDenoiser:
    """Return a denoiser of diffusers with trained tokens, for a pipeline to use in its place.

    For example ``pipe.unet = load_soft_tokens(pipe.unet, "tokens.safetensors")``, and ``pipe.transformer`` of
    Stable Diffusion 3. Load what changes the denoiser itself, as LoRA, before.

    Args:
        denoiser: ``UNet2DConditionModel`` or ``SD3Transformer2DModel``; is changed in place.
        file: of ``repa softrepa train``.

    Raises:
        RepaError: the file cannot be read, or its tokens are not of such a denoiser.
    """
    tokens, notes = read_soft_tokens(Path(file))
    parameter = next(denoiser.parameters())
    return SoftDenoiser(denoiser, tokens.to(parameter.device), notes)
