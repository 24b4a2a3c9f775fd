"""`repa sample` makes images from a run or a published checkpoint."""

from __future__ import annotations

import difflib
import math
import os
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path  # noqa: TC003 - typer resolves annotations of flags
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..data.edge import printable, shortened
from ..data.errors import RepaError
from ..data.units import counted
from .shared.flags import local_folder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray
    from rich.console import Console

    from ..trainer.models.conditioning import Conditioner
    from ..trainer.sampling.generate import TrainedModel
    from ..trainer.sampling.record import SamplingRecord
    from ..trainer.sampling.sampler import SamplerConfig
    from .shared.decoder import Decoder
    from .shared.sampling import SamplingJob

_PLAIN_LINE_SECONDS = 15.0
_MOST_STEPS = 100_000


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
            "--ckpt", help="Instead: a checkpoint of a run, or a published one of SiT, REPA, REG or SRA."
        ),
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
    guidance_cls: Annotated[
        float | None,
        typer.Option(
            help="Scale for the class token that REG samples with the image.", show_default="as --guidance"
        ),
    ] = None
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
    seed: Annotated[int, typer.Option(help="Of the noise.")] = 0
    batch_size: Annotated[int, typer.Option(help="Images of a forward pass; does not change them.")] = 32
    devices: Annotated[
        int, typer.Option(help="Processes, one a GPU, or sharing the CPU's cores; the images stay the same.")
    ] = 1
    weights: Annotated[str, typer.Option(help="ema or model.")] = "ema"
    vae: Annotated[str | None, typer.Option(help="AutoencoderKL; default the one the latents came from.")] = (
        None
    )
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
    from .shared.terminal import PlainConsole

    console = console or PlainConsole()
    _check(flags)
    import torch

    from ..data.storage.files import os_errors, refuse_links
    from ..trainer.sampling.generate import model_of_file
    from ..trainer.sampling.record import SampleFolder
    from ..trainer.sampling.sampler import SamplerConfig

    settings = SamplerConfig(
        solver=flags.solver,
        steps=flags.steps,
        guidance=flags.guidance,
        guidance_cls=flags.guidance_cls,
        interval=flags.interval,
    )
    checkpoint, out = _places(flags)
    cuda = torch.cuda.is_available()
    _check_devices(flags.devices, torch.cuda.device_count() if cuda else 0)
    model = model_of_file(checkpoint, weights=flags.weights)
    _check_guidance(flags, model)
    model.backbone.to("cuda" if cuda else "cpu")
    asked = _asked(flags.labels or (), model)
    condition = _conditions(model.backbone.y_embedder, asked, flags)
    # before the sampling, which may take hours: without an autoencoder it would be for nothing
    decoder = _decoder(model, flags.vae, "cuda" if cuda else "cpu", console)
    record = _record(flags, settings, checkpoint, model, decoder, asked)
    if flags.out is None:
        # a run that others made may have links where its samples go
        with os_errors("write", out):
            refuse_links(out, flags.run or out.parent)
    folder = SampleFolder(out, record)
    folder.open(replace_other=flags.replace)
    missing = folder.missing()
    jobs = _jobs(flags, model, record, condition, missing, out)
    left = sum(min(flags.batch_size, flags.num - first) for first in missing)
    if left < flags.num:
        _say(console, f"{flags.num - left:,} of {counted(flags.num, 'image', ',')} are in {out} already.")
    with _progress(left, console) as report:
        _run(jobs, model, decoder, report)
    folder.finish(condition)
    _say(console, f"Wrote {counted(flags.num, 'image', ',')} to {out}.")


def _record(
    flags: SampleFlags,
    settings: SamplerConfig,
    checkpoint: Path,
    model: TrainedModel,
    decoder: Decoder,
    asked: tuple[int, ...],
) -> SamplingRecord:
    """Say what the sampling is of, and how it is made."""
    from ..trainer.sampling.record import SamplingRecord, sha256_of

    return SamplingRecord(
        checkpoint=checkpoint.name,
        checkpoint_sha256=sha256_of(checkpoint),
        step=model.steps,
        weights=flags.weights,
        autoencoder=decoder.name,
        autoencoder_sha256=decoder.weights_sha256,
        num=flags.num,
        labels=asked,
        solver=settings.solver,
        steps=settings.steps,
        guidance=settings.guidance,
        guidance_cls=(flags.guidance if flags.guidance_cls is None else flags.guidance_cls)
        if model.backbone.config.token_widths
        else None,
        interval=settings.interval,
        seed=flags.seed,
        batch_size=flags.batch_size,
        form="npz" if flags.npz else "png",
    )


def _check_guidance(flags: SampleFlags, model: TrainedModel) -> None:
    """Refuse guidance that the model cannot have.

    Raises:
        RepaError: it was never trained without a label, or has no class token.
    """
    given = {"--guidance": flags.guidance, "--guidance-cls": flags.guidance_cls}
    if flags.guidance_cls is not None and not model.backbone.config.token_widths:
        raise RepaError(
            f"{model.origin} makes no class token that --guidance-cls could act on",
            "leave it out",
            field="--guidance-cls",
        )
    guided = [flag for flag, weight in given.items() if weight not in (None, 1)]
    if guided and not model.guidable:
        raise RepaError(
            f"{model.origin} was trained with label_dropout=0, so it has nothing to be guided away from",
            f"leave {guided[0]} at 1",
            field=guided[0],
        )


