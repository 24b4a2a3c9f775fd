"""The channel-idle network and its merge, against the published code's numbers and against each other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from repa.data.errors import RepaError
from repa.pipeline.encoders.channel_idle import IdleFeedForward, active_channels
from safetensors.torch import load_file
from torch import nn

EXACT = {"rtol": 1e-9, "atol": 1e-9}
SHARES = (0, 25, 50, 70, 75, 90, 100)


@pytest.fixture(scope="module")
def golden(shared: Path) -> dict[str, torch.Tensor]:
    with np.load(shared / "golden" / "repavit.npz") as file:
        arrays = {name: torch.from_numpy(file[name]) for name in file}
    return {**arrays, **load_file(shared / "golden" / "repavit.safetensors")}


def network(golden: dict[str, torch.Tensor], prefix: str, active: int, width: int = 20) -> IdleFeedForward:
    made = IdleFeedForward(width, 4 * width, active, nn.GELU(), batch_norms=True).double()
    state = {name.removeprefix(prefix): each for name, each in golden.items() if name.startswith(prefix)}
    made.load_state_dict(state)
    return made.eval()


@pytest.mark.parametrize("share", SHARES)
def test_published_network_and_its_merge(golden: dict[str, torch.Tensor], share: int) -> None:
    name = f"ffn_{share:03d}"
    active = active_channels(80, share / 100)
    assert active == int(golden[f"{name}_active"])
    made, x = network(golden, f"{name}.", active), golden["ffn_x"]
    with torch.no_grad():
        torch.testing.assert_close(x + made(x), golden[f"{name}_out"], **EXACT)
        merged = made.merge(shortcut=True)
        torch.testing.assert_close(merged(x), golden[f"{name}_out_merged"], **EXACT)
        torch.testing.assert_close(x + made.merge()(x), golden[f"{name}_out"], **EXACT)
    torch.testing.assert_close(merged.linear.weight.data, golden[f"{name}_merged.fc1.weight"], **EXACT)
    torch.testing.assert_close(merged.linear.bias.data, golden[f"{name}_merged.fc1.bias"], **EXACT)
    if active:
        assert merged.fc1 is not None
        assert merged.fc2 is not None
        torch.testing.assert_close(merged.fc1.weight.data, golden[f"{name}_merged.fc2.weight"], **EXACT)
        torch.testing.assert_close(merged.fc1.bias.data, golden[f"{name}_merged.fc2.bias"], **EXACT)
        torch.testing.assert_close(merged.fc2.weight.data, golden[f"{name}_merged.fc3.weight"], **EXACT)
    else:
        assert merged.fc1 is merged.fc2 is None


def test_training_takes_statistics_over_images_and_tokens(golden: dict[str, torch.Tensor]) -> None:
    made = network(golden, "train.", 20).train()
    x = golden["ffn_x"].clone().requires_grad_()
    out = x + made(x)
    torch.testing.assert_close(out, golden["train_out"], **EXACT)
    (golden["train_weights"] * out).sum().backward()
    assert made.norm1 is not None
    assert made.norm2 is not None
    torch.testing.assert_close(x.grad, golden["train_grad_x"], **EXACT)
    torch.testing.assert_close(made.fc1.weight.grad, golden["train_grad_fc1"], **EXACT)
    torch.testing.assert_close(made.norm2.weight.grad, golden["train_grad_norm2_weight"], **EXACT)
    for name in ("norm1", "norm2"):
        for kind in ("running_mean", "running_var", "num_batches_tracked"):
            found = getattr(getattr(made, name), kind)
            torch.testing.assert_close(found, golden[f"train_after.{name}.{kind}"], **EXACT)


def test_layer_scale_folds_into_all_but_the_shortcut(golden: dict[str, torch.Tensor]) -> None:
    made = network(golden, "ours.", 20)
    with torch.no_grad():
        found = made.merge(golden["layer_scale"], shortcut=True)(golden["ffn_x"])
    torch.testing.assert_close(found, golden["layer_scale_out"], **EXACT)


@settings(max_examples=20)
@given(width=st.integers(1, 6), times=st.integers(1, 5), share=st.integers(0, 100), norms=st.booleans())
def test_merge_is_exact_with_and_without_norms(width: int, times: int, share: int, norms: bool) -> None:
    torch.manual_seed(width + 10 * times)
    hidden = times * width
    active = -(-hidden * (100 - share) // 100)
    made = IdleFeedForward(width, hidden, active, nn.GELU(), batch_norms=norms).double()
    x = torch.randn(3, 5, width, dtype=torch.float64)
    made(x)  # statistics that are not 0 and 1
    made.eval()
    with torch.no_grad():
        torch.testing.assert_close(made.merge()(x), made(x), rtol=1e-10, atol=1e-10)


def test_a_network_in_training_is_not_merged() -> None:
    with pytest.raises(RepaError):
        IdleFeedForward(4, 16, 4, nn.GELU(), batch_norms=True).merge()


@pytest.mark.parametrize(("hidden", "idle"), [(4, 1.5), (4, -0.1), (4, 0.1)])
def test_shares_that_idle_nothing_or_too_much(hidden: int, idle: float) -> None:
    with pytest.raises(RepaError) as failure:
        active_channels(hidden, idle)
    assert failure.value.field == "--idle"
