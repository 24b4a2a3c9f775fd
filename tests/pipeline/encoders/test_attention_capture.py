"""Queries and keys of a ViT's blocks: their maps against attention written out, for every kind of ViT."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from repa.data.errors import RepaError
from repa.pipeline.encoders import load_encoder
from repa.pipeline.encoders.attention import AttentionCapture
from repa.pipeline.encoders.teachers import TEACHERS
from repa.pipeline.encoders.timm_teacher import TimmTeacher as Teacher
from repa.pipeline.encoders.timm_vit import TimmEncoder
from timm.layers import apply_rot_embed_cat, set_fused_attn

SMALL = {"embed_dim": 48, "depth": 3, "num_heads": 4, "patch_size": 4}
KINDS: dict[str, tuple[str, dict[str, Any], int]] = {
    "plain": ("vit_tiny_patch16_224", {}, 1),
    "registers": ("vit_tiny_patch16_224", {"reg_tokens": 4}, 5),
    "q/k norm": ("vit_tiny_patch16_224", {"qk_norm": True}, 1),
    "no class token": ("vit_base_patch16_siglip_256", {"pos_embed": "learn"}, 0),
    "rotary": ("vit_small_patch16_dinov3", {}, 5),
}


def small(kind: str, **changes: Any) -> TimmEncoder:
    """A ViT of three narrow blocks on images of 16×16, with weights that are not near the identity."""
    name, options, prefix = KINDS[kind]
    teacher = Teacher(
        name="small",
        timm_name=name,
        hub=None,
        patch_size=4,
        width=48,
        depth=3,
        heads=4,
        prefix_tokens=prefix,
        class_feature="attention-pool" if prefix == 0 else "token",
        pixels_per_token=4,
        options={**SMALL, **options},
        source="test",
    )
    encoder = TimmEncoder(
        teacher,
        resolution=16,
        device=torch.device("cpu"),
        compute_dtype=changes.pop("compute_dtype", "float32"),
        weights=None,
        random_weights=True,
    )
    generator = torch.Generator().manual_seed(1)
    for parameter in encoder._model.parameters():
        parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return encoder


def images(count: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, 16, 16), dtype=torch.uint8, generator=generator)


def written_out(encoder: TimmEncoder, batch: torch.Tensor, block: int) -> torch.Tensor:
    """Maps ``[B, H, T, T]`` of a block over the patches alone: a loop over images, heads and queries."""
    model: Any = encoder._model
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in encoder._teacher.normalisation)
    x = model.patch_embed((batch / 255.0 - mean) / std)
    rope = None
    if hasattr(model, "rope"):
        x, rope = model._pos_embed(x)
    else:
        x = model._pos_embed(x)
    if hasattr(model, "norm_pre"):
        x = model.norm_pre(x)
    prefix = encoder._teacher.prefix_tokens
    for each in model.blocks[: block - 1]:
        x = each(x) if rope is None else each(x, rope=rope)
    attention = model.blocks[block - 1].attn
    x = model.blocks[block - 1].norm1(x)
    if getattr(attention, "q_proj", None) is not None:
        q, k = attention.q_proj(x), attention.k_proj(x)
    else:
        qkv = x @ attention.qkv.weight.T
        if attention.qkv.bias is not None:
            qkv = qkv + attention.qkv.bias
        elif getattr(attention, "q_bias", None) is not None:
            qkv = qkv + torch.cat([attention.q_bias, attention.k_bias, attention.v_bias])
        q, k, _ = qkv.chunk(3, dim=-1)
    B, N, _ = x.shape
    H = attention.num_heads
    maps = torch.empty(B, H, N - prefix, N - prefix, dtype=torch.float64)
    for image in range(B):
        for head in range(H):
            width = slice(head * (q.shape[-1] // H), (head + 1) * (q.shape[-1] // H))
            hq, hk = attention.q_norm(q[image, prefix:, width]), attention.k_norm(k[image, prefix:, width])
            if rope is not None:
                hq, hk = (
                    apply_rot_embed_cat(each[None, None], rope, half=attention.rotate_half)[0, 0]
                    for each in (hq, hk)
                )
            for row in range(N - prefix):
                logits = [float(hq[row].double() @ key.double()) / hq.shape[-1] ** 0.5 for key in hk]
                maps[image, head, row] = torch.tensor(logits, dtype=torch.float64).softmax(0)
    return maps


@pytest.mark.parametrize("kind", KINDS)
def test_maps_of_q_and_k_are_the_attention_written_out(kind: str) -> None:
    encoder = small(kind)
    features = encoder.encode(images(), (1, 3))
    assert set(features) == {"patch", "cls", "q", "k"}
    assert (encoder.depth, encoder.heads, encoder.head_width) == (3, 4, 12)
    for each in (features["q"], features["k"]):
        assert each.shape == (2, 2, 4, 16, 12)
        assert each.dtype == torch.float32
        assert each.is_contiguous()
    logits = features["q"].double() @ features["k"].double().transpose(-1, -2) * encoder.logit_scale
    for place, block in enumerate((1, 3)):
        with torch.inference_mode():
            expected = written_out(encoder, images(), block)
        torch.testing.assert_close(logits[:, place].softmax(-1), expected, atol=2e-5, rtol=0)
        # not a map that anything would equal
        assert (expected - expected.mean(-1, keepdim=True)).abs().max() > 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_features_keep_their_bits(kind: str) -> None:
    encoder = small(kind)
    plain, captured = encoder.encode(images()), encoder.encode(images(), (2,))
    assert set(plain) == {"patch", "cls"}
    for name, values in plain.items():
        assert torch.equal(values, captured[name])
    # which blocks are asked for does not matter to any of them
    assert torch.equal(captured["q"][:, 0], encoder.encode(images(), (1, 2, 3))["q"][:, 1])


def test_the_demo_teacher() -> None:
    encoder = load_encoder("demo", resolution=64)
    batch = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator())
    features = encoder.encode(batch, (4, 5, 6))
    assert features["q"].shape == features["k"].shape == (3, 3, 2, 64, 64)
    assert encoder.logit_scale == 0.125


def test_threads_do_not_see_one_anothers_calls() -> None:
    encoder = small("registers")
    batches = [images(1 + number) for number in range(4)]
    alone = [encoder.encode(batch, (1 + n % 3,)) for n, batch in enumerate(batches)]
    together: dict[int, dict[str, torch.Tensor]] = {}
    start = threading.Barrier(4)

    def encode(number: int) -> None:
        start.wait()
        for _ in range(5):
            together[number] = encoder.encode(batches[number], (1 + number % 3,))

    threads = [threading.Thread(target=encode, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, expected in enumerate(alone):
        for name, values in expected.items():
            torch.testing.assert_close(together[number][name], values)


def test_fused_attention_is_used_whatever_the_environment_says() -> None:
    set_fused_attn(False)
    try:
        encoder = small("plain")
    finally:
        set_fused_attn(True)
    assert encoder.encode(images(), (1,))["q"].shape == (2, 1, 4, 16, 12)


def test_lower_precision_gives_float32_nearby() -> None:
    exact, lower = (
        small("plain", compute_dtype=name).encode(images(), (3,)) for name in ("float32", "bfloat16")
    )
    for name in ("q", "k"):
        assert lower[name].dtype == torch.float32
        assert F.cosine_similarity(lower[name], exact[name], dim=-1).mean() > 0.99


@pytest.mark.parametrize("blocks", [(0,), (4,), (2, 1), (1, 1)])
def test_blocks_that_are_not_there(blocks: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="from 1 to 3"):
        small("plain").encode(images(), blocks)


def capture(**changes: Any) -> AttentionCapture:
    return AttentionCapture(
        "odd", (1,), **{"depth": 1, "heads": 2, "head_width": 4, "tokens": 3, "prefix_tokens": 1, **changes}
    )


Q = torch.ones(1, 2, 4, 4)


@pytest.mark.parametrize(
    ("key", "options", "expected"),
    [
        (Q, {"attn_mask": torch.zeros(4, 4)}, "masks its attention in block 1"),
        (Q, {"is_causal": True}, "masks its attention in block 1"),
        (Q, {"dropout_p": 0.5}, "drops attention out in block 1"),
        (Q, {"scale": 1.0}, "scales its logits by 1, not by 1/√4, in block 1"),
        (torch.ones(1, 2, 5, 4), {}, r"queries \[1, 2, 4, 4\] and keys \[1, 2, 5, 4\]"),
    ],
)
def test_attention_of_another_kind_is_refused(
    key: torch.Tensor, options: dict[str, Any], expected: str
) -> None:
    with pytest.raises(RepaError, match=expected) as caught, capture():
        F.scaled_dot_product_attention(Q, key, key, **options)
    assert "\n" not in str(caught.value)
    assert "--attention" in str(caught.value)


def test_a_scale_that_is_the_default_passes() -> None:
    with capture() as made:
        F.scaled_dot_product_attention(Q, Q, Q, None, 0.0, False, scale=0.5)
    assert made.result()[0].shape == (1, 1, 2, 3, 4)


@pytest.mark.parametrize(("calls", "said"), [(0, "0 times"), (2, "2 times")])
def test_a_model_that_does_not_call_once_a_block_is_refused(calls: int, said: str) -> None:
    made = capture()
    with made:
        for _ in range(calls):
            F.scaled_dot_product_attention(Q, Q, Q)
    with pytest.raises(RepaError, match=f"odd calls PyTorch's attention {said} for 1 block:"):
        made.result()


@pytest.mark.parametrize("name", TEACHERS)
def test_depth_and_heads_of_the_table_are_timms(name: str) -> None:
    teacher = TEACHERS[name]
    model: Any = timm.create_model(teacher.timm_name, num_classes=0, device="meta", **teacher.options)
    assert len(model.blocks) == teacher.depth
    assert {block.attn.num_heads for block in model.blocks} == {teacher.heads}
    assert {block.attn.head_dim for block in model.blocks} == {teacher.head_width}
