"""What a cache holds against its teachers, called live on random rows of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ...data.errors import CacheError
from ...data.format.columns import (
    AUTOENCODER,
    attention_source,
    column_name,
    model_of,
    scale_column,
)
from ...data.format.opening import open_manifest
from ...data.reading.all_views import read_all_views
from ...data.reading.reader import CacheReader
from ..columns.factored import restore_attention
from ..columns.forms import restore
from ..columns.measures import TokenErrors, attention_divergence
from .live import LiveTeachers
from .tolerances import tolerance_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray
    from torch import Tensor

    from ...data.format.manifest import Manifest

DEFAULT_ROWS = 64

# A mean over other images than those measured on when the cache was written is another mean.
_MARGIN = 2.0
# half the distance of neighbouring numbers, relative: IEEE 754, 11 and 24 binary digits
_ROUNDING = {"float16": 2.0**-11, "float32": 2.0**-24}


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One number measured now. Of tokens it is 1 − cosine, of attention KL(teacher ‖ stored) in nats.

    Attributes:
        source: the source.
        what: ``tokens``, or a block and head.
        recorded: the number in the manifest, measured when the source was written; None: there is none.
        measured: the mean over rows and tokens or queries.
        largest: the largest of them.
        limit: what ``judged`` may be at most.
        judged: the mean; for tokens as computed the largest, which rounding bounds.
    """

    source: str
    what: str
    recorded: float | None
    measured: float
    largest: float
    limit: float
    judged: float

    @property
    def kept(self) -> bool:
        """Whether it is within the limit."""
        return self.judged <= self.limit


def check_fidelity(
    cache: Path,
    *,
    data: str,
    rows: int = DEFAULT_ROWS,
    weights: Mapping[str, Path],
    seed: int = 0,
    device: str = "cpu",
) -> list[Comparison]:
    """Encode random valid rows again, in all views, and compare with what is stored.

    Args:
        cache: folder of the cache.
        data: the images it was made from, a folder or ``demo``.
        rows: how many rows; all, if there are fewer.
        weights: encoder → file of its weights; others come from the hub or its local copy.
        seed: of the choice of rows.
        device: ``cpu`` or ``cuda``.

    Returns:
        Of tokens one comparison, of attention one for each block and head.

    Raises:
        RepaError: images or weights that cannot be had, a row that is corrupt.
        CacheError: no teacher in the cache, a source that is not complete, other images, or other weights
            than recorded.
    """
    manifest = open_manifest(cache)
    models = dict.fromkeys(model_of(source) for source in manifest.sources if source != AUTOENCODER)
    if not models:
        raise CacheError(f"cache {cache} has no teacher to compare with", "add one with `repa preprocess`")
    found: list[Comparison] = []
    for model in models:
        found += _Check(cache, manifest, model, data=data, weights=weights, device=device).run(rows, seed)
    return found


class _Check:
    """The sources of one teacher."""

    def __init__(
        self,
        cache: Path,
        manifest: Manifest,
        model: str,
        *,
        data: str,
        weights: Mapping[str, Path],
        device: str,
    ) -> None:
        self._cache, self._manifest, self._model = cache, manifest, model
        self._data, self._weights, self._device = data, weights, torch.device(device)
        own = (model, attention_source(model))
        self._tokens, self._attention = (manifest.sources.get(source) for source in own)
        self._columns = tuple(
            name
            for source in own
            if source in manifest.sources
            for name in manifest.source_columns(source)
            if not name.endswith("/cls")
        )

    def run(self, rows: int, seed: int) -> Iterator[Comparison]:
        notes = self._attention.notes if self._attention is not None else {}
        divergences: list[NDArray[np.float64]] = []
        errors: list[NDArray[np.float64]] = []
        for exact, stored in self._batches(rows, seed, tuple(notes.get("blocks", ()))):
            if self._attention is not None:
                true = restore(self._model, "q", exact), restore(self._model, "k", exact)
                kept = restore_attention(self._model, notes, stored)
                divergence = attention_divergence(true, kept, float(notes["logit_scale"]))
                divergences.append(divergence.cpu().numpy())
            if self._tokens is not None:
                patch = exact[column_name(self._model, "patch")]
                error, _ = TokenErrors(*patch.shape[1:])(patch, restore(self._model, "patch", stored))
                errors.append(error.cpu().numpy())
        if errors:
            yield self._compare_tokens(np.concatenate(errors))
        if divergences:
            yield from self._compare_attention(np.concatenate(divergences), notes)

    def _batches(
        self, rows: int, seed: int, blocks: tuple[int, ...]
    ) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
        """Yield columns of random rows, view by view, as the teacher gives them now, and as stored."""
        names = [name for name in self._columns if not name.endswith(scale_column(""))]
        own = {name: path for name, path in self._weights.items() if name == self._model}
        live = LiveTeachers(
            self._cache, data=self._data, encoders=(self._model,), blocks=blocks, weights=own, exact=True
        )
        try:
            provenances = live.load(self._device)
            with CacheReader(self._cache, self._columns) as reader:
                for part in _random_rows(reader.valid_rows, rows, seed, provenances[self._model].batch_size):
                    stored = read_all_views(reader, part, self._columns)
                    for view in range(len(self._manifest.views)):
                        kept = {name: torch.from_numpy(each[:, view].copy()) for name, each in stored.items()}
                        yield (
                            live(part, names, np.full_like(part, view)),
                            {name: values.to(self._device) for name, values in kept.items()},
                        )
        finally:
            live.close()

    def _compare_tokens(self, error: NDArray[np.float64]) -> Comparison:
        assert self._tokens is not None, "there are tokens"
        mean, largest = float(error.mean()), float(error.max())
        tolerance = tolerance_of(self._tokens)
        fidelity = self._tokens.notes.get("fidelity")
        if fidelity is not None:
            recorded, judged = float(fidelity["cosine_error_mean"]), mean
            limit = _MARGIN * recorded + tolerance.cosine_mean
        else:
            # each number moves by δ of itself at most, so the token by δ of its length, its angle by asin δ
            delta = _ROUNDING[self._manifest.columns[column_name(self._model, "patch")].dtype]
            recorded, judged = None, largest
            limit = delta**2 / 2 * (1 + delta) + tolerance.cosine_largest
        return Comparison(
            source=self._model,
            what="tokens",
            recorded=recorded,
            measured=mean,
            largest=largest,
            limit=limit,
            judged=judged,
        )

    def _compare_attention(
        self, divergence: NDArray[np.float64], notes: Mapping[str, Any]
    ) -> Iterator[Comparison]:
        assert self._attention is not None, "there is attention"
        floor = tolerance_of(self._attention).divergence
        for entry in notes["fidelity"]["kl"]:
            values = divergence[:, notes["blocks"].index(entry["block"]), entry["head"] - 1]
            recorded, mean = float(entry["mean"]), float(values.mean())
            yield Comparison(
                source=attention_source(self._model),
                what=f"block {entry['block']}, head {entry['head']}",
                recorded=recorded,
                measured=mean,
                largest=float(values.max()),
                limit=_MARGIN * recorded + floor,
                judged=mean,
            )


def _random_rows(
    valid: NDArray[np.int64], count: int, seed: int, batch_size: int
) -> Sequence[NDArray[np.int64]]:
    """Draw so many of the valid rows, ascending, in batches."""
    drawn = np.random.Generator(np.random.Philox(key=seed)).permutation(valid)[:count]
    rows = np.sort(drawn)
    return [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
