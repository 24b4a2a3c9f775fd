"""The command line of `repa`, where each command is a function of `repa.commands` with a dataclass of flags.

Nothing heavy is imported before a command runs, so that `repa --help` answers at once.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Sequence  # noqa: TC003 - typer resolves annotations of this module
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from . import __version__
from .commands.analyze.flags import AnalyzeFlags
from .commands.analyze.run import analyze
from .commands.bank.app import bank_app
from .commands.bench.flags import BenchFlags
from .commands.cache.app import cache_app
from .commands.compare import CompareFlags, compare
from .commands.demo.run import DEFAULT_STEPS, IMAGES, METHODS, demo
from .commands.demo.text import DEFAULT_STEPS as DEFAULT_TEXT_STEPS
from .commands.demo.text import METHODS as TEXT_METHODS
from .commands.demo.text import demo_of_text
from .commands.distill.flags import DistillFlags
from .commands.distill.run import distill
from .commands.evaluate.command import evaluate
from .commands.evaluate.flags import EvaluateFlags
from .commands.parity.flags import ParityFlags
from .commands.parity.run import parity
from .commands.plan import PlanFlags, plan
from .commands.preprocess import PreprocessFlags, preprocess
from .commands.recipes import RecipesFlags, recipes
from .commands.sample import SampleFlags, sample
from .commands.shared.flags import takes_flags
from .commands.softrepa.app import softrepa_app
from .commands.train import TrainFlags, train
from .data.edge import printable
from .data.errors import RepaError
from .data.machine import allow_open_files
from .data.storage.files import remedy_of

# of files, processes and memory, wherever one more is asked for
_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN)
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
app.add_typer(bank_app, name="bank")
app.add_typer(softrepa_app, name="softrepa")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line. A user's mistake is a message on standard error and exit status 1.

    Args:
        arguments: the words after ``repa``; those of the process by default.
    """
    # torch's idle threads otherwise spin: on a CPU, one other busy process then slows a step fivefold
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    allow_open_files()
    _prepare_streams()
    try:
        try:
            app(args=None if arguments is None else list(arguments), prog_name="repa")
        except SystemExit:
            # what was printed is handed to the operating system, while its refusal can still be said
            sys.stdout.flush()
            raise
    except RepaError as error:
        _fail(*error.lines)
    except KeyboardInterrupt:
        _fail("interrupted", status=130, prefix="")
    except BrokenPipeError:
        _end_quietly()
    except OSError as error:
        if error.filename is not None:
            # of a path that no command expects to fail like this: a name too long, a folder taken away
            _fail(f"cannot use {error.filename}: {error.strerror}")
        if _is_output_error(error):
            _fail(f"cannot write the output: {error.strerror}")
        if error.errno in _EXHAUSTED:
            _fail(f"the system has no more to give: {error.strerror}; {remedy_of(error)}")
        raise
    except MemoryError:
        _fail("the memory is used up; give a smaller --batch-size, fewer --workers or fewer --limit images")


def _prepare_streams() -> None:
    """Have streams that can always be printed to, whatever the terminal and its letters."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed before we began, as by >&-
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115 - as long as we last
        stream = getattr(sys, name)
        # what a terminal of few letters cannot show is escaped; a test's stream has no encoding to set
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _fail(*lines: str, status: int = 1, prefix: str = "error: ") -> NoReturn:
    """End with a line on standard error, or a few, in which text of others does nothing but appear."""
    with suppress(OSError, ValueError):
        print(prefix + "\n".join(printable(line) for line in lines), file=sys.stderr)
        sys.stderr.flush()
    _drop_output()
    sys.exit(status)


def _end_quietly() -> NoReturn:
    """End as other tools do when whoever read our output, head or less, has gone."""
    _drop_output()
    sys.exit(1)


def _drop_output() -> None:
    """Keep Python from trying again at its end what could not be written."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _is_output_error(error: OSError) -> bool:
    """Return whether an error that names no file is one of standard output, as on a full disk."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def run_command(arguments: Sequence[str]) -> None:
    """Run one command within another. It returns when it is done and raises what it raises.

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


