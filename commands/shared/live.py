"""Live teachers for the commands that use them, with their images and blocks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import typer

from ...data.errors import RepaError
from ...pipeline.images.names import DEFAULT_DATA, DEMO_DATA

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ...data.format.manifest import Manifest
    from ...pipeline.replay.live import LiveTeachers
    from ...trainer.config import TrainConfig

LiveData = Annotated[
    str | None,
    typer.Option(help="Live teachers: the images of the cache.", show_default="images, or demo"),
]
LiveEncoders = Annotated[
    list[str] | None,
    typer.Option("--encoder", help="Live teacher; may repeat. Default: the method's, or the cache's."),
]
LiveWeights = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME=FILE", help="Live teachers: file of an encoder's weights; may repeat."),
]
LiveRandom = Annotated[
    bool, typer.Option("--random-weights", help="Live teachers: draw weights, to try things out.")
]


class LiveFlags(Protocol):
    """What the flags of a command say of live teachers. What they leave out is found out."""

    @property
    def data(self) -> str | None:
        """The images of the cache, a folder or ``demo``."""

    @property
    def encoders(self) -> Sequence[str] | None:
        """Names of teachers."""

    @property
    def weights(self) -> Sequence[str] | None:
        """``NAME=FILE`` of an encoder's weights."""

    @property
    def random_weights(self) -> bool:
        """Draw weights, for trying things out."""


def flags_given(flags: LiveFlags) -> tuple[str, ...]:
    """Name those flags of live teachers that were given."""
    values = {
        "--data": flags.data,
        "--encoder": flags.encoders,
        "--weights": flags.weights,
        "--random-weights": flags.random_weights,
    }
    return tuple(flag for flag, value in values.items() if value)


def live_teachers(
    config: TrainConfig,
    flags: LiveFlags,
    *,
    before: Mapping[str, Any] | None = None,
    exact: bool = False,
) -> LiveTeachers:
    """Make the teachers of an online run, their weights not loaded yet.

    Args:
        config: of the run.
        flags: of the command line.
        before: `LiveTargets.record` of the run when it was begun; stands in for flags that are not given.
        exact: the bits of a float32 cache on a GPU too.

    Raises:
        RepaError: unknown images or teachers, several to choose from, or a block that no teacher has.
        CacheError: no cache, or the images are not the cache's.
    """
    from ...data.format.opening import open_manifest
    from ...data.storage.bucket import cache_path
    from ...data.tars.names import names_tars
    from ...pipeline.replay.live import LiveTeachers
    from ...trainer.run.checks import attention_blocks
    from .encoders import parse_weights

    if names_tars(config.cache):
        raise RepaError(
            f"live teachers cannot be called beside tars, as {config.cache}",
            "make a cache of them with `repa cache import`",
        )
    before = before or {}
    cache = cache_path(config.cache)
    manifest = open_manifest(cache)
    recorded = {name: Path(path) for name, path in before.get("weights", {}).items()}
    data = flags.data or before.get("data")
    encoders = tuple(flags.encoders or before.get("encoders", ()))
    return LiveTeachers(
        cache,
        data=data or (DEMO_DATA if manifest.source_kind == DEMO_DATA else DEFAULT_DATA),
        encoders=encoders or _encoders(config, manifest),
        blocks=attention_blocks(config),
        weights={**recorded, **parse_weights(flags.weights or ())},
        random_weights=flags.random_weights or bool(before.get("random_weights", False)),
        exact=exact,
        typed=flags_given(flags),
    )


def _encoders(config: TrainConfig, manifest: Manifest) -> Sequence[str]:
    """Choose the method's teachers, else the cache's only one, else what `repa preprocess` would take."""
    asked: tuple[str, ...] = getattr(config.method, "encoders", ())
    if asked:
        return tuple(dict.fromkeys(asked))
    from ...data.format.columns import split_column
    from ...trainer.input.online import is_target
    from .encoders import DEFAULT_ENCODER

    present = tuple(dict.fromkeys(split_column(name)[0] for name in manifest.columns if is_target(name)))
    if len(present) > 1:
        raise RepaError(
            f"cache {config.cache} has {len(present)} teachers ({', '.join(present)})",
            "choose those to call live with --encoder",
        )
    return present or ((DEMO_DATA,) if manifest.source_kind == DEMO_DATA else (DEFAULT_ENCODER,))
