"""Teachers: the table against timm, features against a transformer written out, weights from every side."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import huggingface_hub
import pytest
import timm
import torch
import torch.nn.functional as F
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from repa.data.errors import RepaError
from repa.data.format.manifest import LOADED_NOTE
from repa.data.format.opening import as_recorded
from repa.pipeline.columns.models import EncoderModel
from repa.pipeline.demo import TEACHER_WEIGHTS
from repa.pipeline.encoders import load_encoder
from repa.pipeline.encoders.base import IMAGENET
from repa.pipeline.encoders.registry import find_teacher
from repa.pipeline.encoders.teachers import TEACHERS
from repa.pipeline.encoders.timm_teacher import TimmTeacher as Teacher
from repa.pipeline.encoders.timm_vit import TimmEncoder, build
from repa.pipeline.encoders.weights import weights_sha256
from safetensors.torch import load_file, save_file
from timm.layers import resample_abs_pos_embed

if TYPE_CHECKING:
    from pathlib import Path

ONE_BLOCK = {"depth": 1}
OFFICIAL = [name for name in TEACHERS if name != "demo"]


def images(count: int = 2, side: int = 256) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=generator)


def one_block(name: str, **changes: Any) -> Teacher:
    """The teacher's row, with one block instead of all: as wide, quick."""
    return replace(TEACHERS[name], options=ONE_BLOCK, **changes)


def load(teacher: Teacher, weights: Path | None = None, resolution: int = 256, **options: Any) -> TimmEncoder:
    return TimmEncoder(
        teacher,
        resolution=resolution,
        device=torch.device("cpu"),
        compute_dtype="float32",
        weights=weights,
        random_weights=options.pop("random_weights", weights is None),
    )


@pytest.mark.parametrize("name", OFFICIAL)
def test_the_table_agrees_with_timm(name: str) -> None:
    teacher = TEACHERS[name]
    published = timm.get_pretrained_cfg(teacher.timm_name)
    model: Any = timm.create_model(
        teacher.timm_name, img_size=teacher.input_size(256), num_classes=0, device="meta", **ONE_BLOCK
    )
    assert model.num_prefix_tokens == teacher.prefix_tokens
    assert model.embed_dim == teacher.width
    assert model.patch_embed.patch_size == (teacher.patch_size,) * 2
    assert model.patch_embed.grid_size == teacher.grid(256) == (16, 16)
    assert teacher.grid(512) == (32, 32)
    assert teacher.source
    if teacher.hub is not None:
        assert published.hf_hub_id == teacher.hub
        assert (tuple(published.mean), tuple(published.std)) == teacher.normalisation
    assert (model.cls_token is None) == (teacher.class_feature == "attention-pool")


def test_input_sizes_are_those_of_the_reference() -> None:
    sizes = {name: (row.input_size(256), row.input_size(512)) for name, row in TEACHERS.items()}
    assert sizes["dinov2-b"] == sizes["dinov2-g-reg"] == sizes["clip-l"] == (224, 448)
    for name in ("dinov3-b", "dinov1-b", "mae-l", "mocov3-b", "siglip2-b"):
        assert sizes[name] == (256, 512)
    assert TEACHERS["demo"].input_size(64) == 64
    assert TEACHERS["demo"].grid(64) == (8, 8)
    assert TEACHERS["dinov2-b"].grid(16) == (1, 1)


def test_resolutions_without_a_whole_grid_and_unknown_names_are_one_line() -> None:
    with pytest.raises(
        RepaError, match=r"resolution 250 gives encoder dinov2-b no whole grid.*multiple of 16"
    ):
        load_encoder("dinov2-b", resolution=250, random_weights=True)
    with pytest.raises(RepaError, match="no whole grid"):
        find_teacher("demo").grid(0)
    with pytest.raises(
        RepaError, match=r"'dinov2-base' is unknown; did you mean .*dinov2-b\b.*mocov3-b"
    ) as error:
        load_encoder("dinov2-base", resolution=256)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", OFFICIAL)
def test_every_teacher_gives_a_16_by_16_grid(name: str) -> None:
    encoder = load(one_block(name))
    features = encoder.encode(images(1))
    assert set(features) == {"patch", "cls"}
    assert features["patch"].shape == (1, 256, encoder.width)
    assert features["cls"].shape == (1, encoder.width)
    for values in features.values():
        assert values.dtype == torch.float32
        assert not values.requires_grad
        assert values.isfinite().all()


