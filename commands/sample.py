"""`repa sample` makes images from a run or a published checkpoint."""

from __future__ import annotations

import difflib
import os
from dataclasses import dataclass, replace
from pathlib import Path  # noqa: TC003 - typer resolves annotations of flags
from typing import TYPE_CHECKING, Annotated

import typer

from ..data.edge import printable, shortened
from ..data.errors import RepaError
from ..data.units import counted
from .shared.decoder_flags import DecoderFlag, TeacherWeightsFlag  # noqa: TC001 - typer resolves them
from .shared.flags import local_folder

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rich.console import Console

    from ..trainer.sampling.generate import TrainedModel
    from .shared.banks import BankAsked
    from .shared.prepared import Prepared
    from .shared.sampling import SamplingJob
    from .shared.texts import TextAsked


@dataclass(frozen=True, kw_only=True)
class SampleFlags:
    """The flags of `repa sample`."""

    run: Annotated[
        Path | None,
        typer.Option(parser=local_folder, metavar="<path>", help="Folder of a run: its newest checkpoint."),
    ] = None
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
    labels: Annotated[
        list[str] | None,
        typer.Option(
            "--label",
            help="Class to sample, by number or name; may repeat. Default: all, equally often.",
        ),
    ] = None
    bank: Annotated[
        str | None,
        typer.Option(
            metavar="CACHE|FILE",
            help="Of a model conditioned on class tokens or text: where it takes them from, a cache, or a "
            "file of 'repa bank build'.",
            show_default="the cache of the run",
        ),
    ] = None
    like: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ROW|IMAGE",
            help="Take the class token of this row of the bank, or of this image; may repeat, in turn.",
            show_default="rows drawn",
        ),
    ] = None
    mix: Annotated[
        str | None,
        typer.Option(help="Mix two --like: linear, spherical, concat or mask.", show_default="none"),
    ] = None
    alphas: Annotated[
        list[float] | None,
        typer.Option(
            "--alpha",
            help="Share of the second in the mixture, 0 to 1; may repeat, in turn.",
            show_default="0, 0.2, …, 1; of concat and mask 0.5",
        ),
    ] = None
    draw: Annotated[
        str, typer.Option(help="Law of the rows: uniform, or noise (by the mean of the initial noise).")
    ] = "uniform"
    prompts: Annotated[
        list[str] | None,
        typer.Option(
            "--prompt",
            help="Of a model of text: what to show; may repeat, in turn.",
            show_default="a caption of each of the images of --bank",
        ),
    ] = None
    prompts_file: Annotated[
        Path | None,
        typer.Option("--prompts", metavar="FILE", help="Prompts of a file, one a line, in turn."),
    ] = None
    encoder_weights: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=FILE",
            help="Weights of the encoder of --like IMAGE, or a folder of that of --prompt.",
        ),
    ] = None
    seed: Annotated[int, typer.Option(help="Of the noise.")] = 0
    batch_size: Annotated[int, typer.Option(help="Images of a forward pass; does not change them.")] = 32
    devices: Annotated[
        int, typer.Option(help="Processes, one a GPU, or sharing the CPU's cores; the images stay the same.")
    ] = 1
    weights: Annotated[str, typer.Option(help="ema or model.")] = "ema"
    vae: DecoderFlag = None
    teacher_weights: TeacherWeightsFlag = None
    replace: Annotated[
        bool, typer.Option("--replace", help="Remove another sampling that is in the folder.")
    ] = False


def sample(flags: SampleFlags, *, console: Console | None = None) -> None:
    """Sample images. Sample i depends on seed, label and i, not on the batch size or the number of devices.

    Those of a checkpoint file go, without ``--out``, into a folder beside it. A folder holds one sampling and
    its record, ``sampling.json``; the same command goes on with one that was interrupted.

    Args:
        flags: of the command.
        console: where to print; standard output by default.

    Raises:
        RepaError: a mistake the user can mend.
    """
    from .shared.prepared import prepare_sampling
    from .shared.sampling_checks import check_devices, check_numbers
    from .shared.terminal import PlainConsole, progress

    console = console or PlainConsole()
    check_numbers(
        flags,
        ("--num", flags.num, 1, 10**9),
        ("--batch-size", flags.batch_size, 1, 10**6),
        ("--devices", flags.devices, 1, 1024),
    )
    checkpoint, out = _places(flags)
    import torch

    from ..data.storage.files import os_errors, refuse_links
    from ..trainer.run.folder import run_of
    from ..trainer.sampling.record import SampleFolder

    cuda = torch.cuda.is_available()
    check_devices(flags.devices, torch.cuda.device_count() if cuda else 0)
    prepared = prepare_sampling(
        checkpoint,
        flags,
        num=flags.num,
        batch_size=flags.batch_size,
        form="npz" if flags.npz else "png",
        device="cuda" if cuda else "cpu",
        say=lambda line: _say(console, line),
        asked=lambda model: _asked(flags.labels or (), model),
        bank=_bank_asked(flags),
        text=_text_asked(flags),
        run=run_of(checkpoint),
    )
    record = prepared.record
    if flags.out is None:
        # a run that others made may have links where its samples go
        with os_errors("write", out):
            refuse_links(out, flags.run or out.parent)
    folder = SampleFolder(out, record)
    folder.open(replace_other=flags.replace)
    missing = folder.missing()
    jobs = _jobs(flags, prepared, missing, out)
    left = sum(min(flags.batch_size, flags.num - first) for first in missing)
    if left < flags.num:
        _say(console, f"{flags.num - left:,} of {counted(flags.num, 'image', ',')} are in {out} already.")
    with progress(left, console, "sampling") as report:
        _run(jobs, prepared, report)
    folder.finish(prepared.told)
    _say(console, f"Wrote {counted(flags.num, 'image', ',')} to {out}.")


