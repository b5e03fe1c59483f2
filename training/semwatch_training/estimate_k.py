"""How many classes there are: every candidate k is clustered once, and rules by name read the curves.

The default rule, ``consensus``, turns the curves of six criteria into a probability of each k and answers its median,
which is what the smallest mean |k - k*| asks for. A few weights say how far a criterion is to be believed; they were
fitted on development problems (see ``k_consensus``). ``paper``, ``gcd`` and ``dtc`` are the published rules, kept to be
measured beside it.

All criteria share one projection onto principal components, and one that is whitened with the scatter within labelled
classes: known classes tell which directions are mere variation. Clusterings for k start from those for k - 1 and from
one seeding that serves every k, so that curves are smooth.

What no criterion can tell: a class that falls into sub-clusters looks like several. On Magnetic-Tile, which took no
part in development, the consensus over-estimates; see ``tests/benchmarks/bench_k.py``. Believe the interval.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from scipy.optimize import minimize_scalar
from sklearn.metrics import adjusted_rand_score

from semwatch.errors import ConfigError
from semwatch_training.class_metrics import accuracy
from semwatch_training.clustering import (
    UNLABELLED,
    Clustering,
    Floats,
    Labels,
    checked,
    clusterings,
    plain_kmeans,
    squared_distances,
)
from semwatch_training.k_consensus import CRITERIA, MASS, Curve, first_best, grown, posterior
from semwatch_training.whitening import principal_components, whitened

Rule = Literal["consensus", "max", "paper", "gcd", "dtc", "accuracy", "ari", "silhouette", "bic"]

SPAN = 15
"""Candidates reach this far above the number of labelled classes unless said otherwise."""
MAX_SAMPLES = 10_000
"""More are thinned at random, labelled and unlabelled alike; curves hardly change and time does."""
MAX_SILHOUETTE = 2000
"""Silhouettes are averaged over this many samples at most: their distances are n x n."""


@dataclass(frozen=True, slots=True, eq=False)
class KEstimate:
    """An answer and what it rests on."""

    k: int
    interval: tuple[int, int]
    """Smallest and largest k that are still believable: 90 % of development problems lay inside with ``consensus``;
    the other rules give the range of the single criteria's answers, which is honest only for well separated classes."""
    candidates: tuple[int, ...]
    curves: Mapping[str, Curve]
    """Each criterion over the candidates, larger is better; ``probability`` beside them."""
    rule: Rule


def estimate(
    features: Floats,
    labels: Labels,
    *,
    candidates: Sequence[int] | None = None,
    rule: Rule = "consensus",
    seed: int = 0,
) -> KEstimate:
    """Estimate the number of classes, known ones included.

    Without any label only silhouette and BIC speak. Where nothing is unlabelled k is the number of labelled classes.
    Identical samples are one class, or as many as are labelled.

    Args:
        features: (n, D).
        labels: (n,) class >= 0, or -1 where unlabelled.
        candidates: values of k to try; those below the labelled classes or above what the samples allow are left out.
            None: from the labelled classes to ``SPAN`` above.
        seed: of seedings and thinning.

    Raises:
        ConfigError: NaN features, shapes that differ, an unknown rule, or no candidate left.
    Source: IC-DefectNCD section 3.4.2 (rule ``paper``), GCD (``gcd``), DTC (``dtc``); the consensus is ours.
    """
    if rule not in get_args(Rule):
        raise ConfigError(f"unknown rule {rule!r}; choose one of {', '.join(get_args(Rule))}")
    features, labels = checked(features, labels)
    ks = feasible(features, labels, candidates)
    return decide(measure(features, labels, ks, seed=seed), rule)


def feasible(features: Floats, labels: Labels, candidates: Sequence[int] | None = None) -> tuple[int, ...]:
    """Candidates in ascending order that samples and labels allow.

    Raises:
        ConfigError: none is left.
    """
    n_known = len(np.unique(labels[labels >= 0]))
    first = max(n_known, 1)
    last = n_known + int(np.count_nonzero(labels < 0))
    if candidates is None:
        candidates = range(first, first + SPAN + 1)
    if len(features) and not (features != features[0]).any():
        last = first
    ks = tuple(sorted({int(k) for k in candidates if first <= k <= last}))
    if not ks:
        raise ConfigError(f"no candidate k lies between {first} labelled classes and {last}; give others")
    return ks


@dataclass(frozen=True, slots=True, eq=False)
class Measured:
    """Criteria over candidates, and the thinned principal components that the published rules cluster again."""

    candidates: tuple[int, ...]
    criteria: Mapping[str, Curve]
    components: Floats
    labels: Labels
    seed: int


def measure(features: Floats, labels: Labels, candidates: Sequence[int], *, seed: int) -> Measured:
    """Cluster for every candidate and compute all criteria. Inputs as ``checked`` and ``feasible`` leave them."""
    rng = np.random.default_rng(seed)
    if len(features) > MAX_SAMPLES:
        kept = _thinned(labels, rng)
        features, labels = features[kept], labels[kept]
    plain = principal_components(features)
    known = labels >= 0
    sampled = rng.permutation(len(labels))[:MAX_SILHOUETTE]
    criteria: dict[str, list[float]] = {name: [] for name in (*CRITERIA, ANCHORED)}
    for found in clusterings(plain, np.full(len(labels), UNLABELLED), candidates, rng):
        assigned = found.assignment[known]
        criteria["accuracy"].append(_labelled_accuracy(labels[known], assigned))
        criteria["ari"].append(float(adjusted_rand_score(labels[known], assigned)) if known.any() else 0.0)
    for prefix, space in (("", plain), ("whitened ", whitened(plain, labels))):
        distances = np.sqrt(squared_distances(space[sampled], space[sampled]))
        np.fill_diagonal(distances, 0.0)
        for found in clusterings(space, labels, candidates, rng):
            widths = silhouettes(distances, found.assignment[sampled])
            criteria[f"{prefix}bic"].append(bic(found, space.shape))
            if prefix:
                unlabelled = widths[~known[sampled]]
                criteria["unlabelled silhouette"].append(float(unlabelled.mean()) if len(unlabelled) else 0.0)
            else:
                criteria["silhouette"].append(float(widths.mean()))
                criteria[ANCHORED].append(_labelled_accuracy(labels[known], found.assignment[known]))
    curves = {name: np.array(values) for name, values in criteria.items()}
    return Measured(tuple(candidates), curves, plain, labels, seed)


