"""What a training run is: one frozen dataclass, from defaults, a YAML file, flags and ``--set key=value``."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal

import yaml

from ..data.errors import RepaError
from ..data.tars.names import command_in
from .methods.base import MethodConfig  # noqa: TC001 - annotations are read when settings are typed
from .methods.outside import find_method
from .methods.repa import RepaConfig
from .models.registry import FLOW, family_of
from .objectives import registry as objectives
from .objectives.base import ObjectiveConfig  # noqa: TC001 - as of the method
from .objectives.flow import FlowConfig
from .typed import coerce, from_mapping, nearest, parse_assignment, plain

if TYPE_CHECKING:
    from pathlib import Path


DEFAULT_METHOD = "repa"
_METHOD_KEYS = ("method", "method.name")

# what the run itself decides: setting it twice would let two values disagree
_OWNED_TRAINER_KEYS = {
    "max_steps": "max_steps",
    "max_epochs": "max_steps",
    "accumulate_grad_batches": "accumulate",
    "gradient_clip_val": "clip",
    "gradient_clip_algorithm": "clip",
    "precision": "precision",
    "log_every_n_steps": "log_every",
    "val_check_interval": "eval_every",
    "logger": "log_every",
    "callbacks": "preview_every",
    "enable_checkpointing": "checkpoint_every",
    "enable_progress_bar": "log_every",
    "enable_model_summary": "log_every",
    "use_distributed_sampler": "trainer.devices",
    "reload_dataloaders_every_n_epochs": "max_steps",
    "default_root_dir": "--run",
}
_NAMED_SECTIONS = ("method", "objective")
_SECTIONS = (*_NAMED_SECTIONS, "trainer")
# settings of the objective that were settings of the run before there was another
_OF_OBJECTIVE = ("path", "times")

# a run may be resumed with another value of these: they change nothing that was computed
RESUMABLE = (
    "cache",
    "max_steps",
    "checkpoint_every",
    "keep_last",
    "keep_every",
    "log_every",
    "eval_every",
    "preview_every",
    "preview_count",
    "preview_steps",
    "preview_guidance",
    "gradient_angle_every",
    "gradient_angle_block",
    "threads",
    "check_crc",
    "direct",
    "trainer",
)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of a training run; the defaults are REPA's (arXiv 2410.06940, section 4 and its appendix).

    Attributes:
        cache: folder of the cache, or a pattern of the tars it was exported to.
        targets: where the teachers' targets come from: the cache, or online from the teachers themselves.
        model: name of the backbone, ``SiT-<size>/<patch>``.
        method_name: which method: a name of ours, of an installed one, or ``module:Class``.
        method: settings of the method.
        objective: settings of what the backbone learns to predict; their type says what. ``path`` and
            ``times`` stand for ``objective.path`` and ``objective.times``, as they were called before.
        qk_norm: LayerNorm of queries and keys.
        seed: of initialisation, order and every draw.
        order: of the images: full, any at any place; or blocks, a few shards of the cache at a time, for
            disks that are slow at random places.
        shuffle_buffer: rows of the buffer that shuffles a cache that is read from tars.
        batch_size: images of an optimiser step, over all devices and accumulated micro-batches.
        accumulate: micro-batches of a step.
        max_steps: optimiser steps of the run.
        lr: learning rate, constant.
        betas: of AdamW.
        weight_decay: of AdamW.
        ema_decay: of the averaged weights, every step from a copy of the initial ones.
        clip: largest norm of the gradient; none leaves it.
        precision: of Lightning; auto is bf16-mixed on a CUDA device that computes it, else 32-true.
        compile: torch.compile the backbone.
        holdout: rows of the cache that are never trained on, evenly spaced; the held-out loss is theirs.
        eval_every: steps between held-out losses.
        checkpoint_every: steps between checkpoints.
        keep_last: newest checkpoints that are kept.
        keep_every: checkpoints of multiples of this step are kept for good; 0 keeps none of them.
        preview_every: steps between sample grids; 0 makes none.
        preview_count: images of a grid.
        preview_steps: Heun steps of a preview.
        preview_guidance: guidance scale of a preview.
        gradient_angle_every: steps between values of ``gradient_angle``, the cosine of the gradients of
            alignment and of the velocity loss; 0 makes none.
        gradient_angle_block: block over whose parameters; none takes the last that alignment reaches.
        log_every: steps between rows of metrics.csv, each the mean over the steps since the last.
        threads: reading threads of the loader.
        check_crc: compare every row read with its checksum.
        direct: read past the page cache (on), through it (off), or as is faster on that disk (auto).
        trainer: passed on to ``lightning.Trainer``: devices, num_nodes, strategy, accelerator, …
    """

    cache: str = ""
    targets: Literal["cache", "online"] = "cache"
    model: str = "SiT-B/2"
    method_name: str = DEFAULT_METHOD
    method: MethodConfig = field(default_factory=RepaConfig)
    qk_norm: bool = False
    objective: ObjectiveConfig = field(default_factory=FlowConfig)
    seed: int = 0
    order: Literal["full", "blocks"] = "full"
    shuffle_buffer: int = 4096
    batch_size: int = 256
    accumulate: int = 1
    max_steps: int = 400_000
    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    ema_decay: float = 0.9999
    clip: float | None = 1.0
    precision: Literal["auto", "32-true", "bf16-mixed", "16-mixed"] = "auto"
    compile: bool = False
    holdout: int = 0
    eval_every: int = 5_000
    checkpoint_every: int = 2_000
    keep_last: int = 2
    keep_every: int = 50_000
    preview_every: int = 10_000
    preview_count: int = 16
    preview_steps: int = 25
    preview_guidance: float = 1.0
    gradient_angle_every: int = 0
    gradient_angle_block: int | None = None
    log_every: int = 50
    threads: int = 2
    check_crc: bool = True
    direct: Literal["auto", "on", "off"] = "auto"
    trainer: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        least = {
            "batch_size": 1,
            "accumulate": 1,
            "max_steps": 1,
            "eval_every": 1,
            "checkpoint_every": 1,
            "keep_last": 1,
            "log_every": 1,
            "threads": 1,
            "preview_count": 1,
            "preview_steps": 1,
            "shuffle_buffer": 1,
            "seed": 0,
            "holdout": 0,
            "keep_every": 0,
            "preview_every": 0,
            "gradient_angle_every": 0,
            "weight_decay": 0,
        }
        for key, minimum in least.items():
            if not getattr(self, key) >= minimum:
                raise RepaError(f"{key}={getattr(self, key)} is too small: expected at least {minimum}")
        if not self.lr > 0:
            raise RepaError(f"lr={self.lr} is not valid: expected a number above 0")
        if not 0 <= self.ema_decay < 1:
            raise RepaError(f"ema_decay={self.ema_decay} is not valid: expected 0 <= ema_decay < 1")
        if self.clip is not None and not self.clip > 0:
            raise RepaError(f"clip={self.clip} is not valid: expected a number above 0, or none")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise RepaError(f"betas={self.betas} is not valid: expected two numbers, 0 <= beta < 1")

    @property
    def default_run_name(self) -> str:
        """Name of the run's folder when none is given: ``repa-SiT-B-2``."""
        return f"{self.method_name.rpartition(':')[2]}-{self.model.replace('/', '-')}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, the method's name first among its settings."""
        values: dict[str, Any] = plain(self)
        values["method"] = {"name": values.pop("method_name"), **values["method"]}
        values["objective"] = objectives.to_plain(self.objective)
        return values

    def to_yaml(self) -> str:
        """YAML that `load_yaml` and `build` turn into an equal configuration."""
        text: str = yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)
        return text


