"""`repa parity` compares a method's losses and gradients from a cache with those of the teacher called live.

Same initial weights, images, noise, times and conditions on both sides; they differ in the targets alone, so
what differs in the losses and in the gradients of the backbone is what storing the targets costs.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..data.errors import RepaError
from ..data.units import counted
from ..pipeline.images.names import default_cache
from .shared.live import LiveData, LiveEncoders, LiveRandom, LiveWeights, live_teachers

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import torch
    from rich.console import Console
    from torch import Tensor

    from ..data.reading.loader import Batch
    from ..pipeline.replay.live import LiveTeachers
    from ..trainer.config import TrainConfig
    from ..trainer.methods.base import Term
    from ..trainer.run.checked import Checked
    from ..trainer.step.module import TrainingModule

LOSS = "loss"
HALF_SCALE = 2.0**12


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


@dataclass(kw_only=True)
class TermParity:
    """A part of the loss on both sides, a value per batch.

    Attributes:
        cached: from the cache.
        live: from the live teacher.
        gradient_cosine: of the two gradients with respect to all parameters of the backbone, as one vector
            each; 1 where they are equal. Empty of a term that is only logged.
        gradient_difference: the norm of their difference, as a share of the live one's; empty likewise.
    """

    cached: list[float] = field(default_factory=list)
    live: list[float] = field(default_factory=list)
    gradient_cosine: list[float] = field(default_factory=list)
    gradient_difference: list[float] = field(default_factory=list)

    @property
    def largest(self) -> float:
        """Largest absolute difference of a batch."""
        return max(abs(a - b) for a, b in zip(self.cached, self.live, strict=True))


@dataclass(kw_only=True)
class ColumnParity:
    """A column as stored against the exact one.

    Attributes:
        stored: the form in which it is stored, for people.
        largest: largest absolute difference of an element; None where the form keeps other numbers, and only
            the attention maps can be compared.
        cosine_error: mean of 1 − cosine over the vectors of the last axis; None likewise.
        kl_mean: of queries and keys: KL(teacher ‖ stored) of their attention in nats, the mean over images,
            blocks, heads and query rows; None of tokens.
        kl_worst_head: its largest mean of a block and head; None likewise.
    """

    stored: str
    largest: float | None = None
    cosine_error: float | None = None
    kl_mean: float | None = None
    kl_worst_head: float | None = None


@dataclass(kw_only=True)
class Parity:
    """What `parity` found of one view of the images.

    Attributes:
        terms: name → both sides; ``loss`` is the weighted sum.
        columns: targets by name.
    """

    terms: dict[str, TermParity] = field(default_factory=dict)
    columns: dict[str, ColumnParity] = field(default_factory=dict)


def parity(flags: ParityFlags, *, console: Console | None = None) -> dict[str, Parity]:
    """Compare the first batches of a run with cached and with live targets, in each view of the cache.

    From a cache of float32 targets that was written on the same machine the two are equal to the bit.

    Args:
        flags: of the command.
        console: where to print; standard output by default.

    Returns:
        View → both sides of the same images in that view.

    Raises:
        RepaError: a mistake the user can mend.
    """
    from ..trainer.config import build
    from ..trainer.run.lightning_trainer import resolve_precision
    from .shared.terminal import PlainConsole

    if flags.batches < 1:
        raise RepaError(f"--batches {flags.batches} is too small", "give at least 1")
    given = {
        "method": flags.method,
        "model": flags.model,
        "cache": str(flags.cache or default_cache()),
        "batch_size": flags.batch_size,
        "max_steps": flags.batches,
        "seed": flags.seed,
    }
    config = build(None, given, (*(flags.assignments or ()), "targets=cache"))
    config = replace(config, precision=resolve_precision(config))
    checked = _checked(config)
    teachers = live_teachers(replace(config, targets="online"), flags, exact=True)
    try:
        comparison = _Comparison(config, checked, teachers)
        found = {view: comparison.run(number) for number, view in enumerate(comparison.views)}
    finally:
        teachers.close()
    for view, each in found.items():
        _print(each, view if len(found) > 1 else None, config, console or PlainConsole())
    return found


def _checked(config: TrainConfig, live: LiveTeachers | None = None) -> Checked:
    from ..trainer.run.checked import ProblemsError
    from ..trainer.run.checks import check

    checked = check(config, live)
    if checked.problems:
        raise ProblemsError(checked.problems)
    return checked


class _Comparison:
    """Both sides, on the training device."""

    def __init__(self, config: TrainConfig, checked: Checked, teachers: LiveTeachers) -> None:
        from ..trainer.run.fit import assemble
        from ..trainer.run.lightning_trainer import make_trainer

        online = _checked(replace(config, targets="online"), teachers)
        assert checked.method is not None, "the checks have passed"
        assert online.method is not None, "the checks have passed"
        assert checked.device is not None, "the checks have passed"
        self._config = config
        self._checked = checked
        self._teachers = teachers
        self._device: torch.device = checked.device
        teachers.load(self._device)
        self._methods = {"cached": checked.method, "live": online.method.to(self._device)}
        self._module: TrainingModule = assemble(config, checked, {})[0].to(self._device)
        self._context = make_trainer(config).precision_plugin.forward_context
        self._found = Parity()
        self._divergences: dict[str, list[Tensor]] = {}
        assert checked.manifest is not None, "the checks have passed"
        self.views = checked.manifest.views

    def run(self, view: int) -> Parity:
        """Compare the images of the first batches in one view."""
        self._found, self._divergences = Parity(), {}
        for cached in self._batches(view):
            self._compare(cached, self._with_live_targets(cached))
        return self._found

    def _batches(self, view: int) -> Iterator[Batch]:
        """Yield the first batches of the run, all of one view, on the device."""
        from ..data.reading.loader import CacheLoader
        from ..data.reading.reader import CacheReader

        reader, rows = self._checked.reader, self._checked.train_rows
        assert isinstance(reader, CacheReader), "the checks have passed"
        assert rows is not None, "the checks have passed"
        size, steps = self._config.batch_size, self._config.max_steps
        loader = CacheLoader(
            reader,
            rows=rows,
            batch_size=size,
            seed=self._config.seed,
            view=view,
            order=self._config.order,
            last_image=size * steps,
            # not the module's own, which asks the method of the side that was computed last
            columns_at=lambda step: self._names("cached", step),
        )
        for batch in loader:
            columns = {name: values.to(self._device) for name, values in batch.columns.items()}
            yield replace(batch, label=batch.label.to(self._device), columns=columns)

    def _with_live_targets(self, batch: Batch) -> Batch:
        from ..trainer.input.online import live_columns, with_targets

        names = live_columns(self._names("live", batch.step), self._teachers)
        return with_targets(batch, self._teachers, names)

    def _names(self, side: str, step: int) -> tuple[str, ...]:
        """List the columns that a side's method takes at a step."""
        from ..trainer.input.datamodule import columns_of_phase

        method = self._methods[side]
        return columns_of_phase(method, method.phase_at(step), self._module.backbone.y_embedder.columns)

    def _compare(self, cached: Batch, live: Batch) -> None:
        self._compare_columns(cached, live)
        self._compare_attention(cached, live)
        terms = {"cached": self._terms("cached", cached), "live": self._terms("live", live)}
        for side, found in terms.items():
            values = {name: term.value.item() for name, term in found.items()}
            weighted = [term.weight * values[name] for name, term in found.items() if term.weight is not None]
            for name, value in {LOSS: sum(weighted), **values}.items():
                getattr(self._found.terms.setdefault(name, TermParity()), side).append(value)
        self._compare_gradients(terms["cached"], terms["live"])

    def _terms(self, side: str, batch: Batch) -> dict[str, Term]:
        self._module.method = self._methods[side]
        with self._context():
            return self._module.terms(batch)

    def _compare_gradients(self, cached: Mapping[str, Term], live: Mapping[str, Term]) -> None:
        """Compare the gradients of the weighted terms, one after the other, and of their sum."""
        from ..trainer.step.gradients import cosine, relative_difference

        def compare(name: str, stored: Sequence[Tensor], exact: Sequence[Tensor]) -> None:
            difference = relative_difference(stored, exact).item()
            entry = self._found.terms[name]
            entry.gradient_difference.append(difference)
            entry.gradient_cosine.append(cosine(stored, exact).item() if difference else 1.0)

        sums: list[list[Tensor]] = []
        for name, term in cached.items():
            if term.weight is None:
                continue
            pair = [self._gradient(each) for each in (term, live[name])]
            compare(name, *pair)
            # summed here, and not by one more walk back through both graphs
            sums = [
                [a + b for a, b in zip(total, gradient, strict=True)] if total else list(gradient)
                for total, gradient in zip(sums or ([], []), pair, strict=True)
            ]
        compare(LOSS, *sums)

    def _gradient(self, term: Term) -> Sequence[Tensor]:
        """Compute the gradient of a weighted term with respect to the backbone's parameters."""
        import torch

        # float16 loses small numbers, so training scales its loss; what is compared has no scale
        scale = HALF_SCALE if self._config.precision == "16-mixed" else 1.0
        assert term.weight is not None, "only weighted terms have a gradient"
        return torch.autograd.grad(
            term.weight * scale * term.value,
            [each for each in self._module.backbone.parameters() if each.requires_grad],
            retain_graph=True,
            materialize_grads=True,
        )

    def _compare_attention(self, cached: Batch, live: Batch) -> None:
        """Compare the attention that stored queries and keys give with the teacher's, whatever the form."""
        import torch

        from ..data.format.columns import ATTENTION_KINDS, attention_source, column_name, split_column
        from ..pipeline.columns.factored import restore_attention
        from ..pipeline.columns.measures import attention_divergence

        manifest = self._checked.manifest
        assert manifest is not None, "the checks have passed"
        for name in self._teachers.columns:
            teacher, kind = split_column(name)
            if kind != ATTENTION_KINDS[0] or name not in live.columns:
                continue
            source = attention_source(teacher)
            notes, noted = manifest.sources[source].notes, self._teachers.notes[source]
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
                self._found.columns[each].kl_mean = heads.mean().item()
                self._found.columns[each].kl_worst_head = heads.max().item()

    def _compare_columns(self, cached: Batch, live: Batch) -> None:
        from ..data.format.columns import source_of
        from ..trainer.methods.alignment import target

        manifest = self._checked.manifest
        assert manifest is not None, "the checks have passed"
        for name, exact in live.columns.items():
            if name not in self._teachers.columns:
                continue
            notes = manifest.sources[source_of(name)].notes
            spec = manifest.columns[name]
            entry = self._found.columns.setdefault(name, ColumnParity(stored=spec.dtype))
            form = notes.get("form", "exact")
            if form != "exact":
                # its components are others than the teacher's: only products can be compared
                entry.stored = f"{form}, rank {notes['rank']} of {notes['head_width']}"
                continue
            stored = target(cached.columns, name, manifest.columns).float()
            wanted, there = _comparable(name, stored, notes, exact, self._teachers.notes)
            largest, error = _differences(wanted, there)
            entry.largest = max(entry.largest or 0.0, largest)
            seen = cached.step * len(cached.rows)
            mean = ((entry.cosine_error or 0.0) * seen + error * len(cached.rows)) / (seen + len(cached.rows))
            entry.cosine_error = mean


