"""Samples of prompts, encoded as the captions of the cache were."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from repa.commands.sample import SampleFlags, sample
from repa.data.errors import RepaError
from repa.data.format.captions import captions_path, read_captions
from repa.data.format.columns import ColumnSpec
from repa.data.format.opening import open_manifest
from repa.data.testing import synthetic_cache
from repa.data.writing.captions import ensure_captions
from repa.data.writing.store import ensure_source
from repa.data.writing.writer import SourceWriter
from repa.pipeline.text.encoder import load_text_encoder
from repa.pipeline.text.registry import find_text_encoder
from repa.trainer.config import build
from repa.trainer.models.mmdit import MMDIT_SIZES, MMDiTSize
from repa.trainer.run.fit import fit
from rich.console import Console
from tiny_text import save_clip

if TYPE_CHECKING:
    from collections.abc import Iterator

pytest.importorskip("transformers")

NAME = "clip-l-text"
CAPTIONS = ["a red heart on dark", "a blue star"]


class Pixels:
    name = "pixels"
    weights_sha256 = "0"

    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        return (128 + 20 * latent[:, :3]).clamp(0, 255).to(torch.uint8)


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip-l")
    save_clip(folder / "text_encoder", folder / "tokenizer", projected=False)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, encoder_folder: Path) -> Iterator[Path]:
    """A run on captions that the encoder of the folder has encoded."""
    cache = tmp_path_factory.mktemp("sample-text") / "cache"
    synthetic_cache(cache, num_rows=8)
    where = ensure_captions(cache, [CAPTIONS[row % 2 : row % 2 + 1] for row in range(8)])
    encoder = load_text_encoder(find_text_encoder(NAME), folder=encoder_folder)
    states = {text: encoder.encode([text])["states"][0] for text in read_captions(cache)}
    column = f"{NAME}/states"
    columns = {column: ColumnSpec(shape=states[""].shape, dtype="float16")}
    manifest = ensure_source(where, NAME, encoder.provenance(1), columns)
    with SourceWriter(where, manifest, NAME, range(manifest.num_shards)) as writer:
        for number in writer.remaining:
            with writer.shard(number) as shard:
                for row in shard.rows:
                    shard.write(row, column, states[read_captions(cache)[row]].astype(np.float16)[None])
                shard.commit()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MMDIT_SIZES, "6", MMDiTSize(depth=2, width=48, heads=3))
        flags = {"cache": str(cache), "model": "MMDiT-6/2", "method": "none", "condition": column}
        config = build(
            flags={
                **flags,
                "max_steps": 2,
                "batch_size": 4,
                "precision": "32-true",
                "preview_every": 0,
                "lr": 0.1,
            }
        )
        folder = cache.parent / "run"
        fit(config, folder, console=Console(file=io.StringIO()))
        yield folder


@pytest.fixture(autouse=True)
def _pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("repa.commands.shared.prepared.decoder_of", lambda *_: Pixels())


def sampled(run: Path, out: Path, **flags: Any) -> tuple[np.ndarray, dict[str, Any]]:
    sample(
        SampleFlags(run=run, num=4, steps=3, npz=True, out=out, **flags), console=Console(file=io.StringIO())
    )
    with np.load(out / "samples.npz") as arrays:
        return arrays["arr_0"], json.loads((out / "sampling.json").read_text())


def test_a_prompt_is_the_caption_of_the_cache_to_the_bit(
    run: Path, encoder_folder: Path, tmp_path: Path
) -> None:
    weights = [f"{NAME}={encoder_folder}"]
    captions, record = sampled(run, tmp_path / "captions")
    assert record["prompts"] == [CAPTIONS[0], *CAPTIONS[:1], *CAPTIONS[:1], *CAPTIONS[:1]]
    assert record["bank"] == open_manifest(captions_path(run.parent / "cache")).identity
    prompts, record = sampled(run, tmp_path / "prompts", prompts=CAPTIONS[:1], encoder_weights=weights)
    assert (record["prompts"], record["bank"]) == (CAPTIONS[:1], None)
    np.testing.assert_array_equal(prompts, captions)
    file = tmp_path / "prompts.txt"
    file.write_text(f"{CAPTIONS[0]}\n\n  {CAPTIONS[1]}\n")
    both, record = sampled(run, tmp_path / "file", prompts_file=file, encoder_weights=weights)
    assert record["prompts"] == CAPTIONS
    np.testing.assert_array_equal(both[::2], captions[::2])
    assert (both[1::2] != captions[1::2]).any()


def test_what_cannot_be_shown_is_told(run: Path, encoder_folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    save_clip(other / "text_encoder", other / "tokenizer", projected=False, seed=1)
    empty = tmp_path / "empty.txt"
    empty.write_text("\n")
    mine = [f"{NAME}={encoder_folder}"]
    for field, flags in {
        "--encoder-weights": {"prompts": ["a star"], "encoder_weights": [f"{NAME}={other}"]},
        "--prompts": {"prompts_file": empty, "encoder_weights": mine},
        "--bank": {"prompts": ["a star"], "bank": str(run.parent / "cache"), "encoder_weights": mine},
        "--like": {"like": ["1"]},
        "--label": {"labels": ["1"]},
    }.items():
        with pytest.raises(RepaError) as caught:
            sampled(run, tmp_path / "out", **flags)
        assert caught.value.field == field