def load_yaml(path: Path) -> dict[str, Any]:
    """Values of a configuration file, as ``--config`` takes it.

    Raises:
        RepaError: the file cannot be read or is no YAML mapping.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RepaError(
            f"cannot read the configuration {path}: {error.strerror}", "name one that can be read"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        line = " ".join(str(error).split())
        raise RepaError(
            f"the configuration {path} is not YAML: {line}", "mend it, or name another"
        ) from error
    if not isinstance(values, dict):
        raise RepaError(
            f"the configuration {path} is not a mapping of settings", "see config.yaml of any run"
        )
    return values


def build(
    base: Mapping[str, Any] | None = None,
    flags: Mapping[str, Any] | None = None,
    assignments: Iterable[str] = (),
) -> TrainConfig:
    """The configuration of defaults < `base` < `flags` < `assignments`.

    A method from outside, ``module:Class``, is imported only if `flags` or `assignments` name it.

    Args:
        base: values of a configuration file.
        flags: key → value of the command line's own flags; None means not given.
        assignments: texts ``key=value`` with dotted keys, for example ``method.weight=0.25``.

    Raises:
        RepaError: an unknown key, with the nearest names, a value of another type, a command to run that is
            not of the command line, or a method that cannot be had.
    """
    values = _normalise(base or {})
    _check_sections(values)
    given = [(key, value) for key, value in (flags or {}).items() if value is not None]
    given += [parse_assignment(text) for text in assignments]
    for key, value in given:
        _assign(values, key, value)
    if "cache" not in dict(given):
        _refuse_command(values.get("cache"))
    settings = dict(values.pop("method", {}))
    name = str(settings.pop("name", DEFAULT_METHOD))
    from_command_line = any(key in _METHOD_KEYS and value == name for key, value in given)
    kind = find_method(name, may_import=from_command_line).config_class
    method = from_mapping(kind, settings, prefix="method.")
    objective = _objective(dict(values.pop("objective", {})), values.get("model", TrainConfig.model))
    trainer = _trainer_settings(values.pop("trainer", {}))
    scalars = _scalar_annotations()
    for key in values:
        if key not in scalars:
            names = (*scalars, *_SECTIONS, *_dotted(kind))
            raise RepaError(f"unknown setting {key}", f"{nearest(key, names)}")
    typed = {key: coerce(value, scalars[key], key) for key, value in values.items()}
    return TrainConfig(method_name=name, method=method, objective=objective, trainer=trainer, **typed)


def _objective(settings: dict[str, Any], model: Any) -> ObjectiveConfig:
    """The settings of an objective; without a name it is the one of the model's family."""
    name = settings.pop("name", None) or _objective_of(str(model))
    if name not in objectives.OBJECTIVES:
        raise RepaError(
            f"objective {name!r} is unknown", nearest(str(name), objectives.OBJECTIVES), field="objective"
        )
    return from_mapping(objectives.OBJECTIVES[name].config_class, settings, prefix="objective.")


