"""The configuration of a training run, one frozen dataclass of defaults, a YAML file, flags and ``--set``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Annotated, Any, Literal, TypeAlias, get_args, get_type_hints

import yaml
from annotated_types import Ge, Gt, Le, Lt

from ..data.edge import shortened
from ..data.errors import RepaError
from ..data.format.columns import LABEL, MOMENTS
from ..data.tars.names import command_in
from .added_callbacks import SETTING as CALLBACKS
from .added_callbacks import find_callback
from .compiling import Compile
from .lightning_settings import lightning_settings
from .methods.base import MethodConfig  # noqa: TC001 - as of Compile
from .methods.named_presets import with_preset
from .methods.outside import find_method
from .methods.repa import RepaConfig
from .models.conditioning import DROP_PROBABILITY
from .models.registry import FLOW, family_of
from .objectives import registry as objectives
from .objectives.base import ObjectiveConfig  # noqa: TC001 - as of the method
from .objectives.flow import FlowConfig
from .typed import check_fields, coerce, from_mapping, nearest, parse_assignment, plain, unknown_setting

DEFAULT_METHOD = "repa"
_METHOD_KEYS = ("method", "method.name")
OF_METHOD = ("method_name", "method_preset")
NAMED_SECTIONS = ("method", "objective")
SECTIONS = (*NAMED_SECTIONS, "trainer")
RECIPE = "recipe"
# settings of the objective that were settings of the run before there was another
_OF_OBJECTIVE = ("path", "times")

# no quantity here is larger in earnest, and what is would end in an overflow deep inside a library
_MOST = 10**12
_Count: TypeAlias = Annotated[int, Ge(0), Le(_MOST)]
_Positive: TypeAlias = Annotated[int, Ge(1), Le(_MOST)]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of a training run. The defaults are REPA's (arXiv 2410.06940, section 4 and its appendix).

    Attributes:
        cache: folder of the cache, or a pattern of the tars it was exported to.
        recipe: recipe that the settings began with, noted by ``--recipe``, which alone gives it.
        init: run or checkpoint whose weights the run begins with; empty draws them.
        targets: where the teachers' targets come from: the cache, or online from the teachers themselves.
        model: name of the backbone, ``SiT-<size>/<patch>``; where it is left out, `build` takes the method's.
        condition: column that the network is conditioned on: the label, or one of a kind that a condition is
            made of.
        method_name: which method: a name of ours, of an installed one, or ``module:Class``.
        method_preset: named preset that the method's settings began with; empty is none. `build` fills it in.
        method: settings of the method.
        objective: settings of what the backbone learns to predict; their type says what. ``path`` and
            ``times`` stand for ``objective.path`` and ``objective.times``, as they were called before.
        qk_norm: norm of queries and keys.
        rope: rotary positions of queries and keys, of row and column; none takes the backbone's own choice.
        rms_norm: RMSNorm with gain in place of LayerNorm; none takes the backbone's own choice.
        swiglu: gated MLP of two thirds of the width; none takes the backbone's own choice.
        adaln_zero: of MM-DiT, first weights with gates and output at zero; none takes the released code's.
        latents: column that the network learns to make: the autoencoder's moments, or a teacher's patch
            tokens, each position and channel standardised.
        decoder: of such tokens, AutoencoderRAE of diffusers, a folder or a name on the hub; makes images for
            previews, evaluations and `repa sample`.
        latent_norm: what latents are normalised by: autoencoder, what its configuration says; channel, mean
            and standard deviation of each channel of the cache; sd, the one factor of Stable Diffusion.
        latent_scale: what latents are multiplied by; none takes the factor of latent_norm, which is 1 for
            channel.
        latent_shift: what is subtracted from latents first; none takes that of latent_norm.
        seed: of initialisation, order and every draw.
        order: of the images: full, any after any other; or blocks, a few shards of the cache at a time, for
            disks that are slow at random offsets.
        shuffle_buffer: rows of the buffer that shuffles a cache that is read from tars.
        batch_size: images of an optimiser step, over all devices and accumulated micro-batches.
        accumulate: micro-batches of a step.
        max_steps: optimiser steps of the run.
        lr: learning rate; the highest, where it warms up or falls.
        lr_warmup: steps over which the learning rate rises from 0, on a line.
        lr_schedule: of the learning rate after that: constant, or falling to 0 at max_steps, on a line or
            half a cosine.
        betas: of AdamW.
        weight_decay: of AdamW.
        ema_decay: of the averaged weights, every step from a copy of the initial ones.
        clip: largest norm of the gradient; none leaves it.
        label_dropout: how often a label is replaced by the null class, which guidance needs.
        precision: of Lightning; auto is bf16-mixed on a CUDA device that computes it, else 32-true.
        matmul_precision: of products of float32 on CUDA, convolutions too: highest, float32; high, TF32;
            auto, highest where all is float32 (32-true), high for what mixed precision leaves in float32.
        compile: what torch.compile compiles: blocks, each block of the backbone by itself; whole, the
            backbone in one piece; off, nothing; auto, blocks on a CUDA device that can, else nothing. The
            method's losses go along.
        activation_checkpointing: off, or N: of every N-th block of the backbone the inputs alone are kept for
            the backward pass, which computes the block again; 1 saves the most memory.
        holdout: rows of the cache that are never trained on, evenly spaced; the held-out loss is theirs.
        eval_every: steps between held-out losses.
        checkpoint_every: steps between checkpoints.
        keep_last: newest checkpoints that are kept.
        keep_every: checkpoints of multiples of this step are kept for good; 0 keeps none of them.
        preview_every: steps between sample grids; 0 makes none.
        preview_count: images of a grid.
        preview_steps: Heun steps of a preview, of a DiT steps of DDIM.
        preview_shift: shift of the times of a preview, as ``repa sample --shift``.
        preview_guidance: guidance scale of a preview.
        evaluate_every: steps between evaluations of samples of the averaged weights, as by `repa evaluate`; 0
            makes none.
        evaluate_num: samples of an evaluation; its curve is named after it, for figures of different numbers
            cannot be compared.
        evaluate_metrics: names between commas, as of ``repa evaluate --metrics``, against the run's cache.
        evaluate_solver: solver of those samples; where it is left out, `build` takes the objective's first.
        evaluate_steps: steps of that solver.
        evaluate_shift: shift of the times of that solver.
        evaluate_guidance: guidance scale of those samples.
        gradient_angle_every: steps between values of ``gradient_angle``, the cosine of the gradients of
            alignment and of the objective; 0 makes none.
        gradient_angle_block: block over whose parameters; none takes the last that alignment reaches.
        log_every: steps between rows of metrics.csv, each the mean over the steps since the last.
        loggers: of Lightning's, which get metrics, previews and the configuration beside metrics.csv, which
            is always written; tensorboard, wandb and trackio are packages of their own.
        threads: reading threads of a rank; none takes two, or one where the ranks of a machine have a core
            or less each.
        check_crc: compare every row read with its checksum.
        direct: read past the page cache (on), through it (off), or as is faster on that disk (auto).
        trainer: passed on to ``lightning.Trainer``: devices, num_nodes, strategy, accelerator, …;
            trainer.callbacks are names of callbacks to add, ``my_module:MyCallback`` from the command line
            alone.
    """

    cache: str = ""
    recipe: str = ""
    init: str = ""
    targets: Literal["cache", "online"] = "cache"
    model: str = "SiT-B/2"
    condition: str = LABEL
    method_name: str = DEFAULT_METHOD
    method_preset: str = ""
    method: MethodConfig = field(default_factory=RepaConfig)
    qk_norm: bool = False
    rope: bool | None = None
    rms_norm: bool | None = None
    swiglu: bool | None = None
    adaln_zero: bool | None = None
    objective: ObjectiveConfig = field(default_factory=FlowConfig)
    latents: str = MOMENTS
    decoder: str = ""
    latent_norm: Literal["autoencoder", "channel", "sd"] = "autoencoder"
    latent_scale: Annotated[float, Gt(0)] | None = None
    latent_shift: float | None = None
    seed: Annotated[int, Ge(0), Lt(2**63)] = 0
    order: Literal["full", "blocks"] = "full"
    shuffle_buffer: _Positive = 4096
    batch_size: _Positive = 256
    accumulate: _Positive = 1
    max_steps: _Positive = 400_000
    lr: Annotated[float, Gt(0)] = 1e-4
    lr_warmup: _Count = 0
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    betas: tuple[Annotated[float, Ge(0), Lt(1)], Annotated[float, Ge(0), Lt(1)]] = (0.9, 0.999)
    weight_decay: Annotated[float, Ge(0)] = 0.0
    ema_decay: Annotated[float, Ge(0), Lt(1)] = 0.9999
    clip: Annotated[float, Gt(0)] | None = 1.0
    label_dropout: Annotated[float, Ge(0), Le(1)] = DROP_PROBABILITY
    precision: Literal["auto", "32-true", "bf16-mixed", "16-mixed"] = "auto"
    matmul_precision: Literal["auto", "high", "highest"] = "auto"
    compile: Compile = "auto"
    activation_checkpointing: Literal["off"] | _Positive = "off"
    holdout: _Count = 0
    eval_every: _Positive = 5_000
    checkpoint_every: _Positive = 2_000
    keep_last: _Positive = 2
    keep_every: _Count = 50_000
    preview_every: _Count = 10_000
    preview_count: Annotated[int, Ge(1), Le(4096)] = 16
    preview_steps: _Positive = 25
    preview_shift: Annotated[float, Gt(0)] = 1.0
    preview_guidance: float = 1.0
    evaluate_every: _Count = 0
    evaluate_num: Annotated[int, Ge(2), Le(_MOST)] = 5_000
    evaluate_metrics: str = "fd"
    evaluate_solver: Literal["euler", "heun", "sde", "sde-heun", "ddpm", "ddim"] = "euler"
    evaluate_steps: _Positive = 50
    evaluate_shift: Annotated[float, Gt(0)] = 1.0
    evaluate_guidance: Annotated[float, Ge(0)] = 1.0
    gradient_angle_every: _Count = 0
    gradient_angle_block: int | None = None
    log_every: _Positive = 50
    loggers: tuple[Literal["csv", "tensorboard", "wandb", "trackio"], ...] = ()
    threads: Annotated[int, Ge(1), Le(1024)] | None = None
    check_crc: bool = True
    direct: Literal["auto", "on", "off"] = "auto"
    trainer: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_fields(self, leave_out=SECTIONS)

    @property
    def default_run_name(self) -> str:
        """Name of the run's folder when none is given, the recipe's or for example ``repa-SiT-B-2``."""
        return self.recipe or f"{self.method_name.rpartition(':')[2]}-{self.model.replace('/', '-')}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, the method's name and preset, if it has one, first among its settings."""
        values: dict[str, Any] = plain(self)
        preset = values.pop("method_preset")
        chosen = {"preset": preset} if preset else {}
        values["method"] = {"name": values.pop("method_name"), **chosen, **values["method"]}
        values["objective"] = objectives.to_plain(self.objective)
        return values

    def to_yaml(self) -> str:
        """Write YAML that `load_yaml` and `build` turn into an equal configuration."""
        text: str = yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)
        return text


