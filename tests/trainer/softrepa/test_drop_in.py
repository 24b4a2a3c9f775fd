"""Trained tokens in their file and in the pipelines of diffusers."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from repa.data.errors import RepaError
from repa.soft_tokens import SoftDenoiser, load_soft_tokens
from repa.trainer.softrepa.file import SoftTokensNotes, read_soft_tokens, save_soft_tokens
from repa.trainer.softrepa.tokens import SoftTokens, first_time_table, first_tokens, numbers_of
from safetensors.torch import load_file, save_file
from small_diffusion import small_model

SHAPES = {"sd15": (4, 12), "sdxl": (4, 12), "sd3": (3, 4, 16)}
NOTES = SoftTokensNotes(
    kind="sd15",
    model="a/b",
    model_sha256="0",
    blocks=["down"],
    text_length=7,
    condition="clip-l-text/states",
    bins=100,
    interpolate=False,
    preset="sd15",
    step=3,
    settings={"lr": 1e-3},
)


def tokens_of(kind: str, *, scale: float = 50.0) -> SoftTokens:
    generator = torch.Generator().manual_seed(1)
    shape = SHAPES[kind]
    tokens = scale * first_tokens(shape, "normal", generator)
    return SoftTokens(tokens, scale * first_time_table(shape, "normal", generator))


def saved(folder: Path, kind: str) -> tuple[Path, SoftTokens]:
    soft, file = tokens_of(kind), folder / "tokens.safetensors"
    save_soft_tokens(file, soft.state_dict(), replace(NOTES, kind=kind))
    return file, soft


@pytest.mark.parametrize("kind", SHAPES)
def test_a_file_gives_back_tokens_table_and_notes(kind: str, tmp_path: Path) -> None:
    file, soft = saved(tmp_path, kind)
    again, notes = read_soft_tokens(file)
    assert notes == replace(NOTES, kind=kind)
    t = torch.tensor([0.0, 317.0, 1000.0])
    assert torch.equal(again(t), soft(t))


@pytest.mark.parametrize(
    ("names", "bins"), [(["tokens"], 100), (["tokens", "time_table"], 0), (["time_table"], 100), ([], 0)]
)
def test_a_table_that_is_missing_or_superfluous_is_refused(
    names: list[str], bins: int, tmp_path: Path
) -> None:
    weights = tokens_of("sd15").state_dict()
    file = tmp_path / "tokens.safetensors"
    save_soft_tokens(file, {name: weights[name] for name in names}, replace(NOTES, bins=bins))
    with pytest.raises(RepaError) as error:
        read_soft_tokens(file)
    assert error.value.field == "tokens"


def test_a_table_of_another_width_and_other_files_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "tokens.safetensors"
    save_soft_tokens(file, {"tokens": torch.zeros(4, 12), "time_table": torch.zeros(100, 24)}, NOTES)
    with pytest.raises(RepaError) as error:
        read_soft_tokens(file)
    assert error.value.field == "time_table"
    save_file({"tokens": torch.zeros(4, 12)}, file)
    with pytest.raises(RepaError) as error:
        read_soft_tokens(file)
    assert error.value.field == "softrepa"
    file.write_bytes(b"no safetensors")
    with pytest.raises(RepaError):
        read_soft_tokens(file)


@pytest.mark.parametrize(
    ("shape", "time_table", "numbers"),
    [
        ((4, 768), True, 79_872),
        ((8, 2048), False, 16_384),
        ((4, 2048), False, 8_192),
        ((5, 4, 1536), True, 798_720),
    ],
)
def test_the_released_shapes(shape: tuple[int, ...], time_table: bool, numbers: int, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    table = first_time_table(shape, "zero", generator) if time_table else None
    soft = SoftTokens(first_tokens(shape, "normal", generator), table)
    assert (
        sum(each.numel() for each in soft.parameters()) == numbers_of(shape, time_table=time_table) == numbers
    )
    kind = "sd3" if len(shape) == 3 else "sd15"
    notes = replace(NOTES, kind=kind, bins=100 if time_table else 0)
    save_soft_tokens(tmp_path / "tokens.safetensors", soft.state_dict(), notes)
    held = load_file(tmp_path / "tokens.safetensors")
    assert sum(each.numel() for each in held.values()) == numbers
    assert read_soft_tokens(tmp_path / "tokens.safetensors")[0].tokens.shape == shape


def test_tokens_that_begin_equal_stay_equal_as_released_and_differ_by_default() -> None:
    bos = torch.arange(12.0)
    for start, distinct in (("as_released", False), ("bos", True)):
        soft = SoftTokens(first_tokens((4, 12), start, torch.Generator().manual_seed(0), bos=bos), None)
        assert (soft.tokens[0] - soft.tokens[1]).abs().max().item() > 0 or not distinct
        assert torch.equal(soft.tokens[0], soft.tokens[1]) is not distinct
        assert (soft.tokens - bos).abs().max() < 0.1


def test_interpolation_meets_the_rows_at_the_middles_of_bins() -> None:
    soft = tokens_of("sd15")
    mixed = SoftTokens(soft.tokens, soft.time_table, interpolate=True)
    middles = torch.tensor([5.0, 315.0, 995.0, 0.0, 1000.0])
    torch.testing.assert_close(mixed(middles), soft(torch.tensor([5.0, 315.0, 995.0, 0.0, 999.0])))
    torch.testing.assert_close(
        mixed(torch.tensor([320.0])), (soft(torch.tensor([315.0])) + soft(torch.tensor([325.0]))) / 2
    )


def in_pipeline(kind: str, denoiser: Any, text: torch.Tensor, pooled: torch.Tensor) -> torch.Tensor:
    """Latents that a pipeline of diffusers makes with guidance from states of text."""
    import diffusers

    run: dict[str, Any] = {
        "prompt_embeds": text[:1],
        "negative_prompt_embeds": text[1:],
        "num_inference_steps": 2,
        "guidance_scale": 3.0,
        "height": 64,
        "width": 64,
        "output_type": "latent",
        "generator": torch.Generator().manual_seed(5),
    }
    if kind != "sd15":
        run |= {"pooled_prompt_embeds": pooled[:1], "negative_pooled_prompt_embeds": pooled[1:]}
    nothing = {"vae": None, "text_encoder": None, "tokenizer": None}
    if kind == "sd3":
        nothing |= dict.fromkeys(("text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3"))
        scheduler: Any = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
        pipeline: Any = diffusers.StableDiffusion3Pipeline(
            transformer=denoiser, scheduler=scheduler, **nothing
        )
    else:
        scheduler = diffusers.DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1)
        if kind == "sd15":
            none = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
            pipeline = diffusers.StableDiffusionPipeline(
                unet=denoiser, scheduler=scheduler, **nothing, **none
            )
        else:
            nothing |= {"text_encoder_2": None, "tokenizer_2": None}
            pipeline = diffusers.StableDiffusionXLPipeline(unet=denoiser, scheduler=scheduler, **nothing)
    pipeline.set_progress_bar_config(disable=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        images: torch.Tensor = pipeline(**run).images
    return images


@pytest.mark.parametrize("kind", SHAPES)
def test_a_pipeline_takes_the_tokens_of_each_time_in_both_passes(kind: str, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(2)
    text = torch.randn(2, 7, 24 if kind == "sd3" else 12, generator=generator)
    pooled = torch.randn(2, 20 if kind == "sd3" else 10, generator=generator)
    file, soft = saved(tmp_path, kind)
    denoiser = load_soft_tokens(small_model(kind).eval(), file)
    assert isinstance(denoiser, SoftDenoiser)
    assert not any(each.requires_grad for each in denoiser.soft.parameters())
    made = in_pipeline(kind, denoiser, text, pooled)
    plain = in_pipeline(kind, small_model(kind).eval(), text, pooled)
    assert made.shape == plain.shape
    assert (made - plain).abs().max() > 1e-3

    if kind == "sd3":
        return
    # text and tokens in one sequence, by hand: where every block sees both that is all there is
    everywhere = tmp_path / "all.safetensors"
    blocks = replace(NOTES, kind=kind, blocks=["down", "mid", "up"], bins=0)
    save_soft_tokens(everywhere, {"tokens": soft.tokens}, blocks)
    by_hand = torch.cat([text, soft.tokens.detach().expand(2, -1, -1)], dim=1)
    expected = in_pipeline(kind, small_model(kind).eval(), by_hand, pooled)
    found = in_pipeline(kind, load_soft_tokens(small_model(kind).eval(), everywhere), text, pooled)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_a_denoiser_of_another_kind_and_a_text_of_another_length_are_refused(tmp_path: Path) -> None:
    file, _ = saved(tmp_path, "sd15")
    for kind in ("sdxl", "sd3"):
        with pytest.raises(RepaError) as error:
            load_soft_tokens(small_model(kind), file)
        assert error.value.field == "denoiser"
    denoiser = load_soft_tokens(small_model("sd15"), file)
    with pytest.raises(RepaError) as error:
        denoiser(torch.zeros(1, 4, 8, 8), 3, torch.zeros(1, 8, 12))
    assert error.value.field == "encoder_hidden_states"
