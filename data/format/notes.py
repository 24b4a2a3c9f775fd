"""What a manifest notes of a source beside its provenance, typed as far as repa reads it.

Notes are free: what is not named here is kept as it is, and read by nobody.
"""

from __future__ import annotations

from collections.abc import Mapping  # noqa: TC003 - annotations are read when notes are parsed
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeAlias

from annotated_types import Len

from ..edge import parse
from ..errors import CacheError
from .bounds import Axis, Bytes, Count, Number, Positive, Sha256, Text
from .columns import ATTENTION_SUFFIX, AUTOENCODER

TOKENIZER_NOTE = "tokenizer_sha256"
"""Note that text encoders have and no other source."""


@dataclass(frozen=True, kw_only=True)
class CalibrationNote:
    """Which calibration a source was written with.

    Attributes:
        sha256: of its file.
        images: that it was fitted to.
    """

    sha256: Sha256
    images: Count = 0


@dataclass(frozen=True, kw_only=True)
class HeadFidelity:
    """How far the stored attention of one head is from the teacher's.

    Attributes:
        block: of the teacher, counted from 1.
        head: of the block, counted from 1.
        mean: Kullback-Leibler divergence in nats, over images and queries.
        p99: its 99th percentile.
    """

    block: Axis
    head: Axis
    mean: Number
    p99: Number


@dataclass(frozen=True, kw_only=True)
class AttentionFidelity:
    """How well stored queries and keys stand for the teacher's, measured on held-out images.

    Attributes:
        images: measured on.
        bytes_per_image: of queries, keys and scales.
        kl: of each block and head.
        kl_mean: over all of them.
        kl_worst_head: the largest mean of a head, nats.
        gradient_cosine_initial: between the gradients that exact and stored targets give an initial student,
            in the block where it is lowest.
        gradient_cosine_near: the same of a student near the teacher.
        loss_change_initial: mean magnitude of the change of an initial student's loss, nats.
        loss_change_near: the same of a student near the teacher.
    """

    images: Count
    bytes_per_image: Bytes
    kl: Annotated[tuple[HeadFidelity, ...], Len(1)]
    kl_mean: Number
    kl_worst_head: Number
    gradient_cosine_initial: Number | None = None
    gradient_cosine_near: Number | None = None
    loss_change_initial: Number | None = None
    loss_change_near: Number | None = None


@dataclass(frozen=True, kw_only=True)
class TokenFidelity:
    """How well stored tokens stand for the teacher's, measured on held-out images."""

    images: Count
    bytes_per_image: Bytes
    cosine_error_mean: Number
    cosine_error_max: Number
    repa_loss_change: Number
    repa_loss_change_bound: Number | None = None


@dataclass(frozen=True, kw_only=True)
class LatentDeviation:
    """How far posterior means lie from those of float32, measured on some images.

    Attributes:
        images: so many.
        relative_rms: root mean square of the differences, relative to that of the means in float32.
        relative_max: the largest difference, relative to the same.
    """

    images: Count
    relative_rms: Number
    relative_max: Number


@dataclass(frozen=True, kw_only=True)
class LatentStatistics:
    """Statistics of the cache's latents, drawn from the posterior, unscaled.

    Attributes:
        images: that they were measured on.
        mean: of each channel.
        std: of each channel.
    """

    images: Count
    mean: Annotated[tuple[Number, ...], Len(1, 4096)]
    std: Annotated[tuple[Positive, ...], Len(1, 4096)]


@dataclass(frozen=True, kw_only=True)
class TokenDeviation:
    """How far a teacher's tokens lie from those of float32, as 1 − cosine, measured on some images."""

    images: Count
    cosine_error_mean: Number
    cosine_error_max: Number


@dataclass(frozen=True, kw_only=True)
class AttentionDeviation:
    """How far a teacher's attention lies from that of float32, measured on some images.

    Attributes:
        images: so many.
        kl_mean: Kullback-Leibler divergence in nats, over images, queries, blocks and heads.
        kl_worst_head: the largest mean of a block and head.
    """

    images: Count
    kl_mean: Number
    kl_worst_head: Number
    gradient_cosine_initial: Number | None = None
    gradient_cosine_near: Number | None = None
    loss_change_initial: Number | None = None
    loss_change_near: Number | None = None


@dataclass(frozen=True, kw_only=True)
class Notes:
    """Notes of a source of latents or tokens."""

    location: Text | None = None
    scaling_factor: Number | None = None
    shift_factor: Number | None = None
    calibration: CalibrationNote | None = None
    fidelity: TokenFidelity | None = None


