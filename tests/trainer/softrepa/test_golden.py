"""The published SoftREPA, in float64: outputs, pair errors, losses and their gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from repa.trainer.models.denoiser_facts import read_denoiser
from repa.trainer.models.soft_inputs import take_soft_tokens
from repa.trainer.models.stable_diffusion import Denoiser, alphas_cumprod
from repa.trainer.softrepa.contrast import contrastive_loss, found, pair_logits, rows_of_pairs
from repa.trainer.softrepa.tokens import SoftTokens, bins_of
from safetensors.torch import load_file
from small_diffusion import save_model, small_model

GOLDEN = Path(__file__).parents[4] / "shared" / "golden"
pytestmark = pytest.mark.skipif(
    not (GOLDEN / "softrepa.npz").exists(), reason="the golden numbers are not here"
)
KINDS = ("sd15", "sdxl", "sd3")
BLOCKS = ("down", "mid", "up")


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    with np.load(GOLDEN / "softrepa.npz") as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays}


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "softrepa.safetensors")


@pytest.fixture
def denoiser(weights: dict[str, torch.Tensor], tmp_path: Path) -> Any:
    def make(kind: str, blocks: tuple[str, ...] = ("down", "mid")) -> Denoiser:
        prefix = f"{kind}.base."
        state = {name.removeprefix(prefix): each for name, each in weights.items() if name.startswith(prefix)}
        facts = read_denoiser(str(save_model(tmp_path / kind, kind)))
        made = Denoiser(small_model(kind, state).double(), facts)
        take_soft_tokens(made.model, kind, blocks=blocks, text_length=7)
        return made

    return make


def close(value: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(value.double(), expected.double(), rtol=0, atol=1e-9)


def test_the_loss_of_a_matrix_of_errors(golden: dict[str, torch.Tensor]) -> None:
    same = torch.eye(5, dtype=torch.bool)
    close(pair_logits(golden["errors"]), golden["logits"])
    for weight in (0, 10):
        errors = golden["errors"].clone().requires_grad_()
        loss = contrastive_loss(errors, same, matched_weight=weight)
        loss.backward()
        close(loss, golden[f"loss_dweight_{weight}"])
        close(errors.grad, golden[f"grad_dweight_{weight}"])


def test_the_schedule_is_stable_diffusions(golden: dict[str, torch.Tensor]) -> None:
    torch.testing.assert_close(alphas_cumprod({}), golden["alphas_cumprod"].float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("seen", ["100", "110", "111"])
@pytest.mark.parametrize("timed", [False, True])
@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_outputs_of_the_u_nets(
    kind: str, timed: bool, seen: str, golden: dict[str, torch.Tensor], denoiser: Any
) -> None:
    made = denoiser(kind, tuple(name for name, flag in zip(BLOCKS, seen, strict=True) if flag == "1"))
    soft = SoftTokens(golden[f"{kind}_tokens"], golden[f"{kind}_time_table"] if timed else None)
    out = _predict(made, golden, golden["latent"], golden[f"{kind}_t"], soft(golden[f"{kind}_t"]))
    close(out, golden[f"{kind}_out_{seen}{'_time' if timed else ''}"])


@pytest.mark.parametrize("kind", KINDS)
def test_a_call_without_tokens_is_the_plain_models(
    kind: str, golden: dict[str, torch.Tensor], denoiser: Any
) -> None:
    t = golden["sd3_t_a" if kind == "sd3" else f"{kind}_t"]
    close(_predict(denoiser(kind), golden, golden["latent"], t, None), golden[f"{kind}_out_plain"])


def test_outputs_of_stable_diffusion_3(golden: dict[str, torch.Tensor], denoiser: Any) -> None:
    made, latent = denoiser("sd3"), golden["latent"]
    plain = SoftTokens(golden["sd3_tokens"], None)
    close(_predict(made, golden, latent, golden["sd3_t_a"], plain(golden["sd3_t_a"])), golden["sd3_out"])
    all_layers = SoftTokens(golden["sd3_tokens_all"], None)(golden["sd3_t_a"])
    close(_predict(made, golden, latent, golden["sd3_t_a"], all_layers), golden["sd3_out_all_layers"])
    wide = SoftTokens(made.model.context_embedder(golden["sd3_tokens_wide"]).detach(), None)
    close(_predict(made, golden, latent, golden["sd3_t_a"], wide(golden["sd3_t_a"])), golden["sd3_out_wide"])
    timed = SoftTokens(golden["sd3_tokens"], golden["sd3_time_table"])
    for case in "ac":
        t = golden[f"sd3_t_{case}"]
        assert torch.equal(bins_of(t), golden[f"sd3_bins_{case}"])
        close(_predict(made, golden, latent, t, timed(t)), golden[f"sd3_out_time_{case}"])
    # published, one time of 1000 moves the bins of the others
    assert bins_of(golden["sd3_t_b"]).tolist() == [99, 50, 1]
    assert golden["sd3_bins_b"].tolist() == [99, 49, 0]


@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_pairs_and_their_gradients_in_chunks_of_any_size(
    kind: str, rows: int, golden: dict[str, torch.Tensor], denoiser: Any
) -> None:
    made = denoiser(kind)
    soft = SoftTokens(golden[f"{kind}_tokens"], golden[f"{kind}_time_table"])
    t = golden[f"{kind}_pair_t"]
    if made.alphas is not None:
        made.alphas = golden["alphas_cumprod"]
    x, target = made.noised(golden["latent"], golden["noise"], t)

    def predict(images: torch.Tensor, captions: torch.Tensor) -> torch.Tensor:
        times = t.expand(len(images))
        return _predict(made, golden, x[images], times, soft(times), captions)

    errors, total = [], torch.zeros((), dtype=torch.float64)
    for part in rows_of_pairs(predict, target, torch.eye(3, dtype=torch.bool), rows=rows):
        part.loss.backward()
        errors.append(part.errors.detach())
        total += part.loss.detach()
    close(torch.cat(errors), golden[f"{kind}_pair_errors"])
    close(total, golden[f"{kind}_pair_loss"])
    close(soft.tokens.grad, golden[f"{kind}_grad_tokens"])
    assert soft.time_table is not None
    assert soft.time_table.grad is not None
    close(soft.time_table.grad[31], golden[f"{kind}_grad_time_row_31"])
    assert soft.time_table.grad.abs().sum(dim=1).nonzero().flatten().tolist() == [31]
    least = golden[f"{kind}_pair_errors"].argmin(dim=1) == torch.arange(3)
    assert torch.equal(found(torch.cat(errors), torch.eye(3, dtype=torch.bool)), least)


def _predict(
    made: Denoiser,
    golden: dict[str, torch.Tensor],
    x: torch.Tensor,
    t: torch.Tensor,
    soft: torch.Tensor | None,
    captions: torch.Tensor | None = None,
) -> torch.Tensor:
    """A prediction as the golden one was called, SDXL with other image sizes than a side gives."""
    kind = made.facts.kind
    captions = torch.arange(3) if captions is None else captions
    text, pooled = golden[f"{kind}_prompt"][captions], golden.get(f"{kind}_pooled")
    pooled = None if pooled is None else pooled[captions]
    if kind != "sdxl":
        return made.predict(x, t, text, pooled, soft, 64)
    times = golden["sdxl_time_ids"][captions]

    def with_times(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "added_cond_kwargs": {**kwargs["added_cond_kwargs"], "time_ids": times}}

    handle = made.model.register_forward_pre_hook(with_times, with_kwargs=True)
    try:
        return made.predict(x, t, text, pooled, soft, 64)
    finally:
        handle.remove()
