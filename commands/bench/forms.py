"""Columns of the caches that are written and read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...data.format.columns import MOMENTS, ColumnSpec, scale_column

if TYPE_CHECKING:
    from collections.abc import Mapping


PATCH = "dinov2-b/patch"


_LATENT = {MOMENTS: ColumnSpec(shape=(8, 32, 32), dtype="float32")}


FORMS: Mapping[str, Mapping[str, ColumnSpec]] = {
    "float16": {**_LATENT, PATCH: ColumnSpec(shape=(256, 768), dtype="float16")},
    "int8": {
        **_LATENT,
        PATCH: ColumnSpec(shape=(256, 768), dtype="int8"),
        scale_column(PATCH): ColumnSpec(shape=(768,), dtype="float32"),
    },
}
