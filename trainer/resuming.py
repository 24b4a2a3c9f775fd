"""The table of what a run that is resumed does with other settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from ..data.edge import shortened
from ..data.errors import RepaError
from .config import TrainConfig, normalised

OnResume: TypeAlias = Literal["free", "recorded", "bound"]

# what a run that is resumed does with another value of a setting:
#   free      take it, for nothing that is computed depends on it
#   recorded  take it from that step on, and say so in run.json
#   bound     refuse it, for the steps before would not be of the same run
ON_RESUME: Mapping[str, OnResume] = {
    "cache": "free",  # another path; that it holds the same rows, the checkpoint checks
    "recipe": "bound",
    "init": "bound",
    "targets": "bound",
    "model": "bound",
    "method": "bound",
    "condition": "bound",
    "qk_norm": "bound",
    "rope": "bound",
    "rms_norm": "bound",
    "swiglu": "bound",
    "adaln_zero": "bound",
    "objective": "bound",
    "latents": "bound",
    "decoder": "free",
    "latent_norm": "bound",
    "latent_scale": "bound",
    "latent_shift": "bound",
    "seed": "bound",
    "order": "bound",
    "shuffle_buffer": "bound",
    "batch_size": "bound",
    "accumulate": "bound",
    "max_steps": "free",
    "lr": "recorded",
    "lr_warmup": "recorded",
    "lr_schedule": "recorded",
    "betas": "recorded",
    "weight_decay": "recorded",
    "ema_decay": "recorded",
    "clip": "recorded",
    "label_dropout": "recorded",
    "precision": "bound",
    "matmul_precision": "recorded",
    "compile": "recorded",
    "activation_checkpointing": "free",  # the same numbers from less memory
    "holdout": "bound",
    "eval_every": "free",
    "checkpoint_every": "free",
    "keep_last": "free",
    "keep_every": "free",
    "preview_every": "free",
    "preview_count": "free",
    "preview_steps": "free",
    "preview_shift": "free",
    "preview_guidance": "free",
    "evaluate_every": "free",
    "evaluate_num": "free",
    "evaluate_metrics": "free",
    "evaluate_solver": "recorded",
    "evaluate_steps": "recorded",
    "evaluate_shift": "recorded",
    "evaluate_guidance": "recorded",
    "gradient_angle_every": "free",
    "gradient_angle_block": "free",
    "log_every": "free",
    "loggers": "free",
    "threads": "free",
    "check_crc": "free",
    "direct": "free",
    "trainer": "free",
}


@dataclass(frozen=True, kw_only=True)
class Change:
    """A setting that a run goes on with at another value.

    Attributes:
        key: dotted key.
        before: the value so far; None where there was none.
        now: the value from here on; None where there is none.
    """

    key: str
    before: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.key} ({_shown(self.before)} → {_shown(self.now)})"


def changes(before: Mapping[str, Any], now: TrainConfig) -> list[Change]:
    """Return what differs from the settings that a run had and is not free to.

    Args:
        before: `TrainConfig.to_dict` of the run; a key that was not there yet had its default.
        now: settings to go on with.

    Raises:
        RepaError: a setting that the run is bound to differs; ``field`` is the first one's key.
    """
    defaults = flat(TrainConfig(method_name=now.method_name, method=type(now.method)()).to_dict())
    old, new = flat(normalised(before)), flat(now.to_dict())
    found = [
        Change(key=key, before=then, now=new.get(key))
        for key in dict.fromkeys((*old, *new))
        if (then := old.get(key, defaults.get(key))) != new.get(key)
    ]
    bound = [each for each in found if on_resume(each.key, now) == "bound"]
    if bound:
        raise RepaError(
            f"the run has other settings: {', '.join(map(str, bound))}",
            "give the settings it has, or begin another run with --run, from these weights with --init",
            field=bound[0].key,
        )
    return [each for each in found if on_resume(each.key, now) == "recorded"]


def on_resume(key: str, config: TrainConfig) -> OnResume:
    """Return what a resumed run does with another value of a setting, see `ON_RESUME`."""
    if key == "max_steps" and config.lr_schedule != "constant":
        return "recorded"  # the learning rate falls towards it
    if key == "method.preset":
        return "free"  # a name for settings, each of which is looked at itself
    return ON_RESUME.get(key.partition(".")[0], "bound")


def flat(values: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of nested mappings by dotted keys."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def _shown(value: Any) -> str:
    return "none" if value is None else shortened(value)
