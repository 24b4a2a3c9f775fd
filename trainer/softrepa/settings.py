"""The settings of a run of SoftREPA, with what each kind of denoiser takes where nothing is set."""

from __future__ import annotations

from collections.abc import Iterable, Mapping  # noqa: TC003 - annotations are read when settings are typed
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any, Literal, TypeAlias

import yaml
from annotated_types import Ge, Gt, Le, Lt

from ...data.errors import RepaError
from ..config import TrainConfig
from ..methods.base import MethodConfig
from ..models.denoiser_facts import SD3, SD15, SDXL
from ..typed import check_fields, from_mapping, parse_assignment, plain
from .tokens import Count, Start, TimeStart  # noqa: TC001 - as above

NAME = "softrepa"
_Positive: TypeAlias = Annotated[int, Ge(1), Le(10**12)]
_Natural: TypeAlias = Annotated[int, Ge(0), Le(10**12)]
_Decay: TypeAlias = Annotated[float, Ge(0), Lt(1)]
_Weight: TypeAlias = Annotated[float, Ge(0)]

PRESETS: Mapping[str, Mapping[str, Any]] = {
    SD15: {
        "tokens": 4,
        "blocks": ("down",),
        "time_table": True,
        "matched_weight": 10.0,
        "start": "bos",
    },
    SDXL: {
        "tokens": 8,
        "blocks": ("down", "mid"),
        "time_table": False,
        "matched_weight": 10.0,
        "start": "normal",
    },
    SD3: {"tokens": 4, "layers": 5, "time_table": True, "matched_weight": 0.0, "start": "normal"},
}
"""Kind of denoiser → the settings that nobody has set (arXiv 2503.08250 and its released code)."""

FREE = (
    *("cache", "model", "max_steps", "eval_every", "patience", "checkpoint_every", "keep_last", "keep_every"),
    *("log_every", "threads", "check_crc", "direct", "accelerator", "max_time"),
)
"""Settings that a run which is resumed may have at another value."""