@dataclass(frozen=True, kw_only=True)
class ForeignNote:
    """Where latents came from that another program wrote.

    Attributes:
        layout: name of its layout, as of ``repa cache import --format``.
        latents: ``posterior`` where mean and deviation were there; ``sampled`` where one draw was, whose
            deviation is stored as 0.
        mirrored: ``no``; ``second view`` where both views were there; ``at random`` where some images were
            mirrored and nothing says which.
        files: that were read.
        bytes: of them.
        sha256: of the list of their sha256 and names, as ``sha256sum`` prints it, sorted by name.
    """

    layout: Text
    latents: Literal["posterior", "sampled"]
    mirrored: Literal["no", "second view", "at random"]
    files: Count
    bytes: Bytes
    sha256: Sha256


@dataclass(frozen=True, kw_only=True)
class LatentNotes(Notes):
    """Notes of the autoencoder."""

    deviation: LatentDeviation | None = None
    latent_statistics: LatentStatistics | None = None
    foreign: ForeignNote | None = None
    images: Text | None = None


@dataclass(frozen=True, kw_only=True)
class TokenNotes(Notes):
    """Notes of a source of tokens."""

    deviation: TokenDeviation | None = None


@dataclass(frozen=True, kw_only=True)
class TextDeviation:
    """How far what is stored of captions lies from their states in float32, measured on some captions.

    Attributes:
        captions: so many.
        cosine_error_mean: 1 − cosine of a token's states.
        cosine_error_max: the largest of a token.
        relative_rms: root mean square of the differences, relative to that of the states.
    """

    captions: Count
    cosine_error_mean: Number
    cosine_error_max: Number
    relative_rms: Number


@dataclass(frozen=True, kw_only=True)
class TextNotes:
    """Notes of a text encoder.

    Attributes:
        tokenizer_sha256: of all that decides the numbers of the tokens, of each tokenizer.
        tokens: that a caption is padded and cut to.
        layer: whose states are stored.
        empty: ``encoded``, or ``zeros`` where the empty caption has none.
        location: folder or hub name of the files.
        deviation: of what is not float32 throughout.
    """

    tokenizer_sha256: Text
    tokens: Axis
    layer: Text
    empty: Literal["encoded", "zeros"]
    location: Text | None = None
    deviation: TextDeviation | None = None


_Block: TypeAlias = Annotated[tuple[tuple[Count, Count], ...], Len(1, 1024)]


@dataclass(frozen=True, kw_only=True)
class AttentionNotes:
    """Notes of a source of queries and keys.

    Attributes:
        blocks: of the teacher, counted from 1, axis L of the columns.
        logit_scale: factor of a query's product with a key.
        head_width: of the teacher.
        rank: of what is stored, axis r of the columns; of factors the largest of a head.
        form: ``exact``, ``truncated`` by one basis for the data set, or ``factored``, each image by itself.
        keys: ``as computed`` or ``centred``.
        depth: blocks of the teacher.
        tolerance: divergence that the form was chosen for.
        bytes: of an image, that the form was chosen for.
        tokens: of factors, T.
        components: of factors, numbers in int8 and in int4, block by block and head by head.
        calibration: of the source.
        fidelity: of the source.
        deviation: of what is computed in another dtype than float32.
    """

    blocks: Annotated[tuple[Axis, ...], Len(1, 256)]
    logit_scale: Positive
    head_width: Axis
    rank: Axis
    form: Text
    keys: Text
    depth: Axis | None = None
    tolerance: Number | None = None
    bytes: Bytes | None = None
    tokens: Axis | None = None
    components: Annotated[tuple[_Block, ...], Len(1, 256)] | None = None
    calibration: CalibrationNote | None = None
    fidelity: AttentionFidelity | None = None
    deviation: AttentionDeviation | None = None


def check_notes(source: str, notes: Mapping[str, Any], *, where: str, remedy: str) -> None:
    """Check the notes of a source as far as anybody reads them.

    Args:
        source: its name, which says whether it holds attention.
        notes: of its provenance.
        where: the manifest, for the error.
        remedy: what to do about notes that are wrong.

    Raises:
        CacheError: a note that is missing or of another type.
    """
    model: type[Any] = LatentNotes if source == AUTOENCODER else TokenNotes
    if source.endswith(ATTENTION_SUFFIX):
        model = AttentionNotes
    elif TOKENIZER_NOTE in notes:
        model = TextNotes
    try:
        parse(model, notes, where=where, remedy=remedy)
    except CacheError as error:
        field = f"sources.{source}.notes.{error.field}"
        raise CacheError(f"{error.what} in the notes of {source}", remedy, field=field) from None
