"""The flags of `repa parity`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer

from ..shared.live import LiveData, LiveEncoders, LiveRandom, LiveWeights  # noqa: TC001 — typer reads them


@dataclass(frozen=True, kw_only=True)
class ParityFlags:
    """The flags of `repa parity`."""

    method: Annotated[str | None, typer.Option(help="As of `repa train`.", show_default="repa")] = None
    model: Annotated[
        str | None, typer.Option(help="Backbone.", show_default="SiT-B/2, or the method's own")
    ] = None
    cache: Annotated[
        str | None, typer.Option(help="Folder of the cache; default: the only one under caches/.")
    ] = None
    batches: Annotated[int, typer.Option(help="Batches to compare.")] = 4
    batch_size: Annotated[int, typer.Option(help="Images of a batch.")] = 16
    seed: Annotated[
        int | None, typer.Option(help="Of initialisation, order and draws.", show_default="0")
    ] = None
    data: LiveData = None
    encoders: LiveEncoders = None
    weights: LiveWeights = None
    random_weights: LiveRandom = False
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Any other setting of `repa train`; may repeat."),
    ] = None
