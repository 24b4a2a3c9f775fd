"""REG: golden numbers, which tokens are compared with what, presets, missing columns, published names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from method_steps import make_step
from repa.data.format.columns import ColumnSpec, scale_column
from repa.data.format.int8 import dequantise, quantise
from repa.trainer.methods import METHODS
from repa.trainer.methods.reg import PRESETS, Reg, RegConfig
from repa.trainer.models.capture import Captured
from repa.trainer.models.published import load_published
from repa.trainer.models.sit import SIT_SIZES, SiT, SiTConfig
from repa.trainer.objectives.flow import Flow, FlowConfig
from safetensors.torch import load_file

CONFIG = SiTConfig(
    depth=4, width=48, heads=4, patch_size=2, input_size=16, num_classes=10, token_widths=(24,)
)
COLUMNS = {
    "a/patch": ColumnSpec(shape=(64, 24), dtype="float16"),
    "a/cls": ColumnSpec(shape=(24,), dtype="float16"),
}
GRIDS = {"a": (8, 8), "b": (8, 8)}
FLOW = Flow(FlowConfig())


def make(columns: dict[str, ColumnSpec] = COLUMNS, **settings: Any) -> Reg:
    torch.manual_seed(0)
    config = RegConfig(**{"depth": 2, "projector_width": 40} | settings)
    return Reg(config, CONFIG.facts, columns, GRIDS)


def test_golden(shared: Path) -> None:
    """Forward pass, projector, each term and the whole loss; the gradient against differences."""
    with np.load(shared / "golden" / "reg.npz") as file:
        golden = {key: torch.from_numpy(file[key]) for key in file}
    state = load_file(shared / "golden" / "reg.safetensors")
    model, method = SiT(CONFIG).double(), make().double()
    backbone_keys = {key: value for key, value in state.items() if not key.startswith("projectors.")}
    # together the two take every key of the published state dict
    model.load_state_dict(backbone_keys)
    method.load_state_dict({key: value for key, value in state.items() if key not in backbone_keys})
    (vector,) = method.denoised()
    columns = {"a/patch": golden["z"], "a/cls": golden["cls"]}

    def terms() -> tuple[Captured, dict[str, torch.Tensor]]:
        latent = FLOW.noised(golden["x0"], golden["noise"], golden["t"])
        token = FLOW.noised(columns[vector.column], golden["cls_noise"], golden["t"])
        capture = method.capture(method.phase_at(0))
        student = model(latent.x_t, golden["t"], golden["y"], capture, (token.x_t,))
        found = method.losses(make_step(columns, student))
        assert found["repa"].weight == 0.5
        return student, {
            "velocity": FLOW.losses(student, latent)["velocity"],
            "cls": FLOW.losses(Captured(prediction=student.tokens[0]), token)["velocity"],
            "repa": found["repa"].value,
        }

    def total() -> torch.Tensor:
        found = terms()[1]
        return found["velocity"].mean() + vector.weight * found["cls"].mean() + 0.5 * found["repa"]

    student, found = terms()
    projected = method.projectors[0](method.tapped(make_step(columns, student)))
    for name, value in {
        "velocity": student.prediction,
        "cls_velocity": student.tokens[0],
        "projected": projected,
        **{f"loss_{name}": value for name, value in found.items()},
        "loss_total": total(),
    }.items():
        torch.testing.assert_close(value, golden[name], rtol=0, atol=1e-9)
    patches_only = torch.nn.functional.cosine_similarity(projected[:, 1:], golden["z"], dim=-1).mean()
    assert -patches_only.item() == pytest.approx(golden["loss_repa_patches_only"].item(), abs=1e-9)

    parameters = [
        model.cls_projectors2.weight,
        model.wg_norm.bias,
        model.final_layer.linear_cls.weight,
        model.blocks[0].attn.qkv.weight,
        method.projectors[0][0].weight,
    ]
    gradients = torch.autograd.grad(total(), parameters)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        at = int(gradient.abs().argmax())
        with torch.no_grad():
            numbers = []
            for shift in (1e-5, -2e-5):
                parameter.view(-1)[at] += shift
                numbers.append(total().item())
            parameter.view(-1)[at] += 1e-5
        assert gradient.view(-1)[at].item() == pytest.approx((numbers[0] - numbers[1]) / 2e-5, rel=1e-6)


def test_every_token_of_every_image_is_reached() -> None:
    method, generator = make(), torch.Generator().manual_seed(1)
    hidden = torch.randn(3, 64, 48, generator=generator, requires_grad=True)
    leading = torch.randn(3, 1, 48, generator=generator, requires_grad=True)
    columns = {
        "a/patch": torch.randn(3, 64, 24, generator=generator),
        "a/cls": torch.randn(3, 24, generator=generator),
    }
    student = Captured(prediction=None, hidden={2: hidden}, leading={2: leading})
    method.losses(make_step(columns, student))["repa"].value.backward()
    for tokens in (hidden, leading):
        assert tokens.grad is not None
        assert (tokens.grad.abs().sum(-1) > 0).all()
    # zero distance: targets that are the projections themselves
    with torch.no_grad():
        projected = method.projectors[0](torch.cat([leading, hidden], 1))
        columns = {"a/patch": projected[:, 1:], "a/cls": projected[:, 0]}
        value = method.losses(make_step(columns, student))["repa"].value
    assert value.item() == pytest.approx(-1, abs=1e-6)


def test_int8_patches_beside_a_float16_class_token() -> None:
    stored = values, scales = quantise(torch.randn(3, 64, 24, generator=torch.Generator().manual_seed(0)))
    scale = scale_column("a/patch")
    columns = {
        "a/patch": ColumnSpec(shape=(64, 24), dtype="int8"),
        scale: ColumnSpec(shape=tuple(scales.shape[1:]), dtype="float32"),
        "a/cls": ColumnSpec(shape=(24,), dtype="float16"),
    }
    method = make(columns)
    assert method.problems() == []
    assert set(method.columns(method.phase_at(0))) == set(columns)
    cls = torch.randn(3, 24).half()
    batch = {"a/patch": values, scale: scales, "a/cls": cls}
    found = method.target_of(batch, "a/patch")
    assert (found.dtype, found.shape) == (torch.float32, (3, 65, 24))
    assert torch.equal(found[:, 0], cls.float())
    assert torch.equal(found[:, 1:], dequantise(*stored))


def test_several_teachers() -> None:
    """The first one's class token is denoised; each is a target of its own teacher's projector."""
    columns = COLUMNS | {
        "b/patch": ColumnSpec(shape=(64, 12), dtype="float16"),
        "b/cls": ColumnSpec(shape=(12,), dtype="float16"),
    }
    method = make(columns, encoders=("b", "a"))
    assert method.problems() == []
    (vector,) = method.denoised()
    assert (vector.name, vector.column, vector.width, vector.weight) == ("cls", "b/cls", 12, 0.03)
    batch = {name: torch.randn(2, *spec.shape) for name, spec in columns.items()}
    assert torch.equal(method.target_of(batch, "a/patch")[:, 0], batch["a/cls"])
    assert torch.equal(method.target_of(batch, "b/patch")[:, 0], batch["b/cls"])
    assert set(method.columns(method.phase_at(0))) == set(columns)
    # a teacher without a class token is none that REG could take
    del columns["b/cls"]
    assert make(columns).teachers == ("a",)


@pytest.mark.parametrize("missing", ["a/cls", "a/patch"])
@pytest.mark.parametrize("encoders", [(), ("a",)])
def test_a_missing_column(missing: str, encoders: tuple[str, ...]) -> None:
    method = make({name: spec for name, spec in COLUMNS.items() if name != missing}, encoders=encoders)
    (problem,) = method.problems()
    assert problem.field == "method.encoders"
    assert "repa preprocess --encoder" in problem.remedy
    assert method.denoised() == ()


def test_a_class_token_of_another_width() -> None:
    columns = COLUMNS | {"a/cls": ColumnSpec(shape=(20,), dtype="float16")}
    (problem,) = make(columns).problems()
    assert problem.field == "a/cls"


def test_presets() -> None:
    assert METHODS["reg"] is Reg
    assert {name: preset.depth for name, preset in PRESETS.items()} == {
        "T": 2,
        "S": 4,
        "B": 4,
        "L": 8,
        "XL": 8,
    }
    assert set(PRESETS) == set(SIT_SIZES)
    assert (RegConfig().weight, RegConfig().cls_weight) == (0.5, 0.03)


def test_the_class_token_is_denoised_beyond_the_end_of_alignment() -> None:
    method = make(stop=3)
    aligned, plain = method.phase_at(2), method.phase_at(3)
    assert method.columns(aligned) == ("a/patch", "a/cls")
    assert method.columns(plain) == ()
    assert method.flags(plain).idle == ("method.",)
    assert method.flags(plain).objective_loss
    assert method.denoised()[0].column == "a/cls"
    assert method.losses(make_step({}, Captured(prediction=None), index=3)) == {}


def test_published_names(shared: Path) -> None:
    """The state of the released code loads by its names; the projectors are kept apart."""
    found = load_published(shared / "golden" / "reg.safetensors", heads=4)
    assert found.config == CONFIG
    assert set(found.projectors) == {
        f"0.{layer}.{kind}" for layer in (0, 2, 4) for kind in ("weight", "bias")
    }
    model = found.build()
    expected = load_file(shared / "golden" / "reg.safetensors")
    for key, value in model.state_dict().items():
        assert torch.equal(value, expected[key])