def build(
    base: Mapping[str, Any] | None = None,
    flags: Mapping[str, Any] | None = None,
    assignments: Iterable[str] = (),
) -> TrainConfig:
    """Return the configuration of defaults < `base` < `flags` < `assignments`.

    What is from outside, ``module:Class``, is imported only if `flags` or `assignments` name it.

    Args:
        base: values of a configuration file.
        flags: key → value of the command line's own flags; None means not given.
        assignments: texts ``key=value`` with dotted keys, for example ``method.weight=0.25``.

    Raises:
        RepaError: an unknown key, with the nearest names, a value of another type, a command to run that is
            not of the command line, or a method or callback that cannot be had; ``field`` is the key.
    """
    values = normalised(base or {})
    _check_sections(values)
    filed = dict(values.get("method", {}))
    given = [(key, value) for key, value in (flags or {}).items() if value is not None]
    given += [parse_assignment(text) for text in assignments]
    if RECIPE in dict(given):
        what = "the setting recipe only notes what the settings began with"
        raise RepaError(what, "begin with one by --recipe", field=RECIPE)
    for key, value in given:
        _assign(values, key, value)
    if "cache" not in dict(given):
        _refuse_command(values.get("cache"))
    settings = dict(values.pop("method", {}))
    name = settings.pop("name", DEFAULT_METHOD)
    if not isinstance(name, str):
        raise RepaError(f"method.name={shortened(name)} is not valid", "expected text", field="method")
    from_command_line = any(key in _METHOD_KEYS and value == name for key, value in given)
    method_class = find_method(name, may_import=from_command_line)
    kind = method_class.config_class
    values.setdefault("model", method_class.default_model)
    preset, settings = with_preset(
        method_class,
        settings,
        before=filed if filed.get("name", DEFAULT_METHOD) == name else {},
        given={key.removeprefix("method.") for key, _ in given if key.startswith("method.")},
    )
    method = from_mapping(kind, settings, prefix="method.")
    objective = _objective(dict(values.pop("objective", {})), values["model"])
    solvers = objectives.OBJECTIVES[objectives.name_of(objective)].solvers
    values.setdefault("evaluate_solver", solvers[0])
    trainer = lightning_settings(values.pop("trainer", {}))
    if CALLBACKS in dict(given):
        for callback in trainer["callbacks"]:
            find_callback(callback, may_import=True)
    annotations = _annotations()
    for key in values:
        if key not in annotations:
            raise unknown_setting(key, (*annotations, *SECTIONS, *_dotted(kind)))
    typed = {key: coerce(value, annotations[key], key) for key, value in values.items()}
    return TrainConfig(
        method_name=name, method_preset=preset, method=method, objective=objective, trainer=trainer, **typed
    )


