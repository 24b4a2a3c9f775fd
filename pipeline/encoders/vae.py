"""The autoencoder, from images to posterior moments and from latents back to images.

Any `AutoencoderKL` of diffusers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...data.edge import read_json, shortened
from ...data.errors import RepaError
from ...data.format.manifest import Provenance
from ...data.reading.latents import LatentScale, scale_of
from ...data.units import counted
from ..images.pixels import to_autoencoder_input, to_pixels
from .precision import forward_pass
from .weights import drawn_weights, hub_file, library_versions, one_line, some, weights_sha256

if TYPE_CHECKING:
    from collections.abc import Mapping

DEFAULT_VAE = "stabilityai/sd-vae-ft-mse"
DEMO = "demo"
CONFIG = "config.json"
WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")

_FOLDER_REMEDY = f"give --vae a folder with {CONFIG} and {WEIGHTS[0]} of a diffusers AutoencoderKL"

# config.json of stabilityai/sd-vae-ft-mse and Stable Diffusion 1.x; scaling factor: Rombach et al. 2022, D.1
STABLE_DIFFUSION: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "act_fn": "silu",
    "latent_channels": 4,
    "norm_num_groups": 32,
    "sample_size": 256,
    "scaling_factor": 0.18215,
}


class Autoencoder:
    """A frozen `AutoencoderKL`. Make it with `load`.

    Attributes:
        name: hub name, ``demo``, or the folder's absolute path: what `load` finds it by again.
        latent_channels: C.
        scale: the map from its latents to those of a diffusion model.
        stride: pixels per latent position, along a side.
        device: where it computes.
        compute_dtype: of the forward passes.
        random_weights: True when drawn, not trained.
    """

    def __init__(
        self, model: Any, *, name: str, device: torch.device, compute_dtype: str, random_weights: bool
    ) -> None:
        self._model = model.eval().requires_grad_(False)
        self._sha256 = weights_sha256(self._model.state_dict())
        self._model.to(device)
        self.name = name
        self.device = device
        self.compute_dtype = compute_dtype
        self.random_weights = random_weights
        self.latent_channels = int(model.config.latent_channels)
        self.scale = _scale(model.config, name)
        self.stride = 2 ** (len(model.config.block_out_channels) - 1)

    @property
    def weights_sha256(self) -> str:
        """The hash of its weights, as `provenance` gives it."""
        return self._sha256

    @classmethod
    def load(
        cls,
        name: str = DEFAULT_VAE,
        device: str | torch.device = "cpu",
        compute_dtype: str = "float32",
        random_weights: bool = False,
    ) -> Autoencoder:
        """Load an autoencoder, or draw its weights.

        Args:
            name: a folder with ``config.json`` and ``diffusion_pytorch_model.safetensors``, ``demo``, or a
                name on the hub, which may end in a folder there (``owner/name/vae``).
            device: where it computes.
            compute_dtype: one of `COMPUTE_DTYPES`; moments are float32 anyway.
            random_weights: for a name on the hub, draw the weights of Stable Diffusion's architecture
                instead; what is at hand (a folder, the demo's) is loaded all the same.

        Raises:
            RepaError: the folder is not an autoencoder's, or the hub's files are neither here nor reachable.
        """
        folder = _local_folder(name)
        if folder is None and random_weights:
            model = _build_random()
        else:
            model = _from_folder(folder if folder is not None else _from_hub(name))
        return cls(
            model,
            name=str(folder.resolve()) if folder is not None and name != DEMO else name,
            device=torch.device(device),
            compute_dtype=compute_dtype,
            random_weights=folder is None and random_weights,
        )

    def grid(self, resolution: int) -> tuple[int, int]:
        """Return rows and columns of the latent of an image of a side.

        Raises:
            RepaError: the side is not a multiple of the stride.
        """
        _check_stride(self.name, resolution, self.stride)
        return resolution // self.stride, resolution // self.stride

    @torch.inference_mode()
    def encode_moments(self, images: Tensor) -> Tensor:
        """Mean and standard deviation of the posterior, unscaled.

        The deviation is exp(½·log-variance) with the log-variance clamped to [−30, 20], as diffusers does it.

        Args:
            images: uint8 ``[B, 3, R, R]``, on the device.

        Returns:
            float32 ``[B, 2C, h, w]``, mean first, contiguous: the layout decides the order of later sums, and
            what is computed here must be what a cache gives back.
        """
        with forward_pass(self.compute_dtype, self.device):
            posterior = self._model.encode(to_autoencoder_input(images)).latent_dist
            return torch.cat([posterior.mean.float(), posterior.std.float()], dim=1).contiguous()

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents to images.

        Args:
            latents: float ``[B, C, h, w]``, unscaled.

        Returns:
            uint8 ``[B, 3, R, R]``, see `preprocess.to_pixels`.

        Raises:
            RepaError: a latent or its image has a number that is not finite, which would be shown as black.
        """
        check_finite(latents, "a latent")
        with forward_pass(self.compute_dtype, self.device):
            images = self._model.decode(latents.to(self.device, torch.float32)).sample
        check_finite(images, "the image of a latent")
        return to_pixels(images)

    def in_float32(self) -> Autoencoder:
        """Return the same network computing in float32."""
        other = copy.copy(self)
        other.compute_dtype = "float32"
        return other

    def provenance(self, batch_size: int, resolution: int) -> Provenance:
        """Return what the manifest keeps. ``notes["location"]`` is what `load` finds it by."""
        return Provenance(
            model=Path(self.name).name if Path(self.name).is_absolute() else self.name,
            weights_sha256=self._sha256,
            random_weights=self.random_weights,
            input_size=resolution,
            mean=(0.5,) * 3,
            std=(0.5,) * 3,
            compute_dtype=self.compute_dtype,
            batch_size=batch_size,
            grid=self.grid(resolution),
            libraries=library_versions("torch", "diffusers", "pillow"),
            notes={
                **self.scale.notes(),
                "location": self.name,
            },
        )


def latent_shape(name: str, resolution: int, *, random_weights: bool = False) -> tuple[int, int, int]:
    """Return ``(C, h, w)`` of the latent of an image, without the weights.

    Args:
        name: see `Autoencoder.load`; the default's configuration is known, of others on the hub it is read.
        resolution: side of the image.
        random_weights: see `Autoencoder.load`.

    Raises:
        RepaError: the folder is not an autoencoder's, the hub is not reachable, or the side is not a multiple
            of the stride.
    """
    folder = _local_folder(name)
    if folder is None and (random_weights or name == DEFAULT_VAE):
        config = STABLE_DIFFUSION
    else:
        config = _read_config(folder if folder is not None else _from_hub(name))
    try:
        channels, stride = int(config["latent_channels"]), 2 ** (len(config["block_out_channels"]) - 1)
    except (KeyError, TypeError, ValueError) as error:
        raise RepaError(
            f"{CONFIG} of autoencoder {name} lacks {error}", _FOLDER_REMEDY, field="--vae"
        ) from error
    _scale(config, name)
    _check_stride(name, resolution, stride)
    return channels, resolution // stride, resolution // stride


def is_drawn(name: str, *, random_weights: bool) -> bool:
    """Tell whether `Autoencoder.load` would draw the weights."""
    return random_weights and _local_folder(name) is None


def _scale(config: Mapping[str, Any], where: str) -> LatentScale:
    """Return the map that a configuration describes. What it leaves out is diffusers' default.

    Raises:
        RepaError: numbers that are none, or statistics of the latents that no formula gives a meaning.
    """
    values = {"scaling_factor": STABLE_DIFFUSION["scaling_factor"], **config}
    return scale_of(
        values,
        where=f"{CONFIG} of autoencoder {where}",
        remedy=_FOLDER_REMEDY,
        channels=config.get("latent_channels", STABLE_DIFFUSION["latent_channels"]),
        error=RepaError,
    )


def check_finite(values: Tensor, what: str) -> None:
    """Refuse numbers that are not finite, which would be shown as black.

    Raises:
        RepaError: there is one.
    """
    if not torch.isfinite(values).all():
        raise RepaError(
            f"{what} has numbers that are not finite",
            "the model that made it may have diverged, or --guidance may be too strong",
            field="--guidance",
        )


def _check_stride(name: str, resolution: int, stride: int) -> None:
    if resolution % stride:
        raise RepaError(
            f"resolution {resolution} is not a multiple of {stride}, the stride of autoencoder {name}",
            "give another --resolution",
            field="--resolution",
        )


def _local_folder(name: str) -> Path | None:
    """Return the folder that a name means, None for a name on the hub."""
    if name == DEMO:
        from ..demo import VAE_FOLDER

        return VAE_FOLDER
    path = Path(name)
    if path.is_dir():
        return path
    if path.is_absolute() or name.startswith((".", "~")) or path.exists() or "/" not in name:
        raise RepaError(
            f"autoencoder {name} is not a folder",
            f"give --vae a folder with {CONFIG} and {WEIGHTS[0]}, "
            f"a name on the hub such as {DEFAULT_VAE}, or demo",
            field="--vae",
        )
    return None


def _from_hub(name: str) -> Path:
    owner, repository, *folders = name.split("/")
    inside = "".join(f"{folder}/" for folder in folders)
    remedy = (
        f"for --vae {name}, which is no folder here, bring {CONFIG} and {WEIGHTS[0]} of "
        f"https://huggingface.co/{owner}/{repository} in a folder and give `--vae FOLDER`, "
        "or try things out with `repa preprocess --random-weights`"
    )
    config = hub_file(f"{owner}/{repository}", [f"{inside}{CONFIG}"], remedy=remedy)
    hub_file(f"{owner}/{repository}", [f"{inside}{weights}" for weights in WEIGHTS], remedy=remedy)
    return config.parent


def _build_random() -> Any:
    from diffusers import AutoencoderKL

    build: Any = AutoencoderKL
    with drawn_weights():
        return build(**STABLE_DIFFUSION)


def _from_folder(folder: Path) -> Any:
    """Load the autoencoder of a folder, every tensor from its file."""
    import diffusers

    _read_config(folder)
    remedy = _FOLDER_REMEDY
    if not any((folder / weights).is_file() for weights in WEIGHTS):
        raise RepaError(f"autoencoder folder {folder} has no {WEIGHTS[0]}", remedy, field="--vae")
    kl: Any = diffusers.AutoencoderKL
    logs: Any = diffusers.utils.logging
    verbosity = logs.get_verbosity()
    logs.set_verbosity(logs.CRITICAL)  # what it would log is raised below
    try:
        model, report = kl.from_pretrained(
            folder, local_files_only=True, low_cpu_mem_usage=False, output_loading_info=True
        )
    # a broken file or a wrong shape: OSError, ValueError, RuntimeError, SafetensorError, by version
    except Exception as error:
        raise RepaError(
            f"the weights in {folder} do not fit its {CONFIG} ({one_line(error)})", remedy, field="--vae"
        ) from error
    finally:
        logs.set_verbosity(verbosity)
    for kind in ("missing", "unexpected"):
        names = sorted(report[f"{kind}_keys"])
        if names:
            raise RepaError(
                f"the weights in {folder} do not fit its {CONFIG}: {counted(len(names), 'tensor')} {kind} "
                f"({some(names)})",
                remedy,
                field="--vae",
            )
    return model


def _read_config(folder: Path) -> dict[str, Any]:
    """Read the configuration in an autoencoder's folder."""
    try:
        raw = (folder / CONFIG).read_bytes()
    except FileNotFoundError:
        nested = (
            f" (its sub-folder vae has one: --vae {folder / 'vae'})"
            if (folder / "vae" / CONFIG).exists()
            else ""
        )
        raise RepaError(
            f"autoencoder folder {folder} has no {CONFIG}{nested}", _FOLDER_REMEDY, field="--vae"
        ) from None
    except OSError as error:
        raise RepaError(
            f"{folder / CONFIG} cannot be read ({one_line(error)})", _FOLDER_REMEDY, field="--vae"
        ) from error
    config = read_json(raw, str(folder / CONFIG), remedy=_FOLDER_REMEDY, error=RepaError)
    kind = config.get("_class_name") if isinstance(config, dict) else None
    if kind != "AutoencoderKL":
        raise RepaError(
            f"{folder / CONFIG} describes {shortened(kind or 'no model')}, not an AutoencoderKL",
            _FOLDER_REMEDY,
            field="--vae",
        )
    return dict(config)
