"""The method contract, a module that owns auxiliary parameters and answers ten questions.

1 which phases (`phases`), 2 which columns (`columns`), 3 which activations (`capture`), 4 what conditions
the network (`make_conditioner`), 5 at which times (`time_law`), 6 what is the loss (`losses`), 7 what else
(`flags`), 8 what is denoised beside the latent (`denoised`), 9 which times the tokens of an image have
(`token_times`), 10 who made the first steps (`first_steps`). It never touches optimiser, trainer, files,
ranks or logging. The loss of the prediction is the objective's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from ..models.capture import NOTHING, BackboneFacts, Capture, Captured
from ..typed import check_fields

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ...data.format.columns import ColumnSpec
    from ..models.conditioning import Conditioner
    from ..objectives.base import Noised
    from ..objectives.times import TimeLaw
    from ..objectives.token_times import TokenTimes

EmaForward: TypeAlias = Callable[[Tensor, Tensor, Capture], Captured]
"""(x_t ``[B, C, h, w]``, t as in `Step`, capture) → activations of the averaged weights, same condition."""


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """Settings of a method. A method with settings of its own has a frozen subclass."""

    def __post_init__(self) -> None:
        check_fields(self, prefix="method.")


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A range of steps ``start <= step < stop`` in which the answers do not change.

    Attributes:
        name: for logs.
        start: first step inside.
        stop: first step outside; None means never.
    """

    name: str
    start: int = 0
    stop: int | None = None

    def __contains__(self, step: int) -> bool:
        return self.start <= step and (self.stop is None or step < self.stop)


@dataclass(frozen=True, kw_only=True)
class Flags:
    """What else a phase needs of the module.

    Attributes:
        objective_loss: the module adds the objective's own loss; off, the backbone may stop early.
        ema_forward: `Step.ema_forward` is wanted.
        fresh_start: optimiser and averaged weights start afresh at the step that equals the phase's start
            (not "when the phase changed", which a resumed run would see at any step).
        idle: prefixes of parameter names (``backbone.…``, ``method.…``) that no loss of this phase reaches;
            they neither move nor decay, and the module adds 0 times their sum, so that graph, gradient
            buckets and optimiser stay the same. Those that the phase's early stop leaves out of the backbone
            are known without being named.
    """

    objective_loss: bool = True
    ema_forward: bool = False
    fresh_start: bool = False
    idle: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Denoised:
    """A vector of each image that is noised and denoised beside the latent, at the latent's times.

    The backbone takes it as a token of its own before those of the latent, and predicts it.

    Attributes:
        name: of its noise and of its terms of the loss, as ``cls`` of ``cls_velocity``.
        column: the cache's column of its values, ``[width]`` a row, stored as floats; every phase reads it.
        width: its channels.
        weight: of its terms of the loss.
        standardised: whether each channel is brought to mean 0 and deviation 1 over the rows trained on. Its
            setting is then called ``standardise``.
    """

    name: str
    column: str
    width: int
    weight: float
    standardised: bool = False


@dataclass(frozen=True, kw_only=True)
class FirstSteps:
    """The steps of a run that another run has made, whose weights it goes on with.

    Attributes:
        run: folder of that run, or its checkpoint of that step.
        step: the first step that this run makes itself, with fresh optimiser and averaged weights.
        same: names of the method's settings that must have been the same there.
        setting: name of the one that says ``run``.
    """

    run: str
    step: int
    same: tuple[str, ...]
    setting: str


