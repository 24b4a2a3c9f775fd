"""Train the small autoencoder of the demo from nothing, on drawn shapes only.

The folder `vae` beside this file was made, in 12 minutes on one core, by

    python -m repa.pipeline.demo.train_vae --out pipeline/demo/vae

which reported: scaling factor 0.80116, PSNR of 240 held-out images (seed 1, never trained on) 33.07 dB. The
last bits depend on processor and library versions, so a repetition gives other weights of like quality. The
training is reconstruction and a weak Kullback-Leibler term alone: no perceptual network, no adversary, no
other data.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from diffusers import AutoencoderKL

from . import RESOLUTION
from .shapes import render

if TYPE_CHECKING:
    from collections.abc import Iterator

TRAINING_SEED = 0
HELD_OUT_SEED = 1
AUTOENCODER: Any = AutoencoderKL  # diffusers carries no types that a checker accepts


def build_vae() -> Any:
    """Build it untrained, from image `[B, 3, 64, 64]` in [-1, 1] to latent `[B, 4, 8, 8]` and back."""
    return AUTOENCODER(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 48, 48),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=RESOLUTION,
    )


def draw_images(count: int, seed: int) -> torch.Tensor:
    """Draw images 0 … count-1 of a seed, uint8 `[count, 3, 64, 64]`."""
    images = np.stack([render(index, seed) for index in range(count)])
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def batches(images: torch.Tensor, size: int) -> Iterator[torch.Tensor]:
    """Cut along the first axis into parts of at most `size`."""
    for start in range(0, len(images), size):
        yield images[start : start + size]


def to_unit_range(images: torch.Tensor) -> torch.Tensor:
    """Map uint8 pixels to float32 in [-1, 1], shape kept."""
    return images.float() / 127.5 - 1.0


def reconstruction_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Sum squared error, absolute error, and absolute error of the differences to the right and below.

    Both `[B, 3, H, W]`. With absolute errors alone our first run gave every shape one of only two colours,
    and did not leave that state in 900 steps; the squared error cures it. The differences are zero away
    from edges, so their error asks for sharp edges without a perceptual network.
    """
    error = output - target
    across = (error[..., :, 1:] - error[..., :, :-1]).abs().mean()
    down = (error[..., 1:, :] - error[..., :-1, :]).abs().mean()
    return 4.0 * error.square().mean() + error.abs().mean() + 0.5 * (across + down)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Rise linearly over 50 steps, then fall to zero along half a cosine."""
    return peak * min(1.0, (step + 1) / 50) * 0.5 * (1.0 + math.cos(math.pi * step / steps))


def train(steps: int, batch: int, peak: float, kl_weight: float, count: int, seed: int) -> Any:
    """Run the optimisation and return the autoencoder in evaluation mode."""
    torch.manual_seed(seed)
    vae = build_vae().to(memory_format=torch.channels_last)
    images = draw_images(count, TRAINING_SEED)
    optimiser = torch.optim.Adam(vae.parameters(), lr=peak, betas=(0.9, 0.99))
    started = time.monotonic()
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, steps, peak)
        target = to_unit_range(images[torch.randint(count, (batch,))])
        if step % 2:
            target = target.flip(-1)  # caches may hold a mirrored view
        target = target.contiguous(memory_format=torch.channels_last)
        posterior = vae.encode(target).latent_dist
        output = vae.decode(posterior.sample()).sample
        # nats per latent element: a small price that keeps the latents smooth and near unit scale
        kl = 0.5 * (posterior.mean.square() + posterior.var - 1.0 - posterior.logvar).mean()
        reconstruction = reconstruction_loss(output, target)
        optimiser.zero_grad(set_to_none=True)
        (reconstruction + kl_weight * kl).backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimiser.step()
        if step % 100 == 0 or step == steps - 1:
            seconds = time.monotonic() - started
            losses = f"reconstruction {reconstruction.item():.4f} kl {kl.item():.3f}"
            print(f"step {step} {losses} {seconds:.0f} s", flush=True)
    return vae.eval()


@torch.no_grad()
def measure_scale(vae: Any, count: int = 512) -> float:
    """Return 1 / standard deviation of posterior samples over training images, all elements pooled."""
    images = to_unit_range(draw_images(count, TRAINING_SEED))
    generator = torch.Generator().manual_seed(0)
    latents = torch.cat([vae.encode(part).latent_dist.sample(generator) for part in batches(images, 64)])
    return float(1.0 / latents.std())


@torch.no_grad()
def held_out_psnr(vae: Any, count: int = 240) -> float:
    """Mean peak signal-to-noise ratio in dB of held-out images, reconstructed from posterior means."""
    ratios: list[torch.Tensor] = []
    for images in batches(draw_images(count, HELD_OUT_SEED), 60):
        output = vae.decode(vae.encode(to_unit_range(images)).latent_dist.mode()).sample
        pixels = ((output.clamp(-1.0, 1.0) + 1.0) * 127.5).round()
        error = (pixels - images.float()).square().mean(dim=(1, 2, 3)).clamp(min=1e-3)
        ratios.append(10.0 * torch.log10(255.0**2 / error))
    return float(torch.cat(ratios).mean())


def save(vae: Any, folder: Path) -> None:
    """Write config.json, with the measured scaling factor, and float16 weights."""
    vae.register_to_config(scaling_factor=round(measure_scale(vae), 5))
    vae.half().save_pretrained(folder, safe_serialization=True)


def load(folder: Path) -> Any:
    """Read what `save` wrote, in float32 and evaluation mode."""
    return AUTOENCODER.from_pretrained(folder, torch_dtype=torch.float32, low_cpu_mem_usage=False).eval()


def main() -> None:
    """Parse the command line, train, save, and report the numbers of the saved file."""
    parser = argparse.ArgumentParser(description="Train the demo's autoencoder on drawn shapes.")
    parser.add_argument("--out", type=Path, required=True, help="folder for config.json and the weights")
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--kl-weight", type=float, default=2e-3)
    parser.add_argument("--images", type=int, default=4096, help="number of training images")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    vae = train(
        options.steps, options.batch, options.learning_rate, options.kl_weight, options.images, options.seed
    )
    save(vae, options.out)
    loaded = load(options.out)
    print(f"scaling factor {loaded.config.scaling_factor}, held-out PSNR {held_out_psnr(loaded):.2f} dB")


if __name__ == "__main__":
    main()
