"""MM-DiT: the published program's numbers, equations by loops, captures, sizes and initialisations."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from repa.data.errors import RepaError
from repa.data.format.columns import ColumnSpec
from repa.trainer.methods.repa import Repa, RepaConfig
from repa.trainer.models.capture import Capture
from repa.trainer.models.mmdit import MMDiT, MMDiTConfig
from repa.trainer.models.text_conditioning import TextConditioner
from repa.trainer.objectives.flow import Flow, FlowConfig
from repa.trainer.sampling.sampler import sample
from repa.trainer.sampling.settings import SamplerConfig
from safetensors.torch import load_file

if TYPE_CHECKING:
    from pathlib import Path

GOLDEN = MMDiTConfig(depth=4, width=48, heads=4, patch_size=2, input_size=32)
SMALL = MMDiTConfig(depth=3, width=32, heads=2, patch_size=2, input_size=8)


def make(config: MMDiTConfig, states: tuple[int, int] = (5, 12)) -> MMDiT:
    torch.manual_seed(0)
    return MMDiT(config, TextConditioner("clip-l-text/states", states, config.width)).double().eval()


@pytest.fixture(scope="module")
def golden(shared: Path) -> dict[str, torch.Tensor]:
    with np.load(shared / "golden" / "mmdit.npz") as file:
        found = {key: torch.from_numpy(file[key]) for key in file}
    return {key: value.double() for key, value in found.items()}


@pytest.fixture(scope="module")
def state(shared: Path) -> dict[str, torch.Tensor]:
    return {key: value.double() for key, value in load_file(shared / "golden" / "mmdit.safetensors").items()}


@pytest.fixture
def model(golden: dict[str, torch.Tensor], state: dict[str, torch.Tensor]) -> MMDiT:
    model = make(GOLDEN, (20, 768))
    names = {"joint_blocks.": "blocks.", "context_embedder.": "y_embedder.proj."}
    ours = {"y_embedder.null_states": torch.zeros(20, 768).double()}
    for key, value in state.items():
        if not key.startswith("projectors."):
            found = [key.replace(old, new, 1) for old, new in names.items() if key.startswith(old)]
            ours[found[0] if found else key] = value
    model.load_state_dict(ours)
    assert isinstance(model.y_embedder, TextConditioner)
    model.y_embedder.take_null(golden["null_context"])
    return model


@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_golden_losses_and_gradients(
    golden: dict[str, torch.Tensor], state: dict[str, torch.Tensor], model: MMDiT, path: str
) -> None:
    objective = Flow(FlowConfig(path=path))  # type: ignore[arg-type]
    columns = {"a/patch": ColumnSpec(shape=(256, 24), dtype="float32")}
    method = Repa(RepaConfig(depth=2, projector_width=40), GOLDEN.facts, columns, {"a": (16, 16)}).double()
    assert method.problems() == []
    method.load_state_dict({key: value for key, value in state.items() if key.startswith("projectors.")})
    noised = objective.noised(golden["x0"], golden["noise"], golden["t"])
    student = model(noised.x_t, golden["t"], golden["context"], Capture(hidden=(2,), attention=(2,)))
    (denoise,) = objective.losses(student, noised).values()
    projected = method.projectors[0](student.hidden[2])
    proj = -F.cosine_similarity(projected, golden["z"], dim=-1).mean()
    start = "" if path == "linear" else "cosine_"
    torch.testing.assert_close(denoise, golden[f"{start}denoise"], rtol=0, atol=1e-9)
    torch.testing.assert_close(proj, golden[f"{start}proj"], rtol=0, atol=1e-9)
    if path == "cosine":
        return
    torch.testing.assert_close(student.prediction, golden["out"], rtol=0, atol=1e-9)
    torch.testing.assert_close(projected, golden["projected"], rtol=0, atol=1e-9)
    logits = student.queries[2][:, :, :4] @ student.keys[2].mT / 12**0.5
    torch.testing.assert_close(logits, golden["haste_logits_block2"], rtol=0, atol=1e-9)
    total = denoise.mean() + 0.5 * proj
    torch.testing.assert_close(total, golden["total"], rtol=0, atol=1e-9)
    parameters = (
        model.blocks[0].x_block.attn.proj.weight,
        model.blocks[1].context_block.attn.proj.weight,
        method.projectors[0][0].weight,
    )
    for name, found in zip(
        ("image", "text", "projector"), torch.autograd.grad(total, parameters), strict=True
    ):
        torch.testing.assert_close(found, golden[f"grad_{name}"], rtol=0, atol=1e-9)


@torch.no_grad()
def test_golden_null_text(golden: dict[str, torch.Tensor], model: MMDiT) -> None:
    out = model(golden["noise"], golden["t"], model.y_embedder.null(2)).prediction
    torch.testing.assert_close(out[:, :, :8], golden["out_null"], rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("key", "settings"),
    [
        ("ode_euler_cfg2.0", SamplerConfig(solver="euler", steps=6, guidance=2.0)),
        ("ode_heun_cfg2.0", SamplerConfig(solver="heun", steps=3, guidance=2.0, interval=(0, 0.7))),
        ("sde_cfg2.0", SamplerConfig(solver="sde", steps=4, guidance=2.0)),
    ],
)
@torch.no_grad()
def test_golden_samples(
    golden: dict[str, torch.Tensor], model: MMDiT, key: str, settings: SamplerConfig
) -> None:
    noises = iter([each[None] for each in golden["sde_noise"]])
    start, text = golden["noise"][:1], golden["context"][:1]
    found = sample(model, Flow(FlowConfig()), start, text, settings, noises=noises)
    torch.testing.assert_close(found[0], golden[key], rtol=0, atol=1e-7)


def test_published_size() -> None:
    with torch.device("meta"):
        config = MMDiTConfig.named("MMDiT-24/2", input_size=32)
        model = MMDiT(config, TextConditioner("clip-l-text/states", (77, 768), config.width))
    assert (config.depth, config.width, config.heads) == (24, 768, 24)
    count = sum(each.numel() for name, each in model.named_parameters() if name != "pos_embed")
    assert round(count / 1e6, 1) == 505.1
    with pytest.raises(RepaError) as caught:
        MMDiTConfig.named("MMDiT-24/8", input_size=36)
    assert caught.value.field == "--model"
    assert not MMDiTConfig.knows("MMDiT-23/2")


def test_block_by_its_equations() -> None:
    """One softmax over text and image keys, each stream's own maps, and text that is only looked at."""
    block = make(SMALL).blocks[2]
    generator = torch.Generator().manual_seed(1)
    x, text, c = (
        torch.randn(shape, generator=generator).double() for shape in ((2, 4, 32), (2, 3, 32), (2, 32))
    )
    image, words = block.x_block, block.context_block
    assert not hasattr(words, "mlp")
    mods = image.adaLN_modulation[1](F.silu(c)).split(32, dim=1)
    text_mods = words.adaLN_modulation[1](F.silu(c)).split(32, dim=1)
    assert (len(mods), len(text_mods)) == (6, 2)
    found, same, (queries, keys) = block(x, text, c, look=True)
    assert torch.equal(same, text)
    for b in range(2):
        normed = F.layer_norm(x[b], (32,), eps=1e-6) * (1 + mods[1][b]) + mods[0][b]
        seen = F.layer_norm(text[b], (32,), eps=1e-6) * (1 + text_mods[1][b]) + text_mods[0][b]
        qkv, text_qkv = image.attn.qkv(normed), words.attn.qkv(seen)
        heads = []
        for h in range(2):
            q = qkv[:, 16 * h : 16 * h + 16]
            both = torch.cat([text_qkv, qkv])
            k, v = both[:, 32 + 16 * h : 48 + 16 * h], both[:, 64 + 16 * h : 80 + 16 * h]
            torch.testing.assert_close(queries[b, h], q)
            torch.testing.assert_close(keys[b, h], k[3:])
            heads.append(torch.softmax(q @ k.T / 4, dim=-1) @ v)
        after = x[b] + mods[2][b] * image.attn.proj(torch.cat(heads, dim=1))
        hidden = F.layer_norm(after, (32,), eps=1e-6) * (1 + mods[4][b]) + mods[3][b]
        torch.testing.assert_close(found[b], after + mods[5][b] * image.mlp(hidden))