@dataclass(frozen=True, kw_only=True)
class Step:
    """What a method sees of one training step, read only.

    Attributes:
        index: the optimiser step.
        columns: the phase's columns as stored, ``[B, …]``, on the device.
        x0: scaled latent ``[B, C, h, w]``.
        noise: ε, of the same shape.
        t: times ``[B]``; those of groups ``[B, G]`` where `Method.token_times` makes groups of the tokens.
        condition: what the network was conditioned on, ``[B, …]``.
        student: prediction and captured activations.
        beside: name → the vector that is denoised beside the latent: values and noise ``[B, D]``, times.
        target: gives what the objective compares the prediction with, ``[B, C, h, w]``; see
            `Method.needs_target`.
        interpolate: t ``[B]``, or of the groups ``[B, G]``, → x_t for this x0 and noise.
        generator: keyed by (seed, rank, step, micro-batch).
        batch_size: images of the whole optimiser step, over all ranks and micro-batches.
        draws: what `Method.draws` drew for these images, by name, ``[B, …]`` each.
        ema_forward: the averaged weights' forward pass, without gradient; None unless the flags ask for it.
    """

    index: int
    columns: Mapping[str, Tensor]
    x0: Tensor
    noise: Tensor
    t: Tensor
    condition: Tensor
    student: Captured
    interpolate: Callable[[Tensor], Tensor]
    generator: torch.Generator
    batch_size: int = 1
    target: Callable[[], Tensor] | None = None
    beside: Mapping[str, Noised] = field(default_factory=dict)
    draws: Mapping[str, Tensor] = field(default_factory=dict)
    ema_forward: EmaForward | None = None