def _objective(settings: dict[str, Any], model: Any) -> ObjectiveConfig:
    """Return the settings of an objective. Without a name it is the one of the model's family."""
    name = settings.pop("name", None) or _objective_of(str(model))
    if not isinstance(name, str) or name not in objectives.OBJECTIVES:
        shown = shortened(name)
        raise RepaError(
            f"objective {shown} is unknown", nearest(shown, objectives.OBJECTIVES), field="objective"
        )
    return from_mapping(objectives.OBJECTIVES[name].config_class, settings, prefix="objective.")


def _objective_of(model: str) -> str:
    try:
        return family_of(model).objective
    except RepaError:
        # the checks report an unknown model, together with everything else
        return FLOW


def normalised(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy in which settings stand as they do now.

    ``method: repa`` becomes ``method: {name: repa}``, ``path`` goes to ``objective``, and ``compile`` was
    true or false before there was a choice.
    """
    copy = {str(key): dict(value) if isinstance(value, Mapping) else value for key, value in values.items()}
    for section in NAMED_SECTIONS:
        if isinstance(copy.get(section), str):
            copy[section] = {"name": copy[section]}
    if "compile" in copy:
        copy["compile"] = _compiled(copy["compile"])
    for key in _OF_OBJECTIVE:
        if key in copy and isinstance(copy.get("objective", {}), Mapping):
            copy.setdefault("objective", {}).setdefault(key, copy.pop(key))
    return copy


def _compiled(value: Any) -> Any:
    """Return what ``compile`` means today where it is true, which was the whole backbone, or false."""
    if value in get_args(Compile):
        return value
    try:
        return "whole" if coerce(value, bool, "compile") else "off"
    except RepaError:
        return value  # refused with the choices that there are


def _refuse_command(cache: Any) -> None:
    """Check that a cache which a file names is data, as a file may come from anybody."""
    command = command_in(cache) if isinstance(cache, str) else None
    if command is not None:
        raise RepaError(
            f"the configuration's cache is a command, {command!r}, and only the command line may run one",
            "give it with --cache",
            field="cache",
        )


def _assign(values: dict[str, Any], key: str, value: Any) -> None:
    section, dot, rest = key.partition(".")
    if section in NAMED_SECTIONS and rest in ("", "name"):
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
            raise _not_a_section("trainer", value)
        values[key] = _compiled(value) if key == "compile" else value
        return
    if section not in SECTIONS:
        raise unknown_setting(key, (*_annotations(), *_dotted()))
    values.setdefault(section, {})[rest] = value


def _check_sections(values: Mapping[str, Any]) -> None:
    for section in SECTIONS:
        given = values.get(section, {})
        if not isinstance(given, Mapping):
            raise _not_a_section(section, given)
        if wrong := [key for key in given if not isinstance(key, str)]:
            raise unknown_setting(f"{section}.{shortened(wrong[0])}", _dotted())


def _not_a_section(section: str, value: Any) -> RepaError:
    return RepaError(
        f"{section}={shortened(value)} is not valid",
        f"expected settings, for example --set {section}.key=value",
        field=section,
    )


def _dotted(kind: type[MethodConfig] = RepaConfig) -> list[str]:
    keys = [f"method.{item.name}" for item in fields(kind)]
    keys += [f"objective.{item.name}" for item in fields(FlowConfig)]
    return [*keys, "trainer.devices", "trainer.num_nodes", "trainer.strategy", "trainer.accelerator"]


@cache
def _annotations() -> dict[str, Any]:
    """Key → type and bounds, of the settings that are no sections."""
    found = get_type_hints(TrainConfig, include_extras=True)
    return {key: kind for key, kind in found.items() if key not in (*SECTIONS, *OF_METHOD)}
