"""Whether the column that a network is to make can be made, and of which shape its latents are."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, NamedTuple

from ...data.errors import RepaError
from ...data.format.columns import KINDS, MOMENTS, SCALE_SUFFIX, source_of, split_column
from ...data.reading.latents import AUTOENCODER_NORM, chosen_scale
from ..methods.alignment import stored_columns
from ..step.latents import TokenSource

if TYPE_CHECKING:
    from ...data.format.manifest import Manifest
    from ..config import TrainConfig
    from ..methods.base import Method
    from ..models.base import BackboneConfig
    from .checked import Checked

TOKENS = "patch"


class LatentShape(NamedTuple):
    """Channels and side of square latents."""

    channels: int
    side: int


def check_latents(config: TrainConfig, manifest: Manifest, found: Checked) -> LatentShape | None:
    """Find what latents are made of.

    Args:
        config: of the run.
        manifest: of its cache.
        found: takes the problems, and the scale of the latents or whose tokens they are.

    Returns:
        Their shape, None where a problem keeps it from being known.
    """
    if config.latents != MOMENTS:
        return _check_tokens(config, manifest, found)
    if config.decoder:
        found.add(
            f"decoder={config.decoder} is of tokens, and the latents of this run are the autoencoder's",
            "set decoder= (nothing), or latents to the column that it decodes",
            field="decoder",
        )
    found.attempt(lambda: manifest.require((MOMENTS,), where=config.cache))
    found.scale = found.attempt(
        lambda: chosen_scale(manifest, config.latent_norm, where=config.cache).replaced(
            config.latent_scale, config.latent_shift
        )
    )
    moments = manifest.columns.get(MOMENTS)
    if moments is None or not KINDS["moments"].fits(moments.shape, moments.dtype):
        return None
    channels, *sides = moments.shape
    return _square(MOMENTS, channels // 2, (sides[0], sides[1]), found)


def _check_tokens(config: TrainConfig, manifest: Manifest, found: Checked) -> LatentShape | None:
    column = config.latents
    for name, default in (("latent_norm", AUTOENCODER_NORM), ("latent_scale", None), ("latent_shift", None)):
        value = getattr(config, name)
        if value != default:
            found.add(
                f"{name}={value} is of the autoencoder's latents, and each position and channel of "
                f"{column} is standardised",
                f"leave {name} out",
                field=name,
            )
    if found.attempt(lambda: _require_tokens(column, manifest, config.cache)) is None:
        return None
    if found.live is not None and column in found.live.columns:
        found.add(
            f"latents are read from the cache, and --targets online computes {column}",
            "take another --encoder, or --targets cache",
            field="latents",
        )
    source = manifest.sources[source_of(column)]
    stored = stored_columns(column, manifest.columns)
    found.tokens = TokenSource(
        columns=stored,
        grid=source.grid,
        width=manifest.columns[column].shape[-1],
        weights_sha256=source.weights_sha256,
        random_weights=source.random_weights,
        resolution=manifest.resolution,
    )
    found.latent_columns = stored
    if len(stored) > 1:
        found.warnings.append(
            f"{column} is int8: each number of a latent is off by about 0.006 of its deviation, and by about "
            "0.0003 in float16"
        )
    return _square(column, found.tokens.width, source.grid, found)


def _require_tokens(column: str, manifest: Manifest, where: str) -> bool:
    """Refuse a column that the cache lacks, or that has no tokens on a grid.

    Raises:
        RepaError: it is such a column; ``field`` is the setting.
    """
    there = [
        name
        for name in manifest.columns
        if not name.endswith(SCALE_SUFFIX) and split_column(name)[1] == TOKENS
    ]
    choose = f"take {' or '.join((MOMENTS, *there))}"
    try:
        kind = split_column(column)[1]
    except RepaError as error:
        raise RepaError(f"latents: {error.what}", choose, field="latents") from error
    if kind != TOKENS:
        raise RepaError(f"latents={column}, which are no patch tokens", choose, field="latents")
    try:
        manifest.require((column,), where=where)
    except RepaError as error:
        raise RepaError(error.what, error.remedy, field="latents") from error
    tokens, grid = manifest.columns[column].shape[0], manifest.sources[source_of(column)].grid
    if prod(grid) != tokens:
        raise RepaError(
            f"column {column} has {tokens} tokens, and its source a grid of {grid[0]}×{grid[1]}",
            "write it again with `repa preprocess`",
            field="latents",
        )
    return True


def _square(column: str, channels: int, grid: tuple[int, int], found: Checked) -> LatentShape | None:
    if grid[0] == grid[1]:
        return LatentShape(channels=channels, side=grid[0])
    found.add(
        f"column {column} has latents of {grid[0]}×{grid[1]}, and the backbones take square ones",
        "write the cache again with `repa preprocess`",
        field=column,
    )
    return None


def check_targets(config: TrainConfig, method: Method, found: Checked) -> None:
    """Say where a method aligns with the very tokens that the network is to make.

    Args:
        config: of the run.
        method: its method.
        found: takes the line.
    """
    if found.tokens is None:
        return
    read = {column for phase in method.phases() for column in method.columns(phase)}
    if config.latents in read:
        found.warnings.append(
            f"method {config.method_name} aligns with {config.latents}, which the network learns to make: it "
            "is given its own answer without the noise as a target, and no other teacher's knowledge"
        )


def check_width(config: TrainConfig, backbone: BackboneConfig, found: Checked) -> None:
    """Say where a network is narrower than what a token of it has to hold.

    A velocity has a share of noise in each of its numbers, so a network whose hidden state has fewer cannot
    make it (arXiv 2510.11690, section 4.1, theorem 1). Latents of an autoencoder are far from that.

    Args:
        config: of the run.
        backbone: its architecture.
        found: takes the line.
    """
    numbers = backbone.in_channels * backbone.facts.patch_size**2
    if found.tokens is not None and backbone.facts.width < numbers:
        found.warnings.append(
            f"{config.model} has a width of {backbone.facts.width}, and a token of {config.latents} "
            f"{numbers} numbers: a narrower network cannot make them, take a patch of 1 and a larger size"
        )