@app.command("preprocess")
@takes_flags(PreprocessFlags)
def _preprocess(flags: PreprocessFlags) -> None:
    """Encode images by the autoencoder and by teachers into a cache. The same command again resumes."""
    preprocess(flags)


@app.command("plan")
@takes_flags(PlanFlags)
def _plan(flags: PlanFlags) -> None:
    """Measure what a cache will take and give.

    Said are bytes, hours, MB/s needed and there, and when it has paid for itself.

    Encodes a few batches in memory and writes a scratch file beside the cache, which it removes.
    """
    plan(flags)


@app.command("train")
@takes_flags(TrainFlags)
def _train(flags: TrainFlags) -> None:
    """Train from a cache. The same command again resumes."""
    train(flags)


@app.command("recipes")
@takes_flags(RecipesFlags)
def _recipes(flags: RecipesFlags) -> None:
    """List published settings for `repa train --recipe`, or show one with the commands to run."""
    recipes(flags)


@app.command("parity")
@takes_flags(ParityFlags)
def _parity(flags: ParityFlags) -> None:
    """Compare the losses from the cache with those of a live teacher.

    The difference is what storing costs.
    """
    parity(flags)


@app.command("sample")
@takes_flags(SampleFlags)
def _sample(flags: SampleFlags) -> None:
    """Sample images from a run or from a published checkpoint."""
    sample(flags)


@app.command("distill")
@takes_flags(DistillFlags)
def _distill(flags: DistillFlags) -> None:
    """Make a faster copy of a teacher from its cached tokens, with most hidden channels linear and merged.

    It is another teacher than the one it copies, and its file says how far away. The same command resumes.
    """
    distill(flags)


@app.command("compare")
@takes_flags(CompareFlags)
def _compare(flags: CompareFlags) -> None:
    """Write a page that compares runs.

    It has curves, samples, figures, costs and settings, in one HTML file that opens from a disk, without a
    server, a network or a script.
    """
    compare(flags)


@app.command("evaluate")
@takes_flags(EvaluateFlags)
def _evaluate(flags: EvaluateFlags) -> None:
    """Measure samples of a run, a checkpoint or a file against a reference. The same command resumes."""
    evaluate(flags)


@app.command("analyze")
@takes_flags(AnalyzeFlags)
def _analyze(flags: AnalyzeFlags) -> None:
    """Measure the teachers of a cache, or what the blocks of a run have learned of them."""
    analyze(flags)


@app.command("demo")
def _demo(
    out: Annotated[Path, typer.Option(help="Folder of its cache, runs and report.")] = Path("demo-out"),
    steps: Annotated[
        int | None,
        typer.Option(
            help="Training steps of each method.",
            show_default=f"{DEFAULT_STEPS}, of text {DEFAULT_TEXT_STEPS}",
        ),
    ] = None,
    images: Annotated[int, typer.Option(help="Images to encode; 256 of them are held out.")] = IMAGES,
    methods: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,NAME,…",
            help="Methods to train, all on the same images and noise.",
            show_default=f"{METHODS}, of text {TEXT_METHODS}",
        ),
    ] = None,
    text: Annotated[
        bool, typer.Option("--text", help="Train on captions, and sample prompts; needs the extra 'text'.")
    ] = False,
) -> None:
    """Do the main job on what the package carries.

    It needs no download and no GPU, and without --text it takes 5 to 9 minutes on 2 cores.
    """
    amounts = {"steps": steps, "methods": methods}
    given: dict[str, Any] = {name: value for name, value in amounts.items() if value is not None}
    if text:
        demo_of_text(run_command, out=out, images=images, **given)
    else:
        demo(run_command, out=out, images=images, **given)


@app.command("bench")
@takes_flags(BenchFlags)
def _bench(flags: BenchFlags) -> None:
    """Measure loader, stored attention, writer, preprocess and training step, side by side in one run.

    `fidelity` measures what every form of stored attention and tokens changes, and what encoding costs beside
    the teacher's forward pass.
    """
    from .commands.bench.run import bench

    bench(flags.parts or (), flags.settings(), folder=flags.folder)
