"""From patch tokens of a teacher back to images, by the decoder of a representation autoencoder.

Any `AutoencoderRAE` of diffusers (Zheng et al., arXiv 2510.11690). Its encoder is the teacher with a final
norm that has neither gain nor bias, so what it decodes is the cache's tokens with both taken out.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...data.edge import parse, read_json, shortened
from ...data.errors import RepaError
from ..images.pixels import to_pixels
from . import load_encoder
from .precision import forward_pass
from .registry import find_teacher
from .timm_teacher import TimmTeacher
from .timm_vit import TimmEncoder
from .vae import CONFIG, WEIGHTS, check_finite
from .weights import hub_file, load_strictly, one_line, read_state_dict, weights_sha256

KIND = "AutoencoderRAE"
FLAG = "--vae"
TEACHER_FLAG = "--teacher-weights"
_REMEDY = f"give {FLAG} a folder with {CONFIG} and {WEIGHTS[0]} of a diffusers {KIND}"
# class and register tokens that each kind of its encoders cuts off
PREFIX_TOKENS = {"dinov2": 5, "siglip2": 0, "mae": 1}
_KERNELS = ("patch_embeddings.projection.weight", "patch_embedding.weight")
_TABLE = "decoder.decoder_pos_embed"  # made of sines, and stored in some files all the same
_NEAR = 1e-3  # of the largest weight: files of the same network may be rounded to half of its digits


@dataclass(frozen=True, kw_only=True)
class _Said:
    """What is looked at of an autoencoder's configuration before it is built."""

    encoder_type: str = "dinov2"
    encoder_hidden_size: int = 768
    encoder_patch_size: int = 14
    encoder_input_size: int = 224
    patch_size: int = 16

    @property
    def side(self) -> int:
        """Rows and columns of the tokens."""
        return self.encoder_input_size // self.encoder_patch_size


class FinalNorm(NamedTuple):
    """What a teacher does to its tokens at the end, and what tells it from others.

    Attributes:
        gain: float32 ``[D]``, none of them 0.
        bias: float32 ``[D]``.
        weights_sha256: of the teacher, as a cache records it.
        prefix_tokens: that stand before the patches.
        kernel: of its patches, float32 ``[D, 3, p, p]``.
    """

    gain: Tensor
    bias: Tensor
    weights_sha256: str
    prefix_tokens: int
    kernel: Tensor


class TokenDecoder:
    """The frozen decoder of an `AutoencoderRAE`. Make it with `load`.

    Attributes:
        name: hub name, or the folder's absolute path.
        weights_sha256: hash of the decoder's weights.
        width: D of the tokens.
        side: rows and columns of the tokens.
        stride: pixels per token, along a side.
        device: where it computes.
    """

    def __init__(self, model: Any, said: _Said, norm: FinalNorm, *, name: str, device: torch.device) -> None:
        self._model = model.eval().requires_grad_(False).to(device)
        self.name = name
        self.weights_sha256 = weights_sha256(model.decoder.state_dict())
        self.width, self.side, self.stride = said.encoder_hidden_size, said.side, said.patch_size
        self.device = device
        self._gain, self._bias = (each.to(device).view(1, -1, 1, 1) for each in (norm.gain, norm.bias))

    @classmethod
    def load(cls, name: str, norm: FinalNorm, device: str | torch.device = "cpu") -> TokenDecoder:
        """Load the decoder of an autoencoder for the tokens of a teacher.

        Args:
            name: a folder with ``config.json`` and ``diffusion_pytorch_model.safetensors``, or a name on the
                hub, as ``nyu-visionx/RAE-dinov2-wReg-base-ViTXL-n08``.
            norm: of the teacher.
            device: where it computes.

        Raises:
            RepaError: its files cannot be had, do not fit together, or are of another teacher.
        """
        folder = _folder(name)
        said, config = _read_config(folder)
        files = [folder / each for each in WEIGHTS if (folder / each).is_file()]
        if not files:
            raise RepaError(f"folder {folder} has no {WEIGHTS[0]}", _REMEDY, field=FLAG)
        state = read_state_dict(files[0])
        _check_teacher(name, said, norm, state)
        return cls(_build(folder, config, state), said, norm, name=name, device=torch.device(device))

    @torch.inference_mode()
    def decode(self, tokens: Tensor) -> Tensor:
        """Decode tokens to images.

        Args:
            tokens: as the teacher gave them, float ``[B, D, h, w]``.

        Returns:
            uint8 ``[B, 3, R, R]``, see `to_pixels`.

        Raises:
            RepaError: a token or its image has a number that is not finite.
        """
        check_finite(tokens, "a latent")
        plain = (tokens.to(self.device, torch.float32) - self._bias) / self._gain
        with forward_pass("float32", self.device):
            images = self._model.decode(plain).sample
        check_finite(images, "the image of a latent")
        return to_pixels(2 * images - 1)


