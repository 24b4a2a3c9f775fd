"""The material of `repa demo`, a drawn image set and small models, all shipped.

Nothing here is downloaded. The images are drawn on demand (`shapes`). The weights of an autoencoder, a
teacher and a text encoder were made by `train_vae`, `train_teacher` and `train_text` in this folder, which
anyone can run again. This module needs neither torch nor numpy.
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

TEXT_FOLDER: Final = Path(__file__).parent / "text"
"""A folder for transformers' `CLIPTextModel` and tokenizer: captions to states [B, 12, 64].

Trained by `train_text` on captions of drawn shapes of seed 0 and on no other data.
"""

TEXT_LENGTH: Final = 12
"""Tokens of a caption, with those of beginning, end and padding."""

TEXT_WIDTH: Final = 64
"""Channels of a state."""

TEXT_OPTIONS: Final[dict[str, int]] = {
    "vocab_size": 35,
    "hidden_size": TEXT_WIDTH,
    "intermediate_size": 4 * TEXT_WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": TEXT_LENGTH,
    "projection_dim": TEXT_WIDTH,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 3,
}
"""What `transformers.CLIPTextConfig` is given: 31 words, and tokens for padding, begin, unknown and end."""
