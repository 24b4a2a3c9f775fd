"""The method contract, ``none`` and ``repa``: golden value, slow loop, gradients, float16, problems."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from method_steps import make_step, student_of
from repa.data.format.columns import ColumnSpec
from repa.trainer.methods import METHODS
from repa.trainer.methods.alignment import cosine_similarity, stored_columns, target
from repa.trainer.methods.base import Flags, Method, MethodConfig, Phase, Step, Term
from repa.trainer.methods.none import NoAlignment
from repa.trainer.methods.repa import PRESETS, Repa, RepaConfig
from repa.trainer.models.capture import BackboneFacts, Capture, Captured
from repa.trainer.models.mmdit import MMDIT_SIZES
from repa.trainer.models.sit import SIT_SIZES, SiT, SiTConfig
from repa.trainer.objectives.paths import interpolant
from safetensors.torch import load_file

if TYPE_CHECKING:
    from pathlib import Path

CONFIG = SiTConfig(depth=4, width=32, heads=2, patch_size=2, input_size=8, num_classes=5)
MOMENTS = {"sd-vae/moments": ColumnSpec(shape=(8, 8, 8), dtype="float32")}
COLUMNS = MOMENTS | {
    "a/patch": ColumnSpec(shape=(16, 24), dtype="float16"),
    "a/cls": ColumnSpec(shape=(24,), dtype="float16"),
}
TWO = COLUMNS | {"b/patch": ColumnSpec(shape=(16, 12), dtype="float16")}
GRIDS = {"sd-vae": (8, 8), "a": (4, 4), "b": (4, 4)}


def make(
    *,
    columns: dict[str, ColumnSpec] = COLUMNS,
    backbone: BackboneFacts = CONFIG.facts,
    grids: dict[str, tuple[int, int]] = GRIDS,
    **settings: object,
) -> Repa:
    torch.manual_seed(0)
    config = RepaConfig(**{"depth": 2, "projector_width": 40} | settings)  # type: ignore[arg-type]
    return Repa(config, backbone, columns, grids)


@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_golden(shared: Path, path: str) -> None:
    with np.load(shared / "golden" / "repa.npz") as file:
        golden = {key: torch.from_numpy(file[key]) for key in file}
    state = load_file(shared / "golden" / "repa_sit.safetensors")
    config = SiTConfig(depth=4, width=48, heads=4, patch_size=2, input_size=16)
    model = SiT(config).double()
    columns = {"teacher/patch": ColumnSpec(shape=(64, 24), dtype="float32")}
    method = make(backbone=config.facts, columns=columns, grids={"teacher": (8, 8)}).double()
    # together the two take every key of the published state dict
    backbone_keys = {key: value for key, value in state.items() if not key.startswith("projectors.")}
    model.load_state_dict(backbone_keys)
    method.load_state_dict({key: value for key, value in state.items() if key not in backbone_keys})
    phase = method.phase_at(0)
    x = interpolant(path).interpolate(golden["x0"], golden["noise"], golden["t"])
    student = model(x, golden["t"], golden["y"], method.capture(phase))
    if path == "linear":
        projected = method.projectors[0](student.hidden[2])
        torch.testing.assert_close(projected, golden["fwd_z"], rtol=0, atol=1e-9)
    terms = method.losses(make_step({"teacher/patch": golden["z"]}, student))
    assert set(terms) == {"repa"}
    assert terms["repa"].weight == 0.5
    torch.testing.assert_close(terms["repa"].value, golden[f"loss_{path}_proj"], rtol=0, atol=1e-9)
    assert method.problems() == []


def test_slow_loop_over_tokens() -> None:
    method = make(columns=TWO, encoders=("a", "b")).double()
    hidden = torch.randn(3, 16, 32, dtype=torch.float64)
    targets = {
        "a/patch": torch.randn(3, 16, 24, dtype=torch.float64),
        "b/patch": torch.randn(3, 16, 12, dtype=torch.float64),
    }
    value = method.losses(make_step(targets, student_of(hidden)))["repa"].value.item()
    per_teacher = []
    for project, wanted in zip(method.projectors, targets.values(), strict=True):
        cosines = []
        for sample in range(3):
            for token in range(16):
                p = project(hidden[sample, token]).tolist()
                z = wanted[sample, token].tolist()
                dot = math.fsum(a * b for a, b in zip(p, z, strict=True))
                cosines.append(dot / math.sqrt(math.fsum(a * a for a in p) * math.fsum(b * b for b in z)))
        per_teacher.append(-math.fsum(cosines) / len(cosines))
    assert value == pytest.approx(sum(per_teacher) / 2, abs=1e-12)


def test_minus_one_when_projected_tokens_point_where_the_targets_point() -> None:
    method = make()
    hidden = torch.randn(2, 16, 32)
    target = 3.0 * method.projectors[0](hidden).detach()
    value = method.losses(make_step({"a/patch": target}, student_of(hidden)))["repa"].value
    assert value.item() == pytest.approx(-1, abs=1e-6)
    opposite = method.losses(make_step({"a/patch": -target}, student_of(hidden)))["repa"].value
    assert opposite.item() == pytest.approx(1, abs=1e-6)


def test_gradient_reaches_every_sample_projector_and_block_up_to_the_depth() -> None:
    method = make(columns=TWO, encoders=("a", "b"))
    model = SiT(CONFIG)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    x = torch.randn(3, 4, 8, 8, requires_grad=True)
    student = model(x, torch.rand(3), torch.tensor([0, 1, 5]), method.capture(method.phase_at(7)))
    targets = {"a/patch": torch.randn(3, 16, 24), "b/patch": torch.randn(3, 16, 12)}
    method.losses(make_step(targets, student))["repa"].value.backward()
    assert x.grad is not None
    assert (x.grad.abs().amax(dim=(1, 2, 3)) > 0).all()
    for parameter in method.parameters():
        assert parameter.grad is not None
        assert parameter.grad.abs().max() > 0
    for name, parameter in model.named_parameters():
        beyond = name.startswith(("blocks.2.", "blocks.3.", "final_layer."))
        assert (parameter.grad is None) == (beyond or name == "pos_embed"), name
        if parameter.grad is not None:
            assert parameter.grad.abs().max() > 0, name


def test_half_precision_targets_are_normalised_in_float32() -> None:
    """The norm of these tokens overflows float16 (400² · 24 > 65,504), the float32 one does not."""
    target = torch.full((2, 16, 24), 400.0, dtype=torch.float16)
    tokens = torch.ones(2, 16, 24, dtype=torch.float16, requires_grad=True)
    cosines = cosine_similarity(tokens, target)
    assert cosines.dtype == torch.float32
    torch.testing.assert_close(cosines, torch.ones(2, 16))
    # and these underflow it: 1e-4² is 0 in float16
    small = cosine_similarity(tokens, torch.full_like(target, 1e-4))
    torch.testing.assert_close(small, torch.ones(2, 16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_tokens_of_zero_norm_count_nothing_and_send_no_gradient(dtype: torch.dtype) -> None:
    tokens = torch.randn(2, 4, 6)
    targets = torch.randn(2, 4, 6).to(dtype)
    tokens[0, 1] = 0
    targets[1, 2] = 0
    tokens[1, 3] = 0
    targets[1, 3] = 0
    tokens.requires_grad_()
    cosines = cosine_similarity(tokens, targets)
    zero = torch.tensor([[0, 1, 0, 0], [0, 0, 1, 1]], dtype=torch.bool)
    assert (cosines[zero] == 0).all()
    (-cosines.mean()).backward()
    assert tokens.grad is not None
    assert tokens.grad.isfinite().all()
    assert (tokens.grad[zero] == 0).all()
    assert (tokens.grad[~zero].abs().amax(-1) > 0).all()


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1.0, 60.0, 3000.0])
@pytest.mark.parametrize("spread", [0.0, 3.0])
def test_float16_storage_moves_the_loss_by_no_more_than_its_rounding(scale: float, spread: float) -> None:
    """The bound of `cosine_similarity`: η / √(1 − η²), η = 2⁻¹¹ + 2⁻²⁵·√D / ‖z‖, token by token.

    `spread` makes channels of very different size, as real features have; 1e-6 makes all of them subnormal.
    """
    D = 384
    generator = torch.Generator().manual_seed(0)
    channels = torch.exp(spread * torch.randn(D, generator=generator, dtype=torch.float64))
    z = scale * channels / channels.max() * torch.randn(8, 64, D, generator=generator, dtype=torch.float64)
    assert z.abs().max() < 65_504
    stored = z.to(torch.float16)
    norms = torch.linalg.vector_norm(z, dim=-1)
    eta = 2.0**-11 + 2.0**-25 * D**0.5 / norms
    bound = torch.where(eta < 1, eta / (1 - eta.clamp(max=0.999) ** 2).sqrt(), 2.0)

    # the worst direction for every token: straight along the rounding error across z
    error = stored.double() - z
    across = error - (error * z).sum(-1, keepdim=True) / norms[..., None] ** 2 * z
    for tokens in (across, torch.randn(z.shape, generator=generator, dtype=torch.float64), z):
        change = (cosine_similarity(tokens, stored.double()) - cosine_similarity(tokens, z)).abs()
        assert (change <= bound).all()
        assert change.mean() <= bound.mean()
        # computed in float32, as training does: the dot product of D terms adds at most (D + 2)·2⁻²⁴ each way
        computed = cosine_similarity(tokens.float(), stored).double()
        loss = (computed.mean() - cosine_similarity(tokens, z).mean()).abs()
        assert loss <= bound.mean() + 3 * (D + 2) * 2.0**-24


def test_int8_targets_are_decoded_and_their_scales_are_read() -> None:
    """By hand: integer times its channel's scale, the same for all tokens of an image."""
    columns = MOMENTS | {
        "a/patch": ColumnSpec(shape=(16, 24), dtype="int8"),
        "a/patch-scale": ColumnSpec(shape=(24,), dtype="float32"),
    }
    method = make(columns=columns).double()
    assert method.problems() == []
    assert method.columns(method.phase_at(0)) == ("a/patch", "a/patch-scale")
    generator = torch.Generator().manual_seed(0)
    stored = torch.randint(-127, 128, (3, 16, 24), generator=generator, dtype=torch.int8)
    scale = torch.rand(3, 24, generator=generator)
    expected = torch.tensor(
        [
            [[stored[b, t, d].item() * scale[b, d].item() for d in range(24)] for t in range(16)]
            for b in range(3)
        ]
    )
    batch = {"a/patch": stored, "a/patch-scale": scale}
    decoded = target(batch, "a/patch", columns)
    assert decoded.dtype == torch.float32
    torch.testing.assert_close(decoded, expected, rtol=1e-7, atol=0)
    student = student_of(torch.randn(3, 16, 32, generator=generator, dtype=torch.float64))
    value = method.losses(make_step(batch, student))["repa"].value
    plain = make().double().losses(make_step({"a/patch": decoded}, student))["repa"].value
    assert torch.equal(value, plain)


