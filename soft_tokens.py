"""The tokens that SoftREPA trained, in the pipelines of diffusers.

::

    from diffusers import StableDiffusionPipeline
    from repa.soft_tokens import load_soft_tokens

    pipe = StableDiffusionPipeline.from_pretrained(FOLDER)
    pipe.unet = load_soft_tokens(pipe.unet, "runs/softrepa/tokens.safetensors")
"""

from __future__ import annotations

from .trainer.softrepa.drop_in import SoftDenoiser, load_soft_tokens

__all__ = ["SoftDenoiser", "load_soft_tokens"]
