"""U-REPA against golden numbers and loops: where it up-samples, what it compares, what learns of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from method_steps import make_step
from repa.data.format.columns import ColumnSpec, scale_column
from repa.data.format.int8 import quantise
from repa.trainer.config import build
from repa.trainer.methods.alignment import cosine_similarity
from repa.trainer.methods.repa import Repa, RepaConfig
from repa.trainer.methods.urepa import Upsampling, Urepa, UrepaConfig
from repa.trainer.models.capture import Capture, Captured
from repa.trainer.models.sit import SiTConfig
from repa.trainer.models.sit_down import SIT_DOWN_SIZES, SiTDown, SiTDownConfig
from repa.trainer.objectives.base import squared_error
from repa.trainer.objectives.paths import interpolant
from safetensors.torch import load_file

if TYPE_CHECKING:
    from pathlib import Path

    from repa.trainer.methods.base import Term
    from repa.trainer.models.capture import BackboneFacts

GOLDEN = SiTDownConfig(
    outer=2, middle=3, width=32, heads=4, mlp_width=88, patch_size=2, input_size=16, num_classes=10
)
COLUMNS = {"a/patch": ColumnSpec(shape=(64, 24), dtype="float32")}
GRIDS = {"sd-vae": (16, 16), "a": (8, 8)}


def make(
    facts: BackboneFacts = GOLDEN.facts,
    columns: dict[str, ColumnSpec] = COLUMNS,
    grids: dict[str, tuple[int, int]] = GRIDS,
    **settings: Any,
) -> Urepa:
    torch.manual_seed(0)
    values = {"depth": 4, "projector_width": 24} | settings
    return Urepa(UrepaConfig(**values), facts, columns, grids)


def student_of(hidden: torch.Tensor, block: int = 4) -> Captured:
    return Captured(prediction=None, hidden={block: hidden}, grids={block: (4, 4)})


def terms_of(method: Urepa, hidden: torch.Tensor, **columns: torch.Tensor) -> dict[str, Term]:
    named = {name.replace("__", "/"): value for name, value in columns.items()}
    return method.losses(make_step(named, student_of(hidden)))


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(scope="module")
def golden(shared: Path) -> dict[str, torch.Tensor]:
    with np.load(shared / "golden" / "urepa.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file}


def golden_pass(
    shared: Path, golden: dict[str, torch.Tensor], **settings: Any
) -> tuple[SiTDown, Urepa, Captured]:
    state = load_file(shared / "golden" / "urepa.safetensors")
    own = {key[len("model.") :]: value.double() for key, value in state.items() if key.startswith("model.")}
    torch.set_default_dtype(torch.float64)
    try:
        backbone, method = SiTDown(GOLDEN), make(**settings)
    finally:
        torch.set_default_dtype(torch.float32)
    backbone.load_state_dict({key: value for key, value in own.items() if "projector" not in key})
    mlp = {f"projectors.0.{key[len('projector.') :]}": own[key] for key in own if "projector" in key}
    method.double().load_state_dict(mlp)
    x_t = interpolant("linear").interpolate(golden["x0"], golden["noise"], golden["t"])
    captured = backbone(x_t, golden["t"], golden["y"], Capture(hidden=(4,)))
    captured.hidden[4].retain_grad()
    return backbone, method, captured


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def test_golden(shared: Path, golden: dict[str, torch.Tensor]) -> None:
    backbone, method, captured = golden_pass(shared, golden)
    ((student, teacher),) = method.aligned_sides(make_step({"a/patch": golden["z"]}, captured))
    close(method.projectors[0](captured.hidden[4]), golden["projected"])
    close(student, golden["upsampled"])
    assert torch.equal(teacher, golden["z"])
    terms = method.losses(make_step({"a/patch": golden["z"]}, captured))
    close(terms["repa"].value, golden["loss_token"])
    close(terms["relations"].value, golden["loss_manifold"])
    assert {name: term.weight for name, term in terms.items()} == {
        "repa": 0.5, "relations": 1.5, "student_pair_cosine": None, "teacher_pair_cosine": None,
    }  # fmt: skip
    denoise = squared_error(
        captured.prediction, interpolant("linear").velocity(golden["x0"], golden["noise"], golden["t"])
    )
    close(denoise, golden["loss_denoise"])
    weighted = sum(term.weight * term.value for term in terms.values() if term.weight is not None)
    total = denoise.mean() + weighted
    close(total, golden["loss_total"])
    places = {
        "grad_align_tap": captured.hidden[4],
        "grad_align_projector_bias": method.projectors[0][4].bias,
        "grad_align_down": backbone.down.weight,
        "grad_align_first_qkv_bias": backbone.blocks[0].attn.qkv.bias,
    }
    alignment = torch.autograd.grad(weighted / 0.5, list(places.values()), retain_graph=True)
    for name, gradient in zip(places, alignment, strict=True):
        close(gradient, golden[name])
    places = {
        "grad_total_up": backbone.up.weight,
        "grad_total_last_skip_bias": backbone.blocks[6].skip_linear.bias,
    }
    for name, gradient in zip(places, torch.autograd.grad(total, list(places.values())), strict=True):
        close(gradient, golden[name])


@pytest.mark.parametrize(
    ("settings", "token", "manifold"),
    [
        ({"upsampling": "nearest"}, "loss_token_nearest", "loss_manifold_nearest"),
        ({"pairs": "batch"}, "loss_token", "loss_manifold_batch_pairs"),
    ],
)
def test_golden_of_the_other_readings(
    shared: Path, golden: dict[str, torch.Tensor], settings: dict[str, str], token: str, manifold: str
) -> None:
    _, method, captured = golden_pass(shared, golden, **settings)
    terms = method.losses(make_step({"a/patch": golden["z"]}, captured))
    close(terms["repa"].value, golden[token])
    close(terms["relations"].value, golden[manifold])


def test_the_losses_by_loops() -> None:
    """One token and one pair of tokens at a time, up-sampling to the nearest."""
    method, hidden, z = make(upsampling="nearest").double(), drawn(2, 16, 32), drawn(2, 64, 24, seed=1)
    terms = terms_of(method, hidden, a__patch=z)
    projected = method.projectors[0](hidden)
    cosines, squares = [], []
    for image in range(2):
        student = [projected[image, (row // 2) * 4 + column // 2] for row in range(8) for column in range(8)]
        cosines += [torch.cosine_similarity(z[image, i], student[i], dim=0) for i in range(64)]
        for i in range(64):
            for j in range(64):
                mine = torch.cosine_similarity(student[i], student[j], dim=0)
                theirs = torch.cosine_similarity(z[image, i], z[image, j], dim=0)
                squares.append((theirs - mine) ** 2)
    torch.testing.assert_close(terms["repa"].value, -torch.stack(cosines).mean())
    torch.testing.assert_close(terms["relations"].value, torch.stack(squares).mean())


def test_bilinear_upsampling_by_hand() -> None:
    """Centres of the new tokens lie at a quarter and three quarters of the old; the rim is held."""
    tokens = drawn(2, 6, 3)
    found = Upsampling((2, 3), (4, 6), "bilinear").double()(tokens).unflatten(1, (4, 6))
    grid = tokens.unflatten(1, (2, 3))
    for row in range(4):
        for column in range(6):
            expected = torch.zeros(2, 3, dtype=torch.float64)
            for place, weight in weights(row, 2):
                for other, share in weights(column, 3):
                    expected += weight * share * grid[:, place, other]
            torch.testing.assert_close(found[:, row, column], expected)


def weights(new: int, count: int) -> list[tuple[int, float]]:
    at = (new + 0.5) / 2 - 0.5
    low = int(np.floor(at))
    return [(min(max(low, 0), count - 1), 1 - (at - low)), (min(max(low + 1, 0), count - 1), at - low)]


@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
@pytest.mark.parametrize("factor", [2, 3, 4])
def test_upsampling_is_that_of_the_library(mode: str, factor: int) -> None:
    tokens, to = drawn(2, 12, 5), (3 * factor, 4 * factor)
    image = torch.nn.functional.interpolate(tokens.mT.unflatten(2, (3, 4)), size=to, mode=mode)
    found = Upsampling((3, 4), to, mode)(tokens)
    torch.testing.assert_close(found, image.flatten(2).mT, rtol=0, atol=1e-6)
    half = Upsampling((3, 4), to, mode)(tokens.bfloat16())
    assert half.dtype == torch.float32


def test_the_mlp_sees_the_tokens_of_the_middle() -> None:
    facts = SiTDownConfig.named("SiT-down-B/2", input_size=32).facts
    columns = {"a/patch": ColumnSpec(shape=(256, 24), dtype="float16")}
    method = make(facts, columns, {"a": (16, 16)}, depth=None)
    assert method.config.depth == 8
    assert method.problems() == []
    seen = []
    method.projectors[0].register_forward_hook(lambda _, given, out: seen.append((given[0].shape, out.shape)))
    step = make_step({"a/patch": drawn(1, 256, 24).half()}, student_of(drawn(1, 64, 768).float(), 8))
    ((student, teacher),) = method.aligned_sides(step)
    assert seen == [((1, 64, 768), (1, 64, 24))]
    assert student.shape == teacher.shape == (1, 256, 24)


def test_the_gradient_reaches_every_block_up_to_the_tap() -> None:
    torch.manual_seed(0)
    backbone, method = SiTDown(GOLDEN), make()
    for parameter in backbone.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x, t, y = drawn(2, 4, 16, 16).float(), torch.tensor([0.3, 0.7]), torch.tensor([1, 2])
    captured = backbone(x, t, y, Capture(hidden=(4,)))
    terms = method.losses(make_step({"a/patch": drawn(2, 64, 24).float()}, captured))
    sum(term.weight * term.value for term in terms.values() if term.weight).backward()
    blocks = [[each.grad for each in block.parameters()] for block in backbone.blocks]
    assert all(gradient.abs().max() > 0 for block in blocks[:4] for gradient in block)
    assert all(gradient is None for block in blocks[4:] for gradient in block)
    assert backbone.down.weight.grad.abs().max() > 0
    assert backbone.up.weight.grad is None
    assert all(each.grad.abs().max() > 0 for each in method.parameters())


def test_targets_of_fewer_bits() -> None:
    """The manifold term too stays near that of float32 targets."""
    z, hidden = drawn(3, 64, 24, seed=1).float(), drawn(3, 16, 32).float()
    exact = terms_of(make(), hidden, a__patch=z)
    halves = {"a/patch": ColumnSpec(shape=(64, 24), dtype="float16")}
    terms = terms_of(make(columns=halves), hidden, a__patch=z.half())
    for name, term in exact.items():
        assert terms[name].value.item() == pytest.approx(term.value.item(), abs=1e-4), name
    scales = scale_column("a/patch")
    bytes_ = {
        "a/patch": ColumnSpec(shape=(64, 24), dtype="int8"),
        scales: ColumnSpec(shape=(24,), dtype="float32"),
    }
    values, scale = quantise(z)
    method = make(columns=bytes_)
    terms = method.losses(make_step({"a/patch": values, scales: scale}, student_of(hidden)))
    assert set(method.aligned_columns()) == set(bytes_)
    for name, term in exact.items():
        assert terms[name].value.item() == pytest.approx(term.value.item(), abs=2e-3), name
        assert terms[name].value.dtype == torch.float32


def test_a_tap_on_the_teachers_grid_is_repa_and_the_manifold_term() -> None:
    facts = SiTConfig(depth=4, width=32, heads=2, patch_size=2, input_size=16, num_classes=5).facts
    method = make(facts, depth=2)
    torch.manual_seed(0)
    plain = Repa(RepaConfig(depth=2, projector_width=24, relations=3.0), facts, COLUMNS, GRIDS)
    assert method.problems() == plain.problems() == []
    captured = Captured(prediction=None, hidden={2: drawn(2, 64, 32).float()}, grids={2: (8, 8)})
    step = make_step({"a/patch": drawn(2, 64, 24).float()}, captured)
    ours, theirs = method.losses(step), plain.losses(step)
    for name in ("repa", "relations"):
        assert torch.equal(ours[name].value, theirs[name].value)
        assert ours[name].weight == theirs[name].weight


def test_several_teachers_each_on_its_own_grid() -> None:
    columns = COLUMNS | {"b/patch": ColumnSpec(shape=(16, 12), dtype="float32")}
    method = make(columns=columns, grids=GRIDS | {"b": (4, 4)}, encoders=("a", "b"))
    assert method.problems() == []
    a, b, hidden = drawn(2, 64, 24).float(), drawn(2, 16, 12).float(), drawn(2, 16, 32).float()
    terms = terms_of(method, hidden, a__patch=a, b__patch=b)
    first = method.upsamplings[0](method.projectors[0](hidden))
    second = method.projectors[1](hidden)
    expected = -(cosine_similarity(first, a).mean() + cosine_similarity(second, b).mean()) / 2
    torch.testing.assert_close(terms["repa"].value, expected)


def test_a_collapsed_student_is_seen() -> None:
    z = drawn(2, 64, 24)
    collapsed = terms_of(make().double(), drawn(2, 1, 32).expand(2, 16, 32), a__patch=z)
    assert collapsed["student_pair_cosine"].value.item() == pytest.approx(1)
    varied = terms_of(make().double(), drawn(2, 16, 32), a__patch=z)
    assert varied["student_pair_cosine"].value.item() < 0.9
    assert abs(varied["teacher_pair_cosine"].value.item()) < 0.1
    assert not varied["student_pair_cosine"].value.requires_grad


def test_without_the_manifold_term() -> None:
    terms = terms_of(make(relations=None), drawn(1, 16, 32).float(), a__patch=drawn(1, 64, 24).float())
    assert set(terms) == {"repa", "student_pair_cosine", "teacher_pair_cosine"}


def test_who_leaves_out_the_manifold_term_has_the_last_word_over_the_preset() -> None:
    facts = SiTDownConfig.named("SiT-down-B/1", input_size=8).facts
    method = make(facts, depth=None, relations=None)
    assert (method.config.depth, method.config.relations) == (8, None)
    hidden = drawn(1, 16, 768).float()
    step = make_step({"a/patch": drawn(1, 64, 24).float()}, student_of(hidden, 8))
    assert "relations" not in method.losses(step)


def test_settings_that_would_do_nothing_are_refused() -> None:
    def fields_of(facts: BackboneFacts = GOLDEN.facts, **settings: Any) -> list[str]:
        return [problem.field for problem in make(facts, **settings).problems()]

    flat = SiTConfig(depth=4, width=32, heads=2, patch_size=2, input_size=16, num_classes=5).facts
    assert fields_of(flat, upsampling="nearest") == ["method.upsampling"]
    assert fields_of(flat) == fields_of(upsampling="nearest") == []
    assert fields_of(flat, depth=99, upsampling="nearest") == ["method.depth"]
    assert fields_of(relations=None, pairs="batch") == ["method.pairs"]
    assert fields_of(relations=2.0, pairs="batch") == fields_of(relations=None) == []


def test_the_up_sampling_is_in_no_checkpoint() -> None:
    method = make()
    assert {key.partition(".")[0] for key in method.state_dict()} == {"projectors"}
    assert all(name.startswith("projectors.") for name, _ in method.named_parameters())


@pytest.mark.parametrize("size", SIT_DOWN_SIZES)
def test_the_taps_lie_in_the_middle(size: str) -> None:
    facts = SiTDownConfig.named(f"SiT-down-{size}/2", input_size=32).facts
    columns = {"a/patch": ColumnSpec(shape=(256, 24), dtype="float16")}
    method = make(facts, columns, {"a": (16, 16)}, depth=None)
    assert method.problems() == []
    assert method.config.depth == (facts.depth + 1) // 2
    assert facts.grid_of(method.config.depth) == (8, 8)


def test_the_paper_is_the_default() -> None:
    config = build(flags={"method": "urepa"})
    assert config.model == "SiT-down-B/2"
    assert (config.method.weight, config.method.relations, config.method.projector_width) == (0.5, 3.0, 2048)
    assert Urepa.presets["XL"].depth == 18


def test_grids_that_are_no_whole_multiple_are_refused() -> None:
    columns = {"a/patch": ColumnSpec(shape=(36, 24), dtype="float16")}
    (problem,) = make(columns=columns, grids={"a": (6, 6)}).problems()
    assert problem.field == "a/patch"
    assert problem.remedy
