"""The flags of `repa bench`."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path  # noqa: TC003 - typer resolves annotations of flags
from typing import Annotated

import typer

from ..shared.flags import square_side
from .measured import METHODS, TARGETS, BenchSettings


@dataclass(frozen=True, kw_only=True)
class BenchFlags:
    """The flags of `repa bench`, most of them `BenchSettings`."""

    parts: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[loader|attention|writer|preprocess|train|fidelity]...",
            help="Parts; default all but fidelity.",
        ),
    ] = None
    model: Annotated[str, typer.Option(help="Backbone of the training step.")] = "SiT-T/1"
    encoder: Annotated[
        str, typer.Option(help="Teacher; but for fidelity with random weights: its speed is the same.")
    ] = "demo"
    resolution: Annotated[
        int | None,
        typer.Option(
            parser=square_side,
            metavar="<int>",
            help="Side of the images in pixels; 64, of fidelity as of preprocess.",
        ),
    ] = None
    batch_size: Annotated[int, typer.Option(help="Images of a training step and of a forward pass.")] = 32
    images: Annotated[
        int, typer.Option(help="Images that preprocess encodes in a round, or fidelity takes its own from.")
    ] = 256
    rows: Annotated[int, typer.Option(help="Rows of the cache that is read or written.")] = 2048
    processes: Annotated[
        int, typer.Option(help="Of loader: processes that read together, as the ranks of a training.")
    ] = 1
    steps: Annotated[int, typer.Option(help="Training steps of a round.")] = 10
    rounds: Annotated[int, typer.Option(help="Rounds; figures are medians over them.")] = 5
    methods: Annotated[
        str, typer.Option(metavar="NAME,NAME,…", help="Methods whose training step is measured.")
    ] = METHODS
    targets: Annotated[
        str, typer.Option(metavar="NAME,…", help="Where the targets of that step come from.")
    ] = ",".join(TARGETS)
    compiled: Annotated[
        bool | None,
        typer.Option(
            "--compile/--no-compile",
            help="Compile the whole backbone, or nothing, of the step.",
            show_default="as of compile=auto",
        ),
    ] = None
    folder: Annotated[
        Path | None, typer.Option(help="Where the temporary caches go: the disk to measure.")
    ] = None
    data: Annotated[
        str | None,
        typer.Option(
            help="Of fidelity: images, as of preprocess; default images, of the teacher demo 'demo'."
        ),
    ] = None
    attention: Annotated[
        str | None,
        typer.Option(help="Of fidelity: blocks, as of preprocess; default HASTE's, scaled to the teacher."),
    ] = None
    weights: Annotated[
        list[str] | None, typer.Option(metavar="NAME=FILE", help="Of fidelity: weights of the teacher.")
    ] = None
    random_weights: Annotated[
        bool, typer.Option("--random-weights", help="Of fidelity: draw the teacher's weights.")
    ] = False

    def settings(self) -> BenchSettings:
        """Return what is measured.

        Raises:
            RepaError: a value out of its range.
        """
        given = {
            each.name: getattr(self, each.name) for each in fields(BenchSettings) if each.name != "compile"
        }
        given["compile"] = "auto" if self.compiled is None else "whole" if self.compiled else "off"
        given["weights"] = tuple(self.weights or ())
        return BenchSettings(**given)
