"""`repa preprocess` makes a cache of images."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, fields
from pathlib import Path  # noqa: TC003 - typer resolves annotations of flags
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from ..data.errors import RepaError
from ..pipeline.images.base import AUTO_LABELS
from ..pipeline.images.names import DEFAULT_DATA, DEFAULT_RESOLUTION, DEMO_DATA, DEMO_RESOLUTION, cache_for
from .shared.attention import attention_blocks
from .shared.encoders import DEFAULT_ENCODER, parse_weights
from .shared.flags import square_side
from .shared.ray_pool import ray_pool

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from ..pipeline.config import PreprocessConfig

NO_ENCODER = "none"


@dataclass(frozen=True, kw_only=True)
class EncodingFlags:
    """What is to be encoded and how. `repa preprocess` and `repa plan` share these flags.

    Their names are those of `PreprocessConfig`, which says more of each.
    """

    data: Annotated[
        str,
        typer.Option(
            help="Folder of images, a sub-folder per class or a dataset.json; ZIP file; tars "
            "'train-{0000..0146}.tar', here or in a bucket, s3://… or gs://…; 'hf:NAME[:SPLIT]'; 'demo': the "
            "drawn images; 'my_module:MySource?PLACE'."
        ),
    ] = DEFAULT_DATA
    cache: Annotated[
        str | None,
        typer.Option(
            metavar="<path>",
            help="Folder of the cache, or its address in a bucket, s3://… or gs://…; default "
            "caches/<images>-<resolution>.",
        ),
    ] = None
    encoders: Annotated[
        list[str] | None,
        typer.Option(
            "--encoder",
            help="Teacher; may repeat. 'timm:NAME': any ViT of timm; 'my_module:MyTeacher'; a file of "
            "repa distill; 'none': latents only. Default dinov2-b, of the demo 'demo'.",
        ),
    ] = None
    vae: Annotated[
        str | None,
        typer.Option(help="AutoencoderKL: hub name or folder. Default stabilityai/sd-vae-ft-mse."),
    ] = None
    resolution: Annotated[
        int | None,
        typer.Option(
            parser=square_side,
            metavar="<int>",
            help="Side of the crop in pixels; 256, of the demo 64, of imported latents theirs.",
        ),
    ] = None
    views: Annotated[
        str | None,
        typer.Option(
            help="Views of each image: original, or flip: also mirrored, and training tosses a coin.",
            show_default="as the cache has them, else original",
        ),
    ] = None
    limit: Annotated[int | None, typer.Option(help="Take so many images, evenly spaced over the set.")] = None
    batch_size: Annotated[int | None, typer.Option(help="Images of a forward pass.")] = None
    devices: Annotated[int, typer.Option(help="Processes: one a GPU, or sharing the CPU's cores.")] = 1
    weights: Annotated[
        list[str] | None, typer.Option(metavar="NAME=FILE", help="Weights of a teacher; may repeat.")
    ] = None
    random_weights: Annotated[
        bool, typer.Option("--random-weights", help="Draw weights, to try things out.")
    ] = False
    feature_dtype: Annotated[str, typer.Option(help="float16, float32 or int8, of the stored features.")] = (
        "float16"
    )
    attention: Annotated[
        str | None,
        typer.Option(
            help="Store queries and keys too: 'haste', 'haste:SiT-XL', or blocks as 8,10,12 or 9-12."
        ),
    ] = None
    attention_rank: Annotated[
        int | None,
        typer.Option(help="Cut them to so many components a head, as int8, in one basis for all images."),
    ] = None
    attention_kl: Annotated[
        float | None,
        typer.Option(
            help="Store them as factors of each image's attention, as small as the mean KL of every head "
            "stays within so many nats."
        ),
    ] = None
    attention_bytes: Annotated[
        int | None,
        typer.Option(help="Store them as such factors, of at most so many bytes an image, view and encoder."),
    ] = None
    compress: Annotated[
        str | None,
        typer.Option(
            help="zstd, blosc or pcodec, losslessly. Off: floats shrink by a tenth to a fifth, and "
            "compressed rows cannot be read directly."
        ),
    ] = None
    compute_dtype: Annotated[
        str, typer.Option(help="float32, tf32 (of a GPU), bfloat16 or float16, of the models.")
    ] = "float32"
    apply_exif: Annotated[bool, typer.Option("--exif", help="Turn images by their EXIF orientation.")] = False
    class_names: Annotated[
        Path | None, typer.Option(help="Of numbered classes: file with the name of one in each line.")
    ] = None
    labels: Annotated[
        str,
        typer.Option(
            help="Where labels come from: 'folders', 'dataset.json', 'none': all images are one class. "
            "Default: what there is."
        ),
    ] = AUTO_LABELS
    workers: Annotated[int | None, typer.Option(help="Decoding processes for each device.")] = None
    shard_rows: Annotated[int | None, typer.Option(help="Images of a shard; default 1024.")] = None
    captions: Annotated[
        str | None,
        typer.Option(
            help="Captions of the images: file of COCO, captions_train2014.json; table .jsonl, .csv or .tsv "
            "of file names and captions; tars or 'hf:…', where they are by default.",
            show_default="those of the cache, else those in tars or hf:…",
        ),
    ] = None
    text_encoders: Annotated[
        list[str] | None,
        typer.Option(
            "--text-encoder",
            help="Encoder of the captions, as clip-l-text, t5-xxl-text, sd3-context; may repeat.",
        ),
    ] = None
    caption_column: Annotated[
        str | None, typer.Option(help="Column or field of the captions.", show_default="caption, text, …")
    ] = None
    captions_per_image: Annotated[
        int | None, typer.Option(help="Keep the first so many captions of an image.", show_default="all")
    ] = None


@dataclass(frozen=True, kw_only=True)
class PreprocessFlags(EncodingFlags):
    """The flags of `repa preprocess`."""

    shards: Annotated[
        str | None,
        typer.Option(
            help="Do these shards only: 'auto', the share of this task of a SLURM job array; or a range, "
            "0:100, the end not included.",
            show_default="all",
        ),
    ] = None
    launcher: Annotated[
        str | None,
        typer.Option(
            help="'ray': workers of a Ray cluster do the shards. Others start the command themselves.",
            show_default="torchrun or SLURM, if they did",
        ),
    ] = None
    pool: Annotated[
        str | None,
        typer.Option(
            metavar="N|N:M",
            help="Ray: workers, at least and at most.",
            show_default="1 to what the cluster gives",
        ),
    ] = None
    worker_gpus: Annotated[
        float | None, typer.Option(help="Ray: GPUs of a worker.", show_default="1 if the cluster has any")
    ] = None
    worker_cpus: Annotated[
        int | None, typer.Option(help="Ray: CPUs of a worker.", show_default="its GPU's share, or 1")
    ] = None
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be done, and stop.")] = False


def preprocess(flags: PreprocessFlags, *, console: Console | None = None) -> None:
    """Encode images by the autoencoder and by teachers, and write what is not in the cache yet.

    Running the same command again resumes; another encoder adds to the cache and rewrites nothing.

    Args:
        flags: of the command.
        console: where to print; standard output by default.

    Raises:
        RepaError: a mistake the user can mend, in one line.

    Ctrl-C and SIGTERM end the process with status 130, once what is saved has been printed.
    """
    try:
        from .shared.terminal import PlainConsole

        console = console or PlainConsole()
        config = make_config(flags)
        pool = ray_pool(flags.launcher, flags.pool, flags.worker_gpus, flags.worker_cpus, flags.devices)
        from ..pipeline.run import StoppedError, run
    except KeyboardInterrupt:
        _leave("interrupted: nothing had begun")
    try:
        run(config, console, dry_run=flags.dry_run, pool=pool)
    except StoppedError as stop:
        _leave(str(stop))
    except KeyboardInterrupt:
        _leave("interrupted: nothing has been written by this run; the same command begins again")


def make_config(flags: EncodingFlags) -> PreprocessConfig:
    """Make the configuration that flags ask for.

    Most are taken as they are, those below are made out, and defaults are filled in.

    Raises:
        RepaError: a flag that is none of its choices.
    """
    from ..data.format.columns import COMPRESSORS, ROUNDED_DTYPES
    from ..data.format.manifest import COMPUTE_DTYPES, VIEWS
    from ..data.storage.bucket import cache_path
    from ..pipeline.config import PreprocessConfig
    from ..pipeline.encoders.registry import file_of, find_teacher
    from ..pipeline.plan import imported_resolution

    demo = flags.data == DEMO_DATA
    default = DEMO_RESOLUTION if demo else DEFAULT_RESOLUTION
    given = None if flags.cache is None else cache_path(flags.cache)
    side = flags.resolution
    if side is None:
        side = imported_resolution(given) or default
    _check_choice("--feature-dtype", flags.feature_dtype, ROUNDED_DTYPES)
    _check_choice("--compute-dtype", flags.compute_dtype, COMPUTE_DTYPES)
    if flags.compress is not None:
        _check_choice("--compress", flags.compress, COMPRESSORS)
    if flags.views is not None:
        _check_choice("--views", flags.views, tuple(VIEWS))
    cache = given or cache_for(flags.data, side)
    asked = _encoders(flags.encoders or (), demo)
    if flags.text_encoders and not flags.encoders:
        from ..pipeline.captions.plan import unfinished_encoders

        # a cache that has its images gets captions, and no teacher that nobody named
        unfinished = unfinished_encoders(cache)
        asked = asked if unfinished is None else unfinished
    found = {each: find_teacher(each, may_import=True).name for each in asked}
    names = tuple(found[each] for each in asked)
    settings: dict[str, Any] = {each.name: getattr(flags, each.name) for each in fields(EncodingFlags)}
    settings["cache"] = cache
    settings["encoders"] = names
    settings["text_encoders"] = tuple(flags.text_encoders or ())
    settings["resolution"] = side
    settings["views"] = None if flags.views is None else VIEWS[flags.views]
    weights = parse_weights(flags.weights or ())
    files = {own: file for each, own in found.items() if (file := file_of(each)) is not None}
    settings["weights"] = files | {found.get(each, each): file for each, file in weights.items()}
    settings["outside"] = {own: each for each, own in found.items() if ":" in each}
    settings["attention"] = {} if flags.attention is None else attention_blocks(flags.attention, names)
    if isinstance(flags, PreprocessFlags):
        settings["shards"] = flags.shards
    return PreprocessConfig(**settings)


def _encoders(names: Sequence[str], demo: bool) -> tuple[str, ...]:
    if not names:
        return (DEMO_DATA,) if demo else (DEFAULT_ENCODER,)
    if NO_ENCODER in names:
        if len(names) > 1:
            raise RepaError(
                f"--encoder {NO_ENCODER} writes latents only",
                "give it alone, or leave it out",
                field="--encoder",
            )
        return ()
    return tuple(names)


def _check_choice(flag: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise RepaError(f"{flag} {value!r} is unknown", f"the choices are {', '.join(choices)}", field=flag)


def _leave(message: str) -> NoReturn:
    """End the process at once with status 130, as lanes that still compute would hold it up for a batch."""
    print(message, file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(130)
