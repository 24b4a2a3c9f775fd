"""From names that are asked for to figures, by way of the network that a metric takes its features from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from ...data.errors import RepaError
from ...data.units import counted
from .bootstrap import bootstrap_spread
from .moments import Moments, moments_of
from .networks import CLIP, INCEPTION, LOGITS, POOL, SPATIAL
from .references import FLAG as REFERENCE_FLAG
from .registry import (
    FEATURES,
    METRICS,
    REFERENCE,
    REFERENCE_SPATIAL_STATISTICS,
    REFERENCE_STATISTICS,
    SPATIAL_STATISTICS,
    STATISTICS,
    TEXTS,
    measure,
    metrics_giving,
)
from .registry import LOGITS as LOGITS_INPUT
from .results import Figure

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from numpy.typing import NDArray

    from .references import Reference

FLAG: Final = "--metrics"
_DEVIATION = "_deviation"
_OF_REFERENCE = (REFERENCE, REFERENCE_STATISTICS, REFERENCE_SPATIAL_STATISTICS)
_IN_ORDER = "is"
# input of the samples' side → name of the features that it is made of
_ROWS = {FEATURES: POOL, STATISTICS: POOL, SPATIAL_STATISTICS: SPATIAL, LOGITS_INPUT: LOGITS}


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A metric in the features of a network.

    Attributes:
        metric: name in the registry.
        network: ``inception``, or an encoder.
    """

    metric: str
    network: str

    @property
    def needs(self) -> tuple[str, ...]:
        """Names of the inputs."""
        return METRICS[self.metric].needs

    def label(self, number: str) -> str:
        """Return the name under which a number of the metric is kept."""
        return number if METRICS[self.metric].only else f"{number}/{self.network}"


def asked_for(names: Iterable[str], reference: Reference) -> tuple[Asked, ...]:
    """Say which metrics some names ask for, and of which network.

    A name may end in ``/<network>``. Without that it is Inception's, or with a cache for reference its only
    encoder's, but for metrics that are Inception's alone.

    Args:
        names: of metrics or of their numbers.
        reference: what samples are compared with.

    Raises:
        RepaError: an unknown metric, a network that it cannot have, or several encoders to choose from.
    """
    chosen: dict[Asked, None] = {}
    for name in names:
        number, slash, network = name.partition("/")
        if slash and not network:
            raise RepaError(
                f"metric {name!r} names no network", "name one, or leave the slash out", field=FLAG
            )
        for metric in metrics_giving((number,)):
            chosen[Asked(metric=metric, network=_network(metric, network, reference))] = None
    if not chosen:
        raise RepaError("no metric is asked for", "name some, as fid or fd", field=FLAG)
    return tuple(chosen)


def _network(metric: str, network: str, reference: Reference) -> str:
    only = METRICS[metric].only
    if only and network not in ("", only):
        raise RepaError(
            f"{metric} is a metric of {only.capitalize()}'s features, not of {network}",
            f"ask for fd/{network}" if metric == "fid" else f"leave /{network} out",
            field=FLAG,
        )
    if only or network:
        return network or only
    if reference.cache is None:
        if metric == "fd":
            raise RepaError(
                "fd does not say which encoder's features it is of", "write fd/<encoder>", field=FLAG
            )
        return INCEPTION
    if len(reference.encoders) != 1:
        there = ", ".join(reference.encoders) or "none"
        raise RepaError(
            f"{metric} does not say which encoder's features it is of, and the cache has {there}",
            f"write {metric}/<encoder>",
            field=FLAG,
        )
    return reference.encoders[0]


def check_asked(
    asked: Iterable[Asked], reference: Reference, num: int, m: Mapping[str, int], *, prompts: bool = False
) -> None:
    """Refuse, before anything is computed, metrics that the reference or the number of samples rules out.

    Args:
        asked: the metrics.
        reference: what samples are compared with.
        num: N, number of samples.
        m: network → images of the reference that have features in it.
        prompts: whether the samples were made of prompts.

    Raises:
        RepaError: nothing says the prompts, the reference lacks what a metric needs, or there are too few
            images for it.
    """
    if num < 2:
        raise RepaError(f"{counted(num, 'sample')} have no covariance", "take at least 2", field="--num")
    for each in asked:
        if TEXTS in each.needs and not prompts:
            raise RepaError(
                f"{each.metric} compares samples with their prompts, and these have none",
                "leave the metric out, or measure a model of text",
                field=FLAG,
            )
        rows = each.network in m
        for need in each.needs:
            if need not in _OF_REFERENCE or rows:
                continue
            if need in reference.statistics and each.network == INCEPTION:
                continue
            what = "no images" if need == REFERENCE else "no such statistics, and no images to make them of"
            raise RepaError(
                f"{each.metric} in features of {each.network} is measured against {need.replace('_', ' ')}, "
                f"and {reference.said.name} has {what}",
                "give another --reference, or leave the metric out",
                field=REFERENCE_FLAG,
            )
        fewest = min(num, m[each.network]) if REFERENCE in each.needs else num
        for convention in ("subset_size", "smallest", "k"):
            least = METRICS[each.metric].conventions.get(convention, 0)
            if fewest < least or (fewest == least and convention != "subset_size"):
                raise RepaError(
                    f"{each.metric} has {convention.replace('_', ' ')} {least:,}, and there are "
                    f"{counted(fewest, 'image', ',')}",
                    "take more, or kid_all, which takes all rows once"
                    if each.metric == "kid"
                    else "take more, or leave the metric out",
                    field=FLAG,
                )


