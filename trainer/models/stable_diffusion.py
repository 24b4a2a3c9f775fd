"""The frozen text-to-image denoisers that soft tokens are trained for, as diffusers has them.

This is the one module below `trainer` that imports diffusers, and only when a denoiser is loaded: it is the
student, not a teacher. No class of diffusers is changed or copied. A U-Net gets attention processors, a
transformer of Stable Diffusion 3 gets wrapped blocks, and soft tokens stay inputs of a call.
"""

from __future__ import annotations

import hashlib
import math
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...data.edge import printable, read_json, shortened
from ...data.errors import RepaError
from ...data.storage.files import os_errors

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

SD15, SDXL, SD3 = "sd15", "sdxl", "sd3"
KINDS = (SD15, SDXL, SD3)
UNET_BLOCKS = ("down", "mid", "up")
"""Parts of a U-Net whose cross-attention may see soft tokens."""

STEPS = 1000
"""Steps of the chains that all these models were trained on."""

_UNET, _TRANSFORMER = "unet", "transformer"
_CLASSES = {"UNet2DConditionModel": _UNET, "SD3Transformer2DModel": _TRANSFORMER}
_WEIGHTS = "diffusion_pytorch_model"
_SIX = 6  # numbers that SDXL is told of an image's size and crop
_REMEDY = "give a folder or a name on the hub of Stable Diffusion 1.5, XL or 3, as diffusers saves it"
_SOFT = "soft_tokens"
_TIMEOUT_SECONDS = 10
# of Stable Diffusion's scheduler_config.json, where there is none
_CHAIN = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
_SHIFT = 3.0  # of Stable Diffusion 3's


@dataclass(frozen=True, kw_only=True)
class DenoiserFacts:
    """A denoiser as its configuration says it, before any weight is read.

    Attributes:
        name: folder or hub name that it was asked for by.
        kind: one of `KINDS`.
        folder: of its configuration and weights.
        channels: of its latents.
        text_width: channels of the text states that it takes.
        token_width: channels of a soft token, D.
        pooled_width: channels of the pooled text; 0 where it takes none.
        blocks: transformer blocks of Stable Diffusion 3; 0 of a U-Net.
        scheduler: its scheduler's configuration, empty where the folder has none.
    """

    name: str
    kind: str
    folder: Path
    channels: int
    text_width: int
    token_width: int
    pooled_width: int
    blocks: int
    scheduler: Mapping[str, Any]

    @property
    def is_unet(self) -> bool:
        """Whether it is a U-Net, which predicts the noise."""
        return self.kind != SD3


def read_denoiser(name: str) -> DenoiserFacts:
    """Read what a denoiser is.

    Args:
        name: folder of a pipeline, of its denoiser alone, or a name on the hub, whose files are fetched.

    Raises:
        RepaError: it is none of Stable Diffusion 1.5, XL or 3, predicts something else than the noise, or
            cannot be had.
    """
    path = Path(name)
    if not path.is_dir():
        if path.is_absolute() or name.startswith((".", "~")) or path.exists() or name.count("/") != 1:
            raise RepaError(f"model {shortened(name)} is not a folder", _REMEDY, field="--model")
        path = _from_hub(name)
    inside = [path / part for part in (_UNET, _TRANSFORMER) if (path / part).is_dir()]
    folder, pipeline = (inside[0], path) if inside else (path, path.parent)
    config = _read_config(folder / "config.json")
    file = pipeline / "scheduler" / "scheduler_config.json"
    return _facts(name, folder, config, _read_config(file) if file.is_file() else {})


def _facts(name: str, folder: Path, config: Mapping[str, Any], scheduler: Mapping[str, Any]) -> DenoiserFacts:
    kind = kind_of(config, where=str(folder))
    try:
        if kind == SD3:
            sizes = {
                "text_width": int(config["joint_attention_dim"]),
                "token_width": int(config["caption_projection_dim"]),
                "pooled_width": int(config["pooled_projection_dim"]),
                "blocks": int(config["num_layers"]),
            }
        else:
            width, pooled = int(config["cross_attention_dim"]), 0
            if kind == SDXL:
                pooled = int(config["projection_class_embeddings_input_dim"])
                pooled -= _SIX * int(config["addition_time_embed_dim"])
            sizes = {"text_width": width, "token_width": width, "pooled_width": pooled, "blocks": 0}
        channels = int(config["in_channels"])
    except (KeyError, TypeError, ValueError) as error:
        raise RepaError(
            f"{folder}/config.json does not say {printable(str(error))}", _REMEDY, field="--model"
        ) from error
    predicts = scheduler.get("prediction_type", "epsilon")
    if kind != SD3 and predicts != "epsilon":
        raise RepaError(
            f"{name} predicts {shortened(predicts)}, and soft tokens are trained on models that predict the "
            "noise",
            "give another --model",
            field="--model",
        )
    return DenoiserFacts(
        name=name, kind=kind, folder=folder, channels=channels, scheduler=dict(scheduler), **sizes
    )


def kind_of(config: Mapping[str, Any], *, where: str) -> str:
    """Return which of `KINDS` a configuration of diffusers describes.

    Raises:
        RepaError: none of them.
    """
    name = config.get("_class_name")
    if name not in _CLASSES:
        raise RepaError(
            f"{where} describes {shortened(name or 'no model')}, which soft tokens are not made for",
            _REMEDY,
            field="--model",
        )
    if _CLASSES[name] == _TRANSFORMER:
        return SD3
    return SDXL if config.get("addition_embed_type") == "text_time" else SD15


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
    remedy = f"bring {_WEIGHTS}.safetensors of the model whole"
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
        blocks: of a U-Net, which of `UNET_BLOCKS` see the tokens.
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
            _REMEDY,
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


def _read_config(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise RepaError(f"there is no {file}", _REMEDY, field="--model")
    with os_errors("read", file):
        raw = file.read_bytes()
    values = read_json(raw, str(file), remedy=_REMEDY, error=RepaError)
    return dict(values) if isinstance(values, dict) else {}


def _sha256_of(folder: Path) -> str:
    """Return the hex digest of the weight files of a folder, by name and content."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob(f"{_WEIGHTS}*.safetensors")):
        with os_errors("read", file), file.open("rb") as opened:
            digest.update(f"{file.name}\n".encode())
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()


def _from_hub(name: str) -> Path:
    """Fetch a denoiser and its schedule, nothing else of the pipeline.

    Raises:
        RepaError: it is neither here nor reachable.
    """
    from huggingface_hub import snapshot_download

    wanted = [
        f"{part}/{file}"
        for part in (_UNET, _TRANSFORMER)
        for file in (
            "config.json",
            f"{_WEIGHTS}.safetensors",
            f"{_WEIGHTS}-*-of-*.safetensors",
            f"{_WEIGHTS}.safetensors.index.json",
        )
    ]
    try:
        return Path(
            snapshot_download(
                name, allow_patterns=[*wanted, "scheduler/*.json"], etag_timeout=_TIMEOUT_SECONDS
            )
        )
    except Exception as error:  # the hub's client raises many kinds, by version
        reason = printable(" ".join(str(error).split()))[:200]
        raise RepaError(
            f"{name} is neither here nor can be fetched ({reason})",
            f"bring unet or transformer of https://huggingface.co/{name} in a folder, and give that",
            field="--model",
        ) from error


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
