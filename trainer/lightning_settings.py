"""The settings of a run that are passed on to ``lightning.Trainer``."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, get_type_hints

from ..data.errors import RepaError
from .added_callbacks import SETTING as CALLBACKS
from .settings_file import parse_yaml
from .typed import coerce, unknown_setting

if TYPE_CHECKING:
    from collections.abc import Mapping

# settings of Lightning's trainer that the run decides, so that two values cannot disagree
_OWNED_KEYS = {
    "max_steps": "max_steps",
    "max_epochs": "max_steps",
    "accumulate_grad_batches": "accumulate",
    "gradient_clip_val": "clip",
    "gradient_clip_algorithm": "clip",
    "precision": "precision",
    "log_every_n_steps": "log_every",
    "val_check_interval": "eval_every",
    "logger": "loggers",
    "enable_checkpointing": "checkpoint_every",
    "enable_progress_bar": "log_every",
    "enable_model_summary": "log_every",
    "use_distributed_sampler": "trainer.devices",
    "reload_dataloaders_every_n_epochs": "max_steps",
    "default_root_dir": "--run",
}


def lightning_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """Check the names of settings for ``lightning.Trainer`` against its signature.

    Args:
        values: name → value, a text as YAML writes it.

    Returns:
        Name → value, read from the text.

    Raises:
        RepaError: a name that it does not have or that the run decides, or a value of another type; ``field``
            is the key.
    """
    if not values:
        return {}
    from lightning.pytorch import Trainer

    hints = get_type_hints(Trainer.__init__)
    known = [key for key in inspect.signature(Trainer.__init__).parameters if key not in ("self", "kwargs")]
    settings = {}
    for name, value in values.items():
        key = f"trainer.{name}"
        if name in _OWNED_KEYS:
            instead = f"set {_OWNED_KEYS[name]} instead"
            raise RepaError(f"{key} is decided by the run", instead, field=key)
        if name not in known:
            raise unknown_setting(key, [f"trainer.{each}" for each in known])
        settings[name] = value
        if key == CALLBACKS:
            settings[name] = list(coerce(value, tuple[str, ...], key))
            continue
        if isinstance(value, str):
            remedy = f"give {key} a value as YAML writes it"
            settings[name] = parse_yaml(value, where=key, remedy=remedy, field=key)
        # as Lightning reads it, so that each is one of ours or theirs however it is written
        if name == "strategy" and isinstance(settings[name], str):
            settings[name] = settings[name].lower()
        # only these: other settings may have many forms, which Lightning checks itself
        if hints.get(name) in (bool, bool | None):
            settings[name] = coerce(settings[name], bool | None, key)
    return settings