def decide(measured: Measured, rule: Rule) -> KEstimate:
    """Let a rule read the curves."""
    ks = np.array(measured.candidates)
    probability = posterior(measured.criteria)
    single = {name: int(ks[first_best(measured.criteria[name])]) for name in CRITERIA}
    interval = min(single.values()), max(single.values())
    if rule == "consensus":
        middle = int(np.searchsorted(np.cumsum(probability), 0.5))
        low, high = grown(probability, middle, MASS)
        k, interval = int(ks[middle]), (int(ks[low]), int(ks[high]))
    elif rule == "max":
        k = max(single["ari"], single["silhouette"])
    elif rule == "paper":
        k = int(ks[first_best(measured.criteria[ANCHORED])])
    elif rule in single:
        k = single[rule]
    else:
        k = {"gcd": _gcd, "dtc": _dtc}[rule](measured)
    return KEstimate(k, interval, measured.candidates, {**measured.criteria, "probability": probability}, rule)


def silhouettes(distances: Floats, assignment: Labels) -> Floats:
    """Silhouette width of each sample (n,) in [-1, 1] from distances (n, n); 0 in a cluster of one or a single cluster.

    All sums of distances are one matrix product.
    """
    clusters, own = np.unique(assignment, return_inverse=True)
    if len(clusters) < 2:
        return np.zeros(len(own), np.float32)
    rows, one_hot = np.arange(len(own)), np.eye(len(clusters), dtype=np.float32)[own]
    sizes = one_hot.sum(axis=0)
    sums = distances @ one_hot
    inside = sums[rows, own] / np.maximum(sizes[own] - 1, 1)
    means = sums / sizes
    means[rows, own] = np.inf
    outside = means.min(axis=1)
    widths = (outside - inside) / np.maximum(np.maximum(inside, outside), 1e-12)
    return np.where(sizes[own] > 1, widths, 0.0).astype(np.float32)


def bic(found: Clustering, shape: tuple[int, ...]) -> float:
    """Bayesian information criterion per sample, larger is better: round Gaussians with one variance in common.

    Source: X-means (Pelleg and Moore 2000).
    """
    n, d = shape
    sizes = np.bincount(found.assignment)
    sizes = sizes[sizes > 0]
    variance = max(found.inertia / (n * d), 1e-12)
    likelihood = float((sizes * np.log(sizes / n)).sum()) - 0.5 * n * d * math.log(variance)
    return (likelihood - 0.5 * math.log(n) * len(found.centres) * (d + 1)) / n


ANCHORED = "anchored accuracy"
"""The paper's criterion as printed: of labelled samples that are pinned to their class. It is 1 for every k."""


def _last_best(curve: Curve) -> int:
    return len(curve) - 1 - first_best(curve[::-1])


def _thinned(labels: Labels, rng: np.random.Generator) -> Labels:
    """Sorted indices of ``MAX_SAMPLES`` samples; each labelled class keeps one at least."""
    order = rng.permutation(len(labels))
    _, first = np.unique(labels[order], return_index=True)
    return np.sort(np.unique(np.concatenate((order[first], order[:MAX_SAMPLES]))))


def _labelled_accuracy(truth: Labels, assignment: Labels) -> float:
    return accuracy(truth, assignment) if len(truth) else 1.0


def _gcd(measured: Measured) -> int:
    """Brent's bounded search for the accuracy of plain k-means, k cut to an integer as in GCD's code, cached."""
    known = measured.labels >= 0

    @functools.cache
    def accuracy_at(k: int) -> float:
        found = plain_kmeans(measured.components, k, seed=measured.seed)
        return _labelled_accuracy(measured.labels[known], found.assignment[known])

    low, high = measured.candidates[0], measured.candidates[-1]
    if low == high:
        return low
    found = minimize_scalar(lambda k: -accuracy_at(int(k)), bounds=(low, high), method="bounded")  # type: ignore[no-untyped-call]
    return int(found.x)


def _dtc(measured: Measured) -> int:
    """Hide two in five labelled classes; mean of what their accuracy and the silhouette of the unlabelled ask for."""
    rng = np.random.default_rng(measured.seed)
    classes = np.unique(measured.labels[measured.labels >= 0])
    hidden = np.isin(measured.labels, rng.permutation(classes)[: max(1, round(0.4 * len(classes)))])
    anchors = np.where(hidden, UNLABELLED, measured.labels)
    space, free = measured.components, anchors < 0
    sampled = np.flatnonzero(free)[:MAX_SILHOUETTE]
    distances = np.sqrt(squared_distances(space[sampled], space[sampled]))
    np.fill_diagonal(distances, 0.0)
    hit, silhouette = [], []
    for found in clusterings(space, anchors, measured.candidates, rng):
        hit.append(_labelled_accuracy(measured.labels[hidden], found.assignment[hidden]))
        silhouette.append(float(silhouettes(distances, found.assignment[sampled]).mean()))
    best = [measured.candidates[_last_best(np.array(curve))] for curve in (hit, silhouette)]
    return math.ceil(sum(best) / 2)
