"""GMem against the released code's numbers, and its condition."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from repa.data.format.columns import AUTOENCODER, ColumnSpec
from repa.trainer.methods.base import Step
from repa.trainer.methods.gmem import Gmem, GmemConfig
from repa.trainer.models.capture import Capture
from repa.trainer.models.conditioning import ClassTokenConditioner, ConditionColumn
from repa.trainer.models.conditions import build_conditioner
from repa.trainer.models.sit import SiT, SiTConfig
from repa.trainer.objectives.flow import Flow, FlowConfig
from repa.trainer.objectives.paths import interpolant
from repa.trainer.objectives.times import lognormal_times
from safetensors.torch import load_file

if TYPE_CHECKING:
    from pathlib import Path

FLOW = Flow(FlowConfig())
COLUMNS = {
    "t/patch": ColumnSpec(shape=(64, 24), dtype="float32"),
    "t/cls": ColumnSpec(shape=(24,), dtype="float32"),
}
GRIDS = {AUTOENCODER: (16, 16), "t": (8, 8)}


@pytest.fixture(scope="module")
def golden(shared: Path) -> dict[str, torch.Tensor]:
    with np.load(shared / "golden" / "gmem.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file}


@pytest.fixture(scope="module")
def state(shared: Path) -> dict[str, torch.Tensor]:
    return load_file(shared / "golden" / "gmem.safetensors")


def gmem(facts: Any, **settings: Any) -> Gmem:
    config = GmemConfig(depth=2, projector_width=40, **settings)
    return Gmem(config, facts, COLUMNS, GRIDS).double()


@pytest.fixture(scope="module")
def trained(state: dict[str, torch.Tensor]) -> tuple[SiT, Gmem]:
    config = SiTConfig(depth=4, width=48, heads=4, patch_size=2, input_size=16)
    method = gmem(config.facts)
    backbone = SiT(config, method.make_conditioner(10)).double().eval()
    others = ("projectors.", "lightningdit.")
    backbone.load_state_dict({key: value for key, value in state.items() if not key.startswith(others)})
    method.projectors.load_state_dict(
        {key[11:]: value for key, value in state.items() if key.startswith("projectors.")}
    )
    return backbone, method


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-9)


def test_golden_condition(golden: dict[str, torch.Tensor], trained: tuple[SiT, Gmem]) -> None:
    conditioner = trained[0].y_embedder
    values = golden["bank"][golden["rows"]]
    close(conditioner.whole(values), golden["condition"])
    close(conditioner(conditioner.whole(values)), golden["embed"])
    close(conditioner(conditioner.null(3)), golden["embed_null"])
    close(conditioner(conditioner.condition(values, ~golden["keep"])), golden["embed_masked"])


def test_golden_mask_of_the_first_version(
    golden: dict[str, torch.Tensor], state: dict[str, torch.Tensor]
) -> None:
    conditioner = ClassTokenConditioner("t/cls", 24, 48, mask=0.2, mask_projected=True).double()
    conditioner.linear.load_state_dict(
        {key: state[f"y_embedder.linear.{key}"].double() for key in ("weight", "bias")}
    )
    values = golden["bank"][golden["rows"]]
    masked = conditioner.condition(values, ~golden["old_keep"])
    close(conditioner(masked), golden["old_embed_masked"])
    close(conditioner(conditioner.whole(values)), golden["embed"])
    close(conditioner(conditioner.null(3)), golden["embed_null"])
    gone = conditioner.condition(values, torch.ones(3, 48, dtype=torch.bool))
    close(conditioner(gone), golden["embed_null"])
    assert masked.shape == gone.shape == conditioner.null(3).shape


@pytest.mark.parametrize("masked", ["", "_masked"])
def test_golden_losses(golden: dict[str, torch.Tensor], trained: tuple[SiT, Gmem], masked: str) -> None:
    backbone, method = trained
    values = golden["bank"][golden["rows"]]
    conditioner = backbone.y_embedder
    condition = conditioner.condition(values, ~golden["keep"]) if masked else conditioner.whole(values)
    noised = FLOW.noised(golden["x0"], golden["noise"], golden["t"])
    close(noised.x_t, golden["x_t"])
    student = backbone(noised.x_t, noised.t, condition, Capture(hidden=(2,)))
    close(student.prediction, golden[f"velocity{masked}"])
    close(method.projectors[0](student.hidden[2]), golden[f"projected{masked}"])
    step = Step(
        index=0,
        columns={"t/patch": golden["z"], "t/cls": values},
        x0=noised.x0,
        noise=noised.noise,
        t=noised.t,
        condition=condition,
        student=student,
        interpolate=lambda t: FLOW.interpolate(noised.x0, noised.noise, t),
        target=lambda: FLOW.target(noised),
        generator=torch.Generator(),
    )
    terms = method.losses(step)
    velocity = FLOW.losses(student, noised)["velocity"]
    close(velocity, golden[f"loss_mse{masked}"])
    close(terms["cosine"].value, golden[f"loss_cosine{masked}"].mean())
    close(terms["repa"].value, golden[f"loss_repa{masked}"])
    total = velocity.mean() + sum(term.value * term.weight for term in terms.values())
    close(total, golden[f"loss_total{masked}"])


def test_its_times_are_the_sigmoid_of_a_normal_law(trained: tuple[SiT, Gmem]) -> None:
    law = trained[1].time_law(trained[1].phases()[0])
    times = law(20_000, interpolant("linear"), torch.Generator().manual_seed(0))
    normal = torch.logit(times.double())
    assert law is lognormal_times
    assert abs(normal.mean()) < 0.03
    assert normal.std().item() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("projected", [False, True])
def test_elements_and_whole_vectors_are_dropped_as_often_as_asked(projected: bool) -> None:
    conditioner = ClassTokenConditioner("t/cls", 40, 30, mask=0.4, mask_projected=projected, drop=0.1)
    dropped = conditioner.dropped(4_000, torch.Generator().manual_seed(0))
    assert dropped.shape == (4_000, 30 if projected else 40)
    whole = dropped.all(dim=1)
    assert whole.float().mean().item() == pytest.approx(0.1, abs=0.015)
    assert dropped[~whole].float().mean().item() == pytest.approx(0.4, abs=0.005)
    values = torch.randn(4_000, 40)
    condition = conditioner.condition(values, dropped)
    torch.testing.assert_close(condition[whole], conditioner.null(int(whole.sum())))
    # what is kept is as large on average as what is never dropped
    kept = conditioner(condition[~whole]).mean(dim=0)
    torch.testing.assert_close(kept, conditioner(conditioner.whole(values)).mean(dim=0), rtol=0, atol=0.02)


def test_a_zero_vector_is_the_null_condition() -> None:
    conditioner = ClassTokenConditioner("t/cls", 5, 3)
    assert torch.equal(conditioner.whole(torch.zeros(2, 5)), conditioner.null(2))


def test_half_precision_is_normalised_in_float32() -> None:
    conditioner = ClassTokenConditioner("t/cls", 768, 3)
    # the sum of squares is beyond float16's largest number
    large = torch.full((1, 768), 300.0, dtype=torch.float16)
    torch.testing.assert_close(conditioner.whole(large).norm(), torch.tensor(1.0))


@pytest.mark.parametrize("preset", [{}, Gmem.named_presets["first-version"]])
def test_what_a_checkpoint_keeps_builds_the_same_conditioner(preset: dict[str, Any]) -> None:
    config = SiTConfig(depth=4, width=48, heads=4, patch_size=2, input_size=16)
    conditioner = gmem(config.facts, drop=0.1, **preset).make_conditioner(10)
    assert isinstance(conditioner, ClassTokenConditioner)
    said = conditioner.built_from
    assert isinstance(said, ConditionColumn)
    again = build_conditioner(said)
    assert isinstance(again, ClassTokenConditioner)
    for name in ("column", "mask", "mask_projected", "drop_probability"):
        assert getattr(again, name) == getattr(conditioner, name)
    assert again.mask == preset.get("mask", 0.4)
