"""The words of `repa preprocess`, and of `repa plan`, which takes the same flags and a few of its own."""

from __future__ import annotations

import inspect
from pathlib import Path  # noqa: TC003 - typer resolves annotations of this module
from typing import Annotated, Any

import typer


def preprocess_words(
    data: Annotated[
        str,
        typer.Option(
            help="Folder of images, a sub-folder per class; tars 'train-{0000..0146}.tar'; "
            "'hf:NAME[:SPLIT]'; 'demo': the drawn images."
        ),
    ] = "images",
    cache: Annotated[
        Path | None, typer.Option(help="Folder of the cache; default caches/<images>-<resolution>.")
    ] = None,
    encoder: Annotated[
        list[str] | None,
        typer.Option(help="Teacher; may repeat. 'none': latents only. Default dinov2-b, of the demo 'demo'."),
    ] = None,
    vae: Annotated[
        str | None,
        typer.Option(help="AutoencoderKL: hub name or folder. Default stabilityai/sd-vae-ft-mse."),
    ] = None,
    resolution: Annotated[
        int | None, typer.Option(help="Side of the crop in pixels; 256, of the demo 64.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Take so many images, evenly spaced over the set.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images of a forward pass.")] = None,
    devices: Annotated[int, typer.Option(help="Processes: one a GPU, or sharing the CPU's cores.")] = 1,
    weights: Annotated[
        list[str] | None, typer.Option(metavar="NAME=FILE", help="Weights of a teacher; may repeat.")
    ] = None,
    random_weights: Annotated[
        bool, typer.Option("--random-weights", help="Draw weights, to try things out.")
    ] = False,
    feature_dtype: Annotated[
        str, typer.Option(help="float16, float32 or int8, of the stored features.")
    ] = "float16",
    attention: Annotated[
        str | None,
        typer.Option(
            help="Store queries and keys too: 'haste', 'haste:SiT-XL', or blocks as 8,10,12 or 9-12."
        ),
    ] = None,
    attention_rank: Annotated[
        int | None, typer.Option(help="Cut them to so many components a head, as int8.")
    ] = None,
    attention_kl: Annotated[
        float | None,
        typer.Option(help="Cut them as far as the mean KL of every head stays within so many nats."),
    ] = None,
    compress: Annotated[
        str | None,
        typer.Option(
            help="zstd, blosc or pcodec, losslessly. Off: floats shrink by a tenth to a fifth, and "
            "compressed rows cannot be read directly."
        ),
    ] = None,
    compute_dtype: Annotated[
        str, typer.Option(help="float32, bfloat16 or float16, of the models.")
    ] = "float32",
    exif: Annotated[bool, typer.Option("--exif", help="Turn images by their EXIF orientation.")] = False,
    class_names: Annotated[
        Path | None, typer.Option(help="Of tars: file with the name of a class in each line.")
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Decoding processes for each device.")] = None,
    shard_rows: Annotated[int | None, typer.Option(help="Images of a shard; default 1024.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be done, and stop.")] = False,
) -> None:
    """Encode images by the autoencoder and by teachers into a cache. The same command again resumes."""
    from .preprocess import preprocess

    preprocess(
        data=data,
        cache=cache,
        encoders=encoder or (),
        vae=vae,
        resolution=resolution,
        limit=limit,
        batch_size=batch_size,
        devices=devices,
        weights=weights or (),
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
        dry_run=dry_run,
    )


def plan_words(
    *,
    model: Annotated[
        str | None, typer.Option(help="Backbone to train, as SiT-B/2: steps of it are measured.")
    ] = None,
    train_batch_size: Annotated[int, typer.Option(help="Images of a training step.")] = 32,
    images_per_second: Annotated[
        float | None, typer.Option(help="Of the training, if it is known: nothing is measured then.")
    ] = None,
    **flags: Any,
) -> None:
    """What a cache will take and give: bytes, hours, MB/s needed and there, and when it has paid for itself.

    Encodes a few batches in memory and writes a scratch file beside the cache, which it removes.
    """
    from .plan import plan
    from .preprocess import make_config

    flags["encoders"] = flags.pop("encoder") or ()
    flags["weights"] = flags["weights"] or ()
    plan(
        make_config(**flags),
        model=model,
        train_batch_size=train_batch_size,
        images_per_second=images_per_second,
    )


def _take_flags_of_preprocess() -> None:
    """typer reads a command's flags from its signature: those of `repa preprocess`, then the plan's own."""
    shared = dict(inspect.signature(preprocess_words, eval_str=True).parameters)
    del shared["dry_run"]
    own = dict(inspect.signature(plan_words, eval_str=True).parameters)
    del own["flags"]
    parameters = [
        each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in (*shared.values(), *own.values())
    ]
    words: Any = plan_words
    words.__signature__ = inspect.Signature(parameters)
    words.__annotations__ = {each.name: each.annotation for each in parameters}


_take_flags_of_preprocess()
