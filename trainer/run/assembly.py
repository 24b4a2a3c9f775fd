"""Module and data of a run that passed its checks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ...data.reading.reader import CacheReader
from ..input.datamodule import CacheData
from ..input.statistics import column_statistics, token_statistics
from ..models.conditioning import ClassTokenConditioner
from ..models.text_conditioning import TextConditioner
from ..sampling.bank import CacheBank
from ..sampling.caption_bank import CaptionBank
from ..step.backbone import build_backbone
from ..step.latents import MomentLatents, TokenLatents
from ..step.module import TrainingModule

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    from numpy.typing import NDArray

    from ...data.tars.cache import TarCache
    from ..config import TrainConfig
    from ..methods.base import Method
    from ..step.beside import Statistics
    from ..step.latents import Latents
    from .checked import Checked


def assemble(
    config: TrainConfig, checked: Checked, identity: Mapping[str, Any], *, restored: bool = False
) -> tuple[TrainingModule, CacheData]:
    """Build the module and the data of a run that passed the checks.

    Args:
        config: of the run.
        checked: its checks.
        identity: see `identity_of`.
        restored: whether a checkpoint is going to be loaded, which has the statistics of tokens.
    """
    if (
        checked.backbone is None
        or checked.method is None
        or (checked.scale is None and checked.tokens is None)
        or checked.reader is None
        or checked.train_rows is None
    ):
        raise RuntimeError("the checks have not passed")
    backbone = build_backbone(checked.backbone, checked.method, config.seed, checked.condition)
    statistics = _statistics(checked.method, checked.reader, checked.train_rows)
    latents = _latents(checked, checked.reader, checked.train_rows, restored=restored)
    module = TrainingModule(config, backbone, checked.method, latents, identity, statistics)
    _open_bank(module, checked.reader)
    return module, CacheData(config, checked.reader, checked.train_rows, module.columns_at, checked.live)


def _open_bank(module: TrainingModule, reader: CacheReader | TarCache) -> None:
    """Let previews and evaluations take conditions from the cache, where these are no labels.

    Training itself asks for none of them but the states of the empty caption. Of tars no row can be read at
    random.
    """
    for conditioner in (module.backbone.y_embedder, module.ema.y_embedder):
        if isinstance(conditioner, TextConditioner) and isinstance(reader, CacheReader) and reader.texts:
            captions = CaptionBank(reader.texts, conditioner)
            conditioner.take_null(captions.empty())
            conditioner.bank = captions
        if isinstance(conditioner, ClassTokenConditioner) and isinstance(reader, CacheReader):
            conditioner.bank = CacheBank(reader, conditioner.column)


def _latents(
    checked: Checked, reader: CacheReader | TarCache, rows: NDArray[np.int64], *, restored: bool
) -> Latents:
    """Return what the backbone learns to make, with the statistics of tokens, which tars do not give."""
    if checked.tokens is None or not isinstance(reader, CacheReader):
        assert checked.scale is not None, "the checks have passed"
        return MomentLatents(checked.scale)
    columns, grid = checked.tokens.columns, checked.tokens.grid
    if restored:
        nothing = torch.zeros(checked.tokens.width, *grid)
        return TokenLatents(columns, nothing, torch.ones_like(nothing))
    return TokenLatents(columns, *token_statistics(reader, columns, grid, rows))


def _statistics(
    method: Method, reader: CacheReader | TarCache, rows: NDArray[np.int64]
) -> dict[str, Statistics]:
    """Measure what the method standardises, which the checks allow of caches alone."""
    return {
        each.name: column_statistics(reader, each.column, rows)
        for each in method.denoised()
        if each.standardised and isinstance(reader, CacheReader)
    }
