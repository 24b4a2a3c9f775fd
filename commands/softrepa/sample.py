"""`repa softrepa sample` makes images with trained soft tokens."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ...data.errors import RepaError
from ...data.format.columns import AUTOENCODER, MOMENTS, TEXT_STATES, source_of
from ...data.format.foreign import autoencoder_of
from ...data.reading.latents import latent_scale, unscale_latent
from ...data.reading.reader import CacheReader
from ...data.storage.bucket import cache_path
from ...data.storage.files import os_errors, write_file
from ...data.units import counted
from ...trainer.models.denoiser_facts import read_denoiser
from ...trainer.sampling.pictures import save_png
from ...trainer.softrepa.checks import text_columns
from ...trainer.softrepa.file import read_soft_tokens
from ...trainer.softrepa.fit import BEST_FILE, TOKENS_FILE, dtype_of, null_text, prepared_denoiser
from ...trainer.softrepa.sampling import PUBLISHED, Text, initial_noise, sample_latents
from ...trainer.softrepa.settings import build
from ...trainer.softrepa.step import text_of
from ..shared.decoder import Decoder
from ..shared.flags import check_ranges
from ..shared.terminal import PlainConsole, progress
from ..shared.texts import TextAsked, drawn_captions, text_encoder

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from rich.console import Console

    from ...trainer.models.denoiser_facts import DenoiserFacts
    from ...trainer.models.stable_diffusion import Denoiser
    from ...trainer.softrepa.checks import TextColumns
    from ...trainer.softrepa.file import SoftTokensNotes
    from ...trainer.softrepa.tokens import SoftTokens
    from .sample_flags import SoftSampleFlags


@dataclass(frozen=True, kw_only=True)
class _Ready:
    """What the samples are made of.

    Attributes:
        denoiser: on its device.
        soft: None for the plain model.
        text: of all samples.
        null: the empty text.
        prompts: text of each sample.
        size: side in pixels.
        shape: ``(C, h, w)`` of a latent.
        steps: of the scheduler.
        guidance: its scale.
    """

    denoiser: Denoiser
    soft: SoftTokens | None
    text: Text
    null: Text
    prompts: tuple[str, ...]
    size: int
    shape: tuple[int, int, int]
    steps: int
    guidance: float


def sample(flags: SoftSampleFlags, *, console: Console | None = None) -> None:
    """Sample images. Sample i depends on seed, text and i, not on the batch size.

    Args:
        flags: of the command.
        console: where to print; standard output by default.

    Raises:
        RepaError: a mistake the user can mend.
    """
    console = console or PlainConsole()
    check_ranges(
        ("--num", flags.num, 1, 10**6),
        ("--batch-size", flags.batch_size, 1, 10**6),
        ("--steps", flags.steps, 1, 1000),
        ("--guidance", flags.guidance, 0, 1000),
        ("--seed", flags.seed, 0, 2**63 - 1),
    )

    def say(line: str) -> None:
        console.print(line, highlight=False, markup=False, soft_wrap=True)

    file, out = _places(flags)
    soft, notes = read_soft_tokens(file)
    given = {"model": flags.model, "cache": flags.cache, "condition": notes.condition}
    settings = build(notes.settings, given)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    facts = read_denoiser(settings.model)
    _check_model(soft, notes, facts, file)
    _refuse_files(out)
    with CacheReader(cache_path(settings.cache), (MOMENTS, *_text_names(settings, facts))) as reader:
        text = text_columns(settings, reader.manifest, facts)
        _check_text(text, notes, facts, file)
        decoder = _decoder(flags, reader, str(device))
        scale = latent_scale(reader.manifest, where=settings.cache)
        size, stride = _size(flags, reader)
        prompts, texts = _given_text(flags, reader, text, str(device))
        states, pooled = null_text(reader, text)
    denoiser = prepared_denoiser(facts, dtype_of(settings.dtype, device), text, notes.blocks)
    denoiser.to(device)
    if denoiser.weights_sha256 != notes.model_sha256:
        say(f"note: {facts.name} has other weights than the model that {file} was trained for")
    published = PUBLISHED[facts.kind]
    ready = _Ready(
        denoiser=denoiser,
        soft=None if flags.plain else soft.to(device),
        text=texts,
        null=Text(states=states, pooled=pooled),
        prompts=prompts,
        size=size,
        shape=(facts.channels, size // stride, size // stride),
        steps=published.steps if flags.steps is None else flags.steps,
        guidance=published.guidance if flags.guidance is None else flags.guidance,
    )
    with progress(flags.num, console, "sampling") as report:
        _write(ready, flags, out, lambda latent: decoder.decode(unscale_latent(latent, *scale)), report)
    _record(ready, flags, out, notes, file)
    say(f"Wrote {counted(flags.num, 'image', ',')} to {out}.")


def _write(
    ready: _Ready,
    flags: SoftSampleFlags,
    out: Path,
    decode: Callable[[torch.Tensor], torch.Tensor],
    report: Callable[[int], None],
) -> None:
    from PIL import Image

    for first in range(0, flags.num, flags.batch_size):
        count = min(flags.batch_size, flags.num - first)
        latents = sample_latents(
            ready.denoiser,
            ready.soft,
            ready.text.rows(slice(first, first + count)),
            ready.null,
            initial_noise(flags.seed, first, count, ready.shape),
            steps=ready.steps,
            guidance=ready.guidance,
            size=ready.size,
        )
        images = decode(latents).permute(0, 2, 3, 1).cpu().numpy()
        for number, image in enumerate(images, start=first):
            save_png(Image.fromarray(image), out / f"{number:06d}.png", out)
        report(count)


def _record(ready: _Ready, flags: SoftSampleFlags, out: Path, notes: SoftTokensNotes, file: Path) -> None:
    """Write ``sampling.json``, what the images are of."""
    values: dict[str, Any] = {
        "tokens": None if flags.plain else str(file),
        "step": None if flags.plain else notes.step,
        "model": ready.denoiser.facts.name,
        "model_sha256": ready.denoiser.weights_sha256,
        "steps": ready.steps,
        "guidance": ready.guidance,
        "resolution": ready.size,
        "seed": flags.seed,
        "prompts": list(ready.prompts),
    }
    target = out / "sampling.json"
    with os_errors("write", target):
        write_file(target, (json.dumps(values, indent=2) + "\n").encode(), out)


def _places(flags: SoftSampleFlags) -> tuple[Path, Path]:
    """Find the file of tokens, and the folder for the images."""
    if (flags.run is None) == (flags.tokens is None):
        raise RepaError(
            "the flags do not say which tokens to sample with",
            "name one thing: a run with --run, or a file with --tokens",
            field="--run",
        )
    name = "plain" if flags.plain else "final"
    if flags.tokens is not None:
        return flags.tokens, flags.out or flags.tokens.parent / f"{flags.tokens.stem}-{name}"
    assert flags.run is not None, "one of the two is given"
    files = [flags.run / each for each in (BEST_FILE, TOKENS_FILE)]
    there = next((each for each in files if each.exists()), None)
    if there is None:
        raise RepaError(
            f"{flags.run} has no tokens", "train some with `repa softrepa train --run`", field="--run"
        )
    return there, flags.out or flags.run / "samples" / name


def _refuse_files(out: Path) -> None:
    with os_errors("read", out):
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise RepaError(
                f"{out} is not empty", "remove it, or name another folder with --out", field="--out"
            )


def _text_names(settings: Any, facts: Any) -> tuple[str, ...]:
    from ...data.tars.cache import manifest_of

    return text_columns(settings, manifest_of(settings.cache), facts).names


def _check_model(soft: SoftTokens, notes: SoftTokensNotes, facts: DenoiserFacts, file: Path) -> None:
    """Refuse a model that the tokens are not for.

    Raises:
        RepaError: it is of another kind, of another width, or has too few blocks.
    """
    shape = tuple(soft.tokens.shape)
    too_many = not facts.is_unet and shape[0] > facts.blocks
    if facts.kind != notes.kind or facts.token_width != shape[-1] or too_many:
        raise RepaError(
            f"tokens {shape} of {file} are for {notes.kind}, and {facts.name} is {facts.kind} of width "
            f"{facts.token_width}" + (f" and {facts.blocks} blocks" if too_many else ""),
            f"give a model as {notes.model}",
            field="--model",
        )


def _check_text(text: TextColumns, notes: SoftTokensNotes, facts: DenoiserFacts, file: Path) -> None:
    """Refuse text of another length than the tokens of a U-Net follow.

    Raises:
        RepaError: it is of another length.
    """
    if facts.is_unet and text.length != notes.text_length:
        raise RepaError(
            f"{text.states} has {text.length} states, and {file} was trained with {notes.text_length}",
            "give a cache of the same text encoder",
            field="--cache",
        )


def _size(flags: SoftSampleFlags, reader: CacheReader) -> tuple[int, int]:
    """Return the side of the samples, and the stride of the autoencoder, both in pixels.

    Raises:
        RepaError: the side is no multiple of the stride.
    """
    resolution = reader.manifest.resolution
    stride = resolution // reader.manifest.columns[MOMENTS].shape[1]
    size = flags.resolution or resolution
    if size % stride:
        raise RepaError(
            f"--resolution {size} is not a multiple of {stride}, the stride of the autoencoder",
            "give another",
            field="--resolution",
        )
    return size, stride


def _decoder(flags: SoftSampleFlags, reader: CacheReader, device: str) -> Decoder:
    """Return what decodes the latents of a cache.

    Raises:
        RepaError: nobody says which autoencoder they are of.
    """
    provenance = reader.manifest.sources[AUTOENCODER]
    name = flags.vae or autoencoder_of(provenance)
    if name is None:
        raise RepaError(
            "the cache does not say which autoencoder its latents are of", "name it with --vae", field="--vae"
        )
    return Decoder(name, device, random_weights=flags.vae is None and provenance.random_weights)


def _given_text(
    flags: SoftSampleFlags, reader: CacheReader, text: TextColumns, device: str
) -> tuple[tuple[str, ...], Text]:
    """Return the text of each sample, of prompts or of the captions of evenly spaced images.

    Raises:
        RepaError: the text encoder cannot be had, or is another than the captions'.
    """
    asked = TextAsked(
        prompts=tuple(flags.prompts or ()),
        file=flags.prompts_file,
        weights=tuple(flags.encoder_weights or ()),
    )
    if asked.given():
        return _of_prompts(asked, reader, text, flags.num, device)
    if asked.weights:
        raise RepaError("--encoder-weights are of --prompt", "leave them out", field="--encoder-weights")
    rows, numbers, prompts = drawn_captions(reader, flags.num, flags.seed)
    specs = reader.manifest.columns
    out = {name: np.empty((len(rows), *specs[name].shape), specs[name].numpy_dtype) for name in text.names}
    reader.read_rows(rows, text.names, out, captions=numbers)
    states, pooled = text_of({name: torch.from_numpy(each) for name, each in out.items()}, text)
    return prompts, Text(states=states, pooled=pooled)


def _of_prompts(
    asked: TextAsked, reader: CacheReader, text: TextColumns, num: int, device: str
) -> tuple[tuple[str, ...], Text]:
    source = source_of(text.states)
    provenance = reader.manifest.sources[source]
    encoder = text_encoder(
        source,
        asked.weights,
        device=device,
        random_weights=provenance.random_weights,
        sha256=provenance.weights_sha256 or None,
        origin=f"the captions of {reader.path}",
    )
    prompts = asked.read()
    in_turn = tuple(prompts[number % len(prompts)] for number in range(num))
    # one by one, as the batch that a prompt is in may change its last bits
    found = {each: encoder.encode([each]) for each in dict.fromkeys(prompts)}

    def of(kind: str) -> torch.Tensor:
        return torch.cat([torch.from_numpy(found[each][kind]).half() for each in in_turn])

    return in_turn, Text(states=of(TEXT_STATES), pooled=of("pooled") if text.pooled else None)
