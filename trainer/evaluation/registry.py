"""The metrics by name, one line each, with what they are computed from and by which conventions."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ...data.errors import RepaError
from .clip_score import clip_score
from .frechet import frechet_distance, frechet_distance_at_infinity
from .inception_score import inception_score, inception_score_shuffled
from .kernel_distance import kernel_distance, kernel_distance_of_all
from .neighbours import authenticity, density_coverage, precision_recall
from .networks import CLIP, INCEPTION
from .spectrum import vendi_score

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from typing import TypeAlias

    from .moments import Moments, Rows

    Input: TypeAlias = Rows | Moments

FEATURES = "features"
"""Features of the samples ``[N, D]``."""
REFERENCE = "reference"
"""Features of the real images ``[M, D]``, from the same model."""
STATISTICS = "statistics"
"""Moments of the samples' features; their rows will do."""
REFERENCE_STATISTICS = "reference_statistics"
"""Moments of the real images' features; their rows will do."""
SPATIAL_STATISTICS = "spatial_statistics"
"""Moments of the samples' spatial features, 7 channels of Inception's ``mixed_6/conv``, channels last."""
REFERENCE_SPATIAL_STATISTICS = "reference_spatial_statistics"
"""Moments of the real images' spatial features."""
LOGITS = "logits"
"""Inception's class logits of the samples ``[N, C]``, without bias."""
TEXTS = "texts"
"""Embeddings of the samples' prompts ``[N, D]``, from the model of the features."""

ROWS_OF = {STATISTICS: FEATURES, REFERENCE_STATISTICS: REFERENCE}
"""Moments that are measured from rows where only these are given."""


@dataclass(frozen=True, kw_only=True)
class Metric:
    """Hold how one or several numbers about samples are computed.

    Attributes:
        compute: the inputs in the order of ``needs``, and the conventions by name → the numbers by name; a
            float where there is one.
        needs: names of those inputs.
        gives: names of the numbers.
        conventions: what decides the number beside its inputs, with the published values.
        only: the one network in whose features the name means this, `INCEPTION` (the 2015 one of TensorFlow)
            or `CLIP`; empty where any will do.
        after: the program or paper whose number this is.
    """

    compute: Callable[..., float | dict[str, float]]
    needs: tuple[str, ...]
    gives: tuple[str, ...]
    conventions: Mapping[str, int] = field(default_factory=dict)
    only: str = ""
    after: str


_BOTH_STATISTICS = (STATISTICS, REFERENCE_STATISTICS)
_BOTH = (FEATURES, REFERENCE)

METRICS: dict[str, Metric] = {
    "fid": Metric(
        compute=frechet_distance,
        needs=_BOTH_STATISTICS,
        gives=("fid",),
        only=INCEPTION,
        after="ADM's evaluator; float64, exact root",
    ),
    "sfid": Metric(
        compute=frechet_distance,
        needs=(SPATIAL_STATISTICS, REFERENCE_SPATIAL_STATISTICS),
        gives=("sfid",),
        only=INCEPTION,
        after="ADM's evaluator; float64, exact root",
    ),
    "is": Metric(
        compute=inception_score,
        needs=(LOGITS,),
        gives=("is", "is_deviation"),
        conventions={"split_size": 5000},
        only=INCEPTION,
        after="ADM's evaluator, splits in file order",
    ),
    "is_shuffled": Metric(
        compute=inception_score_shuffled,
        needs=(LOGITS,),
        gives=("is", "is_deviation"),
        conventions={"splits": 10, "seed": 2020},
        only=INCEPTION,
        after="torch-fidelity, splits of a permutation",
    ),
    "fd": Metric(
        compute=frechet_distance,
        needs=_BOTH_STATISTICS,
        gives=("fd",),
        after="FID's formula; float64, exact root",
    ),
    "fd_infinity": Metric(
        compute=frechet_distance_at_infinity,
        needs=(FEATURES, REFERENCE_STATISTICS),
        gives=("fd_infinity",),
        conventions={"points": 15, "smallest": 5000, "seed": 0},
        after="Chong and Forsyth, dgm-eval, with a seed",
    ),
    "precision_recall": Metric(
        compute=precision_recall,
        needs=_BOTH,
        gives=("precision", "recall"),
        conventions={"k": 3},
        after="Kynkäänniemi et al., exact distances",
    ),
    "prdc": Metric(
        compute=density_coverage,
        needs=_BOTH,
        gives=("prdc_precision", "prdc_recall", "density", "coverage"),
        conventions={"k": 5},
        after="prdc, dgm-eval",
    ),
    "kid": Metric(
        compute=kernel_distance,
        needs=_BOTH,
        gives=("kid", "kid_deviation"),
        conventions={"subsets": 100, "subset_size": 1000, "seed": 2020},
        after="torch-fidelity",
    ),
    "kid_all": Metric(
        compute=kernel_distance_of_all,
        needs=_BOTH,
        gives=("kid_all",),
        after="Bińkowski et al., all rows once",
    ),
    "authpct": Metric(
        compute=authenticity,
        needs=_BOTH,
        gives=("authpct",),
        after="Alaa et al., dgm-eval",
    ),
    "vendi": Metric(
        compute=vendi_score,
        needs=(FEATURES,),
        gives=("vendi",),
        after="Friedman and Dieng, dgm-eval",
    ),
    "clip_score": Metric(
        compute=clip_score,
        needs=(FEATURES, TEXTS),
        gives=("clip_score", "clip_score_deviation"),
        only=CLIP,
        after="Hessel et al., 100 · max(cos, 0) of image and prompt; the deviation is the mean's",
    ),
}


