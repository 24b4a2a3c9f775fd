"""Distillation end to end, of the student's tokens from the cached ones, in steps that can be resumed.

The loss of a token is 1 − cosine to the cached one, over all patch tokens and the class feature, plus a small
squared error relative to the cached tokens' mean square, so that norms stay.
Trained are the blocks and the final norm. The images of a step and its rate are a function of seed and step
alone, so that a larger number of steps goes on from a smaller one.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from ...data.edge import parse_json
from ...data.errors import RepaError
from ...data.reading.order import EpochOrder, batch_views
from ...data.storage.files import make_folder, os_errors, write_file
from ..encoders.distilled import TrainingSettings  # noqa: TC001 - pydantic reads it
from .begun import require_same

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from ..encoders.timm_vit import TimmEncoder
    from .pairs import CachedPairs, Pairs

SQUARED_WEIGHT = 0.1
"""Of the squared error beside the cosine. Ours."""
MOST_STEPS = 10**9
TRAINED = ("blocks.", "norm.")
_ENTRY = "repa-distillation"
_BEGIN_AGAIN = "remove that file to begin again"
_BETAS, _EPSILON = (0.9, 0.99), 1e-8
SECOND_LAYER = ".mlp.fc2.weight"
SECOND_LAYER_RATE = 0.2
"""Of the rate, for the second layers. Ours, as measured: all idle channels of a layer change their output
alike, so that a step of AdamW there, which is as large whatever the gradient, overshoots first."""
WARM_UP = 10
"""Steps in which the rate rises to its full size. Ours; AdamW's second moments are of too few batches
before."""
_RULE = 2
"""Of how a step follows from the one before, to be raised when that changes."""


@dataclass(frozen=True, kw_only=True)
class _Kept:
    """What the file of a distillation says of the state in it."""

    settings: TrainingSettings
    step: Annotated[int, Field(ge=0, le=MOST_STEPS)]
    rule: int = 1
    start: float | None = None


class Distillation:
    """A student in training.

    Args:
        student: encoder with a ViT of `make_idle`, whose weights are trained in place.
        settings: of the run.
        pairs: the cache.
        rows: that are trained on.
        file: where the state is kept.

    Attributes:
        step: steps done.
        start: cosine of held-out patch tokens before the first step, once it has been measured.
        losses: of the steps done by this process.
    """

    def __init__(
        self,
        student: TimmEncoder,
        settings: TrainingSettings,
        pairs: CachedPairs,
        rows: NDArray[np.int64],
        file: Path,
    ) -> None:
        self._student, self._settings, self._pairs, self._rows = student, settings, pairs, rows
        self._file = file
        self._order = EpochOrder(seed=settings.seed, count=len(rows))
        model = student.model.requires_grad_(False)
        self._trained = {
            name: each.requires_grad_() for name, each in model.named_parameters() if name.startswith(TRAINED)
        }
        self._optimizer = torch.optim.AdamW(
            [{"params": [each], "share": _share(name)} for name, each in self._trained.items()],
            lr=settings.learning_rate,
            betas=_BETAS,
            eps=_EPSILON,
            weight_decay=0.0,
        )
        self.step = 0
        self.start: float | None = None
        self.losses: list[float] = []

    def resume(self) -> bool:
        """Go on where the state was kept, and return whether there was one.

        Raises:
            RepaError: it is of other settings, or damaged.
        """
        if not self._file.exists():
            return False
        kept, state = _read_kept(self._file)
        require_same(kept.settings, self._settings, self._file, f"give the same, or {_BEGIN_AGAIN}")
        if kept.step and kept.rule != _RULE:
            raise RepaError(
                f"the distillation in {self._file} was trained by another version, which trained otherwise",
                f"name another file with --out, or {_BEGIN_AGAIN}",
                field="--out",
            )
        self._require_form(state, moments=kept.step > 0)
        self._student.model.load_state_dict(_part(state, "model."))
        self.step, self.start = kept.step, kept.start
        if self.step:
            moments = {
                number: {
                    "step": torch.tensor(float(self.step)),
                    "exp_avg": state[f"average.{name}"],
                    "exp_avg_sq": state[f"squares.{name}"],
                }
                for number, name in enumerate(self._trained)
            }
            groups = self._optimizer.state_dict()["param_groups"]
            self._optimizer.load_state_dict({"state": moments, "param_groups": groups})
        return True

    def _require_form(self, state: dict[str, Tensor], *, moments: bool) -> None:
        """Refuse a state whose tensors are not those that `save` writes."""
        wanted = {f"model.{name}": each for name, each in self._student.model.state_dict().items()}
        for kind in ("average", "squares") if moments else ():
            wanted |= {f"{kind}.{name}": each for name, each in self._trained.items()}
        forms = [{name: (each.shape, each.dtype) for name, each in held.items()} for held in (state, wanted)]
        if forms[0] != forms[1]:
            raise RepaError(
                f"the tensors in {self._file} are not those of this distillation", _BEGIN_AGAIN, field="--out"
            )

    def save(self) -> None:
        """Keep the state, whole or not at all."""
        state = {f"model.{name}": each for name, each in self._student.model.state_dict().items()}
        for name, each in self._trained.items():
            moments = self._optimizer.state.get(each)
            if moments:
                state[f"average.{name}"], state[f"squares.{name}"] = (
                    moments["exp_avg"],
                    moments["exp_avg_sq"],
                )
        kept = _Kept(settings=self._settings, step=self.step, rule=_RULE, start=self.start)
        write_tensors(self._file, state, {_ENTRY: json.dumps(asdict(kept))})

    def run(self, steps: int, save_every: int, report: Callable[[int], None]) -> None:
        """Train until so many steps are done.

        Args:
            steps: of the whole run.
            save_every: steps after which the state is kept; it is at the end too.
            report: is told the images of each step.

        Raises:
            RepaError: a loss is not finite.
        """
        for block in self._student.model.blocks:
            # no other layer of the teachers behaves otherwise in training
            block.mlp.train()
        try:
            while self.step < steps:
                self._step()
                report(self._settings.batch_size)
                if self.step % save_every == 0 or self.step == steps:
                    self.save()
        finally:
            self._student.model.eval()

    def _step(self) -> None:
        size, seed = self._settings.batch_size, self._settings.seed
        positions = self._order.batch(self.step * size, size)
        count = len(self._pairs.reader.manifest.views)
        views = batch_views(seed=seed, step=self.step, batch_size=size, views=count)
        batch = self._pairs.read(self._rows[positions], views)
        loss = token_loss(self._student.compute(batch.images), batch)
        if not bool(torch.isfinite(loss)):
            raise RepaError(
                f"the loss of step {self.step + 1} is not finite",
                "give a smaller --learning-rate",
                field="--learning-rate",
            )
        for group in self._optimizer.param_groups:
            warm = min(1.0, (self.step + 1) / WARM_UP)
            group["lr"] = warm * group["share"] * self._settings.learning_rate
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        self.losses.append(loss.item())
        self.step += 1


def _share(name: str) -> float:
    return SECOND_LAYER_RATE if name.endswith(SECOND_LAYER) else 1.0


def token_loss(features: dict[str, Tensor], wanted: Pairs) -> Tensor:
    """Return the loss of a batch, see the module.

    Args:
        features: of the student, ``patch`` ``[B, T, D]`` and ``cls`` ``[B, D]``.
        wanted: the cached ones.
    """
    found = torch.cat([features["patch"], features["cls"].unsqueeze(1)], dim=1)
    tokens = torch.cat([wanted.patch, wanted.cls.unsqueeze(1)], dim=1)
    away = 1 - F.cosine_similarity(found, tokens, dim=-1).mean()
    error: Tensor = (found - tokens).square().mean() / tokens.square().mean()
    return away + SQUARED_WEIGHT * error


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file whole or not at all.

    Raises:
        RepaError: it cannot be written.
    """
    plain = {name: each.detach().cpu().contiguous() for name, each in tensors.items()}
    with os_errors("write", path):
        make_folder(path.parent)
        write_file(path, save(plain, metadata), path.parent)


def _read_kept(path: Path) -> tuple[_Kept, dict[str, Tensor]]:
    """Read the state of a distillation.

    Raises:
        RepaError: it cannot be read, or is none.
    """
    try:
        with safe_open(path, framework="pt") as file:
            entry = (file.metadata() or {}).get(_ENTRY)
        state = load_file(path)
    except (SafetensorError, OSError) as error:
        raise RepaError(
            f"{path} cannot be read as a distillation ({error})", _BEGIN_AGAIN, field="--out"
        ) from error
    if entry is None:
        raise RepaError(f"{path} is no state of a distillation", _BEGIN_AGAIN, field="--out")
    kept = parse_json(
        _Kept, entry.encode(), where=f"the header of {path}", remedy=_BEGIN_AGAIN, error=RepaError
    )
    return kept, state


def _part(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): each for name, each in state.items() if name.startswith(prefix)}