def transformer(state: dict[str, torch.Tensor], pixels: torch.Tensor, heads: int, patch: int) -> torch.Tensor:
    """A ViT written out: pre-norm, class token first, learned positions, exact GELU, LayerNorm's eps 1e-6."""

    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps=1e-6)

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    B, _, H, W = pixels.shape
    squares = pixels.reshape(B, 3, H // patch, patch, W // patch, patch).permute(0, 2, 4, 1, 3, 5)
    kernel = state["patch_embed.proj.weight"].flatten(1)
    x = squares.reshape(B, -1, kernel.shape[1]) @ kernel.T + state["patch_embed.proj.bias"]
    x = torch.cat([state["cls_token"].expand(B, -1, -1), x], dim=1) + state["pos_embed"]
    depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
    for block in (f"blocks.{i}" for i in range(depth)):
        qkv = linear(f"{block}.attn.qkv", norm(f"{block}.norm1", x))
        q, k, v = qkv.reshape(B, x.shape[1], 3, heads, -1).permute(2, 0, 3, 1, 4)
        mixed = (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).softmax(dim=-1) @ v
        x = x + linear(f"{block}.attn.proj", mixed.transpose(1, 2).reshape(x.shape))
        hidden = F.gelu(linear(f"{block}.mlp.fc1", norm(f"{block}.norm2", x)))
        x = x + linear(f"{block}.mlp.fc2", hidden)
    return norm("norm", x)


def test_features_are_those_of_the_transformer_written_out() -> None:
    encoder = load_encoder("demo", resolution=64)
    state = {name: value.double() for name, value in load_file(TEACHER_WEIGHTS).items()}
    batch = images(3, 64)
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in TEACHERS["demo"].normalisation)
    tokens = transformer(state, (batch / 255.0 - mean) / std, heads=2, patch=8)
    features = encoder.encode(batch)
    assert features["patch"].shape == (3, 64, 128)
    assert torch.allclose(features["patch"].double(), tokens[:, 1:], atol=1e-4)
    assert torch.allclose(features["cls"].double(), tokens[:, 0], atol=1e-4)


def test_tokens_are_row_major() -> None:
    """A change in one 8x8 square changes the patch embedding of that token most."""
    encoder = load_encoder("demo", resolution=64)
    plain = torch.full((1, 3, 64, 64), 128, dtype=torch.uint8)
    dotted = plain.clone()
    dotted[:, :, 2 * 8 : 3 * 8, 5 * 8 : 6 * 8] = 255
    change = (encoder.encode(dotted)["patch"] - encoder.encode(plain)["patch"]).norm(dim=-1)
    assert change.argmax().item() == 2 * 8 + 5


def test_siglip_class_feature_is_its_attention_pool() -> None:
    encoder = load(one_block("siglip2-b"))
    features = encoder.encode(images(2))
    pool = encoder._model.attn_pool
    with torch.inference_mode():
        assert torch.equal(features["cls"], pool(features["patch"]))


