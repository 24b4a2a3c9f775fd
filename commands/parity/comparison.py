"""The two sides of `repa parity`, step by step on the same images, losses and gradients."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from ...data.reading.loader import CacheLoader
from ...data.reading.reader import CacheReader
from ...trainer.input.datamodule import columns_of_phase
from ...trainer.input.online import live_columns, with_targets
from ...trainer.run.assembly import assemble
from ...trainer.run.checked import ProblemsError
from ...trainer.run.checks import check
from ...trainer.run.lightning_trainer import make_trainer
from ...trainer.step.gradients import cosine, relative_difference
from .columns import StoredColumns
from .found import Parity, TermParity

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor

    from ...data.reading.loader import Batch
    from ...pipeline.replay.live import LiveTeachers
    from ...trainer.config import TrainConfig
    from ...trainer.methods.base import Term
    from ...trainer.run.checked import Checked
    from ...trainer.step.module import TrainingModule

LOSS = "loss"
HALF_SCALE = 2.0**12


def checked_run(config: TrainConfig, live: LiveTeachers | None = None) -> Checked:
    """Return a run that passes the checks.

    Raises:
        ProblemsError: it does not.
    """
    checked = check(config, live)
    if checked.problems:
        raise ProblemsError(checked.problems)
    return checked


class Comparison:
    """Both sides, on the training device.

    Args:
        config: of the run, from the cache.
        checked: the same, that passed the checks.
        teachers: called live.

    Attributes:
        manifest: of the cache.
    """

    def __init__(self, config: TrainConfig, checked: Checked, teachers: LiveTeachers) -> None:
        online = checked_run(replace(config, targets="online"), teachers)
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
        assert checked.manifest is not None, "the checks have passed"
        self.manifest = checked.manifest

    def run(self, view: int) -> Parity:
        """Compare the images of the first batches in one view."""
        self._found = Parity()
        columns = StoredColumns(self.manifest, self._teachers, self._found.columns)
        for cached in self._batches(view):
            live = self._with_live_targets(cached)
            columns.compare(cached, live)
            self._compare(cached, live)
        return self._found

    def _batches(self, view: int) -> Iterator[Batch]:
        """Yield the first batches of the run, all of one view, on the device."""
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
        names = live_columns(self._names("live", batch.step), self._teachers)
        return with_targets(batch, self._teachers, names)

    def _names(self, side: str, step: int) -> tuple[str, ...]:
        """List the columns that a side's method takes at a step."""
        method = self._methods[side]
        condition, latents = self._module.backbone.y_embedder.columns, self._module.latents.columns
        return columns_of_phase(method, method.phase_at(step), condition, latents)

    def _compare(self, cached: Batch, live: Batch) -> None:
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
        # float16 loses small numbers, so training scales its loss; what is compared has no scale
        scale = HALF_SCALE if self._config.precision == "16-mixed" else 1.0
        assert term.weight is not None, "only weighted terms have a gradient"
        return torch.autograd.grad(
            term.weight * scale * term.value,
            [each for each in self._module.backbone.parameters() if each.requires_grad],
            retain_graph=True,
            materialize_grads=True,
        )