def test_float_targets_pass_through() -> None:
    values = torch.randn(2, 16, 24).half()
    assert target({"a/patch": values}, "a/patch", COLUMNS) is values
    assert stored_columns("a/patch", COLUMNS) == ("a/patch",)
    assert stored_columns("b/patch", COLUMNS) == ("b/patch",)


def test_what_float16_cannot_hold() -> None:
    assert torch.tensor([65_504.0, 65_519.9]).half().isfinite().all()
    assert torch.tensor([65_520.0]).half().isinf().all()


def test_the_contract_of_repa() -> None:
    method = make()
    (phase,) = method.phases()
    assert phase == Phase(name="align", start=0, stop=None)
    assert all(method.phase_at(step) == phase for step in (0, 1, 400_000))
    assert method.columns(phase) == ("a/patch",)
    assert method.capture(phase) == Capture(hidden=(2,))
    assert hash(method.capture(phase)) == hash(Capture(hidden=(2,)))
    assert method.flags(phase) == Flags()
    assert method.make_conditioner(10) is None
    assert method.time_law(phase) is None
    assert [tuple(p.shape) for p in method.parameters()] == [
        (40, 32),
        (40,),
        (40, 40),
        (40,),
        (24, 40),
        (24,),
    ]
    assert set(method.state_dict()) == {
        f"projectors.0.{i}.{part}" for i in (0, 2, 4) for part in ("weight", "bias")
    }
    bound = (6 / (32 + 40)) ** 0.5
    first = method.projectors[0][0]
    assert 0.9 * bound < first.weight.abs().max() <= bound
    assert not first.bias.any()


