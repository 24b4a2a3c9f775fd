"""HASTE on a network of four blocks and the columns of a teacher that suit it."""

from __future__ import annotations

from typing import Any

import torch
from repa.data.format.columns import ColumnSpec
from repa.trainer.methods.haste import Haste, HasteConfig
from repa.trainer.models.capture import BackboneFacts
from repa.trainer.models.sit import SiTConfig

# heads of 8 channels, 16 tokens; the teacher has two heads of 12 and blocks 3, 5, 6 in the cache
CONFIG = SiTConfig(depth=4, width=32, heads=4, patch_size=2, input_size=8, num_classes=5, qk_norm=True)
HEADS, TOKENS, RANK, STORED = 2, 16, 12, (3, 5, 6)
MOMENTS = {"sd-vae/moments": ColumnSpec(shape=(8, 8, 8), dtype="float32")}
GRIDS = {"sd-vae": (8, 8), "a": (4, 4), "a+attention": (4, 4)}
NOTES: dict[str, dict[str, Any]] = {
    "a": {},
    "a+attention": {
        "blocks": list(STORED),
        "logit_scale": 0.3,
        "head_width": 12,
        "rank": RANK,
        "form": "exact",
        "keys": "as computed",
        "calibration": None,
        "fidelity": None,
    },
}


def specs_of(dtype: str = "float32", rank: int = RANK, heads: int = HEADS) -> dict[str, ColumnSpec]:
    shape = (len(STORED), heads, TOKENS, rank)
    specs = MOMENTS | {
        "a/patch": ColumnSpec(shape=(TOKENS, 24), dtype=dtype),
        "a/q": ColumnSpec(shape=shape, dtype=dtype),
        "a/k": ColumnSpec(shape=shape, dtype=dtype),
    }
    if dtype == "int8":
        scale = ColumnSpec(shape=(len(STORED), heads, rank), dtype="float32")
        specs |= {"a/patch-scale": ColumnSpec(shape=(24,), dtype="float32")}
        specs |= {"a/q-scale": scale, "a/k-scale": scale}
    return specs


def make(
    *,
    columns: dict[str, ColumnSpec] | None = None,
    backbone: BackboneFacts = CONFIG.facts,
    grids: dict[str, tuple[int, int]] = GRIDS,
    notes: dict[str, dict[str, Any]] = NOTES,
    **settings: Any,
) -> Haste:
    torch.manual_seed(0)
    given = {"depth": 3, "student_blocks": (2, 3), "teacher_blocks": (6, 3), "stop": 10}
    config = HasteConfig(**{**given, "projector_width": 40, **settings})
    return Haste(config, backbone, specs_of() if columns is None else columns, grids, notes)