def metrics_giving(names: Iterable[str]) -> tuple[str, ...]:
    """Return the metrics that give some numbers, each metric once, in the order they are first asked for.

    Args:
        names: of metrics (``prdc``) or of their numbers (``density``).

    Raises:
        RepaError: a name is neither.
    """
    giving = {number: name for name, metric in reversed(METRICS.items()) for number in metric.gives}
    chosen: dict[str, None] = {}
    for name in names:
        if name not in METRICS and name not in giving:
            raise RepaError(
                f"metric {name!r} is unknown",
                f"there are {', '.join(dict.fromkeys([*METRICS, *giving]))}",
                field="--metrics",
            )
        chosen[name if name in METRICS else giving[name]] = None
    return tuple(chosen)


def missing_inputs(name: str, given: Iterable[str]) -> tuple[str, ...]:
    """Return the inputs that a metric needs and that neither are there nor can be made of what is there.

    Args:
        name: of the metric.
        given: names of the inputs that are there.

    Raises:
        RepaError: there is no such metric.
    """
    there = set(given)
    return tuple(need for need in _metric(name).needs if need not in there and ROWS_OF.get(need) not in there)


def measure(name: str, inputs: Mapping[str, Input], **conventions: int) -> dict[str, float]:
    """Return the numbers that a metric gives.

    Args:
        name: of the metric.
        inputs: input names → arrays, tensors or moments; more than it needs may be there.
        conventions: those that shall differ from the published ones.

    Returns:
        A number for each name in the metric's ``gives``.

    Raises:
        RepaError: there is no such metric or convention, it needs an input that is not there, or the inputs
            do not fit it.
    """
    metric = _metric(name)
    missing = missing_inputs(name, inputs)
    if missing:
        raise RepaError(
            f"metric {name} is computed from {', '.join(metric.needs)}, and there is no {missing[0]}",
            "give it too",
            field=missing[0],
        )
    strange = [each for each in conventions if each not in metric.conventions]
    if strange:
        raise RepaError(
            f"metric {name} has no {strange[0]}",
            f"it has {', '.join(metric.conventions) or 'no conventions to change'}",
            field=strange[0],
        )
    values = [inputs[need] if need in inputs else inputs[ROWS_OF[need]] for need in metric.needs]
    numbers = metric.compute(*values, **{**metric.conventions, **conventions})
    return numbers if isinstance(numbers, dict) else {metric.gives[0]: numbers}


def _metric(name: str) -> Metric:
    if name not in METRICS:
        raise RepaError(f"metric {name!r} is unknown", f"there are {', '.join(METRICS)}", field="--metrics")
    return METRICS[name]
