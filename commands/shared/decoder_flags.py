"""The flags that name what decodes samples."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, TypeAlias

import typer

DecoderFlag: TypeAlias = Annotated[
    str | None,
    typer.Option(
        help="AutoencoderKL, or of a model of tokens AutoencoderRAE; default the one the latents came "
        "from, or the run's decoder."
    ),
]

TeacherWeightsFlag: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Of a model of tokens: weights of the teacher, whose final norm is undone.",
        show_default="the hub's",
    ),
]
