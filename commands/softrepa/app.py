"""The flags of `repa softrepa …`, whose work is in the modules that they name."""

from __future__ import annotations

import typer

from ..shared.flags import takes_flags
from .sample_flags import SoftSampleFlags
from .train_flags import SoftTrainFlags

softrepa_app = typer.Typer(
    help="Train a few text tokens of a frozen Stable Diffusion (SoftREPA), and sample with them.",
    no_args_is_help=True,
)


@softrepa_app.command("train")
@takes_flags(SoftTrainFlags)
def _softrepa_train(flags: SoftTrainFlags) -> None:
    """Train soft tokens from a cache of latents and captions. The same command again resumes."""
    from .train import train

    train(flags)


@softrepa_app.command("sample")
@takes_flags(SoftSampleFlags)
def _softrepa_sample(flags: SoftSampleFlags) -> None:
    """Sample images with trained soft tokens, or without, to compare."""
    from .sample import sample

    sample(flags)
