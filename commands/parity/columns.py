"""The columns of a cache against what its teachers give for the same images now."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ...data.format.columns import ATTENTION_KINDS, attention_source, column_name, source_of, split_column
from ...pipeline.columns.factored import restore_attention
from ...pipeline.columns.measures import attention_divergence
from ...trainer.methods.alignment import target
from .found import ColumnParity

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from ...data.format.manifest import Manifest
    from ...data.reading.loader import Batch
    from ...pipeline.replay.live import LiveTeachers


class StoredColumns:
    """The comparison of targets, batch after batch.

    Args:
        manifest: of the cache.
        teachers: called live.
        found: column → what is found, filled by `compare`.
    """

    def __init__(self, manifest: Manifest, teachers: LiveTeachers, found: dict[str, ColumnParity]) -> None:
        self._manifest = manifest
        self._teachers = teachers
        self._found = found
        self._divergences: dict[str, list[Tensor]] = {}

    def compare(self, cached: Batch, live: Batch) -> None:
        """Compare one batch, as stored and as computed now."""
        self._compare_values(cached, live)
        self._compare_attention(cached, live)

    def _compare_values(self, cached: Batch, live: Batch) -> None:
        """Compare the elements of each column, where it is stored in a form that has the teacher's own."""
        for name, exact in live.columns.items():
            if name not in self._teachers.columns:
                continue
            notes = self._manifest.sources[source_of(name)].notes
            spec = self._manifest.columns[name]
            entry = self._found.setdefault(name, ColumnParity(stored=spec.dtype))
            form = notes.get("form", "exact")
            if form != "exact":
                # its components are others than the teacher's: only products can be compared
                entry.stored = f"{form}, rank {notes['rank']} of {notes['head_width']}"
                continue
            stored = target(cached.columns, name, self._manifest.columns).float()
            wanted, there = _comparable(name, stored, notes, exact, self._teachers.notes)
            largest, error = _differences(wanted, there)
            entry.largest = max(entry.largest or 0.0, largest)
            seen = cached.step * len(cached.rows)
            mean = ((entry.cosine_error or 0.0) * seen + error * len(cached.rows)) / (seen + len(cached.rows))
            entry.cosine_error = mean

    def _compare_attention(self, cached: Batch, live: Batch) -> None:
        """Compare the attention that stored queries and keys give with the teacher's, whatever the form."""
        for name in self._teachers.columns:
            teacher, kind = split_column(name)
            if kind != ATTENTION_KINDS[0] or name not in live.columns:
                continue
            source = attention_source(teacher)
            notes, noted = self._manifest.sources[source].notes, self._teachers.notes[source]
            at = [notes["blocks"].index(block) for block in noted["blocks"]]
            queries, keys = restore_attention(teacher, notes, cached.columns)
            names = [column_name(teacher, each) for each in ATTENTION_KINDS]
            exact_queries, exact_keys = (live.columns[each].float() for each in names)
            divergence = attention_divergence(
                (exact_queries, exact_keys), (queries[:, at], keys[:, at]), noted["logit_scale"]
            )
            means = self._divergences.setdefault(source, [])
            means.append(divergence.mean(dim=(0, 3)).cpu())
            heads = torch.stack(means).mean(0)
            for each in names:
                self._found[each].kl_mean = heads.mean().item()
                self._found[each].kl_worst_head = heads.max().item()


def _comparable(
    name: str,
    stored: Tensor,
    notes: Mapping[str, Any],
    exact: Tensor,
    live_notes: Mapping[str, Mapping[str, Any]],
) -> tuple[Tensor, Tensor]:
    """Choose queries or keys of the blocks that both have. Keys are centred where the stored ones are."""
    if "blocks" not in notes:
        return stored, exact
    blocks = live_notes[source_of(name)]["blocks"]
    stored = stored[:, [notes["blocks"].index(block) for block in blocks]]
    if name.endswith("/k") and notes.get("keys") == "centred":
        exact = exact - exact.mean(dim=-2, keepdim=True)
    return stored, exact


def _differences(stored: Tensor, exact: Tensor) -> tuple[float, float]:
    """Compute the largest absolute difference, and the mean of 1 − cosine over the last axis.

    Both are exactly 0 where equal.
    """
    stored, exact = stored.double(), exact.double()
    cosine = torch.nn.functional.cosine_similarity(stored, exact, dim=-1)
    errors = torch.where((stored == exact).all(-1), 0, 1 - cosine)
    return (stored - exact).abs().max().item(), errors.mean().item()
