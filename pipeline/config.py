"""A `repa preprocess` as asked for. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping  # noqa: TC003 — dataclasses read it
from dataclasses import dataclass, field
from math import inf
from pathlib import Path  # noqa: TC003 — dataclasses read it
from typing import TYPE_CHECKING

from ..data.errors import RepaError
from ..data.format.columns import AUTOENCODER, attention_source
from ..data.storage.bucket import CachePath  # noqa: TC001 — dataclasses read it
from .columns.specs import INT8, AttentionSettings
from .encoders.registry import find_teacher
from .images.base import AUTO_LABELS
from .text.facts import TEXT_ENCODERS

if TYPE_CHECKING:
    from .encoders.base import Teacher

# far above what any machine makes use of; beyond them memory or the system's own limits give way first
_RANGES = (
    ("--resolution", 1, 8192),
    ("--devices", 1, 1024),
    ("--limit", 1, 10**10),
    ("--batch-size", 1, 1 << 16),
    ("--shard-rows", 1, 1 << 22),
    ("--workers", 0, 1024),
    ("--attention-bytes", 1, 1 << 40),
)


@dataclass(frozen=True, kw_only=True)
class PreprocessConfig:
    """A `repa preprocess` as asked for. `resolve` fills in what was left open.

    Attributes:
        data: image folder or ZIP file; WebDataset tars, as ``shards/train-{0000..0146}.tar``; a Hugging Face
            data set, ``hf:NAME[:SPLIT]`` or ``hf:FOLDER`` of `save_to_disk`; images from outside, see
            `open_source`; ``demo`` names the drawn images.
        cache: folder of the cache, or its prefix in a bucket.
        encoders: teachers to run, by name; none writes latents only.
        vae: hub name or folder of an ``AutoencoderKL``, or ``demo``; None: the one the cache was made with,
            else ``stabilityai/sd-vae-ft-mse``, of the demo ``demo``.
        resolution: side in pixels of the crop.
        views: views of each image that are encoded; None: as the cache has them, else the original alone.
        limit: take so many images, evenly spaced over the set; of the demo: draw so many. None takes all.
        batch_size: images of a forward pass. It is part of the cache, for features of another batch size may
            differ in the last bits. None: as the cache has it, else by resolution and device.
        devices: processes to start, one a GPU, or sharing the cores; 1 computes in this one. Started by
            torchrun or SLURM, leave it 1.
        feature_dtype: ``float16``, ``float32`` or ``int8``, of the teachers' columns; of int8 it is measured
            what that changes, see `TokenErrors`.
        attention: encoder → blocks whose queries and keys are stored too, counted from 1, ascending.
        attention_rank: cut them to so many components a head, as int8, in one basis for all images. Beside
            ``attention_kl``: of a cache of an earlier version, which chose this rank for it.
        attention_kl: store factors of each image's own attention, of the fewest bytes whose mean divergence
            from the teacher's is at most so many nats in every block and head, on held-out images.
        attention_bytes: store such factors of at most so many bytes an image and view, all blocks of an
            encoder together.
        compress: ``zstd``, ``blosc`` or ``pcodec`` for the teachers' columns, losslessly. None stores them as
            they are: floats shrink by a tenth to a fifth, and compressed rows cannot be read directly.
        compute_dtype: ``float32``, ``tf32`` (of a GPU's tensor cores), ``bfloat16`` or ``float16``, of the
            forward passes; of all but float32 it is measured what that changes, see `deviation`.
        weights: encoder → file of its weights, safetensors or a tensors-only .pth; others come from the hub
            or its local copy.
        random_weights: draw the weights of every model, for trying things out.
        apply_exif: turn images by their EXIF orientation.
        class_names: file with the name of a class in each line, where classes are numbers, as of tars.
        labels: where labels come from, see `SourceOptions`.
        outside: encoder → ``module:Class``, of teachers that were named so.
        shards: those of this job, see `job_shards`; None takes all.
        shard_rows: rows of a shard; None: as the cache has it, else 1,024.
        workers: processes a device that decode images; None: by the number of cores, 0 on a CPU.
        text_encoders: text encoders to run on the captions, by name.
        captions: captions file of COCO, table of file names and captions, tars or ``hf:…``; None: those of
            the cache, else those that lie with the images.
        caption_column: column or field that holds them; None looks for it.
        captions_per_image: most captions of an image that are kept, the first ones; None keeps all.
    """

    data: str
    cache: CachePath
    encoders: tuple[str, ...]
    vae: str | None = None
    resolution: int = 256
    views: tuple[str, ...] | None = None
    limit: int | None = None
    batch_size: int | None = None
    devices: int = 1
    feature_dtype: str = "float16"
    attention: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    attention_rank: int | None = None
    attention_kl: float | None = None
    attention_bytes: int | None = None
    compress: str | None = None
    compute_dtype: str = "float32"
    weights: Mapping[str, Path] = field(default_factory=dict)
    random_weights: bool = False
    apply_exif: bool = False
    class_names: Path | None = None
    labels: str = AUTO_LABELS
    outside: Mapping[str, str] = field(default_factory=dict)
    shards: str | None = None
    shard_rows: int | None = None
    workers: int | None = None
    text_encoders: tuple[str, ...] = ()
    captions: str | None = None
    caption_column: str | None = None
    captions_per_image: int | None = None

    @property
    def sources(self) -> tuple[str, ...]:
        """The sources it writes. They are the autoencoder, the encoders, and their attention."""
        own = {name: (attention_source(name),) if name in self.attention else () for name in self.encoders}
        return (AUTOENCODER, *(source for name in self.encoders for source in (name, *own[name])))

    def teacher(self, encoder: str) -> Teacher:
        """Return what is known of one of the encoders, in any process."""
        return find_teacher(self.outside.get(encoder, encoder), may_import=True)

    def attention_settings(self, encoder: str) -> AttentionSettings | None:
        """Return how the attention of an encoder is to be stored, or None for not at all."""
        blocks = self.attention.get(encoder)
        if blocks is None:
            return None
        # a rank that cuts nothing off is int8 at the whole width
        whole = self.attention_rank == self.teacher(encoder).head_width and self.attention_kl is None
        return AttentionSettings(
            blocks=blocks,
            dtype=INT8 if whole else self.feature_dtype,
            rank=None if whole else self.attention_rank,
            tolerance=self.attention_kl,
            bytes=self.attention_bytes,
            compressor=self.compress,
        )


def check_flags(config: PreprocessConfig) -> None:
    """Refuse flags that contradict one another.

    Raises:
        RepaError: which, and what to do.
    """
    for flag, names in (("--encoder", config.encoders), ("--text-encoder", config.text_encoders)):
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise RepaError(f"{flag} {twice[0]} is given more than once", "give each once", field=flag)
    unasked = sorted(set(config.weights) - {*config.encoders, *config.text_encoders})
    if unasked:
        flag = "--text-encoder" if unasked[0] in TEXT_ENCODERS else "--encoder"
        raise RepaError(
            f"--weights names {unasked[0]}, which is not asked for",
            f"add {flag} {unasked[0]} or drop it",
            field="--weights",
        )
    for flag, least, most in _RANGES:
        value = getattr(config, flag.removeprefix("--").replace("-", "_"))
        if value is not None and not least <= value <= most:
            size = "small" if value < least else "large"
            raise RepaError(f"{flag} {value} is too {size}", f"give {least} to {most:,}", field=flag)
    for flag in ("--captions", "--caption-column", "--captions-per-image"):
        if (
            getattr(config, flag.removeprefix("--").replace("-", "_")) is not None
            and not config.text_encoders
        ):
            raise RepaError(
                f"{flag} says which captions are encoded, and nothing encodes them",
                "add --text-encoder clip-l-text, or drop it",
                field=flag,
            )
    _check_attention(config)


def _check_attention(config: PreprocessConfig) -> None:
    cuts = {
        "--attention-rank": config.attention_rank,
        "--attention-kl": config.attention_kl,
        "--attention-bytes": config.attention_bytes,
    }
    given = [flag for flag, value in cuts.items() if value is not None]
    if len(given) > 1:
        raise RepaError(
            f"{' and '.join(given)} exclude one another",
            "give the rank, the bytes, or what is to be reached",
            field=given[0],
        )
    if given and not config.attention:
        raise RepaError(
            f"{given[0]} says how attention is stored", "add --attention, or drop it", field=given[0]
        )
    if config.attention_kl is not None and not 0 < config.attention_kl < inf:
        raise RepaError(
            f"--attention-kl {config.attention_kl:g} cannot be met",
            "give nats above 0, as 0.01",
            field="--attention-kl",
        )
    for name, blocks in config.attention.items():
        teacher = config.teacher(name)
        if not teacher.heads:
            raise RepaError(
                f"encoder {name} gives no queries and keys", "leave --attention out", field="--attention"
            )
        outside = [block for block in blocks if not 1 <= block <= teacher.depth]
        if outside or not blocks:
            raise RepaError(
                f"--attention names {f'block {outside[0]}' if outside else 'no block'} of encoder {name}",
                f"its blocks are 1 to {teacher.depth}",
                field="--attention",
            )
        rank = config.attention_rank
        if rank is not None and not 1 <= rank <= teacher.head_width:
            raise RepaError(
                f"--attention-rank {rank} is none of encoder {name}, whose heads are "
                f"{teacher.head_width} wide",
                f"give 1 to {teacher.head_width}",
                field="--attention-rank",
            )