def test_the_contract_of_none() -> None:
    method = NoAlignment(MethodConfig(), CONFIG.facts, MOMENTS, GRIDS)
    phase = method.phase_at(123)
    assert method.losses(make_step({}, Captured(prediction=torch.zeros(1)))) == {}
    assert (method.columns(phase), method.capture(phase), method.problems()) == ((), Capture(), [])
    assert not list(method.parameters())


def test_phases_are_a_pure_function_of_the_step() -> None:
    @dataclass(frozen=True, kw_only=True)
    class TwoConfig(MethodConfig):
        tau: int = 100

    class TwoPhases(Method):
        def phases(self) -> tuple[Phase, ...]:
            tau = self.config.tau
            return (Phase(name="align", stop=tau), Phase(name="free", start=tau))

        def losses(self, step: Step) -> dict[str, Term]:
            return {}

    method = TwoPhases(TwoConfig(), CONFIG.facts, {}, {})
    steps = (100, 99, 0, 10**6, 99)
    assert [method.phase_at(step).name for step in steps] == ["free", "align", "align", "free", "align"]
    with pytest.raises(ValueError, match="no phase"):
        method.phase_at(-1)


def test_registry() -> None:
    assert list(METHODS)[:3] == ["none", "repa", "haste"]
    for method in METHODS.values():
        method(method.config_class(), CONFIG.facts, COLUMNS, GRIDS)