@dataclass(frozen=True, kw_only=True)
class SoftConfig:
    """Settings of a run. What is none is chosen by the kind of the denoiser, see `PRESETS`.

    Attributes:
        cache: folder of the cache, with latents of the denoiser's autoencoder and captions.
        model: the denoiser, a folder as diffusers saves it or a name on the hub.
        condition: column of the text states; empty takes the only one that fits the denoiser.
        tokens: soft tokens, of Stable Diffusion 3 in each block; none takes 4, of SDXL 8.
        blocks: parts of a U-Net that see them, of down, mid and up; none takes down, of SDXL down,mid.
        layers: first blocks of Stable Diffusion 3 that get some; none takes 5.
        time_table: whether a row for each of 100 bins of time is added to them; none takes it, but not of
            SDXL.
        matched_weight: of the mean error of the matched pairs, the denoiser's own loss; none takes 10, of
            Stable Diffusion 3 0.
        start: first values: bos, the first text state of the empty caption and noise; normal, noise of 0.02;
            as_released, bos without noise, which keeps the tokens equal. None takes bos for SD 1.5, normal
            for others.
        time_start: first values of the time table, noise of 0.02 or zero.
        interpolate: mix the rows of neighbouring bins of time by distance.
        rows: images that meet all captions of the batch at a time; fewer need less memory, nothing else.
        dtype: of the frozen denoiser; auto is bfloat16 on a GPU that computes it.
        seed: of first values, order and every draw.
        batch_size: images of a step, B; B² pairs go through the denoiser.
        max_steps: optimiser steps of the run.
        lr: learning rate at the start of each cycle.
        lr_min: to which it falls, half a cosine.
        cycle: steps of a cycle of the learning rate.
        betas: of AdamW.
        weight_decay: of AdamW.
        holdout: rows of the cache that are never trained on, evenly spaced; 0 measures and stops by nothing.
        eval_every: steps between evaluations of the held-out rows.
        patience: evaluations without a lower held-out loss after which the run ends; 0 never ends it.
        checkpoint_every: steps between checkpoints.
        keep_last: newest checkpoints that are kept.
        keep_every: checkpoints of multiples of this step are kept for good; 0 keeps none of them.
        log_every: steps between rows of metrics.csv.
        threads: reading threads; none takes two, or one of a single core.
        check_crc: compare every row read with its checksum.
        direct: read past the page cache (on), through it (off), or as is faster on that disk (auto).
        accelerator: where to train, of Lightning: auto, cpu, gpu.
        max_time: DD:HH:MM:SS after which the run is saved and ends; empty is never.
    """

    cache: str = ""
    model: str = ""
    condition: str = ""
    tokens: Count | None = None
    blocks: tuple[Literal["down", "mid", "up"], ...] | None = None
    layers: Count | None = None
    time_table: bool | None = None
    matched_weight: _Weight | None = None
    start: Start | None = None
    time_start: TimeStart = "normal"
    interpolate: bool = False
    rows: _Positive = 1
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    seed: Annotated[int, Ge(0), Lt(2**63)] = 0
    batch_size: Annotated[int, Ge(2), Le(10**6)] = 4
    max_steps: _Positive = 30_000
    lr: Annotated[float, Gt(0)] = 1e-3
    lr_min: _Weight = 1e-5
    cycle: _Positive = 5_000
    betas: tuple[_Decay, _Decay] = (0.9, 0.999)
    weight_decay: _Weight = 1e-4
    holdout: _Natural = 64
    eval_every: _Positive = 1_000
    patience: _Natural = 5
    checkpoint_every: _Positive = 500
    keep_last: _Positive = 2
    keep_every: _Natural = 0
    log_every: _Positive = 50
    threads: Annotated[int, Ge(1), Le(1024)] | None = None
    check_crc: bool = True
    direct: Literal["auto", "on", "off"] = "auto"
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    max_time: str = ""

    def __post_init__(self) -> None:
        check_fields(self)

    def filled(self, kind: str) -> SoftConfig:
        """Return the settings with those of a kind of denoiser where nothing is set."""
        preset = PRESETS[kind]
        return replace(self, **{name: value for name, value in preset.items() if getattr(self, name) is None})

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        values: dict[str, Any] = plain(self)
        return values

    def to_yaml(self) -> str:
        """Write YAML that `build` reads again."""
        text: str = yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)
        return text

    def as_run(self) -> TrainConfig:
        """Return what the parts of a run that know no method take, its steps, files and data."""
        same = {item.name for item in fields(TrainConfig)} & {item.name for item in fields(self)}
        trainer: dict[str, Any] = {"accelerator": self.accelerator, "devices": 1}
        if self.max_time:
            trainer["max_time"] = self.max_time
        values = {name: getattr(self, name) for name in same - {"condition"}}
        return TrainConfig(
            **values,
            method_name=NAME,
            method=MethodConfig(),
            precision="32-true",
            clip=None,
            preview_every=0,
            trainer=trainer,
        )


def build(
    base: Mapping[str, Any] | None = None,
    flags: Mapping[str, Any] | None = None,
    assignments: Iterable[str] = (),
) -> SoftConfig:
    """Return the settings of defaults < `base` < `flags` < `assignments`.

    Args:
        base: values of a file.
        flags: key → value of the command line's own flags; None means not given.
        assignments: texts ``key=value``.

    Raises:
        RepaError: an unknown key, with the nearest names, or a value of another type.
    """
    given = {key: value for key, value in (flags or {}).items() if value is not None}
    return from_mapping(SoftConfig, {**(base or {}), **given, **dict(map(parse_assignment, assignments))})


def refuse_changes(before: Mapping[str, Any], now: SoftConfig) -> None:
    """Compare settings with those that a run was trained with.

    Args:
        before: as of `SoftConfig.to_dict`; a key that was not there yet had its default.
        now: to go on with.

    Raises:
        RepaError: one that the run is bound to differs.
    """
    defaults, values = SoftConfig().to_dict(), now.to_dict()
    changed = {
        key: (then, value)
        for key, value in values.items()
        if key not in FREE and (then := before.get(key, defaults[key])) != value
    }
    if changed:
        said = ", ".join(f"{key} ({then} → {value})" for key, (then, value) in changed.items())
        raise RepaError(
            f"the run has other settings: {said}",
            "give the settings it has, or begin another run with --run",
            field=next(iter(changed)),
        )