@dataclass(frozen=True, kw_only=True)
class Term:
    """A named part of the loss with its weight at this step.

    Without a weight it is no part of the loss, only logged: give it detached.
    """

    value: Tensor
    weight: float | None


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Why a run cannot start and what mends it, each in one line.

    Attributes:
        what: what is wrong.
        remedy: what to do about it.
        field: the flag, setting or column that it is about; empty where it is about none.
    """

    what: str
    remedy: str
    field: str = ""


class Requirement(ABC):
    """What a method needs of its settings, the backbone or the cache, declared in `Method.requires`."""

    @abstractmethod
    def problems(self, method: Method) -> Iterable[Problem]:
        """Say what is missing and the remedy, or nothing where the need is met.

        Args:
            method: freshly constructed.
        """


C = TypeVar("C", bound=MethodConfig)


def filled(config: C, preset: MethodConfig | None) -> C:
    """Return settings with the preset's where nothing was set, which is where None or empty is the default.

    Where the default is a value, None is what somebody has set.
    """
    default = type(config)()
    unset = [
        item.name
        for item in fields(config)
        if getattr(config, item.name) in (None, ()) and getattr(default, item.name) in (None, ())
    ]
    return replace(config, **{name: getattr(preset, name) for name in unset if hasattr(preset, name)})


class Method(nn.Module, ABC):
    """Base of all methods, whose defaults add nothing in one phase.

    A constructor must not fail where a requirement is not met: the checks before step 0 collect all problems.

    Args:
        config: the method's settings.
        backbone: facts of the backbone to come.
        columns: columns of the cache, name → spec.
        grids: source → rows and columns of its tokens.
        notes: source → what its provenance notes, as `Provenance.notes`.

    Attributes:
        config_class: class of the settings, a frozen dataclass whose fields all have a default.
        default_model: the backbone, as of ``--model``, where nobody names one.
        presets: size of backbone (``"B"``), or of one family (``"DiT-B"``), which comes first → what the
            settings are that nobody has set.
        named_presets: name, as of ``method.preset``, → settings that it sets, each in place of its default.
        own_condition: what its conditioner gives the network in place of the label, in words, for reports,
            which must not compare it with others.
        needs_target: whether its losses ask for `Step.target`, which not every objective has.
        target_terms: names of losses that ask the prediction for the objective's target and align nothing;
            the gradient angle counts them with the objective's own.
        requires: what the method needs; the checks before step 0 look at all of it.
        config: the settings, the preset's where nothing was set.
        asked: the settings as they were given.
    """

    config_class: ClassVar[type[MethodConfig]] = MethodConfig
    default_model: ClassVar[str] = "SiT-B/2"
    presets: ClassVar[Mapping[str, MethodConfig]] = {}
    named_presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    own_condition: ClassVar[str] = ""
    needs_target: ClassVar[bool] = False
    target_terms: ClassVar[frozenset[str]] = frozenset()
    requires: ClassVar[tuple[Requirement, ...]] = ()

    def __init__(
        self,
        config: Any,
        backbone: BackboneFacts,
        columns: Mapping[str, ColumnSpec],
        grids: Mapping[str, tuple[int, int]],
        notes: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        super().__init__()
        self.asked = config
        self.config = filled(config, self.preset_of(backbone))
        self.backbone = backbone
        self.specs = dict(columns)
        self.grids = dict(grids)
        self.notes = dict(notes or {})

    @classmethod
    def preset_of(cls, backbone: BackboneFacts) -> MethodConfig | None:
        """Return the preset of a backbone's family and size, or of its size, None without one."""
        size = backbone.size_name or ""
        return cls.presets.get(f"{backbone.family}-{size}", cls.presets.get(size))

    def phases(self) -> tuple[Phase, ...]:
        """Return the phases in order. The first starts at 0, each next one where the one before stops."""
        return (Phase(name="train"),)

    def phase_at(self, step: int) -> Phase:
        """Return the phase of a step, a pure function of the step.

        Raises:
            ValueError: no phase holds the step.
        """
        for phase in self.phases():
            if step in phase:
                return phase
        raise ValueError(f"step {step} is in no phase of {self.phases()}")

    def columns(self, phase: Phase) -> tuple[str, ...]:
        """Name the columns that the losses of a phase read, beyond latent and condition."""
        del phase
        return ()

    def attention_blocks(self) -> tuple[int, ...]:
        """Return the blocks of a teacher whose queries and keys the losses compare, from 1, ascending.

        Known without any teacher: who computes targets live must know what to compute.
        """
        return ()

    def capture(self, phase: Phase) -> Capture:
        """Ask for the activations that the losses of a phase read."""
        del phase
        return NOTHING

    def make_conditioner(self, num_classes: int) -> Conditioner | None:
        """Return the conditioner the backbone is built with and owns, None for class labels."""
        del num_classes
        return None

    def time_law(self, phase: Phase) -> TimeLaw | None:
        """Return the law of time, None for the one that the run is configured with (uniform by default)."""
        del phase
        return None

    def draws(self, phase: Phase, count: int, generator: torch.Generator) -> Mapping[str, Tensor]:
        """Draw what is random in the losses of a phase, by name, for all images of a rank's step at once.

        Micro-batches get their share in `Step.draws`, so that accumulation changes no draw.

        Args:
            phase: of the step.
            count: images B.
            generator: to draw from, keyed by (seed, rank, step).

        Returns:
            Tensors ``[B, …]`` on the generator's device.
        """
        del phase, count, generator
        return {}

    def token_times(self, phase: Phase) -> TokenTimes | None:
        """Return which times the tokens of an image have, None for one time an image."""
        del phase
        return None

    @abstractmethod
    def losses(self, step: Step) -> dict[str, Term]:
        """Return the terms beside the objective's own, by name."""

    def flags(self, phase: Phase) -> Flags:
        """Say what else a phase needs."""
        del phase
        return Flags()

    def denoised(self) -> tuple[Denoised, ...]:
        """Name what is denoised beside the latent, in every phase."""
        return ()

    def first_steps(self) -> FirstSteps | None:
        """Name the run that has made this one's first steps, None where it makes them itself."""
        return None

    def predicts_after(self, steps: int) -> bool:
        """Return whether the prediction has been trained once so many steps are done."""
        return any(self.flags(phase).objective_loss for phase in self.phases() if phase.start < steps)

    def problems(self) -> list[Problem]:
        """Return everything that keeps the method from running on this backbone and cache, each once."""
        found = (problem for requirement in self.requires for problem in requirement.problems(self))
        return list(dict.fromkeys(found))
