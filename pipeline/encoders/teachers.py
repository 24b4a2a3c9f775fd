"""The table of the teachers that have a name, one row each, with the publication of its facts.

Needs neither torch nor timm.

Beside these, `registry` finds any ViT of timm and teachers from outside the package.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from .timm_teacher import DEMO, TimmTeacher

if TYPE_CHECKING:
    from collections.abc import Mapping

CLIP: Final = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
HALF: Final = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
FIXED: Final = 256
"""Largest images of teachers whose positions were learned at one size, 14×14 or 16×16 tokens.

The reference resamples these tables for 256² and takes DINOv2 alone at 512² (sihyun-yu/REPA utils.py).
"""
# size → its word in timm's names, width, blocks, heads
SIZES: Final = {
    "s": ("small", 384, 12, 6),
    "b": ("base", 768, 12, 12),
    "l": ("large", 1024, 24, 16),
    "g": ("giant", 1536, 40, 24),
}


def _dinov2() -> list[TimmTeacher]:
    rows = []
    for size, (word, width, depth, heads) in SIZES.items():
        for suffix, registers, count in (("", "", 0), ("-reg", "_reg4", 4)):
            timm_name = f"vit_{word}_patch14{registers}_dinov2.lvd142m"
            rows.append(
                TimmTeacher(
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


def _dinov3() -> list[TimmTeacher]:
    rows = []
    # S keeps its query and value biases (_qkvb); those of the distilled B and L are all zero and left out by
    # timm (timm/models/eva.py, checkpoint_filter_fn)
    for size in ("s", "b", "l"):
        word, width, depth, heads = SIZES[size]
        timm_name = f"vit_{word}_patch16_dinov3{'_qkvb' if size == 's' else ''}.lvd1689m"
        rows.append(
            TimmTeacher(
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


def _mocov3() -> list[TimmTeacher]:
    rows = []
    # timm has the architecture but not the weights: --weights with facebookresearch/moco-v3's own file,
    # whose momentum encoder and projection head are dropped; its fixed sin-cos table is part of the file
    for size in ("b", "l"):
        word, width, depth, heads = SIZES[size]
        rows.append(
            TimmTeacher(
                name=f"mocov3-{size}",
                timm_name=f"vit_{word}_patch16_224",
                hub=None,
                patch_size=16,
                width=width,
                depth=depth,
                heads=heads,
                prefix_tokens=1,
                largest_resolution=FIXED,
                checkpoint_prefix="module.base_encoder.",
                source="arXiv 2104.02057; facebookresearch/moco-v3 vits.py; sihyun-yu/REPA utils.py",
            )
        )
    return rows


def _others() -> list[TimmTeacher]:
    return [
        TimmTeacher(
            name="dinov1-b",
            timm_name="vit_base_patch16_224.dino",
            hub="timm/vit_base_patch16_224.dino",
            patch_size=16,
            width=768,
            depth=12,
            heads=12,
            prefix_tokens=1,
            largest_resolution=FIXED,
            source="arXiv 2104.14294; 256 directly: sihyun-yu/REPA train.py; hf.co model card of timm",
        ),
        TimmTeacher(
            name="mae-l",
            timm_name="vit_large_patch16_224.mae",
            hub="timm/vit_large_patch16_224.mae",
            patch_size=16,
            width=1024,
            depth=24,
            heads=16,
            prefix_tokens=1,
            largest_resolution=FIXED,
            source="arXiv 2111.06377; 256 directly: sihyun-yu/REPA utils.py; hf.co model card of timm",
        ),
        # With OpenAI's own QuickGELU: the plain timm name has another activation for the same weights. Tokens
        # are taken after the final norm (ln_post) as of every teacher here; the reference takes CLIP's before
        # it (sihyun-yu/REPA models/clip_vit.py), so a projector trained there does not fit these.
        TimmTeacher(
            name="clip-l",
            timm_name="vit_large_patch14_clip_quickgelu_224.openai",
            hub="timm/vit_large_patch14_clip_224.openai",
            patch_size=14,
            width=1024,
            depth=24,
            heads=16,
            prefix_tokens=1,
            normalisation=CLIP,
            largest_resolution=FIXED,
            source="arXiv 2103.00020; openai/CLIP clip.py (mean, std), model.py (QuickGELU); timm's note",
        ),
        # No class token: `cls` is the output of the attention-pooling head, SigLIP's image embedding.
        TimmTeacher(
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
            largest_resolution=FIXED,
            source="arXiv 2502.14786; hf.co model card of timm",
        ),
    ]


def _demo() -> TimmTeacher:
    from ..demo import RESOLUTION, TEACHER_ARCHITECTURE, TEACHER_OPTIONS

    patch_size = TEACHER_OPTIONS["patch_size"]
    fixed = ("img_size", "num_classes")
    return TimmTeacher(
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


TEACHERS: Final[Mapping[str, TimmTeacher]] = {
    row.name: row for row in (*_dinov2(), *_dinov3(), *_others(), *_mocov3(), _demo())
}
