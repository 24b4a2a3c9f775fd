"""The frozen text-to-image denoisers that soft tokens are trained for, as diffusers has them.

This is the one module below `trainer` that imports diffusers, and only when a denoiser is loaded: it is the
student, not a teacher.
"""

from __future__ import annotations

import hashlib
import math
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...data.edge import printable, shortened
from ...data.errors import RepaError
from ...data.storage.files import os_errors
from .denoiser_facts import REMEDY, SD3, SDXL, WEIGHTS, DenoiserFacts
from .soft_inputs import arguments_with

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

STEPS = 1000
"""Steps of the chains that all these models were trained on."""

# of Stable Diffusion's scheduler_config.json, where there is none
_CHAIN = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
_SHIFT = 3.0  # of Stable Diffusion 3's


def load_denoiser(facts: DenoiserFacts, dtype: torch.dtype) -> Denoiser:
    """Load a denoiser on the CPU, frozen.

    Args:
        facts: of `read_denoiser`.
        dtype: of its weights and its computation.

    Raises:
        RepaError: its weights cannot be read or do not fit its configuration.
    """
    import diffusers

    build: Any = diffusers.SD3Transformer2DModel if facts.kind == SD3 else diffusers.UNet2DConditionModel
    remedy = f"bring {WEIGHTS}.safetensors of the model whole"
    with _quiet_diffusers():
        try:
            model, report = build.from_pretrained(
                facts.folder,
                local_files_only=True,
                use_safetensors=True,
                low_cpu_mem_usage=False,
                output_loading_info=True,
            )
        # a broken file or a wrong shape: OSError, ValueError, RuntimeError, SafetensorError, by version
        except Exception as error:
            reason = printable(" ".join(str(error).split()))[:200]
            raise RepaError(
                f"the weights in {facts.folder} cannot be loaded ({reason})", remedy, field="--model"
            ) from error
    wrong = sorted((*report["missing_keys"], *report["unexpected_keys"]))
    if wrong:
        raise RepaError(
            f"the weights in {facts.folder} do not fit its configuration, as {wrong[0]}",
            remedy,
            field="--model",
        )
    # not by from_pretrained, which leaves some models in float32
    return Denoiser(nn.Module.to(model, dtype), facts, weights_sha256=_sha256_of(facts.folder))