def needs_images(asked: Iterable[Asked], reference: Reference, network: str) -> bool:
    """Return whether features of the reference's images are needed, which has neither them nor statistics."""
    if reference.images is None or network in reference.encoders:
        return False
    ready = reference.statistics_of(network)
    needs = {need for each in asked if each.network == network for need in each.needs}
    return any(need in _OF_REFERENCE and need not in ready for need in needs)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The features of one network that figures are computed from.

    Attributes:
        samples: name → ``[N, D]`` of the samples.
        reference: name → ``[M, D]`` of the reference's images; empty where it has statistics alone.
        statistics: input of a metric → moments that the reference has ready.
        weights_sha256: of the network.
        random_weights: whether they were drawn.
        texts: embeddings of the samples' prompts ``[N, D]``; None without prompts.
    """

    samples: Mapping[str, NDArray[Any]]
    reference: Mapping[str, NDArray[Any]]
    statistics: Mapping[str, Moments]
    weights_sha256: str
    random_weights: bool = False
    texts: NDArray[Any] | None = None

    def inputs(self) -> dict[str, Any]:
        """Return the inputs of metrics that can be made of these."""
        found: dict[str, Any] = {}
        for name, values in self.samples.items():
            if name == SPATIAL:
                found[SPATIAL_STATISTICS] = moments_of(values)
            else:
                found[{POOL: FEATURES, LOGITS: LOGITS_INPUT}[name]] = values
        if self.texts is not None:
            found[TEXTS] = self.texts
        if POOL in self.samples:
            found[STATISTICS] = moments_of(self.samples[POOL])
        if POOL in self.reference:
            found[REFERENCE] = self.reference[POOL]
            if REFERENCE_STATISTICS not in self.statistics:
                found[REFERENCE_STATISTICS] = moments_of(self.reference[POOL])
        if SPATIAL in self.reference and REFERENCE_SPATIAL_STATISTICS not in self.statistics:
            found[REFERENCE_SPATIAL_STATISTICS] = moments_of(self.reference[SPATIAL])
        return found | dict(self.statistics)


def figures_of(
    asked: Sequence[Asked], measured: Mapping[str, Measured], *, bootstrap: int = 0
) -> list[Figure]:
    """Compute figures.

    Args:
        asked: the metrics.
        measured: network → features.
        bootstrap: sets drawn from the samples for the spread of a number that has none of its own; 0 draws
            none.

    Returns:
        A figure for each number that the metrics give; a number's own deviation is its figure's spread.

    Raises:
        RepaError: features do not fit a metric.
    """
    inputs = {network: each.inputs() for network, each in measured.items()}
    figures: list[Figure] = []
    for each in asked:
        metric, own = METRICS[each.metric], inputs[each.network]
        numbers = measure(each.metric, own)
        n = len(next(iter(measured[each.network].samples.values())))
        for number in metric.gives:
            if number.endswith(_DEVIATION):
                continue
            figures.append(
                Figure(
                    metric=each.label(each.metric if len(metric.gives) == 1 else number),
                    value=float(numbers[number]),
                    spread=numbers.get(f"{number}{_DEVIATION}")
                    or _spread(each, number, own, measured[each.network], bootstrap),
                    n=n,
                    m=_count_of_reference(each, own),
                    k=metric.conventions.get("k"),
                    network=each.network,
                    network_sha256=measured[each.network].weights_sha256,
                    protocol=_protocol(each.metric),
                )
            )
    return figures


def _spread(
    asked: Asked, number: str, inputs: Mapping[str, Any], measured: Measured, rounds: int
) -> float | None:
    """Return how far a number would move with other samples, None where that is not asked for."""
    if not rounds or TEXTS in asked.needs:
        return None
    name, need = next((name, need) for need, name in _ROWS.items() if need in asked.needs)
    return bootstrap_spread(
        lambda rows: measure(asked.metric, {**inputs, need: rows})[number],
        measured.samples[name],
        rounds=rounds,
    )


def _count_of_reference(asked: Asked, inputs: Mapping[str, Any]) -> int | None:
    """Return how many images a metric's reference side is of, None where nothing says it."""
    for need in asked.needs:
        if need in _OF_REFERENCE:
            side = inputs[need]
            return (side.count or None) if isinstance(side, Moments) else len(side)
    return None


def _protocol(metric: str) -> str:
    conventions = METRICS[metric].conventions
    said = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in conventions.items())
    return "; ".join(each for each in (METRICS[metric].after, said) if each)


def notes_of(
    asked: Sequence[Asked], measured: Mapping[str, Measured], reference: Reference, *, class_sorted: bool
) -> list[str]:
    """Say what a reader of the figures must know.

    Args:
        asked: the metrics.
        measured: network → features.
        reference: what samples are compared with.
        class_sorted: whether the samples stand class by class.
    """
    notes = []
    for network, each in measured.items():
        if each.random_weights:
            notes.append(f"{network} has random weights: the figures say nothing of quality")
        if network not in (INCEPTION, CLIP):
            notes.append(
                f"fd/{network} and what else is of {network} is in this project's own features (decoded, "
                "uint8, encoded as a cache is): not comparable with published FD-DINOv2"
            )
        needs = {need for one in asked if one.network == network for need in one.needs}
        for need, name in ((STATISTICS, POOL), (SPATIAL_STATISTICS, SPATIAL)):
            values = each.samples.get(name)
            if need in needs and values is not None and len(values) < values.shape[1]:
                count, width = len(values), values.shape[1]
                notes.append(
                    f"{count:,} samples span at most {count - 1:,} of the {width:,} channels of {network}: "
                    "the Fréchet distance is far above that of many samples, and good only beside others of "
                    "the same number"
                )
    if class_sorted and any(each.metric == _IN_ORDER for each in asked):
        notes.append(
            "the samples stand class by class, which makes the splits of the Inception score one-sided: "
            "shuffle them, or ask for is_shuffled"
        )
    return notes
