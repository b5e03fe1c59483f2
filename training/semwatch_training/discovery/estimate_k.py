"""How many classes there are: every candidate k is clustered once, and rules by name read the curves.

The default rule, ``consensus``, turns the curves of ten criteria into a probability of each k and answers its median,
which is what the smallest mean |k - k*| asks for. A few weights say how far a criterion is to be believed; they were
fitted on development problems (see ``k_consensus``). ``paper``, ``gcd`` and ``dtc`` are the published rules, kept to be
measured beside it.

Criteria read three spaces: principal components, the same whitened by the scatter within labelled classes, and the
metric of discovery heads, whitened before it is cut short. Known classes tell which directions are mere variation.
Clusterings for k start from those for k - 1 and from one seeding that serves every k, so that curves are smooth.

What no criterion can tell: a class that falls into sub-clusters looks like several. On Magnetic-Tile, which took no
part in fitting, the consensus over-estimates by 4, and its interval misses more than it promises; see
``tests/benchmarks/bench_k.py``.
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
from semwatch_training.discovery.clustering import (
    UNLABELLED,
    Clustering,
    Floats,
    Labels,
    checked,
    clusterings,
    plain_kmeans,
    squared_distances,
)
from semwatch_training.discovery.k_consensus import CRITERIA, MASS, Curve, first_best, grown, posterior
from semwatch_training.discovery.whitening import principal_components, whitened, within_class_metric
from semwatch_training.metrics.class_metrics import accuracy

Rule = Literal["consensus", "max", "paper", "gcd", "dtc", "accuracy", "ari", "silhouette", "bic"]

SPAN = 15
"""Candidates reach this far above the number of labelled classes unless said otherwise."""
MAX_SAMPLES = 10_000
"""More are thinned at random, labelled and unlabelled alike; curves hardly change and time does."""
MAX_SILHOUETTE = 2000
"""Silhouettes are averaged over this many samples at most: their distances are n x n."""
METRIC_WHITENED, METRIC_COMPONENTS = 256, 64
"""Of the space that discovery heads read by default; the consensus was fitted with these."""
CAUTIOUS_AXES = 16
"""Axes that ``bic`` is told of in whitened spaces. With all of them it takes every lump of a real class for a class:
images vary along few directions at once, so that axes are not independent witnesses."""


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

    Without any label only silhouettes and BIC speak. Where nothing is unlabelled k is the number of labelled classes.
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
    spaces = {
        "": plain,
        "whitened ": unit_length(whitened(plain, labels)),
        "metric ": unit_length(_metric(features, labels)),
    }
    sampled = rng.permutation(len(labels))[:MAX_SILHOUETTE]
    curves: dict[str, Curve] = {}
    for prefix in ("", "metric "):
        found = _agreement(spaces[prefix], labels, candidates, rng)
        curves |= {prefix + name: curve for name, curve in found.items()}
    for prefix, space in spaces.items():
        found = _separation(space, labels, candidates, sampled, rng)
        curves |= {prefix + name: curve for name, curve in found.items()}
    read = {name: curves[name] for name in (*CRITERIA, ANCHORED)}
    return Measured(tuple(candidates), read, plain, labels, seed)


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


def unit_length(features: Floats) -> Floats:
    """Scale rows (n, d) to unit length; a row of zeros stays."""
    lengths = np.linalg.norm(features, axis=1, keepdims=True)
    return np.asarray(features / np.where(lengths > 0, lengths, 1.0), np.float32)


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


def _metric(features: Floats, labels: Labels) -> Floats:
    """What discovery heads read, but for its length: (n, at most ``METRIC_COMPONENTS``)."""
    classes = np.unique(labels[labels >= 0])
    consecutive = np.where(labels >= 0, np.searchsorted(classes, labels), UNLABELLED)
    mean, directions = within_class_metric(
        features[None], consecutive, METRIC_COMPONENTS, whitened_components=METRIC_WHITENED
    )
    return np.asarray((features - mean) @ directions, np.float32)


def _agreement(space: Floats, labels: Labels, candidates: Sequence[int], rng: np.random.Generator) -> dict[str, Curve]:
    """How well clusterings that saw no label agree with the labels."""
    known = labels >= 0
    found = clusterings(space, np.full(len(labels), UNLABELLED), candidates, rng)
    pairs = [(labels[known], one.assignment[known]) for one in found]
    return {
        "accuracy": np.array([_labelled_accuracy(*pair) for pair in pairs]),
        "ari": np.array([adjusted_rand_score(*pair) if known.any() else 0.0 for pair in pairs]),
    }


def _separation(
    space: Floats, labels: Labels, candidates: Sequence[int], sampled: Labels, rng: np.random.Generator
) -> dict[str, Curve]:
    """How compact and distinct the clusters of anchored clusterings are; silhouettes of the sampled alone."""
    known = labels >= 0
    distances = np.sqrt(squared_distances(space[sampled], space[sampled]))
    np.fill_diagonal(distances, 0.0)
    found = clusterings(space, labels, candidates, rng)
    return {
        "silhouette": np.array([float(silhouettes(distances, one.assignment[sampled]).mean()) for one in found]),
        "bic": np.array([bic(one, space.shape) for one in found]),
        "cautious bic": np.array([bic(one, (len(space), CAUTIOUS_AXES)) for one in found]),
        ANCHORED: np.array([_labelled_accuracy(labels[known], one.assignment[known]) for one in found]),
    }


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
