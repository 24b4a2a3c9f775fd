"""Every metric against the published programs' numbers on given features."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from repa.trainer.evaluation import neighbours
from repa.trainer.evaluation.frechet import frechet_distance
from repa.trainer.evaluation.inception_score import inception_score, inception_score_shuffled
from repa.trainer.evaluation.kernel_distance import _discrepancy, kernel_distance, kernel_distance_of_all
from repa.trainer.evaluation.moments import moments_of
from repa.trainer.evaluation.neighbours import (
    authenticity,
    density_coverage,
    precision_recall,
)
from repa.trainer.evaluation.spectrum import vendi_score

if TYPE_CHECKING:
    from pathlib import Path

Arrays = dict[str, np.ndarray]


def close(number: float) -> object:
    return pytest.approx(number, rel=1e-9, abs=1e-12)


@pytest.fixture(scope="module")
def golden(shared: Path) -> Arrays:
    with np.load(shared / "golden" / "metrics.npz") as file:
        return dict(file)


def test_frechet(golden: Arrays) -> None:
    samples, reference = golden["samples"], golden["reference"]
    assert frechet_distance(samples, reference) == close(golden["adm_fid"])
    assert frechet_distance(moments_of(torch.from_numpy(samples)), reference) == close(golden["adm_fid"])
    spatial = moments_of(golden["samples_spatial"])
    assert frechet_distance(spatial, golden["reference_spatial"]) == close(golden["adm_sfid"])
    few = frechet_distance(samples[:15], reference[:20])
    assert few == pytest.approx(golden["adm_fid_few_exact"], abs=1e-6)


def test_inception_score(golden: Arrays) -> None:
    logits = golden["logits"]
    ten = inception_score(logits, split_size=40)
    assert ten["is"] == close(golden["adm_is_10_splits"])
    assert ten["is_deviation"] == close(golden["is_10_splits_std"])
    assert inception_score(logits)["is"] == close(golden["adm_is_1_split"])
    assert inception_score(logits, split_size=150)["is"] == close(golden["adm_is_ragged_150"])
    shuffled = inception_score_shuffled(torch.from_numpy(logits))
    assert shuffled["is"] == close(golden["fidelity_is_mean"])
    assert shuffled["is_deviation"] == close(golden["fidelity_is_std"])
    again = inception_score(logits[golden["fidelity_is_order"].astype(int)], split_size=40)
    assert again["is"] == close(golden["fidelity_is_mean"])


@pytest.mark.parametrize("chunk", [neighbours.CHUNK_ELEMENTS, 3000])
def test_neighbours(golden: Arrays, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "CHUNK_ELEMENTS", chunk)
    samples, reference = golden["samples"], golden["reference"]
    for features in (samples, samples + np.float32(100)):  # an offset common to both costs no digits
        shift = features[0, 0] - samples[0, 0]
        ours = precision_recall(features, torch.from_numpy(reference + shift))
        assert ours["precision"] == close(golden["adm_precision"])
        assert ours["recall"] == close(golden["adm_recall"])
    for k in (3, 5):
        ours = density_coverage(samples, reference, k=k)
        assert ours["prdc_precision"] == close(golden[f"prdc_k{k}_precision"])
        assert ours["prdc_recall"] == close(golden[f"prdc_k{k}_recall"])
        assert ours["density"] == close(golden[f"prdc_k{k}_density"])
        assert ours["coverage"] == close(golden[f"prdc_k{k}_coverage"])
    # the published one is the quotient of float32 numbers
    assert authenticity(samples, reference) == pytest.approx(golden["authpct"], rel=1e-6)
    for name, rows in (("reference", reference), ("samples", samples)):
        centred, _ = neighbours._centred(rows, rows, 3)
        np.testing.assert_allclose(neighbours._radii(centred, 3), golden[f"adm_radii_{name}"], rtol=1e-5)


def test_kernel_distance(golden: Arrays) -> None:
    samples, reference = golden["samples"], golden["reference"]
    ours = kernel_distance(samples, reference, subsets=20, subset_size=100)
    assert ours["kid"] == close(golden["fidelity_kid_mean"])
    assert ours["kid_deviation"] == close(golden["fidelity_kid_std"])
    first, second = (
        torch.from_numpy(golden[name][golden[f"kid_rows_{name}"][0].astype(int)]).double()
        for name in ("samples", "reference")
    )
    one = _discrepancy(first, second)
    assert one == close(golden["kid_values"][0])
    assert kernel_distance_of_all(samples, reference[:300]) == close(golden["kid_all_equal"])
    assert kernel_distance_of_all(samples, reference) == close(golden["kid_all_unequal_by_hand"])


def test_vendi(golden: Arrays) -> None:
    samples = golden["samples"]
    assert vendi_score(samples) == close(golden["vendi"])
