"""SRA on the network of the golden numbers: student, averaged weights and head as the reference had them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from repa.trainer.methods.base import Step
from repa.trainer.methods.sra import LOSSES, Sra, SraConfig
from repa.trainer.models.capture import Capture, Captured
from repa.trainer.models.sit import SiT, SiTConfig
from repa.trainer.models.token_groups import TokenGroups
from repa.trainer.objectives.base import Noised
from repa.trainer.objectives.flow import Flow, FlowConfig
from safetensors.torch import load_file

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

CONFIG = SiTConfig(depth=6, width=48, heads=4, patch_size=2, input_size=16, num_classes=10)
HEAD = "ap_head."
TOLERANCE = {"rtol": 0, "atol": 1e-9}


@dataclass(frozen=True)
class Reference:
    """The reference's arrays in float64, and its networks."""

    numbers: dict[str, Tensor]
    student: SiT
    teacher: SiT
    head: dict[str, Tensor]


def load(shared: Path) -> Reference:
    with np.load(shared / "golden" / "sra.npz") as file:
        arrays = {key: torch.from_numpy(file[key]) for key in file}
    numbers = {key: value.double() if value.is_floating_point() else value for key, value in arrays.items()}
    networks, heads = [], []
    for name in ("sra", "sra_ema"):
        state = {
            key: value.double() for key, value in load_file(shared / "golden" / f"{name}.safetensors").items()
        }
        network = SiT(CONFIG).double()
        network.load_state_dict({key: value for key, value in state.items() if not key.startswith(HEAD)})
        networks.append(network)
        heads.append({key: value for key, value in state.items() if key.startswith(HEAD)})
    return Reference(numbers, networks[0], networks[1].requires_grad_(False), heads[0])


def make(reference: Reference | None = None, preset: str = "paper", **settings: Any) -> Sra:
    torch.manual_seed(0)
    config = SraConfig(**{"student_block": 2, "teacher_block": 5, **LOSSES[preset], **settings})
    method = Sra(config, CONFIG.facts, {}, {}).double()
    if reference is not None:
        method.load_state_dict(reference.head)
    return method


def groups_of(reference: Reference, *, separate: bool) -> tuple[TokenGroups, Tensor]:
    """The reference's groups and their times ``[B, 2]``; an image of one group has that one's time twice."""
    of_token, t = reference.numbers["dts_mask"], reference.numbers["dts_t"].mT.clone()
    whole = (of_token == 1).all(1)
    return TokenGroups(of_token=of_token, separate=separate), torch.where(whole[:, None], t[:, 1:], t)


def dual_step_of(
    reference: Reference, method: Sra, *, teacher_labels: str = "dts_y_dropped"
) -> tuple[Step, Tensor]:
    """A step with the reference's groups, and its velocity loss per sample."""
    numbers, objective = reference.numbers, Flow(FlowConfig())
    groups, t = groups_of(reference, separate=method.config.separate)

    def spread(times: Tensor) -> Tensor:
        return groups.on_latent(times, (8, 8), 2) if times.ndim == 2 else times

    def teach(x: Tensor, times: Tensor, capture: Capture) -> Captured:
        given = {"groups": groups} if times.ndim == 2 else {}
        return reference.teacher(x, times, numbers[teacher_labels], capture, **given)

    noised = objective.noised(numbers["x0"], numbers["noise"], spread(t))
    capture = method.capture(method.phase_at(0))
    student = reference.student(noised.x_t, t, numbers["dts_y_dropped"], capture, groups=groups)
    step = Step(
        index=0,
        columns={},
        x0=noised.x0,
        noise=noised.noise,
        t=t,
        condition=numbers["dts_y_dropped"],
        student=student,
        interpolate=lambda times: objective.interpolate(noised.x0, noised.noise, spread(times)),
        generator=torch.Generator(),
        draws={"offset": numbers["dts_k"].mT},
        ema_forward=teach,
    )
    return step, objective.losses(student, noised)["velocity"]


def step_of(
    reference: Reference, method: Sra, *, path: str = "linear", index: int = 0
) -> tuple[Step, Tensor]:
    """A step with the reference's draws, and its velocity loss per sample."""
    numbers, objective = reference.numbers, Flow(FlowConfig(path=path))  # type: ignore[arg-type]
    noised: Noised = objective.noised(numbers["x0"], numbers["noise"], numbers["t"])
    student: Captured = reference.student(
        noised.x_t, noised.t, numbers["y"], method.capture(method.phase_at(index))
    )
    step = Step(
        index=index,
        columns={},
        x0=noised.x0,
        noise=noised.noise,
        t=noised.t,
        condition=numbers["y"],
        student=student,
        interpolate=lambda t: objective.interpolate(noised.x0, noised.noise, t),
        generator=torch.Generator(),
        draws={"offset": numbers["k"]},
        ema_forward=lambda x, t, capture: reference.teacher(x, t, numbers["y"], capture),
    )
    return step, objective.losses(student, noised)["velocity"]
