"""Live teachers for the commands that use them: which images, which teachers, which blocks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.errors import RepaError
from ..data.places import DEFAULT_DATA, DEMO_DATA

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ..data.schema import Manifest
    from ..pipeline.live import LiveTeachers
    from ..trainer.config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class LiveFlags:
    """What a command line says of live teachers; what it leaves out is found out.

    Attributes:
        data: the images of the cache, a folder or ``demo``.
        encoders: names of teachers.
        weights: ``NAME=FILE`` of an encoder's weights.
        random_weights: draw weights, for trying things out.
    """

    data: str | None = None
    encoders: tuple[str, ...] = ()
    weights: tuple[str, ...] = ()
    random_weights: bool = False

    @property
    def given(self) -> tuple[str, ...]:
        """Those flags that were given."""
        values = {
            "--data": self.data,
            "--encoder": self.encoders,
            "--weights": self.weights,
            "--random-weights": self.random_weights,
        }
        return tuple(flag for flag, value in values.items() if value)


NO_FLAGS = LiveFlags()


def live_teachers(
    config: TrainConfig,
    flags: LiveFlags,
    *,
    before: Mapping[str, Any] | None = None,
    exact: bool = False,
) -> LiveTeachers:
    """The teachers of an online run, their weights not loaded yet.

    Args:
        config: of the run.
        flags: of the command line.
        before: `LiveTargets.record` of the run when it was begun; stands in for flags that are not given.
        exact: the bits of a float32 cache on a GPU too.

    Raises:
        RepaError: unknown images or teachers, several to choose from, or a block that no teacher has.
        CacheError: no cache, or the images are not the cache's.
    """
    from ..data.remote import cache_path
    from ..data.store import open_manifest
    from ..data.tars import names_tars
    from ..pipeline.live import LiveTeachers
    from ..trainer.checks import attention_blocks
    from .preprocess import parse_weights

    if names_tars(config.cache):
        raise RepaError(
            f"live teachers cannot be called beside tars, as {config.cache}; make a cache of them with "
            "`repa cache import`"
        )
    before = before or {}
    cache = cache_path(config.cache)
    manifest = open_manifest(cache)
    recorded = {name: Path(path) for name, path in before.get("weights", {}).items()}
    data = flags.data or before.get("data")
    encoders = flags.encoders or tuple(before.get("encoders", ()))
    return LiveTeachers(
        cache,
        data=data or (DEMO_DATA if manifest.source_kind == DEMO_DATA else DEFAULT_DATA),
        encoders=encoders or _encoders(config, manifest),
        blocks=attention_blocks(config),
        weights={**recorded, **parse_weights(flags.weights)},
        random_weights=flags.random_weights or bool(before.get("random_weights", False)),
        exact=exact,
    )


def _encoders(config: TrainConfig, manifest: Manifest) -> Sequence[str]:
    """The method's teachers, else the cache's only one, else what `repa preprocess` would take."""
    asked: tuple[str, ...] = getattr(config.method, "encoders", ())
    if asked:
        return tuple(dict.fromkeys(asked))
    from ..data.columns import split_column
    from ..trainer.online import is_target
    from .preprocess import DEFAULT_ENCODER

    present = tuple(dict.fromkeys(split_column(name)[0] for name in manifest.columns if is_target(name)))
    if len(present) > 1:
        raise RepaError(
            f"cache {config.cache} has {len(present)} teachers ({', '.join(present)}); "
            "choose those to call live with --encoder"
        )
    return present or ((DEMO_DATA,) if manifest.source_kind == DEMO_DATA else (DEFAULT_ENCODER,))
