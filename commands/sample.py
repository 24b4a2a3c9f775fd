"""`repa sample`: a run or a published checkpoint in, images out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path  # noqa: TC003 - typer resolves annotations of flags
from typing import TYPE_CHECKING, Annotated

import typer

from ..data.errors import RepaError
from ..data.units import counted
from .shared.flags import local_folder

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy as np
    from numpy.typing import NDArray
    from rich.console import Console
    from torch import Tensor

    from ..trainer.models.conditioning import Conditioner
    from ..trainer.sampling.generate import TrainedModel
    from .shared.decoder import Decoder

GRID_FILE = "grid.png"
ARRAY_FILE = "samples.npz"
_GRID_IMAGES = 64


@dataclass(frozen=True, kw_only=True)
class SampleFlags:
    """The flags of `repa sample`."""

    run: Annotated[
        Path | None,
        typer.Option(parser=local_folder, metavar="<path>", help="Folder of a run: its newest checkpoint."),
    ] = None
    checkpoint: Annotated[
        Path | None,
        typer.Option("--ckpt", help="Instead: a checkpoint of a run, or a published one of SiT or REPA."),
    ] = None
    num: Annotated[int, typer.Option(help="Number of images.")] = 16
    out: Annotated[
        Path | None,
        typer.Option(
            parser=local_folder,
            metavar="<path>",
            help="Folder to write to.",
            show_default="samples/final of the run",
        ),
    ] = None
    npz: Annotated[
        bool, typer.Option("--npz", help="One uint8 array file, as the ADM evaluation suite reads it.")
    ] = False
    solver: Annotated[str, typer.Option(help="euler, heun or sde.")] = "euler"
    steps: Annotated[int, typer.Option(help="Steps of the solver.")] = 50
    guidance: Annotated[float, typer.Option(help="Scale of classifier-free guidance; 1: none.")] = 1.0
    interval: Annotated[
        tuple[float, float], typer.Option(metavar="LOW HIGH", help="Times between which guidance acts.")
    ] = (0.0, 1.0)
    labels: Annotated[
        list[int] | None,
        typer.Option("--label", help="Class to sample; may repeat. Default: all, equally often."),
    ] = None
    seed: Annotated[int, typer.Option(help="Of the noise.")] = 0
    batch_size: Annotated[int, typer.Option(help="Images of a forward pass; does not change them.")] = 32
    weights: Annotated[str, typer.Option(help="ema or model.")] = "ema"
    vae: Annotated[str | None, typer.Option(help="AutoencoderKL; default the one the latents came from.")] = (
        None
    )


def sample(flags: SampleFlags, *, console: Console | None = None) -> None:
    """Sample images; sample i depends on seed, label and i, not on the batch size.

    Those of a checkpoint file go, without ``--out``, into a folder beside it.

    Args:
        flags: of the command.
        console: where to print; standard output by default.

    Raises:
        RepaError: a mistake the user can mend.
    """
    from rich.console import Console

    console = console or Console()
    if flags.num < 1 or flags.batch_size < 1:
        raise RepaError(f"--num {flags.num} and --batch-size {flags.batch_size} must be at least 1")
    import torch

    from ..trainer.sampling.generate import generate
    from ..trainer.sampling.sampler import SamplerConfig

    settings = SamplerConfig(
        solver=flags.solver, steps=flags.steps, guidance=flags.guidance, interval=flags.interval
    )
    model, folder = _model(flags)
    if flags.out is None:
        from ..data.storage.files import os_errors, refuse_links

        # a run that others made may have links where its samples go
        with os_errors("write", folder):
            refuse_links(folder, flags.run or folder.parent)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.backbone.to(device)
    classes = _conditions(model.backbone.y_embedder, flags)
    # before the sampling, which may take hours: without an autoencoder it would be for nothing
    decoder = _decoder(model, flags.vae, device, console)
    latents = generate(model, classes, settings, seed=flags.seed, batch_size=flags.batch_size)
    images = _with_progress((_pixels(decoder, part) for part in latents), flags.num, console)
    _write(images, classes, folder, npz=flags.npz)
    console.print(f"Wrote {counted(flags.num, 'image', ',')} to {folder}.", highlight=False, soft_wrap=True)


def _model(flags: SampleFlags) -> tuple[TrainedModel, Path]:
    """The model that the flags name, and the folder for its images."""
    from ..trainer.sampling.generate import model_of_file, model_of_run

    if flags.run is not None and flags.checkpoint is None:
        model = model_of_run(flags.run, weights=flags.weights)
        return model, flags.out or flags.run / "samples" / "final"
    if flags.checkpoint is not None and flags.run is None:
        file = flags.checkpoint
        model = model_of_file(file, weights=flags.weights)
        return model, flags.out or file.parent / f"{file.stem}-samples"
    raise RepaError("sample from one thing: a run with --run, or a checkpoint with --ckpt")


def _conditions(conditioner: Conditioner, flags: SampleFlags) -> Tensor:
    """Condition of each sample ``[N, …]``; for labels int64 ``[N]``."""
    from ..trainer.models.conditioning import LabelConditioner
    from ..trainer.step.randomness import generator_for

    if isinstance(conditioner, LabelConditioner):
        return _labels(flags.labels or (), flags.num, conditioner.num_classes)
    if flags.labels:
        raise RepaError(
            f"the model is conditioned on {conditioner.column}, not on labels",
            "leave --label out",
            field="--label",
        )
    return conditioner.sampling(flags.num, generator_for(flags.seed, "sample condition")).cpu()


def _labels(asked: Sequence[int], num: int, num_classes: int) -> Tensor:
    """Class of each sample, int64 ``[N]``."""
    import torch

    from ..trainer.models.conditioning import balanced_labels

    outside = [label for label in asked if not 0 <= label < num_classes]
    if outside:
        raise RepaError(
            f"the model has {counted(num_classes, 'class')}, label {outside[0]} is none of them",
            f"give 0 to {num_classes - 1}",
        )
    if not asked:
        return balanced_labels(num, num_classes)
    return torch.tensor([asked[number % len(asked)] for number in range(num)])


def _decoder(model: TrainedModel, vae: str | None, device: str, console: Console) -> Decoder:
    from ..pipeline.encoders.vae import DEFAULT_VAE
    from .shared.decoder import Decoder

    name = vae or model.autoencoder or DEFAULT_VAE
    decoder = Decoder(name, device, random_weights=vae is None and model.autoencoder_random)
    autoencoder = decoder.load()
    side = model.backbone.config.input_size * autoencoder.stride
    found = autoencoder.provenance(batch_size=1, resolution=side).weights_sha256
    if model.autoencoder_sha256 is not None and found != model.autoencoder_sha256:
        console.print(
            f"note: {name} has other weights than the autoencoder that {model.origin} was trained with",
            highlight=False,
            soft_wrap=True,
        )
    return decoder


def _pixels(decoder: Decoder, latents: Tensor) -> NDArray[np.uint8]:
    """Images uint8 ``[B, H, W, 3]``."""
    images: NDArray[np.uint8] = decoder.decode(latents).permute(0, 2, 3, 1).cpu().numpy()
    return images


def _with_progress(
    batches: Iterator[NDArray[np.uint8]], num: int, console: Console
) -> Iterator[NDArray[np.uint8]]:
    from rich.progress import Progress

    with Progress(console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task("sampling", total=num)
        for images in batches:
            yield images
            progress.advance(task, len(images))


def _write(images: Iterator[NDArray[np.uint8]], labels: Tensor, folder: Path, *, npz: bool) -> None:
    """Write batches as they come, and a grid of the first images."""
    import numpy as np
    from PIL import Image

    from ..data.storage.files import make_folder, os_errors
    from ..trainer.sampling.pictures import make_grid, save_array_file, save_png

    shown: list[NDArray[np.uint8]] = []

    def watched() -> Iterator[NDArray[np.uint8]]:
        for batch in images:
            shown.extend(batch[: max(_GRID_IMAGES - len(shown), 0)])
            yield batch

    with os_errors("write", folder):
        make_folder(folder)
    if npz:
        save_array_file(folder / ARRAY_FILE, watched(), labels.numpy())
    else:
        number = 0
        for batch in watched():
            for image in batch:
                save_png(Image.fromarray(image), folder / f"{number:06d}.png")
                number += 1
    save_png(make_grid(np.stack(shown)), folder / GRID_FILE)