@pytest.mark.parametrize(("resolution", "side"), [(256, 224), (512, 448)])
def test_a_patch_of_14_pixels_sees_the_normalised_crop_scaled_by_seven_eighths(
    resolution: int, side: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder, batch, seen = load(one_block("dinov2-s"), resolution=resolution), images(1, resolution), []
    forward = encoder._model.forward_features
    monkeypatch.setattr(encoder._model, "forward_features", lambda x: (seen.append(x), forward(x))[1])
    features = encoder.encode(batch, (1,))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in TEACHERS["dinov2-s"].normalisation)
    assert torch.equal(seen[0], F.interpolate((batch / 255 - mean) / std, size=(side, side), mode="bicubic"))
    tokens = (resolution // 16) ** 2
    assert features["patch"].shape == (1, tokens, 384)
    assert features["q"].shape == features["k"].shape == (1, 1, 6, tokens, 64)


@pytest.mark.parametrize("name", ["dinov2-s", "dinov2-s-reg", "mae-l"])
@pytest.mark.parametrize("resolution", [256, 512])
def test_the_position_table_is_resampled_as_the_reference_does_it(
    name: str, resolution: int, tmp_path: Path
) -> None:
    """A file saved at another image size: our path, timm's own and the table by hand are equal."""
    teacher = one_block(name)
    size = timm.get_pretrained_cfg(teacher.timm_name).input_size[-1]
    original: Any = timm.create_model(teacher.timm_name, img_size=size, num_classes=0, **ONE_BLOCK)
    torch.nn.init.normal_(original.pos_embed, std=0.5)
    path = tmp_path / "model.safetensors"
    save_file(original.state_dict(), path)

    encoder = load(teacher, path, resolution)
    table = resample_abs_pos_embed(
        original.pos_embed.detach(),
        list(teacher.grid(resolution)),
        num_prefix_tokens=0 if original.no_embed_class else 1,
    )
    assert table.shape != original.pos_embed.shape
    assert torch.equal(encoder._model.pos_embed, table)
    theirs: Any = timm.create_model(
        teacher.timm_name,
        pretrained=True,
        pretrained_cfg_overlay={"state_dict": load_file(path)},
        img_size=teacher.input_size(resolution),
        num_classes=0,
        **ONE_BLOCK,
    )
    found = encoder.provenance(1)
    assert found.weights_sha256 == weights_sha256(original.state_dict())
    assert found.notes[LOADED_NOTE] == weights_sha256(theirs.state_dict()) != found.weights_sha256
    assert not encoder.random_weights


def test_the_hub_and_a_file_are_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = one_block("dinov2-s")
    path = tmp_path / "model.safetensors"
    save_file(
        timm.create_model(teacher.timm_name, img_size=518, num_classes=0, **ONE_BLOCK).state_dict(), path
    )
    asked = []

    def here(repository: str, filename: str, local_files_only: bool = False) -> str:
        asked.append((repository, filename, local_files_only))
        return str(path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", here)
    from_hub = load(teacher, random_weights=False)
    assert asked == [("timm/vit_small_patch14_dinov2.lvd142m", "model.safetensors", True)]
    assert torch.equal(from_hub.encode(images())["patch"], load(teacher, path).encode(images())["patch"])


def test_no_weights_is_one_line_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def nowhere(repository: str, filename: str, local_files_only: bool = False) -> str:
        calls.append(local_files_only)
        if local_files_only:
            raise LocalEntryNotFoundError("not here")
        raise EntryNotFoundError("not there")

    class Session:
        def head(self, url: str, timeout: float) -> None:
            raise ConnectionError("no route to host\nand more")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", nowhere)
    monkeypatch.setattr(huggingface_hub, "get_session", Session)
    with pytest.raises(RepaError) as error:
        load_encoder("dinov2-b", resolution=256)
    assert calls == [True, True]
    text = str(error.value)
    for part in (
        "no route to host)",
        "model.safetensors of https://huggingface.co/timm/vit_base_patch14_dinov2.lvd142m",
        "`--weights dinov2-b=FILE`",
        "--random-weights`",
    ):
        assert part in text
    assert "\n" not in text
    with pytest.raises(
        RepaError, match=r"mocov3-b has no weights on the hub; bring .*--weights mocov3-b=FILE"
    ):
        load_encoder("mocov3-b", resolution=256)


def test_original_authors_files_load(tmp_path: Path) -> None:
    """DINOv2's own file has a mask token; with registers, other names and a class token without position."""
    teacher = one_block("dinov2-s-reg")
    ours: Any = timm.create_model(teacher.timm_name, img_size=518, num_classes=0, **ONE_BLOCK)
    torch.nn.init.normal_(ours.pos_embed)
    plain, official = tmp_path / "timm.safetensors", tmp_path / "official.pth"
    save_file(ours.state_dict(), plain)
    state = {name: value.clone() for name, value in ours.state_dict().items()}
    position = torch.randn(1, 1, 384)
    state["register_tokens"] = state.pop("reg_token")
    state["cls_token"] = state["cls_token"] - position
    state["pos_embed"] = torch.cat([position, state["pos_embed"]], dim=1)
    state["mask_token"] = torch.zeros(1, 384)
    torch.save(state, official)
    expected = load(teacher, plain).encode(images())
    assert torch.allclose(load(teacher, official).encode(images())["patch"], expected["patch"], atol=1e-4)


@pytest.mark.parametrize("nesting", ["bare", "model", "state_dict", "both"])
def test_nested_checkpoints_load(nesting: str, tmp_path: Path) -> None:
    state = dict(load_file(TEACHER_WEIGHTS))
    nested: dict[str, Any] = {
        "bare": state,
        "model": {"model": state, "epoch": 3},
        "state_dict": {"state_dict": state, "arch": "vit"},
        "both": {"state_dict": {"model": state}},
    }[nesting]
    torch.save(nested, tmp_path / "demo.pth")
    encoder = load_encoder("demo", resolution=64, weights=tmp_path / "demo.pth")
    assert (
        encoder.provenance(1).weights_sha256
        == load_encoder("demo", resolution=64).provenance(1).weights_sha256
    )


def test_mocov3s_own_file_gives_its_base_encoder(tmp_path: Path) -> None:
    teacher = one_block("mocov3-b")
    base, other = (
        timm.create_model("vit_base_patch16_224", num_classes=0, **ONE_BLOCK).state_dict() for _ in range(2)
    )
    state = {f"module.base_encoder.{name}": value for name, value in base.items()}
    state |= {f"module.momentum_encoder.{name}": value for name, value in other.items()}
    state |= {
        "module.base_encoder.head.0.weight": torch.zeros(4, 768),
        "module.predictor.0.weight": torch.zeros(4),
    }
    torch.save({"state_dict": state, "epoch": 300}, tmp_path / "vit-b-300ep.pth.tar")
    save_file(base, tmp_path / "plain.safetensors")
    theirs, plain = (load(teacher, tmp_path / name) for name in ("vit-b-300ep.pth.tar", "plain.safetensors"))
    assert theirs.provenance(1).weights_sha256 == plain.provenance(1).weights_sha256


def test_a_classifier_in_the_file_is_dropped(tmp_path: Path) -> None:
    teacher = one_block("clip-l")
    state = build(teacher, 224).state_dict()
    save_file({**state, "head.weight": torch.zeros(768, 1024)}, tmp_path / "clip.safetensors")
    assert load(teacher, tmp_path / "clip.safetensors").provenance(1).weights_sha256 == weights_sha256(state)


def test_one_file_has_one_hash_at_every_size() -> None:
    at = {side: load_encoder("demo", resolution=side).provenance(4) for side in (64, 128, 256)}
    assert len({each.weights_sha256 for each in at.values()}) == 1
    assert at[64].weights_sha256 == weights_sha256(load_file(TEACHER_WEIGHTS))
    # what is run differs by its position table, which is said, and binds nothing
    assert len({each.notes[LOADED_NOTE] for each in at.values()} | {at[64].weights_sha256}) == 4
    assert LOADED_NOTE not in at[128].identity()["notes"]


def test_a_cache_with_the_hash_of_what_was_run_goes_on() -> None:
    encoder = load_encoder("demo", resolution=128)
    found = encoder.provenance(4)
    notes = {name: value for name, value in found.notes.items() if name != LOADED_NOTE}
    before = replace(found, weights_sha256=found.notes[LOADED_NOTE], notes=notes)
    assert as_recorded(found, [before]) == before
    model = EncoderModel(encoder, ["demo"], batch_size=4, dtype="float16", recorded={"demo": before})
    assert model.declarations["demo"].provenance == before
    # another model is another model by either count
    other = replace(before, weights_sha256="0" * 64)
    assert as_recorded(found, [other]) == found
    assert as_recorded(found, [found]) == found


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_lower_precision_gives_float32_features_nearby(dtype: str) -> None:
    exact = load_encoder("demo", resolution=64).encode(images(2, 64))
    encoder = load_encoder("demo", resolution=64, compute_dtype=dtype)
    for kind, values in encoder.encode(images(2, 64)).items():
        assert values.dtype == torch.float32
        assert not torch.equal(values, exact[kind])
        assert F.cosine_similarity(values, exact[kind], dim=-1).min() > 0.99
    assert encoder.provenance(1).compute_dtype == dtype


def test_random_weights_are_reproducible_and_leave_the_generator_alone() -> None:
    before = torch.random.get_rng_state()
    first = load(one_block("dinov2-s"))
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.rand(1)
    second = load(one_block("dinov2-s"))
    assert first.random_weights
    assert first.provenance(1).random_weights
    assert first.provenance(1).weights_sha256 == second.provenance(1).weights_sha256
    assert torch.equal(first.encode(images())["patch"], second.encode(images())["patch"])
    # what is shipped is not drawn
    assert not load_encoder("demo", resolution=64, random_weights=True).provenance(1).random_weights


def test_provenance() -> None:
    provenance = load(one_block("dinov2-s-reg")).provenance(batch_size=7)
    assert provenance.model == "vit_small_patch14_reg4_dinov2.lvd142m"
    assert (provenance.input_size, provenance.grid, provenance.batch_size) == (224, (16, 16), 7)
    assert (provenance.mean, provenance.std) == IMAGENET
    assert provenance.compute_dtype == "float32"
    assert set(provenance.libraries) == {"repa", "torch", "timm", "pillow"}
    assert provenance.notes == {"patch": "final norm", "cls": "token"}


def test_another_teachers_file_says_what_differs(tmp_path: Path) -> None:
    path = tmp_path / "base.safetensors"
    save_file(build(one_block("dinov2-b"), 224).state_dict(), path)
    with pytest.raises(RepaError, match=r"does not fit dinov2-s .*cls_token \[1, 1, 768\] for \[1, 1, 384\]"):
        load(one_block("dinov2-s"), path)
