"""The command line of `repa`: flags and their help; each command's work is a function of `repa.commands`.

Nothing heavy is imported before a command runs, so that `repa --help` answers at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence  # noqa: TC003 - typer resolves annotations of this module
from pathlib import Path
from typing import Annotated

import typer

from . import __version__
from .commands.cache_app import cache_app
from .commands.demo import DEFAULT_STEPS, IMAGES
from .commands.live import LiveFlags
from .commands.preprocess_app import plan_words, preprocess_words
from .data.errors import RepaError

_SUMMARY = "Encode an image set once, then train every representation-alignment method from the cache."

app = typer.Typer(
    help=_SUMMARY,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(cache_app, name="cache")

LiveData = Annotated[
    str | None,
    typer.Option(help="Live teachers: the images of the cache.", show_default="images, or demo"),
]
LiveEncoder = Annotated[
    list[str] | None,
    typer.Option(help="Live teacher; may repeat. Default: the method's, or the cache's."),
]
LiveWeights = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME=FILE", help="Live teachers: file of an encoder's weights; may repeat."),
]
LiveRandom = Annotated[
    bool, typer.Option("--random-weights", help="Live teachers: draw weights, to try things out.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would be done, and stop.")]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; a user's mistake is a message on standard error and exit status 1.

    Args:
        arguments: the words after ``repa``; those of the process by default.
    """
    # torch's idle threads otherwise spin: on a CPU, one other busy process then slows a step fivefold
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        app(args=None if arguments is None else list(arguments), prog_name="repa")
    except RepaError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        # whoever read our output (head, less) has gone: end quietly, as other tools do
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def run_command(arguments: Sequence[str]) -> None:
    """Run one command within another: returns when it is done, raises what it raises.

    Args:
        arguments: the words after ``repa``.

    Raises:
        RepaError: of the command.
    """
    app(args=list(arguments), prog_name="repa", standalone_mode=False)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"repa {__version__}")
        raise typer.Exit


