"""The first steps of a run that another run has made, held against this one before they are taken."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ...data.errors import RepaError
from ..models import registry as backbones
from ..resuming import flat
from ..step.checkpoints import checkpoints_of, load_checkpoint
from ..step.module import CHECKPOINT_KEY
from ..typed import from_mapping
from .divergence import largest

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor

    from ..config import TrainConfig
    from ..methods.base import FirstSteps, Method
    from ..step.module import TrainingModule
    from .checked import Checked

# of a cache's identity: what the order of the images depends on changes no weight of another run
_NOT_OF_ROWS = "order"


@dataclass(frozen=True, kw_only=True)
class TakenSteps:
    """Steps that another run has made.

    Attributes:
        step: how many, where this run goes on.
        weights: state dict of that run's module.
        record: where they are from, as plain values for run.json.
    """

    step: int
    weights: Mapping[str, Tensor]
    record: Mapping[str, Any]

    def load_into(self, module: TrainingModule) -> None:
        """Copy the weights that those steps trained. The others are as this run drew them.

        The averaged weights begin at that step, as a hard copy.

        Raises:
            RepaError: the file lacks a weight, or has it in another shape.
        """
        state = module.state_dict()
        for name in copied(module, self.step):
            given = self.weights.get(name)
            if given is None or given.shape != state[name].shape:
                raise RepaError(
                    f"{self.record['file']} has no {name} of this run's shape",
                    "take another checkpoint",
                    field=self.record["setting"],
                )
            state[name] = given
        module.load_state_dict(state)


def check_first_steps(config: TrainConfig, method: Method, found: Checked) -> None:
    """Check whether a run can begin with steps of another, and say what its own first ones leave out.

    The other run itself is looked at by `read_first_steps`.

    Args:
        config: of the run.
        method: of the run.
        found: takes problems and warnings.
    """
    taken = method.first_steps()
    if taken is not None and config.init:
        found.add(
            f"init and method.{taken.setting} both say what the run begins with",
            "leave one of them out",
            field="init",
        )
    if taken is not None and taken.step >= config.max_steps:
        found.add(
            f"the run begins at step {taken.step:,} and would end at {config.max_steps:,}",
            "set a larger --max-steps",
            field="--max-steps",
        )
    begins = 0 if taken is None else taken.step
    untrained = [phase for phase in method.phases() if not method.predicts_after(phase.start + 1)]
    if untrained and not method.predicts_after(begins + 1):
        last = untrained[-1]
        until = f"step {last.stop:,}" if last.stop is not None and last.stop < config.max_steps else "its end"
        names = ", ".join(phase.name for phase in untrained)
        found.warnings.append(
            f"no held-out loss, previews or evaluations until {until}: phase {names} does not train what "
            "they need"
        )


def copied(module: TrainingModule, step: int) -> tuple[str, ...]:
    """Name the weights that the steps before one train or hold, as in the module's state dict.

    They are those of backbone and method, but for what is idle in every phase until then.
    """
    phases = [phase for phase in module.method.phases() if phase.start < step]
    names = {parameter: name for name, parameter in module.named_parameters()}
    idle = [{names[each] for each in module.idle_parameters(phase)} for phase in phases]
    left = set.intersection(*idle) if idle else set()
    return tuple(
        name for name in module.state_dict() if name.startswith(("backbone.", "method.")) and name not in left
    )


def read_first_steps(checked: Checked, config: TrainConfig, identity: Mapping[str, Any]) -> TakenSteps | None:
    """Read the weights of the run that made the first steps, and hold that run against this one.

    Args:
        checked: this run, that passed the checks.
        config: its settings.
        identity: see `identity_of`.

    Returns:
        The weights, None where this run makes its first steps itself.

    Raises:
        RepaError: there is no such checkpoint, it cannot be read, or that run's cache, teacher, latents,
            backbone or settings are others, all of which are named; ``field`` is the method's setting.
    """
    method = checked.method
    if method is None:
        raise RuntimeError("the checks have not passed")
    wanted = method.first_steps()
    if wanted is None:
        return None
    field = f"method.{wanted.setting}"
    file, checkpoint = _checkpoint_of(wanted, field)
    said = checkpoint[CHECKPOINT_KEY]
    different = [
        *_different_method(said, config, method, wanted),
        *_different_cache(said, identity),
        *(key for key in ("latent", "condition") if said.get(key) != identity.get(key)),
        *_different_backbone(said["backbone"], identity["backbone"]),
        *_different_holdout(said, config),
    ]
    floats = [each for each in checkpoint["state_dict"].values() if each.is_floating_point()]
    if not different and not math.isfinite(float(largest(floats))):
        raise RepaError(f"the weights of {file} are not finite", "take another run", field=field)
    if different:
        raise RepaError(
            f"the steps of {file} are not this run's first: {'; '.join(different)}",
            "give this run what that one has, or let it make its first steps itself",
            field=field,
        )
    theirs, ours = flat(said["settings"]), flat(config.to_dict())
    return TakenSteps(
        step=wanted.step,
        weights=checkpoint["state_dict"],
        record={
            "setting": field,
            "file": str(file),
            "steps": wanted.step,
            # what need not be the same, for who reads the results
            "differs": {key: [theirs.get(key), ours[key]] for key in ours if theirs.get(key) != ours[key]},
        },
    )


def _checkpoint_of(wanted: FirstSteps, field: str) -> tuple[Path, dict[str, Any]]:
    """Load the checkpoint of the steps that a method names.

    Raises:
        RepaError: there is none, it cannot be read, or it is of another step; ``field`` is the one given.
    """
    try:
        file = _file_of(wanted)
    except RepaError as error:
        raise RepaError(error.what, error.remedy, field=field) from error
    try:
        checkpoint = load_checkpoint(file)
    except RepaError as error:
        # its own remedy is for the run that the file is of, which is another
        raise RepaError(
            error.what, "name another run, or its checkpoint of that step", field=field
        ) from error
    if checkpoint["global_step"] != wanted.step:
        raise RepaError(
            f"{file} is of step {checkpoint['global_step']:,}, and this run begins at {wanted.step:,}",
            "name its checkpoint of that step, or its run",
            field=field,
        )
    return file, checkpoint


def _file_of(wanted: FirstSteps) -> Path:
    path = Path(wanted.run)
    if not path.is_dir():
        if not path.exists():
            raise RepaError(f"there is no {path}", "name the folder of a run, or its checkpoint")
        return path
    found = checkpoints_of(path)
    if wanted.step not in found:
        steps = ", ".join(f"{step:,}" for step in found)
        raise RepaError(
            f"{path} has no checkpoint of step {wanted.step:,}, where this run begins",
            f"it has those of {steps}" if found else "name the folder of a run that has one",
        )
    return found[wanted.step]


def _different_method(
    said: Mapping[str, Any], config: TrainConfig, method: Method, wanted: FirstSteps
) -> Iterator[str]:
    settings = dict(said.get("settings", {}).get("method", {}))
    name = settings.pop("name", None)
    settings.pop("preset", None)
    if name != config.method_name:
        yield f"method ({name} → {config.method_name})"
        return
    try:
        asked = from_mapping(type(config.method), settings, prefix="method.")
    except RepaError as error:
        # of another version of this program, or of a file that somebody has made
        yield error.what
        return
    with torch.device("meta"):
        theirs = type(method)(asked, method.backbone, method.specs, method.grids, method.notes)
    for key in wanted.same:
        was, now = getattr(theirs.config, key), getattr(method.config, key)
        if was != now:
            yield f"method.{key} ({was} → {now})"
    for phase in (each for each in method.phases() if each.start < wanted.step):
        last = wanted.step if phase.stop is None else min(phase.stop, wanted.step)
        # a longer warm-up begins with the steps of a shorter one
        for step in dict.fromkeys((phase.start, last - 1)):
            was, now = theirs.phase_at(step).name, phase.name
            if was != now:
                yield f"phase of step {step:,} ({was} → {now})"
        was, now = (", ".join(each.columns(phase)) for each in (theirs, method))
        if was != now:
            yield f"targets ({was} → {now})"


def _different_cache(said: Mapping[str, Any], identity: Mapping[str, Any]) -> Iterator[str]:
    was, now = ({**each["cache"], **each.get("live", {})} for each in (said, identity))
    for key in dict.fromkeys((*was, *now)):
        if key != _NOT_OF_ROWS and was.get(key) != now.get(key):
            yield f"cache ({key})"


def _different_backbone(was: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    before = {"family": backbones.FIRST, **was}
    for key, value in now.items():
        if before.get(key) != value:
            yield f"backbone.{key} ({before.get(key)} → {value})"


def _different_holdout(said: Mapping[str, Any], config: TrainConfig) -> Iterator[str]:
    """Name the held-out rows where those steps may have trained on this run's."""
    was = said.get("settings", {}).get("holdout")
    if config.holdout and was != config.holdout:
        yield f"holdout ({was} → {config.holdout})"