def test_early_stop_and_captures() -> None:
    model = make(SMALL)
    x, t, text = torch.randn(2, 4, 8, 8).double(), torch.rand(2).double(), torch.randn(2, 5, 12).double()
    whole = model(x, t, text, Capture(hidden=(1, 3), attention=(2,)))
    early = model(x, t, text, Capture(hidden=(1,), attention=(2,), stop_after=2))
    assert early.prediction is None
    assert torch.equal(early.hidden[1], whole.hidden[1])
    assert torch.equal(early.keys[2], whole.keys[2])
    assert whole.hidden[3].shape == (2, 16, 32)
    assert whole.grids == {1: (4, 4), 3: (4, 4)}


def test_initialisations() -> None:
    """As released nothing is zero; adaLN-zero begins as the identity that predicts nothing."""
    x, t, text = torch.randn(2, 4, 8, 8).double(), torch.rand(2).double(), torch.randn(2, 5, 12).double()
    released, zero = make(SMALL), make(replace(SMALL, adaln_zero=True))
    assert released(x, t, text).prediction.abs().min() > 0
    assert zero(x, t, text, Capture()).prediction.abs().max() == 0
    bound = 32**-0.5
    weights = released.blocks[0].x_block.attn.qkv.weight
    assert 0.98 * bound < weights.abs().max() <= bound
    assert torch.equal(zero.y_embedder.proj.weight, released.y_embedder.proj.weight)


def test_a_label_is_no_text() -> None:
    with pytest.raises(ValueError, match="sequence"):
        MMDiT(SMALL)


def test_the_null_condition_takes_the_place_of_what_is_dropped() -> None:
    conditioner = make(SMALL).y_embedder
    assert isinstance(conditioner, TextConditioner)
    conditioner.take_null(torch.full((5, 12), 0.5))
    values = torch.randn(4, 5, 12).half()
    dropped = torch.tensor([False, True, False, True])
    found = conditioner.condition(values, dropped)
    assert found.dtype == torch.float64
    for sample_, lost in enumerate(dropped.tolist()):
        expected = torch.full((5, 12), 0.5) if lost else values[sample_]
        assert torch.equal(found[sample_], expected.double())
    assert torch.equal(conditioner.null(2), torch.full((2, 5, 12), 0.5).double())
    draws = conditioner.dropped(20_000, torch.Generator().manual_seed(0)).double().mean().item()
    assert abs(draws - 0.1) < 0.01