@app.callback(help=_SUMMARY)
def _root(
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None: ...


def _live_flags(
    data: str | None, encoder: list[str] | None, weights: list[str] | None, random_weights: bool
) -> LiveFlags:
    return LiveFlags(
        data=data,
        encoders=tuple(encoder or ()),
        weights=tuple(weights or ()),
        random_weights=random_weights,
    )


app.command("preprocess")(preprocess_words)
app.command("plan")(plan_words)


@app.command("train")
def _train(
    method: Annotated[
        str | None, typer.Option(help="'repa', 'haste', or 'none' for plain SiT.", show_default="repa")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Backbone.", show_default="SiT-B/2")] = None,
    cache: Annotated[
        str | None,
        typer.Option(
            metavar="CACHE",
            help="Folder of the cache, or tars of an export; default: the only one under caches/.",
        ),
    ] = None,
    run: Annotated[
        Path | None, typer.Option(help="Folder of the run.", show_default="runs/<method>-<model>")
    ] = None,
    max_steps: Annotated[int | None, typer.Option(help="Optimiser steps.", show_default="400000")] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Images of a step, over all devices.", show_default="256")
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate.", show_default="1e-4")] = None,
    seed: Annotated[
        int | None, typer.Option(help="Of initialisation, order and draws.", show_default="0")
    ] = None,
    targets: Annotated[
        str | None,
        typer.Option(
            help="'cache', or 'online': call the teachers in every step, the reference.", show_default="cache"
        ),
    ] = None,
    data: LiveData = None,
    encoder: LiveEncoder = None,
    weights: LiveWeights = None,
    random_weights: LiveRandom = False,
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Any other setting of config.yaml; may repeat."),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML file of settings, as config.yaml of another run.")
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """Train from a cache. The same command again resumes."""
    from .commands.train import train

    train(
        method=method,
        model=model,
        cache=cache,
        run=run,
        max_steps=max_steps,
        batch_size=batch_size,
        lr=lr,
        seed=seed,
        targets=targets,
        live=_live_flags(data, encoder, weights, random_weights),
        assignments=assignments or (),
        config=config,
        dry_run=dry_run,
    )


@app.command("parity")
def _parity(
    method: Annotated[str | None, typer.Option(help="As of `repa train`.", show_default="repa")] = None,
    model: Annotated[str | None, typer.Option(help="Backbone.", show_default="SiT-B/2")] = None,
    cache: Annotated[
        Path | None, typer.Option(help="Folder of the cache; default: the only one under caches/.")
    ] = None,
    batches: Annotated[int, typer.Option(help="Batches to compare.")] = 4,
    batch_size: Annotated[int, typer.Option(help="Images of a batch.")] = 16,
    seed: Annotated[
        int | None, typer.Option(help="Of initialisation, order and draws.", show_default="0")
    ] = None,
    data: LiveData = None,
    encoder: LiveEncoder = None,
    weights: LiveWeights = None,
    random_weights: LiveRandom = False,
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Any other setting of `repa train`; may repeat."),
    ] = None,
) -> None:
    """The losses from the cache beside those with the teacher called live: what storing costs."""
    from .commands.parity import parity

    parity(
        method=method,
        model=model,
        cache=cache,
        batches=batches,
        batch_size=batch_size,
        seed=seed,
        live=_live_flags(data, encoder, weights, random_weights),
        assignments=assignments or (),
    )


@app.command("sample")
def _sample(
    run: Annotated[Path | None, typer.Option(help="Folder of a run: its newest checkpoint.")] = None,
    ckpt: Annotated[
        Path | None, typer.Option(help="Instead: a checkpoint of a run, or a published one of SiT or REPA.")
    ] = None,
    num: Annotated[int, typer.Option(help="Number of images.")] = 16,
    out: Annotated[
        Path | None, typer.Option(help="Folder to write to.", show_default="samples/final of the run")
    ] = None,
    npz: Annotated[
        bool, typer.Option("--npz", help="One uint8 array file, as the ADM evaluation suite reads it.")
    ] = False,
    solver: Annotated[str, typer.Option(help="euler, heun or sde.")] = "euler",
    steps: Annotated[int, typer.Option(help="Steps of the solver.")] = 50,
    guidance: Annotated[float, typer.Option(help="Scale of classifier-free guidance; 1: none.")] = 1.0,
    interval: Annotated[
        tuple[float, float], typer.Option(metavar="LOW HIGH", help="Times between which guidance acts.")
    ] = (0.0, 1.0),
    label: Annotated[
        list[int] | None, typer.Option(help="Class to sample; may repeat. Default: all, equally often.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the noise.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Images of a forward pass; does not change them.")] = 32,
    weights: Annotated[str, typer.Option(help="ema or model.")] = "ema",
    vae: Annotated[
        str | None, typer.Option(help="AutoencoderKL; default the one the latents came from.")
    ] = None,
) -> None:
    """Sample images from a run or from a published checkpoint."""
    from .commands.sample import sample

    sample(
        run=run,
        checkpoint=ckpt,
        num=num,
        out=out,
        npz=npz,
        solver=solver,
        steps=steps,
        guidance=guidance,
        interval=interval,
        labels=label or (),
        seed=seed,
        batch_size=batch_size,
        weights=weights,
        vae=vae,
    )


@app.command("demo")
def _demo(
    out: Annotated[Path, typer.Option(help="Folder of its cache, runs and report.")] = Path("demo-out"),
    steps: Annotated[int, typer.Option(help="Training steps of each method.")] = DEFAULT_STEPS,
    images: Annotated[int, typer.Option(help="Images to encode; 256 of them are held out.")] = IMAGES,
) -> None:
    """The main job on what the package carries: no download, no GPU, at most 8 minutes on 2 cores."""
    from .commands.demo import demo

    demo(run_command, out=out, steps=steps, images=images)


@app.command("bench")
def _bench(
    parts: Annotated[
        list[str] | None, typer.Argument(metavar="[loader|preprocess|train]...", help="Parts; default all.")
    ] = None,
    model: Annotated[str, typer.Option(help="Backbone of the training step.")] = "SiT-T/1",
    encoder: Annotated[
        str, typer.Option(help="Teacher, with random weights: its speed is the same.")
    ] = "demo",
    resolution: Annotated[int, typer.Option(help="Side of the images in pixels.")] = 64,
    batch_size: Annotated[int, typer.Option(help="Images of a training step and of a forward pass.")] = 32,
    images: Annotated[int, typer.Option(help="Images that preprocess encodes in a round.")] = 256,
    rows: Annotated[int, typer.Option(help="Rows of the cache that the loader reads.")] = 2048,
    steps: Annotated[int, typer.Option(help="Training steps of a round.")] = 10,
    rounds: Annotated[int, typer.Option(help="Rounds; figures are medians over them.")] = 5,
    folder: Annotated[
        Path | None, typer.Option(help="Where the temporary caches go: the disk to measure.")
    ] = None,
) -> None:
    """Loader, preprocess and training step against their limits, side by side in one run."""
    from .commands.bench import BenchSettings, bench

    settings = BenchSettings(
        model=model,
        encoder=encoder,
        resolution=resolution,
        batch_size=batch_size,
        images=images,
        rows=rows,
        steps=steps,
        rounds=rounds,
    )
    bench(parts or (), settings, folder=folder)