def final_norm(
    teacher: str, *, resolution: int, weights: Path | None = None, random_weights: bool = False
) -> FinalNorm:
    """Return the gain and bias of a teacher's final norm.

    Args:
        teacher: name of its source in a cache.
        resolution: side in pixels of the cropped images.
        weights: its file; None takes the shipped one (demo), else the hub's or its local copy.
        random_weights: draw its weights where no file is given, as the cache's were.

    Raises:
        RepaError: there is no such teacher, its weights cannot be had, or its tokens do not come from a norm
            that can be undone.
    """
    facts = find_teacher(teacher)
    if not isinstance(facts, TimmTeacher) or facts.patch_feature != "final norm":
        raise RepaError(
            f"tokens of {teacher} do not come from a final norm, and {KIND} decodes such alone",
            "train on tokens of a teacher of the DINOv2 family with registers, of MAE or of SigLIP 2",
            field="latents",
        )
    encoder = load_encoder(facts, resolution=resolution, weights=weights, random_weights=random_weights)
    assert isinstance(encoder, TimmEncoder), "rows of timm become these"
    norm, model = encoder.model.norm, encoder.model
    gain, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    if not isinstance(norm, nn.LayerNorm) or gain is None or bias is None or not bool((gain != 0).all()):
        raise RepaError(
            f"the final norm of {teacher} is no LayerNorm whose gain can be undone",
            "train on tokens of another teacher",
            field="latents",
        )
    return FinalNorm(
        gain=gain.detach().float(),
        bias=bias.detach().float(),
        weights_sha256=encoder.provenance(1).weights_sha256,
        prefix_tokens=model.num_prefix_tokens,
        kernel=model.patch_embed.proj.weight.detach().float(),
    )


def _folder(name: str) -> Path:
    """Return the folder of an autoencoder, here or of the hub's copy.

    Raises:
        RepaError: it is neither.
    """
    path = Path(name)
    if path.is_dir():
        if not (path / CONFIG).is_file():
            raise RepaError(f"folder {path} has no {CONFIG}", _REMEDY, field=FLAG)
        return path
    owner, _, repository = name.partition("/")
    if path.is_absolute() or name.startswith((".", "~")) or path.exists() or not owner or not repository:
        raise RepaError(f"{name} is no folder", _REMEDY, field=FLAG)
    config = hub_file(name, [CONFIG], remedy=_REMEDY)
    hub_file(name, WEIGHTS, remedy=_REMEDY)
    return config.parent


def _read_config(folder: Path) -> tuple[_Said, dict[str, Any]]:
    file = folder / CONFIG
    values = read_json(file.read_bytes(), str(file), remedy=_REMEDY, error=RepaError)
    kind = values.get("_class_name") if isinstance(values, dict) else None
    if kind != KIND:
        raise RepaError(
            f"{file} describes {shortened(kind or 'no model')}, not an {KIND}", _REMEDY, field=FLAG
        )
    known = {name: values[name] for name in _Said.__dataclass_fields__ if name in values}
    said = parse(_Said, known, where=str(file), remedy=_REMEDY, error=RepaError)
    if said.encoder_type not in PREFIX_TOKENS or said.encoder_patch_size < 1 or said.side < 1:
        raise RepaError(
            f"{file} has an encoder {shortened(said.encoder_type)} of {said.encoder_input_size} pixels in "
            f"patches of {said.encoder_patch_size}, which is none of {', '.join(PREFIX_TOKENS)}",
            _REMEDY,
            field=FLAG,
        )
    return said, {name: value for name, value in values.items() if not name.startswith("_")}


def _check_teacher(name: str, said: _Said, norm: FinalNorm, state: dict[str, Tensor]) -> None:
    """Refuse a decoder of another teacher, whose images would be finite and wrong.

    Raises:
        RepaError: its encoder differs in kind or in its first weights, or is not there.
    """
    kernels = [each for key, each in state.items() if key.startswith("encoder.") and key.endswith(_KERNELS)]
    if not kernels:
        raise RepaError(
            f"the weights of {name} have no encoder, so that nothing tells which teacher's tokens it decodes",
            f"give {FLAG} the whole {KIND}, as diffusers saves it",
            field=FLAG,
        )
    alike = all(
        each.shape == norm.kernel.shape
        and float((each.float() - norm.kernel).abs().max()) <= _NEAR * float(norm.kernel.abs().max())
        for each in kernels
    )
    if (
        alike
        and PREFIX_TOKENS[said.encoder_type] == norm.prefix_tokens
        and (said.encoder_hidden_size == len(norm.gain))
    ):
        return
    raise RepaError(
        f"{name} decodes tokens of another teacher, {said.encoder_type} with {said.encoder_hidden_size} "
        f"channels and patches of {said.encoder_patch_size} pixels",
        f"give {FLAG} the {KIND} of the teacher whose tokens the model makes",
        field=FLAG,
    )


def _build(folder: Path, config: dict[str, Any], state: dict[str, Tensor]) -> Any:
    """Build the autoencoder with its decoder alone.

    The statistics of its own are left out, as the tokens come without: then decoding divides by 1 + 1e-5.
    """
    rae = _library()
    settings = {
        **config,
        "encoder_num_hidden_layers": 0,
        "latents_mean": None,
        "latents_std": None,
        "scaling_factor": 1.0,
        "reshape_to_2d": True,
    }
    try:
        model = rae.from_config(settings)
    # sizes that do not fit one another: ValueError, TypeError, ZeroDivisionError, …
    except Exception as error:
        raise RepaError(
            f"{folder / CONFIG} describes no {KIND} ({one_line(error)})", _REMEDY, field=FLAG
        ) from error
    model.encoder = nn.Identity()
    own = {name: each for name, each in model.state_dict().items() if name.startswith("_latents_")}
    kept = {
        name: each
        for name, each in state.items()
        if not name.startswith(("encoder.", "_latents_")) and name != _TABLE
    }
    load_strictly(
        model, {**kept, **own}, what=f"the weights in {folder} do not fit its {CONFIG}", remedy=_REMEDY
    )
    return model


def _library() -> Any:
    """Return the class of diffusers, which builds its encoder with transformers.

    Raises:
        RepaError: one of the two is not there, or is too old.
    """
    try:
        import transformers  # noqa: F401
        from diffusers import AutoencoderRAE
    except ImportError as error:
        raise RepaError(
            f"{KIND} needs diffusers 0.39 or newer and transformers ({one_line(error)})",
            "pip install -e '.[rae]'",
            field=FLAG,
        ) from error
    return AutoencoderRAE
