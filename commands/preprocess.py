"""`repa preprocess`: images in, a cache out."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from ..data.columns import COMPRESSORS, STORED_DTYPES
from ..data.errors import RepaError
from ..data.places import DEFAULT_DATA, DEFAULT_RESOLUTION, DEMO_DATA, DEMO_RESOLUTION, cache_for
from .attention import attention_blocks

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from ..pipeline.config import PreprocessConfig

DEFAULT_ENCODER = "dinov2-b"
NO_ENCODER = "none"
COMPUTE_DTYPES = ("float32", "bfloat16", "float16")


def preprocess(
    *,
    data: str = DEFAULT_DATA,
    cache: Path | None = None,
    encoders: Sequence[str] = (),
    vae: str | None = None,
    resolution: int | None = None,
    limit: int | None = None,
    batch_size: int | None = None,
    devices: int = 1,
    weights: Sequence[str] = (),
    random_weights: bool = False,
    feature_dtype: str = "float16",
    attention: str | None = None,
    attention_rank: int | None = None,
    attention_kl: float | None = None,
    compress: str | None = None,
    compute_dtype: str = "float32",
    exif: bool = False,
    class_names: Path | None = None,
    workers: int | None = None,
    shard_rows: int | None = None,
    dry_run: bool = False,
    console: Console | None = None,
) -> None:
    """Encode images by the autoencoder and by teachers, and write what is not in the cache yet.

    Running the same command again resumes; another ``encoders`` adds to the cache and rewrites nothing.

    Args:
        data: image folder; WebDataset tars, as ``shards/train-{0000..0146}.tar``; a Hugging Face data set,
            ``hf:NAME[:SPLIT]`` or ``hf:FOLDER`` of `save_to_disk`; ``demo`` names the drawn images.
        cache: the cache; by default ``caches/<name of the folder>-<resolution>``, the demo's ``caches/demo``.
        encoders: names of teachers, or ``none`` alone for latents only; by default ``dinov2-b``, of the demo
            ``demo``.
        vae: hub name or folder of an ``AutoencoderKL``, or ``demo``; by default the one the cache was made
            with, else ``stabilityai/sd-vae-ft-mse``, of the demo ``demo``.
        resolution: side in pixels of the crop; 256, of the demo 64.
        limit: take so many images, evenly spaced; of the demo: draw so many.
        batch_size: images of a forward pass. It is part of the cache, for features of another batch size may
            differ in the last bits. By default as the cache has it, else by resolution and device.
        devices: processes: one a GPU, or sharing the cores. Started by torchrun or SLURM, leave it 1.
        weights: ``NAME=FILE`` of an encoder's weights, safetensors or a tensors-only .pth.
        random_weights: draw weights, for trying things out.
        feature_dtype: ``float16``, ``float32`` or ``int8``, as the teachers' columns are stored; of int8 it
            is measured what that changes, see `TokenErrors`.
        attention: store queries and keys of each teacher's blocks too: see `attention_blocks`.
        attention_rank: cut them to so many components a head, as int8.
        attention_kl: cut them, as int8, to the smallest rank of 8, 16, 24, … whose mean divergence from the
            teacher's attention is at most so many nats in every block and head, on held-out images.
        compress: ``zstd``, ``blosc`` or ``pcodec`` for the teachers' columns, losslessly. By default they are
            not compressed: floats shrink by a tenth to a fifth, and compressed rows cannot be read directly.
        compute_dtype: ``float32``, ``bfloat16`` or ``float16``, of the forward passes.
        exif: turn images by their EXIF orientation.
        class_names: file with the name of a class in each line, for tars, whose classes are numbers.
        workers: processes a device that decode images; by default by the number of cores, 0 on a CPU.
        shard_rows: images of a shard; as the cache has it, else 1,024.
        dry_run: only print what would be done.
        console: where to print; standard output by default.

    Raises:
        RepaError: a mistake the user can mend, in one line.

    Ctrl-C and SIGTERM end the process with status 130, once what is saved has been printed.
    """
    try:
        from rich.console import Console

        console = console or Console()
        config = make_config(
            data=data,
            cache=cache,
            encoders=encoders,
            vae=vae,
            resolution=resolution,
            limit=limit,
            batch_size=batch_size,
            devices=devices,
            weights=weights,
            random_weights=random_weights,
            feature_dtype=feature_dtype,
            attention=attention,
            attention_rank=attention_rank,
            attention_kl=attention_kl,
            compress=compress,
            compute_dtype=compute_dtype,
            exif=exif,
            class_names=class_names,
            workers=workers,
            shard_rows=shard_rows,
        )
        from ..pipeline.run import StoppedError, run
    except KeyboardInterrupt:
        _leave("interrupted: nothing had begun")
    try:
        run(config, console, dry_run=dry_run)
    except StoppedError as stop:
        _leave(str(stop))
    except KeyboardInterrupt:
        _leave("interrupted: nothing has been written by this run; the same command begins again")


def make_config(
    *,
    data: str = DEFAULT_DATA,
    cache: Path | None = None,
    encoders: Sequence[str] = (),
    vae: str | None = None,
    resolution: int | None = None,
    limit: int | None = None,
    batch_size: int | None = None,
    devices: int = 1,
    weights: Sequence[str] = (),
    random_weights: bool = False,
    feature_dtype: str = "float16",
    attention: str | None = None,
    attention_rank: int | None = None,
    attention_kl: float | None = None,
    compress: str | None = None,
    compute_dtype: str = "float32",
    exif: bool = False,
    class_names: Path | None = None,
    workers: int | None = None,
    shard_rows: int | None = None,
) -> PreprocessConfig:
    """The command that flags ask for, defaults filled in; see `preprocess` for what they mean.

    Raises:
        RepaError: a flag that is none of its choices.
    """
    from ..pipeline.config import PreprocessConfig

    demo = data == DEMO_DATA
    default = DEMO_RESOLUTION if demo else DEFAULT_RESOLUTION
    side = default if resolution is None else resolution
    _check_choice("--feature-dtype", feature_dtype, STORED_DTYPES)
    _check_choice("--compute-dtype", compute_dtype, COMPUTE_DTYPES)
    if compress is not None:
        _check_choice("--compress", compress, COMPRESSORS)
    names = _encoders(encoders, demo)
    return PreprocessConfig(
        data=data,
        cache=cache or cache_for(data, side),
        encoders=names,
        vae=vae,
        resolution=side,
        limit=limit,
        batch_size=batch_size,
        devices=devices,
        feature_dtype=feature_dtype,
        attention=attention_blocks(attention, names) if attention is not None else {},
        attention_rank=attention_rank,
        attention_kl=attention_kl,
        compress=compress,
        compute_dtype=compute_dtype,
        weights=parse_weights(weights),
        random_weights=random_weights,
        apply_exif=exif,
        class_names=class_names,
        shard_rows=shard_rows,
        workers=workers,
    )


def _encoders(names: Sequence[str], demo: bool) -> tuple[str, ...]:
    if not names:
        return (DEMO_DATA,) if demo else (DEFAULT_ENCODER,)
    if NO_ENCODER in names:
        if len(names) > 1:
            raise RepaError(f"--encoder {NO_ENCODER} writes latents only; give it alone, or leave it out")
        return ()
    return tuple(names)


def parse_weights(pairs: Sequence[str]) -> dict[str, Path]:
    """Encoder → file of its weights, of texts ``NAME=FILE``.

    Raises:
        RepaError: not of that form, or a name twice.
    """
    weights: dict[str, Path] = {}
    for pair in pairs:
        name, sign, file = pair.partition("=")
        if not (name and sign and file):
            raise RepaError(
                f"--weights {pair!r} is not NAME=FILE; write for example "
                f"--weights {DEFAULT_ENCODER}=dinov2_vitb14_pretrain.pth"
            )
        if name in weights:
            raise RepaError(f"--weights names {name} twice; give one file for each encoder")
        weights[name] = Path(file)
    return weights


def _check_choice(flag: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise RepaError(f"{flag} {value!r} is unknown; the choices are {', '.join(choices)}")


def _leave(message: str) -> NoReturn:
    """End the process at once, status 130: lanes that still compute would hold it up for a batch."""
    print(message, file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(130)
