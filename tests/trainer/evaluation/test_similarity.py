"""Alignment of representations, structure in space and the probe: published numbers and edges."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from repa.data.errors import RepaError
from repa.trainer.evaluation.probe import linear_probe
from repa.trainer.evaluation.similarity import cka, cknna
from repa.trainer.evaluation.structure import (
    correlation_decay,
    local_distant_similarity,
    region_self_similarity,
    spatial_contrast,
)

if TYPE_CHECKING:
    from pathlib import Path

RANDOM = np.random.default_rng(0)


def test_alignment_of_two_models(shared: Path) -> None:
    with np.load(shared / "golden" / "metrics.npz") as golden:
        x, y = golden["features_x"], torch.from_numpy(golden["features_y"])
        for normalise, suffix in ((True, ""), (False, "_raw")):
            close = {"rel": 1e-9, "abs": 1e-12}
            assert cknna(x, y, normalise=normalise) == pytest.approx(golden[f"cknna_k10{suffix}"], **close)
            assert cka(x, y, normalise=normalise) == pytest.approx(golden[f"cka{suffix}"], **close)
            unbiased = cka(x, y, unbiased=True, normalise=normalise)
            assert unbiased == pytest.approx(golden[f"cka_unbiased{suffix}"], **close)
        assert cknna(x, x) == pytest.approx(golden["cknna_self_k10"], rel=1e-9)


def test_structure_in_space(shared: Path) -> None:
    with np.load(shared / "golden" / "irepa.npz") as golden:
        tokens, mask = (torch.from_numpy(golden[f"structure_{name}"]) for name in ("tokens", "mask"))
        found = {
            "lds": local_distant_similarity(tokens, (8, 8)),
            "cds": correlation_decay(tokens, (8, 8)),
            "srss": region_self_similarity(tokens, (8, 8), mask),
            "rmsc": spatial_contrast(tokens),
        }
        for name, values in found.items():
            np.testing.assert_allclose(values, golden[f"structure_{name}64"], rtol=1e-9)
            np.testing.assert_allclose(values, golden[f"structure_{name}"], atol=2e-6)


def test_structure_of_tokens_without_any() -> None:
    alike = torch.ones(2, 24, 3)
    assert local_distant_similarity(alike, (4, 6)).tolist() == pytest.approx([0, 0])
    assert correlation_decay(alike, (4, 6)).tolist() == pytest.approx([0, 0])
    assert spatial_contrast(alike).tolist() == pytest.approx([0, 0])
    nowhere = torch.zeros(2, 24, dtype=torch.bool)
    assert region_self_similarity(alike, (4, 6), nowhere).isnan().all()
    for measure in (local_distant_similarity, correlation_decay):
        for grid in ((2, 2), (4, 4)):
            with pytest.raises(RepaError) as caught:
                measure(torch.ones(1, 4, 3), grid)
            assert caught.value.field == "grid"
    with pytest.raises(RepaError) as caught:
        region_self_similarity(alike, (4, 6), nowhere[:, 1:])
    assert caught.value.field == "mask"


def test_alignment_ignores_rotation_and_scale_of_a_space() -> None:
    x = RANDOM.normal(size=(50, 6))
    rotation = np.linalg.qr(RANDOM.normal(size=(6, 6)))[0]
    assert cknna(x, x @ rotation * 3) == pytest.approx(1, abs=1e-3)
    assert cka(x, x @ rotation * 3) == pytest.approx(1, abs=1e-6)
    assert abs(cka(x, RANDOM.normal(size=(50, 6)), unbiased=True)) < 0.1
    for other in (x[1:], x[:, 0], x * np.nan):
        with pytest.raises(RepaError):
            cka(x, other)
    with pytest.raises(RepaError) as caught:
        cknna(x, x, k=50)
    assert caught.value.field == "k"


@pytest.mark.parametrize("width", [3, 200])
def test_probe_finds_classes_that_are_there_and_no_others(width: int) -> None:
    labels = np.arange(120) % 3 + 5
    features = RANDOM.normal(size=(120, width))
    chance = linear_probe(features[:90], labels[:90], features[90:], labels[90:])
    features[:, :3] += 8 * np.eye(3)[labels - 5]
    told = linear_probe(features[:90], labels[:90], features[90:], labels[90:])
    assert chance < 0.7
    assert told > 0.9
    with pytest.raises(RepaError) as caught:
        linear_probe(features[:90], np.ones(90, int), features[90:], labels[90:])
    assert caught.value.field == "labels"


def test_probe_solves_ridge_regression() -> None:
    """Both systems, by samples and by channels, give the weights of one definition."""
    features, labels = RANDOM.normal(size=(40, 40)), np.arange(40) % 4
    held_out, held_labels = RANDOM.normal(size=(300, 40)), np.arange(300) % 4
    one = linear_probe(features, labels, held_out, held_labels)
    x, mean = (features - features.mean(0)) / features.std(0), np.eye(4)[labels].mean(0)
    weights = np.linalg.inv(x.T @ x + 0.4 * np.eye(40)) @ x.T @ (np.eye(4)[labels] - mean)
    named = (((held_out - features.mean(0)) / features.std(0)) @ weights + mean).argmax(1)
    assert one == (named == held_labels).mean()
    wide = np.concatenate([features, np.zeros((40, 5))], axis=1)  # more channels than images
    assert linear_probe(wide, labels, np.concatenate([held_out, np.ones((300, 5))], 1), held_labels) == one