def _objective_of(model: str) -> str:
    try:
        return family_of(model).objective
    except RepaError:
        # the checks report an unknown model, together with everything else
        return FLOW


def _normalise(values: Mapping[str, Any]) -> dict[str, Any]:
    """A copy in which ``method: repa`` is ``method: {name: repa}`` and ``path`` is ``objective.path``."""
    copy = {str(key): dict(value) if isinstance(value, Mapping) else value for key, value in values.items()}
    for section in _NAMED_SECTIONS:
        if isinstance(copy.get(section), str):
            copy[section] = {"name": copy[section]}
    for key in _OF_OBJECTIVE:
        if key in copy and isinstance(copy.get("objective", {}), Mapping):
            copy.setdefault("objective", {}).setdefault(key, copy.pop(key))
    return copy


def _refuse_command(cache: Any) -> None:
    """Check that a cache which a file names is data: a file may come from anybody."""
    command = command_in(cache) if isinstance(cache, str) else None
    if command is not None:
        raise RepaError(
            f"the configuration's cache is a command, {command!r}, and only the command line may run one",
            "give it with --cache",
            field="cache",
        )


def _assign(values: dict[str, Any], key: str, value: Any) -> None:
    section, dot, rest = key.partition(".")
    if section in _NAMED_SECTIONS and rest in ("", "name"):
        # settings of another method or objective mean nothing to this one
        before = values.get(section, {})
        kept = before if section == "objective" and "name" not in before else {}
        if before.get("name") != value:
            values[section] = {**kept, "name": value}
        return
    if key in _OF_OBJECTIVE:
        section, dot, rest = "objective", ".", key
    if not dot:
        if key == "trainer":
            raise RepaError(_not_a_section("trainer", value))
        values[key] = value
        return
    if section not in _SECTIONS:
        raise RepaError(f"unknown setting {key}", f"{nearest(key, (*_scalar_annotations(), *_dotted()))}")
    values.setdefault(section, {})[rest] = value


def _check_sections(values: Mapping[str, Any]) -> None:
    for section in _SECTIONS:
        if not isinstance(values.get(section, {}), Mapping):
            raise RepaError(_not_a_section(section, values[section]))


def _not_a_section(section: str, value: Any) -> str:
    return f"{section}={value!s} is not valid: expected settings, for example --set {section}.key=value"


def _dotted(kind: type[MethodConfig] = RepaConfig) -> list[str]:
    keys = [f"method.{item.name}" for item in fields(kind)]
    keys += [f"objective.{item.name}" for item in fields(FlowConfig)]
    return [*keys, "trainer.devices", "trainer.num_nodes", "trainer.strategy", "trainer.accelerator"]


def _scalar_annotations() -> dict[str, Any]:
    from typing import get_type_hints

    return {
        key: kind
        for key, kind in get_type_hints(TrainConfig).items()
        if key not in ("method_name", *_SECTIONS)
    }


def _trainer_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings for ``lightning.Trainer``, their names checked against its signature."""
    if not values:
        return {}
    from lightning.pytorch import Trainer

    known = [key for key in inspect.signature(Trainer.__init__).parameters if key not in ("self", "kwargs")]
    settings = {}
    for key, value in values.items():
        if key in _OWNED_TRAINER_KEYS:
            raise RepaError(f"trainer.{key} is decided by the run", f"set {_OWNED_TRAINER_KEYS[key]} instead")
        if key not in known:
            names = [f"trainer.{each}" for each in known]
            raise RepaError(f"unknown setting trainer.{key}", f"{nearest(f'trainer.{key}', names)}")
        settings[key] = yaml.safe_load(value) if isinstance(value, str) else value
    return settings


def differences(old: TrainConfig, new: TrainConfig) -> list[str]:
    """Keys that a resumed run may not change and that differ, as ``key (old → new)``."""
    before, after = _flat(old.to_dict()), _flat(new.to_dict())
    return [
        f"{key} ({before.get(key, 'absent')} → {after.get(key, 'absent')})"
        for key in dict.fromkeys((*before, *after))
        if key.split(".")[0] not in RESUMABLE and before.get(key) != after.get(key)
    ]


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
