"""The flags of `repa evaluate`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path  # noqa: TC003 - typer resolves annotations of flags
from typing import Annotated

import typer

from ..shared.decoder_flags import DecoderFlag, TeacherWeightsFlag  # noqa: TC001 - typer resolves them
from ..shared.flags import local_folder

NUM = 50_000


@dataclass(frozen=True, kw_only=True)
class EvaluateFlags:
    """The flags of `repa evaluate`."""

    run: Annotated[
        Path | None,
        typer.Option(
            # torchrun takes --run for a short form of its own --run-path, wherever it stands
            "--run",
            "--run-folder",
            parser=local_folder,
            metavar="<path>",
            help="Folder of a run. Write --run-folder behind torchrun.",
        ),
    ] = None
    step: Annotated[int | None, typer.Option(help="Checkpoint of the run.", show_default="its newest")] = None
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            "--ckpt",
            help="Instead: a checkpoint of a run, or a published one of DiT, SiT, REPA, REG, SRA, "
            "LightningDiT or GMem.",
        ),
    ] = None
    family: Annotated[
        str | None,
        typer.Option(help="What a published checkpoint is of where it does not say itself: DiT or SiT."),
    ] = None
    samples: Annotated[
        Path | None,
        typer.Option(help="Instead: finished samples, an .npz file (arr_0) or a folder of images."),
    ] = None
    num: Annotated[
        int | None,
        typer.Option(
            # torchrun takes --num for a short form of its own --numa-binding
            "--num",
            "--num-samples",
            help="Number of samples. Write --num-samples behind torchrun.",
            show_default=f"{NUM}, or all that --samples has",
        ),
    ] = None
    labels: Annotated[str, typer.Option(help="Classes: balanced (in turn) or random (drawn).")] = "balanced"
    reference: Annotated[
        str | None,
        typer.Option(
            metavar="FILE.npz|CACHE|FOLDER",
            help="What to compare with: a reference file of the ADM suite, a cache, or a folder of images.",
            show_default="the cache of the run",
        ),
    ] = None
    metrics: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,NAME,…",
            help="Such as fid,sfid,is,precision,recall,kid,prdc; fd/<encoder>, kid/<encoder>, …",
            show_default="fd with a cache, fid,sfid,is,precision,recall with another reference",
        ),
    ] = None
    inception: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Weights of Inception, torch-fidelity's.", show_default="the hub's"
        ),
    ] = None
    clip: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER|NAME",
            help="CLIP of clip_score: a folder, or its name on the hub.",
            show_default="ViT-L/14",
        ),
    ] = None
    encoder_weights: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=FILE", help="File of an encoder's weights; may repeat."),
    ] = None
    solver: Annotated[
        str,
        typer.Option(
            help="euler, heun, sde or sde-heun; of a DiT ddpm or ddim.", show_default="euler, ddpm of a DiT"
        ),
    ] = ""
    steps: Annotated[int, typer.Option(help="Steps of the solver.")] = 50
    shift: Annotated[
        float, typer.Option(help="Shift of the times of euler and heun, as 0.3 of LightningDiT; 1: none.")
    ] = 1.0
    guidance: Annotated[float, typer.Option(help="Scale of classifier-free guidance; 1: none.")] = 1.0
    guidance_cls: Annotated[
        float | None,
        typer.Option(
            help="Scale for the class token that REG samples with the image.", show_default="as --guidance"
        ),
    ] = None
    guidance_channels: Annotated[
        str,
        typer.Option(help="Channels of the latent that are guided: all, or three as in the released DiT."),
    ] = "all"
    interval: Annotated[
        tuple[float, float], typer.Option(metavar="LOW HIGH", help="Times between which guidance acts.")
    ] = (0.0, 1.0)
    bank: Annotated[
        str | None,
        typer.Option(
            metavar="CACHE|FILE",
            help="Of a model conditioned on class tokens: where it takes them from, a cache or a file of "
            "'repa bank build'.",
            show_default="the cache of the run",
        ),
    ] = None
    seed: Annotated[int, typer.Option(help="Of the noise.")] = 0
    weights: Annotated[str, typer.Option(help="ema or model.")] = "ema"
    vae: DecoderFlag = None
    teacher_weights: TeacherWeightsFlag = None
    devices: Annotated[
        int, typer.Option(help="Processes, one a GPU, or sharing the CPU's cores; figures stay the same.")
    ] = 1
    bootstrap: Annotated[
        int,
        typer.Option(
            metavar="ROUNDS",
            help="Spread of each figure over so many sets drawn from the samples; 0 draws none.",
        ),
    ] = 0
    keep_samples: Annotated[
        bool, typer.Option("--keep-samples", help="Keep the images too, as one .npz file.")
    ] = False
    out: Annotated[
        Path | None,
        typer.Option(
            parser=local_folder,
            metavar="<path>",
            help="Folder of features and results.",
            show_default="the run's, or beside the checkpoint or the samples",
        ),
    ] = None
