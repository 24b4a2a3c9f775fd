"""Statistics of the latents in the manifest, and what training makes of them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from repa.data.errors import CacheError, RepaError
from repa.data.format.columns import AUTOENCODER, MOMENTS, ColumnSpec
from repa.data.format.manifest import LATENTS_NOTE, Manifest
from repa.data.format.opening import open_manifest
from repa.data.reading.latents import (
    STABLE_DIFFUSION_SCALE,
    chosen_scale,
    latent_scale,
    sample_posterior,
    scale_latent,
    unscale_latent,
)
from repa.data.reading.reader import CacheReader
from repa.data.testing import SYNTHETIC_COLUMNS, expected_row, synthetic_cache
from repa.data.upkeep import latent_statistics
from repa.data.upkeep.latent_statistics import settle_latent_statistics
from repa.data.writing.store import write_manifest

if TYPE_CHECKING:
    from pathlib import Path


def moments_of(path: Path) -> np.ndarray:
    with CacheReader(path, (MOMENTS,)) as reader:
        return np.stack(
            [
                expected_row(MOMENTS, row, reader.manifest.columns[MOMENTS], view=view)
                for row in reader.valid_rows
                for view in range(len(reader.manifest.views))
            ]
        ).astype(np.float64)


@pytest.mark.parametrize("views", [("original",), ("original", "mirrored")])
def test_statistics_are_those_of_draws_of_all_views(
    views: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "cache"
    before = synthetic_cache(path, num_rows=41, invalid={3: "damaged"}, views=views)
    monkeypatch.setattr(latent_statistics, "_CHUNK", 16)
    assert settle_latent_statistics(path)
    manifest = open_manifest(path)
    note = manifest.sources[AUTOENCODER].notes[LATENTS_NOTE]
    assert note["images"] == 40
    moments = moments_of(path)
    mean, std = moments[:, :4], moments[:, 4:]
    assert note["mean"] == pytest.approx(mean.mean(axis=(0, 2, 3)).tolist(), rel=1e-9)
    spread = mean.var(axis=(0, 2, 3)) + np.square(std).mean(axis=(0, 2, 3))
    assert note["std"] == pytest.approx(np.sqrt(spread).tolist(), rel=1e-9)
    # it binds nobody: the cache is the one it was, and nothing else of it has changed
    assert manifest.identity == before.identity
    assert manifest.source_identities == before.source_identities
    assert not settle_latent_statistics(path)
    assert open_manifest(path) == manifest


def test_what_another_process_has_noted_meanwhile_is_not_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "cache"
    synthetic_cache(path, num_rows=8)
    measure = latent_statistics._measure

    def measured_by_two(path: Path) -> object:
        with monkeypatch.context() as patch:
            patch.setattr(latent_statistics, "_measure", measure)
            assert settle_latent_statistics(path)
        return measure(path)

    monkeypatch.setattr(latent_statistics, "_measure", measured_by_two)
    written: list[object] = []
    monkeypatch.setattr(
        latent_statistics, "write_manifest", lambda *given: (written.append(given), write_manifest(*given))
    )
    assert not settle_latent_statistics(path)
    assert len(written) == 1


def test_normalised_latents_have_deviation_one_and_decode_as_before(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    synthetic_cache(path, num_rows=40)
    settle_latent_statistics(path)
    scale = chosen_scale(open_manifest(path), "channel", where="cache")
    moments = torch.from_numpy(moments_of(path)).repeat(8, 1, 1, 1)
    noise = torch.randn(320, 4, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    latents = sample_posterior(moments, noise)
    normalised = scale_latent(latents, *scale)
    assert normalised.mean(dim=(0, 2, 3)).abs().max() < 0.02
    torch.testing.assert_close(
        normalised.std(dim=(0, 2, 3)), torch.ones(4, dtype=torch.float64), rtol=0.02, atol=0
    )
    torch.testing.assert_close(unscale_latent(normalised, *scale), latents)
    with pytest.raises(RepaError) as caught:
        scale.replaced(None, 0.5)
    assert caught.value.field == "latent_shift"
    assert scale.replaced(0.5, None).scaling_factor == 0.5


def test_other_norms(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    manifest = synthetic_cache(path, num_rows=8, notes={AUTOENCODER: {"scaling_factor": 0.5}})
    assert chosen_scale(manifest, "autoencoder", where="c") == latent_scale(manifest, where="c")
    assert chosen_scale(manifest, "sd", where="c") == STABLE_DIFFUSION_SCALE
    with pytest.raises(CacheError) as caught:
        chosen_scale(manifest, "channel", where="c")
    assert caught.value.field == "latent_norm"
    assert caught.value.remedy


def test_what_is_not_measured(tmp_path: Path) -> None:
    teacher = {name: spec for name, spec in SYNTHETIC_COLUMNS.items() if name != MOMENTS}
    synthetic_cache(tmp_path / "teacher", num_rows=8, columns=teacher)
    assert not settle_latent_statistics(tmp_path / "teacher")
    synthetic_cache(tmp_path / "empty", num_rows=8, written=False)
    assert not settle_latent_statistics(tmp_path / "empty")
    spoilt = dict.fromkeys(range(8), "damaged")
    synthetic_cache(tmp_path / "spoilt", num_rows=8, invalid=spoilt)
    assert not settle_latent_statistics(tmp_path / "spoilt")


@pytest.mark.parametrize(
    "note", [{"images": 3, "mean": [0.0], "std": [0.0]}, {"images": 3, "mean": [], "std": []}, 7]
)
def test_a_note_that_is_none_is_refused(note: object, tmp_path: Path) -> None:
    manifest = synthetic_cache(
        tmp_path / "cache", num_rows=8, columns={MOMENTS: ColumnSpec(shape=(2, 4, 4), dtype="float32")}
    )
    provenance = manifest.sources[AUTOENCODER]
    bad = replace(provenance, notes={**provenance.notes, LATENTS_NOTE: note})
    with pytest.raises(CacheError) as caught:
        Manifest.from_json(replace(manifest, sources={AUTOENCODER: bad}).to_json(), where="c")
    assert caught.value.field is not None
    assert caught.value.field.startswith(f"sources.{AUTOENCODER}.notes.latent_statistics")


def test_statistics_of_other_channels_are_refused(tmp_path: Path) -> None:
    note = {"images": 3, "mean": [0.0], "std": [1.0]}
    manifest = synthetic_cache(tmp_path / "cache", num_rows=8, notes={AUTOENCODER: {LATENTS_NOTE: note}})
    with pytest.raises(CacheError) as caught:
        chosen_scale(manifest, "channel", where="c")
    assert caught.value.field == "latents_mean"