def _comparable(
    name: str,
    stored: Tensor,
    notes: Mapping[str, Any],
    exact: Tensor,
    live_notes: Mapping[str, Mapping[str, Any]],
) -> tuple[Tensor, Tensor]:
    """Choose queries or keys of the blocks that both have. Keys are centred where the stored ones are."""
    from ..data.format.columns import source_of

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
    import torch

    stored, exact = stored.double(), exact.double()
    cosine = torch.nn.functional.cosine_similarity(stored, exact, dim=-1)
    errors = torch.where((stored == exact).all(-1), 0, 1 - cosine)
    return (stored - exact).abs().max().item(), errors.mean().item()


def _print(found: Parity, view: str | None, config: TrainConfig, console: Console) -> None:
    from rich.table import Table

    images = config.batch_size * config.max_steps
    terms = Table(
        title=f"{config.method_name}, {config.model}: {counted(config.max_steps, 'batch')}, "
        f"{counted(images, 'image', ',')}{'' if view is None else f', {view}'}",
        title_justify="left",
    )
    headings = (
        "term",
        "cached",
        "live",
        "largest difference",
        "gradient: least cosine",
        "largest difference",
    )
    for heading in headings:
        terms.add_column(heading, justify="left" if heading == "term" else "right")
    for name, term in found.terms.items():
        means = [f"{sum(values) / len(values):.8f}" for values in (term.cached, term.live)]
        cosine = f"{min(term.gradient_cosine):.8f}" if term.gradient_cosine else "–"
        difference = f"{max(term.gradient_difference):.3g}" if term.gradient_difference else "–"
        terms.add_row(name, *means, f"{term.largest:.3g}", cosine, difference)
    console.print(terms)
    columns = Table()
    for heading in (
        "column",
        "stored as",
        "largest difference",
        "mean cosine error",
        "attention: KL mean",
        "worst head",
    ):
        columns.add_column(heading, justify="left" if heading in ("column", "stored as") else "right")
    for name, column in found.columns.items():
        values = (column.largest, column.cosine_error, column.kl_mean, column.kl_worst_head)
        columns.add_row(name, column.stored, *("–" if value is None else f"{value:.3g}" for value in values))
    console.print(columns)
