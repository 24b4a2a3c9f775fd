"""Channel-idle blocks in ViTs of timm, against the published model's numbers, before and after the merge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from repa.data.errors import RepaError
from repa.pipeline.encoders.idle_blocks import layer_scale, make_idle, merged, require_idle_fits, shape_merged
from repa.pipeline.encoders.idle_teacher import NORMS
from repa.pipeline.encoders.registry import find_teacher
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer

PLAIN = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 0}


def vit(kind: str) -> Any:
    torch.manual_seed(0)
    if kind == "rotary":  # as DINOv3
        options = {**PLAIN, "embed_dim": 32}
        model = timm.create_model("vit_small_patch16_dinov3_qkvb", pretrained=False, **options)
    else:
        model = VisionTransformer(**PLAIN, init_values=0.3 if kind == "scaled" else None)
    for block in model.blocks:
        scale = layer_scale(block)
        if scale is not None:
            torch.nn.init.uniform_(scale, 0.1, 0.9)
    return model.double().eval()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", ["plain", "scaled", "rotary"])
def test_merge_changes_no_token_and_its_weights_load(kind: str, norm: str) -> None:
    model, images = vit(kind), torch.randn(3, 3, 16, 16, dtype=torch.float64)
    require_idle_fits(model, kind)
    student = make_idle(model, 0.75, norm)
    student.train()
    with torch.no_grad():
        student.forward_features(images)  # statistics that are not 0 and 1
    with pytest.raises(RepaError):
        merged(student, norm)
    student.eval()
    found, loaded = merged(student, norm), vit(kind)
    shape_merged(loaded, 0.75, norm)
    loaded.double().load_state_dict(found.state_dict())
    with torch.no_grad():
        wanted = student.forward_features(images)
        for each in (found, loaded):
            torch.testing.assert_close(each.forward_features(images), wanted, rtol=1e-10, atol=1e-10)
        assert (model.forward_features(images) - wanted).abs().max() > 1e-3, "the student is another network"
    count = {each: sum(p.numel() for p in each.parameters()) for each in (model, found)}
    assert count[found] < 0.8 * count[model]


def test_published_model(shared: Path) -> None:
    with np.load(shared / "golden" / "repavit.npz") as file:
        golden = {name: torch.from_numpy(file[name]) for name in file}
    options = {**PLAIN, "img_size": 32, "embed_dim": 32, "depth": 3, "num_heads": 4}
    model: Any = VisionTransformer(**options, pre_norm=True)
    # its attention's norm has another constant than the final one
    for block in model.blocks:
        block.norm1.eps = 1e-5
    student = make_idle(model.double(), 0.75, "batch")
    state = {
        name.removeprefix("model.").replace("attn.norm.", "norm1."): each
        for name, each in load_file(shared / "golden" / "repavit.safetensors").items()
        if name.startswith("model.") and not name.startswith("model.head.")
    }
    student.load_state_dict(state)
    student.eval()
    with torch.no_grad():
        for each, name in ((student, "tokens"), (merged(student, "batch"), "tokens_merged")):
            found = each.forward_features(golden["images"])
            torch.testing.assert_close(found, golden[name], rtol=1e-9, atol=1e-9)


def test_gated_networks_are_refused() -> None:
    with torch.device("meta"):
        model = timm.create_model("vit_giant_patch14_dinov2", pretrained=False, depth=1)
    with pytest.raises(RepaError) as failure:
        require_idle_fits(model, "dinov2-g")
    assert failure.value.field == "--encoder"


def test_names_say_what_a_teacher_is() -> None:
    teacher, own = find_teacher("dinov2-b"), find_teacher("dinov2-b-idle75-bn")
    assert (own.name, own.width, own.depth, own.heads) == ("dinov2-b-idle75-bn", 768, 12, 12)
    assert own.grid(256) == teacher.grid(256) == (16, 16)
    assert (own.teacher, own.idle, own.norm) == ("dinov2-b", 0.75, "batch")
    assert find_teacher("dinov3-s-idle100").norm == "layer"


@pytest.mark.parametrize(
    "name", ["dinov9-idle75", "dinov2-b-idle75-idle50", "dinov2-b-idle0", "demo-idle101"]
)
def test_names_of_no_copy(name: str) -> None:
    with pytest.raises(RepaError) as failure:
        find_teacher(name)
    assert failure.value.field == "--encoder"
