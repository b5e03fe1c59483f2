"""Semi-supervised k-means: labelled samples stay with their class, the rest finds its place.

The parent code leaves empty clusters as NaN, is unseeded and builds N x K x D differences. Here distances are one
matrix product, an empty cluster moves to the sample that is served worst, and equal seeds give equal results.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.cluster import KMeans

from semwatch.errors import ConfigError

UNLABELLED = -1

Floats = NDArray[np.float32]
Labels = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Clustering:
    """Which cluster each sample is in. Labelled classes come first, in ascending order of their label."""

    assignment: Labels
    """(n,) in [0, k)."""
    centres: Floats
    """(k, D), always finite."""
    inertia: float
    """Sum of squared distances of all samples to their centre."""


def semi_supervised_kmeans(
    features: Floats, labels: Labels, k: int, *, seed: int, n_init: int = 4, max_iter: int = 100, tol: float = 1e-4
) -> Clustering:
    """Cluster with every labelled sample pinned to its class's cluster; centres are free to move.

    Centres start at the class means, the others by k-means++ among the unlabelled samples alone. The best of ``n_init``
    starts is kept. Without any label this is plain k-means. With more clusters than distinct samples some stay empty.

    Args:
        features: (n, D).
        labels: (n,) class >= 0, or -1 where unlabelled. Values need not be consecutive.
        k: at least the number of labelled classes.
        seed: of the k-means++ draws.
        tol: stop when the centres' squared movement is below this share of the features' variance.

    Raises:
        ConfigError: features hold NaN, shapes differ, k is below the number of labelled classes, or there are fewer
            unlabelled samples than clusters beside the labelled ones.
    Source: GCD (Vaze et al. 2022), section 3.2; re-seeding of empty clusters is ours.
    """
    features, labels = checked(features, labels)
    n_known = len(np.unique(labels[labels >= 0]))
    n_free = int(np.count_nonzero(labels < 0))
    if k < max(n_known, 1):
        raise ConfigError(f"k = {k} is below the {n_known} labelled classes; raise k or drop labels")
    if k - n_known > n_free:
        raise ConfigError(f"k = {k} asks for {k - n_known} new clusters of {n_free} unlabelled samples; lower k")
    rng = np.random.default_rng(seed)
    starts = (seed_centres(features, labels, k, rng) for _ in range(n_init if k > n_known else 1))
    runs = [refine(features, labels, start, max_iter=max_iter, tol=tol) for start in starts]
    return min(runs, key=lambda run: run.inertia)


def plain_kmeans(features: Floats, k: int, *, seed: int, n_init: int = 10) -> Clustering:
    """Cluster with scikit-learn's k-means: the baseline that looks at no label.

    Raises:
        ConfigError: features hold NaN, or there are fewer samples than k.
    """
    features, _ = checked(features, np.full(len(features), UNLABELLED))
    if not 1 <= k <= len(features):
        raise ConfigError(f"k = {k} must be from 1 to the {len(features)} samples")
    found = KMeans(k, n_init=n_init, random_state=seed).fit(features)
    return Clustering(found.labels_.astype(np.int64), found.cluster_centers_, float(found.inertia_))


def squared_distances(features: Floats, centres: Floats) -> Floats:
    """(n, k), never negative, by one matrix product."""
    # Half norms of the features are left to the end: they do not change which centre is nearest.
    cross = features @ (-2.0 * centres).T
    cross += np.einsum("kd,kd->k", centres, centres)
    cross += np.einsum("nd,nd->n", features, features)[:, None]
    return np.asarray(np.maximum(cross, 0.0, out=cross), np.float32)


def seed_centres(features: Floats, labels: Labels, k: int, rng: np.random.Generator) -> Floats:
    """Class means first, then k-means++ among unlabelled samples, greedy over 2 + log k draws: (k, D).

    The first j centres are a seeding for j clusters, so one call serves every smaller k.
    """
    centres = class_means(features, labels)
    free = features[labels < 0]
    if len(centres) == 0:
        centres = free[[rng.integers(len(free))]]
    nearest = squared_distances(free, centres).min(axis=1) if len(free) else np.zeros(0, np.float32)
    n_draws = 2 + int(math.log(k))
    chosen = list(centres)
    while len(chosen) < k:
        draws = _draw(nearest, n_draws, rng)
        candidates = np.minimum(squared_distances(free, free[draws]), nearest[:, None])
        best = int(candidates.sum(axis=0).argmin())
        nearest = candidates[:, best]
        chosen.append(free[draws[best]])
    return np.stack(chosen)[:k]


def refine(features: Floats, labels: Labels, centres: Floats, *, max_iter: int = 100, tol: float = 1e-4) -> Clustering:
    """Run Lloyd's steps from the given centres (k, D), labelled classes' centres first, until they rest."""
    k = len(centres)
    free = labels < 0
    unlabelled = features[free]
    norms = np.einsum("nd,nd->n", unlabelled, unlabelled)
    classes = np.unique(labels[~free])
    pinned = np.searchsorted(classes, labels[~free])
    pinned_sums, pinned_counts = _sums(features[~free], pinned, k)
    enough = tol * float(features.var(axis=0).sum()) if len(features) else 0.0
    for _ in range(max_iter):
        nearest, distance = _nearest(unlabelled, norms, centres)
        nearest = _reseeded(nearest, distance, k, empty=pinned_counts == 0)
        sums, counts = _sums(unlabelled, nearest, k)
        counts += pinned_counts
        moved = np.where(counts[:, None] > 0, (sums + pinned_sums) / np.maximum(counts, 1)[:, None], centres)
        shift = float(np.square(moved - centres).sum())
        centres = moved.astype(np.float32)
        if shift <= enough:
            break
    nearest, distance = _nearest(unlabelled, norms, centres)
    assignment = np.empty(len(features), np.int64)
    assignment[free], assignment[~free] = nearest, pinned
    own = np.square(features[~free] - centres[pinned]).sum()
    return Clustering(assignment, centres, float(distance.sum() + own))


def clusterings(
    features: Floats, labels: Labels, candidates: Sequence[int], rng: np.random.Generator, *, n_starts: int = 3
) -> list[Clustering]:
    """The best anchored clustering for each ascending candidate.

    Up the candidates each starts from shared seedings and from the last result with one centre more; down again from
    the next result with two clusters merged. Local optima, not the data, make most of the noise in such curves.
    """
    n_known = len(np.unique(labels[labels >= 0]))
    seedings = [seed_centres(features, labels, candidates[-1], rng) for _ in range(n_starts)]

    def best(starts: Sequence[Floats], runs: Sequence[Clustering] = ()) -> Clustering:
        refined = (refine(features, labels, start, max_iter=50) for start in starts)
        return min((*runs, *refined), key=lambda run: run.inertia)

    found: list[Clustering] = []
    for k in candidates:
        starts = [centres[:k] for centres in seedings]
        if found and k == len(found[-1].centres) + 1:
            starts += [_one_more(features, labels, found[-1].centres, rng) for _ in range(2)]
        found.append(best(starts))
    for i in range(len(found) - 2, -1, -1):
        if candidates[i] + 1 == candidates[i + 1]:
            found[i] = best([_one_fewer(found[i + 1], n_known)], [found[i]])
    return found


def class_means(features: Floats, labels: Labels) -> Floats:
    """(classes, D), in ascending order of label; no rows where nothing is labelled."""
    classes = np.unique(labels[labels >= 0])
    sums, counts = _sums(features[labels >= 0], np.searchsorted(classes, labels[labels >= 0]), len(classes))
    return np.asarray(sums / np.maximum(counts, 1)[:, None], np.float32)


def checked(features: Floats, labels: Labels) -> tuple[Floats, Labels]:
    """Features as C-ordered float32 and labels as int64.

    Raises:
        ConfigError: they are empty, of the wrong shape or not finite.
    """
    features = np.ascontiguousarray(features, np.float32)
    labels = np.asarray(labels, np.int64)
    if features.ndim != 2 or len(features) == 0:
        raise ConfigError(f"features must be a non-empty (n, D) array, not of shape {features.shape}")
    if labels.shape != features.shape[:1]:
        raise ConfigError(f"labels have shape {labels.shape}, expected {features.shape[:1]}: one for each sample")
    bad = np.flatnonzero(~np.isfinite(features).all(axis=1))
    if len(bad):
        raise ConfigError(f"features of {len(bad)} samples are NaN or infinite, first at row {bad[0]}; drop these rows")
    return features, labels


def _one_more(features: Floats, labels: Labels, centres: Floats, rng: np.random.Generator) -> Floats:
    """Centres and the unlabelled sample, of a few drawn by distance, that lowers inertia most: (k + 1, D)."""
    free = features[labels < 0]
    nearest = squared_distances(free, centres).min(axis=1)
    draws = _draw(nearest, 8, rng)
    gains = np.maximum(nearest[:, None] - squared_distances(free, free[draws]), 0.0).sum(axis=0)
    return np.concatenate((centres, free[draws[[gains.argmax()]]]))


def _one_fewer(found: Clustering, n_known: int) -> Floats:
    """Centres after the merge of a new cluster into another that raises inertia least (Ward): (k - 1, D)."""
    sizes = np.maximum(np.bincount(found.assignment, minlength=len(found.centres)), 1)
    cost = squared_distances(found.centres, found.centres) / (1 / sizes[:, None] + 1 / sizes)
    cost[:, :n_known] = np.inf
    np.fill_diagonal(cost, np.inf)
    kept, merged = np.unravel_index(int(cost.argmin()), cost.shape)
    centres = found.centres.copy()
    centres[kept] = np.average(centres[[kept, merged]], axis=0, weights=sizes[[kept, merged]])
    return np.delete(centres, merged, axis=0)


def _nearest(features: Floats, norms: Floats, centres: Floats) -> tuple[Labels, Floats]:
    half = features @ centres.T
    half -= 0.5 * np.einsum("kd,kd->k", centres, centres)
    nearest = half.argmax(axis=1)
    distance = norms - 2.0 * half[np.arange(len(half)), nearest]
    return nearest, np.maximum(distance, 0.0)


def _reseeded(nearest: Labels, distance: Floats, k: int, *, empty: NDArray[np.bool_]) -> Labels:
    """Give each cluster without a member the sample farthest from its centre; identical samples are left alone."""
    empty = empty & (np.bincount(nearest, minlength=k) == 0)
    missing = np.flatnonzero(empty)
    if len(missing):
        farthest = np.argsort(-distance, kind="stable")[: len(missing)]
        worth = distance[farthest] > 0
        nearest[farthest[worth]] = missing[worth]
    return nearest


def _sums(features: Floats, clusters: Labels, k: int) -> tuple[Floats, Labels]:
    """Sum (k, D) and number (k,) of samples in each cluster; the one-hot product is faster than add.at."""
    one_hot = np.zeros((len(features), k), np.float32)
    one_hot[np.arange(len(features)), clusters] = 1.0
    return one_hot.T @ features, np.bincount(clusters, minlength=k)


def _draw(weights: Floats, n: int, rng: np.random.Generator) -> Labels:
    """Indices drawn by weight; by index alone where all weights are zero (identical samples)."""
    total = np.cumsum(weights, dtype=np.float64)
    if total[-1] <= 0:
        return np.asarray(rng.integers(len(weights), size=n))
    # The last index is the guard against a draw that rounding puts behind the sum.
    drawn = np.searchsorted(total, rng.random(n) * total[-1], side="right")
    return np.asarray(np.minimum(drawn, len(weights) - 1), np.int64)
