"""The teachers: one row each, with the source of its facts. Needs neither torch nor timm.

Every teacher is scaled so that its tokens lie on the patches of SiT/2: one token per 16 pixels of the cropped
image (8 latent positions per 64 pixels, two per token). A teacher with patches of p pixels therefore sees
p · R / 16 pixels of an image of side R: ViT/14 sees 224 at R = 256 and 448 at 512 (the rule of the reference,
sihyun-yu/REPA `train.py`), ViT/16 sees R itself.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping  # noqa: TC003 — dataclasses read it
from dataclasses import dataclass, field
from typing import Final, Literal

from ...data.errors import RepaError

IMAGENET: Final = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP: Final = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
HALF: Final = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
DEMO: Final = "demo"
# size → its word in timm's names, width, blocks, heads
SIZES: Final = {
    "s": ("small", 384, 12, 6),
    "b": ("base", 768, 12, 12),
    "l": ("large", 1024, 24, 16),
    "g": ("giant", 1536, 40, 24),
}


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """One row.

    Attributes:
        name: what ``--encoder`` takes; the name of the source in a cache.
        timm_name: architecture, and tag of the weights, in timm.
        hub: repository of the weights on the Hugging Face hub; None: by ``--weights`` or shipped.
        patch_size: side of a patch, in pixels of what the teacher sees.
        width: D of its tokens.
        depth: number of blocks.
        heads: heads of every block.
        prefix_tokens: class and register tokens, which stand before the patches and are cut.
        class_feature: how ``cls`` is formed: the class ``token`` after the final norm, or for a teacher
            without one its ``attention-pool`` over the final-norm patch tokens.
        normalisation: mean and standard deviation per channel, of pixels in [0, 1].
        pixels_per_token: side of the square of the cropped image a token stands for.
        checkpoint_prefix: names in the official checkpoint that begin so are the encoder, without it; the
            rest (a momentum copy, heads) is dropped.
        options: what the architecture is given beside its timm name.
        source: where the facts are from.
    """

    name: str
    timm_name: str
    hub: str | None
    patch_size: int
    width: int
    depth: int
    heads: int
    prefix_tokens: int
    class_feature: Literal["token", "attention-pool"] = "token"
    normalisation: tuple[tuple[float, float, float], tuple[float, float, float]] = IMAGENET
    pixels_per_token: int = 16
    checkpoint_prefix: str = ""
    options: Mapping[str, int] = field(default_factory=dict)
    source: str

    def grid(self, resolution: int) -> tuple[int, int]:
        """Rows and columns of the patch tokens of an image of side ``resolution``.

        Raises:
            RepaError: the tokens would not lie on whole patches.
        """
        if resolution < self.pixels_per_token or resolution % self.pixels_per_token:
            raise RepaError(
                f"resolution {resolution} gives encoder {self.name} no whole grid: it has one token per "
                f"{self.pixels_per_token} pixels",
                f"give --resolution a multiple of {self.pixels_per_token}",
            )
        return resolution // self.pixels_per_token, resolution // self.pixels_per_token

    def input_size(self, resolution: int) -> int:
        """Side in pixels of what the teacher sees of an image of side ``resolution``.

        Raises:
            RepaError: see `grid`.
        """
        return self.patch_size * self.grid(resolution)[0]

    @property
    def head_width(self) -> int:
        """Dh of every head."""
        return self.width // self.heads


def _dinov2() -> list[Teacher]:
    rows = []
    for size, (word, width, depth, heads) in SIZES.items():
        for suffix, registers, count in (("", "", 0), ("-reg", "_reg4", 4)):
            timm_name = f"vit_{word}_patch14{registers}_dinov2.lvd142m"
            rows.append(
                Teacher(
                    name=f"dinov2-{size}{suffix}",
                    timm_name=timm_name,
                    hub=f"timm/{timm_name}",
                    patch_size=14,
                    width=width,
                    depth=depth,
                    heads=heads,
                    prefix_tokens=1 + count,
                    source="arXiv 2304.07193; registers arXiv 2309.16588; facebookresearch/dinov2 hubconf; "
                    "224 at 256: sihyun-yu/REPA train.py; hf.co model card of timm",
                )
            )
    return rows


def _dinov3() -> list[Teacher]:
    rows = []
    # S keeps its query and value biases (_qkvb); those of the distilled B and L are all zero and left out by
    # timm (timm/models/eva.py, checkpoint_filter_fn)
    for size in ("s", "b", "l"):
        word, width, depth, heads = SIZES[size]
        timm_name = f"vit_{word}_patch16_dinov3{'_qkvb' if size == 's' else ''}.lvd1689m"
        rows.append(
            Teacher(
                name=f"dinov3-{size}",
                timm_name=timm_name,
                hub=f"timm/{timm_name}",
                patch_size=16,
                width=width,
                depth=depth,
                heads=heads,
                prefix_tokens=5,
                source="arXiv 2508.10104 (patch 16, 4 registers, rotary positions); hf.co model card of timm",
            )
        )
    return rows


def _mocov3() -> list[Teacher]:
    rows = []
    # timm has the architecture but not the weights: --weights with facebookresearch/moco-v3's own file,
    # whose momentum encoder and projection head are dropped; its fixed sin-cos table is part of the file
    for size in ("b", "l"):
        word, width, depth, heads = SIZES[size]
        rows.append(
            Teacher(
                name=f"mocov3-{size}",
                timm_name=f"vit_{word}_patch16_224",
                hub=None,
                patch_size=16,
                width=width,
                depth=depth,
                heads=heads,
                prefix_tokens=1,
                checkpoint_prefix="module.base_encoder.",
                source="arXiv 2104.02057; facebookresearch/moco-v3 vits.py; sihyun-yu/REPA utils.py",
            )
        )
    return rows


def _others() -> list[Teacher]:
    return [
        Teacher(
            name="dinov1-b",
            timm_name="vit_base_patch16_224.dino",
            hub="timm/vit_base_patch16_224.dino",
            patch_size=16,
            width=768,
            depth=12,
            heads=12,
            prefix_tokens=1,
            source="arXiv 2104.14294; 256 directly: sihyun-yu/REPA train.py; hf.co model card of timm",
        ),
        Teacher(
            name="mae-l",
            timm_name="vit_large_patch16_224.mae",
            hub="timm/vit_large_patch16_224.mae",
            patch_size=16,
            width=1024,
            depth=24,
            heads=16,
            prefix_tokens=1,
            source="arXiv 2111.06377; 256 directly: sihyun-yu/REPA utils.py; hf.co model card of timm",
        ),
        # With OpenAI's own QuickGELU: the plain timm name has another activation for the same weights. Tokens
        # are taken after the final norm (ln_post) as of every teacher here; the reference takes CLIP's before
        # it (sihyun-yu/REPA models/clip_vit.py), so a projector trained there does not fit these.
        Teacher(
            name="clip-l",
            timm_name="vit_large_patch14_clip_quickgelu_224.openai",
            hub="timm/vit_large_patch14_clip_224.openai",
            patch_size=14,
            width=1024,
            depth=24,
            heads=16,
            prefix_tokens=1,
            normalisation=CLIP,
            source="arXiv 2103.00020; openai/CLIP clip.py (mean, std), model.py (QuickGELU); timm's note",
        ),
        # No class token: `cls` is the output of the attention-pooling head, SigLIP's image embedding.
        Teacher(
            name="siglip2-b",
            timm_name="vit_base_patch16_siglip_256.v2_webli",
            hub="timm/vit_base_patch16_siglip_256.v2_webli",
            patch_size=16,
            width=768,
            depth=12,
            heads=12,
            prefix_tokens=0,
            class_feature="attention-pool",
            normalisation=HALF,
            source="arXiv 2502.14786; hf.co model card of timm",
        ),
    ]


def _demo() -> Teacher:
    from ..demo import RESOLUTION, TEACHER_ARCHITECTURE, TEACHER_OPTIONS

    patch_size = TEACHER_OPTIONS["patch_size"]
    fixed = ("img_size", "num_classes")
    return Teacher(
        name=DEMO,
        timm_name=TEACHER_ARCHITECTURE,
        hub=None,
        patch_size=patch_size,
        width=TEACHER_OPTIONS["embed_dim"],
        depth=TEACHER_OPTIONS["depth"],
        heads=TEACHER_OPTIONS["num_heads"],
        prefix_tokens=1,
        pixels_per_token=patch_size,
        options={name: value for name, value in TEACHER_OPTIONS.items() if name not in fixed},
        source=f"repa.pipeline.demo.train_teacher, at {RESOLUTION} pixels",
    )


TEACHERS: Final[Mapping[str, Teacher]] = {
    row.name: row for row in (*_dinov2(), *_dinov3(), *_others(), *_mocov3(), _demo())
}


def find_teacher(name: str) -> Teacher:
    """The row of a name.

    Raises:
        RepaError: no such row; says which come nearest.
    """
    if name in TEACHERS:
        return TEACHERS[name]
    near = difflib.get_close_matches(name, TEACHERS, n=3)
    suggestion = f"did you mean {' or '.join(near)}? " if near else ""
    raise RepaError(
        f"encoder {name!r} is unknown", f"{suggestion}give --encoder one of {', '.join(TEACHERS)}"
    )
