"""The file of a merged channel-idle encoder, which says what it is. Needs neither torch nor timm."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

from ...data.edge import parse_json
from ...data.errors import RepaError
from .idle_teacher import split_idle_name

if TYPE_CHECKING:
    from pathlib import Path

    from .idle_teacher import IdleTeacher

ENTRY: Final = "repa-idle-encoder"
"""The entry of a file's header that says what is in it, as JSON."""


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """What the weights after a step depend on.

    Attributes:
        encoder: name of the student.
        cache: identity of the cache.
        teacher_sha256: of the teacher's weights.
        fit_images: images of the closed-form start.
        held_out: images that are held out.
        batch_size: images of a step.
        learning_rate: of AdamW, see `repa.pipeline.distill.training`.
        seed: of the order and of the images of the start.
    """

    encoder: str
    cache: str
    teacher_sha256: str
    fit_images: int
    held_out: int
    batch_size: int
    learning_rate: float
    seed: int


@dataclass(frozen=True, kw_only=True)
class Training(TrainingSettings):
    """What an encoder was trained with.

    Attributes:
        steps: of training after the closed-form start.
    """

    steps: int


@dataclass(frozen=True, kw_only=True)
class Fidelity:
    """What was measured on held-out images against the cached tokens, see `repa.pipeline.distill.fidelity`.

    Attributes:
        images: that were held out.
        patch_cosine_mean: of patch tokens.
        patch_cosine_p01: their 1st percentile.
        patch_cosine_worst_image: mean of the image where it is lowest.
        shuffled_cosine: to another image's tokens.
        class_cosine_mean: of class tokens.
        relative_l2: of an image's patch tokens.
        gram_error: of the cosines between an image's tokens.
        repa_loss_change: per token.
        neighbour_agreement: share of the nearest images in common.
        neighbours: of an image.
        merge_error: largest change by the merge, relative to the largest number.
    """

    images: int
    patch_cosine_mean: float
    patch_cosine_p01: float
    patch_cosine_worst_image: float
    shuffled_cosine: float
    class_cosine_mean: float
    relative_l2: float
    gram_error: float
    repa_loss_change: float
    neighbour_agreement: float
    neighbours: int
    merge_error: float


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Images a second of an encoder and its teacher, in turn on one device.

    Attributes:
        device: its name.
        threads: of a CPU, 0 of a GPU.
        compute_dtype: of the forward pass.
        batch_size: images of a pass.
        teacher: the teacher's, median.
        copy: the encoder's, median.
        ratio: median of the rounds' own.
    """

    device: str
    threads: int
    compute_dtype: str
    batch_size: int
    teacher: float
    copy: float
    ratio: float


@dataclass(frozen=True, kw_only=True)
class Distilled:
    """What the file of a merged encoder says of it. It is part of the provenance of its columns.

    Attributes:
        name: of the encoder.
        teacher: the teacher's name.
        teacher_sha256: of the teacher's weights, as the cache has it.
        idle: θ.
        norm: one of `NORMS`.
        merged: True; what is not merged is no encoder.
        resolution: side of the cropped images of the cache it was distilled from.
        data: fingerprint of these images.
        views: of each.
        training: what it was trained with.
        fidelity: how far it is from its teacher.
        speed: of it and its teacher.
    """

    name: str
    teacher: str
    teacher_sha256: str
    idle: float
    norm: str
    merged: bool
    resolution: int
    data: str
    views: tuple[str, ...]
    training: Training
    fidelity: Fidelity
    speed: Speed

    def notes(self) -> dict[str, Any]:
        """Return it as plain values, as they come back from JSON."""
        found: dict[str, Any] = json.loads(self.as_json())
        return found

    def as_json(self) -> str:
        """Return it as the text that a file keeps."""
        return json.dumps(asdict(self))


def read_distilled(path: Path) -> Distilled:
    """Read what a file says of the merged encoder in it.

    Raises:
        RepaError: it cannot be read, or is no such file.
    """
    from safetensors import SafetensorError, safe_open

    remedy = "give a file that `repa distill` wrote"
    try:
        with safe_open(path, framework="numpy") as file:
            text = (file.metadata() or {}).get(ENTRY)
    except OSError as error:
        raise RepaError(f"weights file {path} cannot be read ({error})", remedy, field="--weights") from error
    except SafetensorError as error:
        raise RepaError(f"weights file {path} is no safetensors file", remedy, field="--weights") from error
    if text is None:
        raise RepaError(f"weights file {path} is of no merged encoder", remedy, field="--weights")
    found = parse_json(
        Distilled, text.encode(), where=f"the header of {path}", remedy=remedy, error=RepaError
    )
    split = split_idle_name(found.name)
    if split != (found.teacher, found.idle, found.norm) or not found.merged:
        raise RepaError(
            f"weights file {path} calls itself {found.name}, and says otherwise what it is",
            remedy,
            field="--weights",
        )
    return found


def require_fit(found: Distilled, teacher: IdleTeacher, resolution: int, path: Path) -> None:
    """Refuse the file of another encoder, or of images of another size.

    Raises:
        RepaError: says which.
    """
    if found.name != teacher.name:
        raise RepaError(
            f"weights file {path} is of {found.name}, not of {teacher.name}",
            f"name it --encoder {found.name}, or give another file",
            field="--weights",
        )
    if found.resolution != resolution:
        raise RepaError(
            f"encoder {teacher.name} was distilled from images of {found.resolution}², and these are of "
            f"{resolution}²",
            f"give --resolution {found.resolution}, or distil from a cache of {resolution}²",
            field="--resolution",
        )