def _bank_asked(flags: SampleFlags) -> BankAsked:
    from .shared.banks import BankAsked

    return BankAsked(
        bank=flags.bank or "",
        like=tuple(flags.like or ()),
        mix=flags.mix or "",
        alphas=tuple(flags.alphas or ()),
        draw=flags.draw,
        encoder_weights=() if flags.prompts or flags.prompts_file else tuple(flags.encoder_weights or ()),
    )


def _text_asked(flags: SampleFlags) -> TextAsked:
    from .shared.texts import TextAsked

    asked = TextAsked(prompts=tuple(flags.prompts or ()), file=flags.prompts_file)
    return replace(asked, weights=tuple(flags.encoder_weights or ())) if asked.given() else asked


def _places(flags: SampleFlags) -> tuple[Path, Path]:
    """Find the checkpoint that the flags name, and the folder for its images."""
    from ..trainer.sampling.generate import newest_checkpoint

    if flags.run is not None and flags.checkpoint is None:
        return newest_checkpoint(flags.run), flags.out or flags.run / "samples" / "final"
    if flags.checkpoint is not None and flags.run is None:
        file = flags.checkpoint
        return file, flags.out or file.parent / f"{file.stem}-samples"
    raise RepaError(
        "the flags do not say what to sample",
        "sample from one thing: a run with --run, or a checkpoint with --ckpt",
        field="--run",
    )


def _asked(labels: Sequence[str], model: TrainedModel) -> tuple[int, ...]:
    """Parse the classes that ``--label`` names, by number or by name.

    Raises:
        RepaError: no such class, or the model knows none.
    """
    from ..trainer.models.conditioning import LabelConditioner

    conditioner = model.backbone.y_embedder
    if labels and not isinstance(conditioner, LabelConditioner):
        raise RepaError(
            f"the model is conditioned on {conditioner.column}, not on labels",
            "leave --label out",
            field="--label",
        )
    return tuple(_class_of(label, model) for label in labels)


def _class_of(label: str, model: TrainedModel) -> int:
    """Return the number of a class.

    Raises:
        RepaError: no such class, with the names that come nearest.
    """
    names, count = model.class_names, model.num_classes
    if label.isdecimal() and int(label[:20]) < count:
        return int(label)
    if label in names:
        return names.index(label)
    folded = [name.casefold() for name in names]
    if folded.count(label.casefold()) == 1:
        return folded.index(label.casefold())
    near = difflib.get_close_matches(label.casefold(), folded, n=3, cutoff=0.5)
    numbers = f"give a number from 0 to {count - 1}"
    if near:
        remedy = f"did you mean {' or '.join(printable(names[folded.index(name)]) for name in near)}?"
    else:
        remedy = f"{numbers}, or a name as {printable(names[0])}" if names else numbers
    raise RepaError(
        f"the model has {counted(count, 'class')}, and {shortened(label)} is none of them",
        remedy,
        field="--label",
    )


def _jobs(flags: SampleFlags, prepared: Prepared, missing: Sequence[int], out: Path) -> list[SamplingJob]:
    """Deal the batches that are missing to the processes in turn."""
    from .shared.sampling import SamplingJob

    model = prepared.model
    cuda = next(model.backbone.parameters()).device.type == "cuda"
    threads = None if cuda or flags.devices == 1 else max((os.cpu_count() or 1) // flags.devices, 1)
    return [
        SamplingJob(
            checkpoint=model.origin,
            random_autoencoder=prepared.random_autoencoder,
            teacher_weights=prepared.teacher_weights,
            record=prepared.record,
            condition=prepared.condition,
            batches=tuple(missing[number :: flags.devices]),
            folder=out,
            device=f"cuda:{number}" if cuda else "cpu",
            threads=threads,
        )
        for number in range(min(flags.devices, len(missing)))
    ]


def _run(jobs: Sequence[SamplingJob], prepared: Prepared, report: Callable[[int], None]) -> None:
    from .shared.processes import in_processes
    from .shared.sampling import sample_batches, sample_in_process

    if len(jobs) > 1:
        in_processes(sample_in_process, jobs, report, what="sampling")
        return
    for job in jobs:
        sample_batches(job, prepared.model, prepared.decoder, report)


def _say(console: Console, line: str) -> None:
    console.print(line, highlight=False, markup=False, soft_wrap=True)
