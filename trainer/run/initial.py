"""Weights to begin with, of another run or of a checkpoint that somebody published."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...data.errors import RepaError
from ...data.reading.latents import scale_of
from ..models import registry as backbones
from ..models.published import FAMILY
from ..step.checkpoints import checkpoints_of, objective_said, own_checkpoint
from ..step.latents import NAME as LATENTS
from ..step.latents import TOKENS, TokenLatents
from ..step.module import CHECKPOINT_KEY
from .divergence import largest

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor, nn

    from ..models.base import BackboneConfig
    from ..step.latents import Latents
    from ..step.module import TrainingModule
    from .checked import Checked

FLAG = "--init"


@dataclass(frozen=True, kw_only=True)
class Initial:
    """Weights that a run begins with. The optimiser's moments are not taken.

    Attributes:
        backbone: state dict of the backbone.
        ema: state dict of its averaged copy.
        method: state dict of the method, empty where the file has none.
        statistics: what tokens were standardised by, mean and deviation, empty where they are no latents.
        record: where they are from, as plain values for run.json.
        notes: what differs from how they were trained, in words.
    """

    backbone: Mapping[str, Tensor]
    ema: Mapping[str, Tensor]
    method: Mapping[str, Tensor]
    record: Mapping[str, Any]
    statistics: Mapping[str, Tensor] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def load_into(self, module: TrainingModule) -> tuple[str, ...]:
        """Copy the weights. Those of a method with other parameters are left out.

        Returns:
            What differs from how they were trained, in words.

        Raises:
            RepaError: the backbone is conditioned in another way.
        """
        for network, weights in ((module.backbone, self.backbone), (module.ema, self.ema)):
            if not _fits(network, weights):
                raise RepaError(
                    f"the weights of {self.record['file']} do not fit this run's conditioning",
                    "take another file, or the method that they were trained with",
                    field=FLAG,
                )
            network.load_state_dict(weights)
        if _fits(module.method, self.method):
            module.method.load_state_dict(self.method)
        return (*self.notes, *self._moved(module.latents))

    def _moved(self, latents: Latents) -> Iterator[str]:
        """Yield how far tokens are standardised otherwise, in deviations of this run's latents."""
        if not isinstance(latents, TokenLatents) or not self.statistics:
            return
        mean, std = latents.mean.cpu(), latents.std.cpu()
        moved = float(((self.statistics["mean"] - mean) / std).abs().max())
        wider = float((self.statistics["std"] / std).log().abs().max().exp())
        if moved > 0 or wider > 1:
            yield (
                "they were trained on tokens standardised by other images: where most, the mean lies "
                f"{moved:.2g} deviations away, and a deviation is {wider:.3g} times another"
            )


def read_initial(path: str, checked: Checked) -> Initial:
    """Read the weights that a run is to begin with, and hold them against it.

    Args:
        path: folder of a run, whose newest checkpoint is taken, or a file: a checkpoint of a run, or a
            published ``.pt`` or ``.safetensors``.
        checked: the new run, that passed the checks.

    Raises:
        RepaError: there is no such file, it cannot be read, its weights are not finite, or its backbone is
            another.
    """
    file = _file_of(Path(path))
    try:
        ours = own_checkpoint(file)
        initial, backbone = _published(file, checked) if ours is None else _own(file, ours, checked)
    except RepaError as error:
        raise RepaError(error.what, error.remedy, field=FLAG) from error
    if checked.backbone is None:
        raise RuntimeError("the checks have not passed")
    if backbone != checked.backbone:
        was, now = backbones.to_plain(backbone), backbones.to_plain(checked.backbone)
        different = {name: f"{was.get(name)} → {now[name]}" for name in now if was.get(name) != now[name]}
        said = ", ".join(f"{name} ({values})" for name, values in different.items())
        raise RepaError(
            f"the backbone of {file} is not the one of this run: {said}",
            # what is denoised beside the latent is the method's
            "choose the --method that the weights were trained with, or other weights"
            if [*different] == ["token_widths"]
            else "choose the same --model, or a cache with the same latents and classes",
            field=FLAG,
        )
    if not math.isfinite(float(largest([*initial.backbone.values(), *initial.ema.values()]))):
        raise RepaError(f"the weights of {file} are not finite", "take an older checkpoint", field=FLAG)
    return initial


def _file_of(path: Path) -> Path:
    if path.is_dir():
        found = checkpoints_of(path)
        if not found:
            raise RepaError(f"{path} holds no checkpoint", "name a run that has one, or a file", field=FLAG)
        return found[max(found)]
    if not path.exists():
        raise RepaError(f"there is no {path}", "name the folder of a run, or a checkpoint", field=FLAG)
    return path


def _own(file: Path, checkpoint: Mapping[str, Any], checked: Checked) -> tuple[Initial, BackboneConfig]:
    said = checkpoint[CHECKPOINT_KEY]
    weights = checkpoint["state_dict"]

    def under(name: str) -> dict[str, Tensor]:
        return {key.removeprefix(name): each for key, each in weights.items() if key.startswith(name)}

    scale = scale_of(said["latent"], where=str(file), remedy="take another file", error=RepaError)
    was = tuple((said.get(TOKENS) or {}).get("columns", ()))
    notes = []
    same = was == (() if checked.tokens is None else checked.tokens.columns)
    if not same:
        notes.append("they were trained on other latents than this run's")
    elif not was and scale != checked.scale:
        notes.append("they were trained on latents of another scale than this run's")
    if not said.get("predicts", True):
        notes.append("they are of a warm-up: blocks that it leaves out are as they were drawn")
    initial = Initial(
        backbone=under("backbone."),
        ema=under("ema."),
        method=under("method."),
        statistics=under(f"{LATENTS}.") if same else {},
        record={"file": str(file), "steps": checkpoint["global_step"], "objective": objective_said(said)},
        notes=tuple(notes),
    )
    return initial, backbones.from_plain(said["backbone"])


def _published(file: Path, checked: Checked) -> tuple[Initial, BackboneConfig]:
    family = None
    try:
        name, averaged = backbones.load_any_published(file, weights="ema")
    except RepaError as error:
        if error.field != FAMILY or checked.backbone is None:
            raise
        # the file may be of several families, and the run says which it begins with
        family = backbones.family_name(checked.backbone)
        name, averaged = backbones.load_any_published(file, weights="ema", family=family)
    try:
        _, raw = backbones.load_any_published(file, weights="model", family=family)
    except RepaError:
        raw = averaged  # a published file may hold the averaged weights alone
    initial = Initial(
        backbone=raw.backbone,
        ema=averaged.backbone,
        method={},
        record={
            "file": str(file),
            "steps": averaged.steps,
            "objective": {"name": name, **averaged.objective},
        },
    )
    return initial, averaged.config


def _fits(network: nn.Module, weights: Mapping[str, Tensor]) -> bool:
    """Tell whether a network has exactly these weights, by name and shape."""
    own = network.state_dict()
    return own.keys() == weights.keys() and all(own[key].shape == weights[key].shape for key in own)
