"""The material of `repa demo`, a drawn image set, a small autoencoder and a small teacher, all shipped.

Nothing here is downloaded. The images are drawn on demand (`shapes`); the weights were made by `train_vae`
and `train_teacher` in this folder, which anyone can run again. This module needs neither torch nor numpy.
"""

from pathlib import Path
from typing import Final

RESOLUTION: Final = 64
"""Side of a demo image in pixels."""

VAE_FOLDER: Final = Path(__file__).parent / "vae"
"""A folder for `diffusers.AutoencoderKL.from_pretrained`: image [B, 3, 64, 64] to latent [B, 4, 8, 8].

Trained by `train_vae` on drawn shapes of seed 0 and on no other data.
"""

TEACHER_WEIGHTS: Final = Path(__file__).parent / "teacher.safetensors"
"""Backbone weights, in timm's names, of the transformer that the next two constants describe.

Trained with labels by `train_teacher` on drawn shapes of seed 0 and on no other data.
"""

TEACHER_ARCHITECTURE: Final = "vit_tiny_patch16_224"
"""The timm name the teacher is built from."""

TEACHER_OPTIONS: Final[dict[str, int]] = {
    "img_size": RESOLUTION,
    "patch_size": 8,
    "embed_dim": 128,
    "depth": 6,
    "num_heads": 2,
    "num_classes": 0,
}
"""What `timm.create_model` is given beside the name: 8x8 patches, one class token, head width 64."""
