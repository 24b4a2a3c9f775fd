"""Metrics by name, what each lacks, and sets that have no number."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from repa.data.errors import RepaError
from repa.trainer.evaluation.bootstrap import bootstrap_spread
from repa.trainer.evaluation.frechet import frechet_distance
from repa.trainer.evaluation.moments import moments_of
from repa.trainer.evaluation.neighbours import precision_recall
from repa.trainer.evaluation.registry import METRICS, Metric, measure, metrics_giving, missing_inputs
from repa.trainer.evaluation.spectrum import effective_rank, vendi_score

RANDOM = np.random.default_rng(0)
SAMPLES = RANDOM.standard_normal((60, 4))
REAL = RANDOM.standard_normal((50, 4)) + 0.5
INPUTS = {
    "features": SAMPLES,
    "reference": REAL,
    "spatial_statistics": moments_of(SAMPLES),
    "reference_spatial_statistics": moments_of(REAL),
    "logits": SAMPLES,
    "texts": SAMPLES + 0.5 * RANDOM.standard_normal((60, 4)),
}
SMALL = {"fd_infinity": {"smallest": 20}, "kid": {"subset_size": 30, "subsets": 3}}


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_gives_what_it_says(name: str) -> None:
    metric = METRICS[name]
    numbers = measure(name, INPUTS, **SMALL.get(name, {}))
    assert tuple(numbers) == metric.gives
    assert all(np.isfinite(list(numbers.values())))
    assert metrics_giving(metric.gives[:1]) in {(name,), ("is",)}
    on_tensors = {k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in INPUTS.items()}
    assert measure(name, on_tensors, **SMALL.get(name, {})) == numbers
    for need in metric.needs:
        rest = {k: v for k, v in INPUTS.items() if k not in {need, "features", "reference"}}
        with pytest.raises(RepaError) as caught:
            measure(name, rest)
        assert caught.value.field in metric.needs


def test_metrics_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert measure("fd", INPUTS)["fd"] == frechet_distance(SAMPLES, REAL) > 0.5
    monkeypatch.setitem(
        METRICS,
        "spread",
        Metric(compute=lambda x: float(x.std()), needs=("features",), gives=("spread",), after="a test"),
    )
    assert measure("spread", INPUTS)["spread"] == pytest.approx(SAMPLES.std())
    assert metrics_giving(["coverage", "prdc", "recall", "precision"]) == ("prdc", "precision_recall")
    for name in ("fidd", ""):
        with pytest.raises(RepaError) as caught:
            metrics_giving([name])
        assert caught.value.field == "--metrics"
    with pytest.raises(RepaError) as caught:
        measure("fd", INPUTS, k=3)
    assert caught.value.field == "k"


def test_a_reference_of_statistics_alone_does_for_some() -> None:
    given = ("features", "reference_statistics")
    assert missing_inputs("fid", given) == ()
    assert missing_inputs("fd_infinity", given) == ()
    assert missing_inputs("precision_recall", given) == ("reference",)
    assert missing_inputs("sfid", given) == ("spatial_statistics", "reference_spatial_statistics")


@pytest.mark.parametrize("name", ["precision_recall", "prdc", "kid_all", "authpct", "fd"])
@pytest.mark.parametrize(
    ("samples", "real"),
    [(SAMPLES, REAL[:, :3]), (SAMPLES[:1], REAL[:1]), (SAMPLES.ravel(), REAL), (SAMPLES * np.nan, REAL)],
)
def test_sets_that_have_no_number(name: str, samples: np.ndarray, real: np.ndarray) -> None:
    with pytest.raises(RepaError) as caught:
        measure(name, {"features": samples, "reference": real})
    assert caught.value.field in {"features", "reference"}


def test_precision_and_recall_are_not_mixed_up() -> None:
    real = RANDOM.standard_normal((200, 2))
    narrow = real[:50] * 0.01  # every sample is like a real image, most real images are like no sample
    numbers = precision_recall(narrow, real)
    assert numbers["precision"] == 1
    assert numbers["recall"] < 0.1
    assert precision_recall(real, narrow)["recall"] == 1


def test_effective_number_of_directions_and_of_images() -> None:
    one_of_each = np.eye(6)
    assert vendi_score(one_of_each) == pytest.approx(6)
    assert vendi_score(np.repeat(one_of_each[:2], 50, axis=0)) == pytest.approx(2)
    with pytest.raises(RepaError):
        vendi_score(np.zeros((3, 2)))
    assert effective_rank(np.concatenate([one_of_each, -one_of_each])) == pytest.approx(6)
    assert effective_rank(np.outer(np.arange(9.0), np.ones(4)) + 7) == pytest.approx(1)
    assert effective_rank(np.ones((5, 3))) == 0
    assert effective_rank(RANDOM.standard_normal((3, 50))) <= 2 + 1e-9


def test_bootstrap_of_a_mean_is_its_standard_error() -> None:
    rows = RANDOM.normal(size=(400, 1))
    spread = bootstrap_spread(lambda x: float(x.mean()), rows, rounds=300)
    assert spread == pytest.approx(rows.std() / 20, rel=0.15)
    assert spread == bootstrap_spread(lambda x: float(x.mean()), rows, rounds=300)
    with pytest.raises(RepaError):
        bootstrap_spread(lambda x: 0.0, rows, rounds=1)