def test_presets() -> None:
    published = {"T": 4, "S": 8, "B": 8, "L": 8, "XL": 8, "MMDiT-24": 8, "MMDiT-6": 4}
    assert set(PRESETS) == set(SIT_SIZES) | {f"MMDiT-{depth}" for depth in MMDIT_SIZES}
    for name, size in SIT_SIZES.items():
        facts = SiTConfig.named(f"SiT-{name}/2", input_size=8).facts
        method = make(backbone=facts, depth=None)
        assert method.config == RepaConfig(depth=published[name], projector_width=40)
        assert method.asked.depth is None
        assert 1 <= published[name] <= size.depth
        assert method.problems() == []


def the_problem(method: Method, field: str) -> str:
    """The remedy of the only problem, which is about that setting or column."""
    (problem,) = method.problems()
    assert problem.field == field
    assert problem.what
    assert "\n" not in problem.what + problem.remedy
    return problem.remedy


def test_problem_no_teacher() -> None:
    remedy = the_problem(make(columns=MOMENTS), "method.encoders")
    assert "repa preprocess --encoder" in remedy


def test_problem_several_teachers_and_none_chosen() -> None:
    remedy = the_problem(make(columns=TWO), "method.encoders")
    assert "--set method.encoders=[a]" in remedy
    assert make(columns=TWO, encoders=("b",)).problems() == []


def test_problem_teacher_not_in_the_cache() -> None:
    remedy = the_problem(make(encoders=("a", "dinov2-b")), "method.encoders")
    assert "--encoder dinov2-b" in remedy


def test_problem_teacher_named_twice() -> None:
    the_problem(make(encoders=("a", "a")), "method.encoders")


@pytest.mark.parametrize("depth", [0, 5, -1])
def test_problem_depth_outside_the_backbone(depth: int) -> None:
    remedy = the_problem(make(depth=depth), "method.depth")
    assert "--set method.depth=" in remedy


def test_problem_no_preset_for_an_unnamed_size() -> None:
    remedy = the_problem(make(depth=None), "method.depth")
    assert "--set method.depth=4" in remedy


def test_problem_grid_and_the_patch_size_that_fits() -> None:
    facts = SiTConfig.named("SiT-B/4", input_size=8).facts
    assert "--model SiT-B/2" in the_problem(make(backbone=facts), "a/patch")


def test_problem_grid_and_the_encoder_that_fits() -> None:
    columns = COLUMNS | {"b/patch": ColumnSpec(shape=(9, 24), dtype="float16")}
    remedy = the_problem(make(columns=columns, grids=GRIDS | {"b": (3, 3)}, encoders=("b",)), "b/patch")
    assert "--set method.encoders=[a]" in remedy


def test_problem_grid_that_nothing_fits() -> None:
    columns = MOMENTS | {"b/patch": ColumnSpec(shape=(9, 24), dtype="float16")}
    remedy = the_problem(make(columns=columns, grids={"sd-vae": (8, 8), "b": (3, 3)}), "b/patch")
    assert "whose grid is 4×4" in remedy


def test_problem_grid_and_tokens_disagree() -> None:
    remedy = the_problem(make(grids=GRIDS | {"a": (4, 5)}), "a/patch")
    assert "write a again" in remedy


def test_problems_are_collected() -> None:
    method = make(encoders=("x", "y", "a"), depth=9)
    assert sorted(problem.field for problem in method.problems()) == [
        "method.depth",
        "method.encoders",
        "method.encoders",
    ]
