"""Attention of a trained ViT-S/14 of DINOv2-S's architecture on photographs: as small as is promised."""

from __future__ import annotations

import importlib.util
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from attention_forms import notes
from repa.commands.preprocess import PreprocessFlags, preprocess
from repa.data.upkeep.verify import verify_cache
from rich.console import Console

# 600 kB for the twice as many heads of dinov2-b
MOST_BYTES, TOLERANCE = 300_000, 1e-3


@pytest.fixture(scope="module")
def weights(shared: Path, request: pytest.FixtureRequest) -> Path:
    """The file that ``REPA_DINOV2_S`` names, or else one that is made once where onnx is installed."""
    named = os.environ.get("REPA_DINOV2_S")
    if named:
        return Path(named)
    script = shared / "real" / "dinov2_s.py"
    if not script.exists() or importlib.util.find_spec("onnx") is None:
        pytest.skip("no REPA_DINOV2_S names a file of weights, and none can be made without onnx")
    cache = request.config.cache
    assert cache is not None
    file = cache.mkdir("dinov2_s") / "dinov2_s.safetensors"
    if not file.exists():
        made = subprocess.run([sys.executable, script, file], capture_output=True, text=True, check=False)
        if made.returncode:
            pytest.skip(f"the file of weights cannot be made: {made.stderr[-200:]}")
    return file


@pytest.mark.thorough
def test_a_worst_head_of_a_thousandth_nat_takes_what_is_promised(
    weights: Path, shared: Path, tmp_path: Path
) -> None:
    flags = PreprocessFlags(
        data=str(shared / "imagenet-sample"),
        cache=tmp_path / "cache",
        encoders=["dinov2-s"],
        weights=[f"dinov2-s={weights}"],
        vae="demo",
        resolution=256,
        limit=18,
        batch_size=2,
        attention="8,10,12",
        attention_kl=TOLERANCE,
    )
    preprocess(flags, console=Console(file=io.StringIO(), width=200))
    recorded = notes(tmp_path / "cache", "dinov2-s+attention")
    fidelity = recorded["fidelity"]
    assert (recorded["form"], len(fidelity["kl"]), fidelity["images"]) == ("factored", 18, 6)
    assert fidelity["bytes_per_image"] <= MOST_BYTES
    assert fidelity["kl_worst_head"] <= TOLERANCE
    assert fidelity["gradient_cosine_near"] >= 0.99
    assert fidelity["gradient_cosine_initial"] >= 0.999
    assert verify_cache(tmp_path / "cache") == []