class Denoiser:
    """A frozen denoiser that takes soft tokens as an input of a call.

    It is no module, so that neither checkpoints nor optimisers see its weights.

    Args:
        model: of diffusers.
        facts: what it is.
        weights_sha256: hex digest of its weight files, empty where they are not known.
    """

    def __init__(self, model: nn.Module, facts: DenoiserFacts, weights_sha256: str = "") -> None:
        self.model = model.eval().requires_grad_(False)
        self.facts = facts
        self.weights_sha256 = weights_sha256
        self.alphas = alphas_cumprod(facts.scheduler) if facts.is_unet else None

    @property
    def dtype(self) -> torch.dtype:
        """Of its weights."""
        return next(self.model.parameters()).dtype

    def to(self, device: torch.device) -> None:
        """Move its weights."""
        self.model.to(device)
        if self.alphas is not None:
            self.alphas = self.alphas.to(device)

    def take_embedded(self) -> None:
        """Have it take text states that have passed the context embedder of Stable Diffusion 3 already."""
        self.model.context_embedder = nn.Identity()

    def noised(self, x: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return x_t and what the model is to predict of it, ``[B, C, h, w]`` both.

        A U-Net's chain is x_t = √ᾱ·x + √(1−ᾱ)·ε, and it predicts ε; Stable Diffusion 3's path is
        x_t = (1−σ)·x + σ·ε with σ = t/1000, and it predicts ε − x.

        Args:
            x: scaled latents.
            noise: ε, broadcast over the batch.
            t: times in steps of the chain, int64 ``[]`` or ``[B]``.
        """
        t = t.reshape(-1, 1, 1, 1)
        if self.alphas is None:
            sigma = t.to(x.dtype) / STEPS
            return (1 - sigma) * x + sigma * noise, noise - x
        alpha = self.alphas[t].to(x.dtype)
        return alpha.sqrt() * x + (1 - alpha).sqrt() * noise, noise.expand_as(x)

    def predict(
        self, x: Tensor, t: Tensor, text: Tensor, pooled: Tensor | None, soft: Tensor | None, size: int
    ) -> Tensor:
        """Predict as the model does, in its dtype.

        Args:
            x: noisy latents ``[B, C, h, w]``.
            t: times in steps of the chain, ``[B]``.
            text: states ``[B, S, E]``.
            pooled: pooled text ``[B, P]``, of those that take it.
            soft: soft tokens ``[B, n, D]``, of Stable Diffusion 3 ``[B, L, n, D]``; None for the plain model.
            size: side in pixels of the images, which SDXL is told.
        """
        dtype = self.dtype
        arguments = arguments_with(self.facts.kind, text.to(dtype), None if soft is None else soft.to(dtype))
        if self.facts.kind == SDXL:
            assert pooled is not None, "the checks have looked"
            times = torch.tensor([size, size, 0, 0, size, size], dtype=dtype, device=x.device)
            told = {"text_embeds": pooled.to(dtype), "time_ids": times.expand(len(x), -1)}
            arguments["added_cond_kwargs"] = told
        elif self.facts.kind == SD3:
            assert pooled is not None, "the checks have looked"
            arguments["pooled_projections"] = pooled.to(dtype)
        predicted: Tensor = self.model(x.to(dtype), timestep=t, return_dict=False, **arguments)[0]
        return predicted


def alphas_cumprod(scheduler: Mapping[str, Any]) -> Tensor:
    """Return ᾱ of Stable Diffusion's chain, float32 ``[1000]``.

    Its β are the squares of numbers on a line.

    Args:
        scheduler: configuration; what it does not say is Stable Diffusion's.

    Raises:
        RepaError: another schedule or another number of steps.
    """
    chain = {**_CHAIN, "num_train_timesteps": STEPS, **scheduler}
    if chain["beta_schedule"] != _CHAIN["beta_schedule"] or chain["num_train_timesteps"] != STEPS:
        raise RepaError(
            f"the model's schedule is {shortened(chain['beta_schedule'])} of "
            f"{shortened(chain['num_train_timesteps'])} steps, not Stable Diffusion's",
            REMEDY,
            field="--model",
        )
    first, last = (math.sqrt(float(chain[name])) for name in ("beta_start", "beta_end"))
    betas = torch.linspace(first, last, STEPS, dtype=torch.float32) ** 2
    return torch.cumprod(1.0 - betas, dim=0)


def make_scheduler(facts: DenoiserFacts) -> Any:
    """Return the scheduler of diffusers that samples are made with, DDIM or Euler.

    Args:
        facts: of the denoiser, whose schedule is taken.
    """
    import diffusers

    with _quiet_diffusers():
        if facts.is_unet:
            kind: Any = diffusers.DDIMScheduler
            chain = {**_CHAIN, "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
            return kind.from_config({**chain, **facts.scheduler})
        kind = diffusers.FlowMatchEulerDiscreteScheduler
        return kind.from_config({"shift": _SHIFT, **facts.scheduler})


def _sha256_of(folder: Path) -> str:
    """Return the hex digest of the weight files of a folder, by name and content."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob(f"{WEIGHTS}*.safetensors")):
        with os_errors("read", file), file.open("rb") as opened:
            digest.update(f"{file.name}\n".encode())
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()


@contextmanager
def _quiet_diffusers() -> Iterator[None]:
    """Hide what diffusers logs while it loads."""
    import diffusers

    logs: Any = diffusers.utils.logging
    verbosity = logs.get_verbosity()
    logs.set_verbosity(logs.CRITICAL)
    try:
        yield
    finally:
        logs.set_verbosity(verbosity)
