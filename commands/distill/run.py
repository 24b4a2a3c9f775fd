"""`repa distill` makes a faster copy of a teacher from the tokens that a cache has of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...data.errors import RepaError
from ...pipeline.images.names import DEFAULT_DATA, DEMO_DATA, default_cache

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from rich.console import Console

    from ...pipeline.distill.config import DistillConfig
    from ...pipeline.encoders.distilled import Distilled
    from .flags import DistillFlags

_FIGURES = {
    "patch_cosine_mean": "cosine of patch tokens to the teacher's: mean",
    "patch_cosine_p01": "1st percentile of the tokens",
    "patch_cosine_worst_image": "worst image",
    "shuffled_cosine": "to another image's tokens (the floor)",
    "class_cosine_mean": "cosine of class tokens",
    "relative_l2": "relative L2 error of patch tokens",
    "gram_error": "error of the cosines between an image's tokens",
    "repa_loss_change": "change of REPA's loss, per token",
    "neighbour_agreement": "nearest images in common",
    "merge_error": "change by the merge, relative",
}


def distill(flags: DistillFlags, *, console: Console | None = None) -> None:
    """Distil a copy, and print how far it is from its teacher and how much faster.

    Args:
        flags: of the command.
        console: where to print; standard output by default.

    Raises:
        RepaError: a mistake the user can mend.
    """
    from ..shared.terminal import PlainConsole

    console = console or PlainConsole()
    config = _config(flags)
    from ...pipeline.distill import run as work
    from ...pipeline.distill.config import check_numbers

    check_numbers(config)
    path, found = work.distill(config, _Report(console))
    _print(found, console)
    _say(console, f"Wrote {path}. Encode by it with `repa preprocess --encoder {path}`.")


def _config(flags: DistillFlags) -> DistillConfig:
    import torch

    from ...data.format.opening import open_manifest
    from ...data.storage.bucket import cache_path
    from ...pipeline.distill.config import DistillConfig
    from ..shared.encoders import parse_weights

    cache = flags.cache or str(default_cache())
    demo = open_manifest(cache_path(cache)).source_kind == DEMO_DATA
    weights = parse_weights(flags.weights or ())
    if len(weights) > 1 or (flags.encoder is not None and set(weights) - {flags.encoder}):
        raise RepaError(
            f"--weights names {', '.join(weights)}, and one teacher is copied",
            "give the file of the teacher of --encoder alone",
            field="--weights",
        )
    [named, file] = next(iter(weights.items()), (None, None))
    return DistillConfig(
        cache=cache,
        teacher=flags.encoder or named,
        idle=flags.idle,
        norm=flags.norm,
        data=flags.data or (DEMO_DATA if demo else DEFAULT_DATA),
        may_import=flags.data is not None,
        weights=file,
        fit_images=flags.fit_images,
        steps=flags.steps,
        batch_size=flags.batch_size,
        learning_rate=flags.learning_rate,
        held_out=flags.held_out,
        seed=flags.seed,
        save_every=flags.save_every,
        out=flags.out,
        device="cuda" if torch.cuda.is_available() else "cpu",
    )


class _Report:
    """Progress on a console."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def say(self, text: str) -> None:
        """Print a line."""
        _say(self._console, text)

    def progress(self, total: int, what: str) -> AbstractContextManager[Any]:
        """Show a bar on a terminal."""
        from ..shared.terminal import progress

        return progress(total, self._console, what)


def _print(found: Distilled, console: Console) -> None:
    from rich.table import Table

    norm = "LayerNorms kept" if found.norm == "layer" else "BatchNorms"
    table = Table(
        title=f"{found.name}: {found.idle:.0%} of {found.teacher}'s hidden channels idle, {norm}, merged; "
        f"{found.training.steps:,} steps; measured on {found.fidelity.images:,} held-out images",
        title_justify="left",
        show_header=False,
    )
    table.add_column(justify="left")
    table.add_column(justify="right")
    for key, text in _FIGURES.items():
        count = f", of {found.fidelity.neighbours}" if key == "neighbour_agreement" else ""
        value = getattr(found.fidelity, key)
        table.add_row(f"{text}{count}", f"{value:.2g}" if key == "merge_error" else f"{value:.4f}")
    speed = found.speed
    threads = f", threads: {speed.threads}" if speed.threads else ""
    table.add_row(
        f"images/s, {speed.device}{threads}, {speed.compute_dtype}, batch {speed.batch_size}",
        f"{speed.teacher:.1f} → {speed.copy:.1f}, ×{speed.ratio:.2f}",
    )
    console.print(table)


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)