def _check(flags: SampleFlags) -> None:
    """Refuse numbers out of their range.

    Raises:
        RepaError: the first of them.
    """
    for flag, value, least, most in (
        ("--num", flags.num, 1, 10**9),
        ("--batch-size", flags.batch_size, 1, 10**6),
        ("--steps", flags.steps, 1, _MOST_STEPS),
        ("--seed", flags.seed, 0, 2**63 - 1),
        ("--devices", flags.devices, 1, 1024),
    ):
        if not least <= value <= most:
            raise RepaError(f"{flag} {value} is not valid", f"give {least:,} to {most:,}", field=flag)
    for flag, weight in (("--guidance", flags.guidance), ("--guidance-cls", flags.guidance_cls)):
        if weight is not None and not 0 <= weight < math.inf:
            raise RepaError(f"{flag} {weight} is not valid", "give a finite number from 0", field=flag)


def _check_devices(devices: int, gpus: int) -> None:
    """Refuse more processes than help.

    Raises:
        RepaError: more than there are GPUs, or without any than cores.
    """
    most = gpus or os.cpu_count() or 1
    if devices > most:
        raise RepaError(
            f"--devices {devices}, and this machine has {counted(most, 'GPU' if gpus else 'core')}",
            f"give at most {most}",
            field="--devices",
        )


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


def _conditions(conditioner: Conditioner, asked: Sequence[int], flags: SampleFlags) -> NDArray[Any]:
    """Choose the condition of each sample ``[N, …]``, for labels int64 ``[N]``."""
    import numpy as np

    from ..trainer.models.conditioning import LabelConditioner, balanced_labels
    from ..trainer.step.randomness import generator_for

    if isinstance(conditioner, LabelConditioner):
        if not asked:
            return balanced_labels(flags.num, conditioner.num_classes).numpy()
        return np.resize(np.array(asked, np.int64), flags.num)
    drawn = conditioner.sampling(flags.num, generator_for(flags.seed, "sample condition"))
    found: NDArray[Any] = drawn.cpu().numpy()
    return found


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


def _decoder(model: TrainedModel, vae: str | None, device: str, console: Console) -> Decoder:
    """Load the autoencoder.

    Raises:
        RepaError: it cannot be had, or has latents of other channels.
    """
    from ..pipeline.encoders.vae import DEFAULT_VAE
    from .shared.decoder import Decoder

    name = vae or model.autoencoder or DEFAULT_VAE
    decoder = Decoder(name, device, random_weights=vae is None and model.autoencoder_random)
    autoencoder = decoder.load()
    channels = model.latent_shape[0]
    if autoencoder.latent_channels != channels:
        raise RepaError(
            f"{name} decodes latents of {counted(autoencoder.latent_channels, 'channel')}, and those of "
            f"{model.origin} have {channels}",
            "give --vae the autoencoder that the latents came from",
            field="--vae",
        )
    if model.autoencoder_sha256 is not None and decoder.weights_sha256 != model.autoencoder_sha256:
        _say(
            console,
            f"note: {name} has other weights than the autoencoder that {model.origin} was trained with",
        )
    return decoder


def _jobs(
    flags: SampleFlags,
    model: TrainedModel,
    record: SamplingRecord,
    condition: NDArray[Any],
    missing: Sequence[int],
    out: Path,
) -> list[SamplingJob]:
    """Deal the batches that are missing to the processes in turn."""
    from .shared.sampling import SamplingJob

    cuda = next(model.backbone.parameters()).device.type == "cuda"
    threads = None if cuda or flags.devices == 1 else max((os.cpu_count() or 1) // flags.devices, 1)
    return [
        SamplingJob(
            checkpoint=model.origin,
            random_autoencoder=flags.vae is None and model.autoencoder_random,
            record=record,
            condition=condition,
            batches=tuple(missing[number :: flags.devices]),
            folder=out,
            device=f"cuda:{number}" if cuda else "cpu",
            threads=threads,
        )
        for number in range(min(flags.devices, len(missing)))
    ]


def _run(
    jobs: Sequence[SamplingJob], model: TrainedModel, decoder: Decoder, report: Callable[[int], None]
) -> None:
    from .shared.sampling import sample_batches, sample_in_processes

    if len(jobs) > 1:
        sample_in_processes(jobs, report)
        return
    for job in jobs:
        sample_batches(job, model, decoder, report)


@contextmanager
def _progress(total: int, console: Console) -> Iterator[Callable[[int], None]]:
    """Show a bar on a terminal, elsewhere a line now and then.

    Yields:
        A function that takes the number of images that have come since the last call.
    """
    from rich.progress import Progress

    began = said = time.monotonic()
    done = 0
    with Progress(console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task("sampling", total=total)

        def report(count: int) -> None:
            nonlocal done, said
            done += count
            bar.advance(task, count)
            now = time.monotonic()
            if not console.is_terminal and now - said > _PLAIN_LINE_SECONDS:
                said = now
                _say(
                    console,
                    f"{done:,} of {counted(total, 'image', ',')}, {done / (now - began):,.1f} a second",
                )

        yield report


def _say(console: Console, line: str) -> None:
    console.print(line, highlight=False, markup=False, soft_wrap=True)
