"""Splits of few images: folds that hold classes evenly and near duplicates together, and gates across them."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from semwatch.line import binarization
from semwatch_training.metrics import detection_metrics
from semwatch_training.metrics.uncertainty import Rate

N_RESAMPLED = 200


def folds_of(classes: Sequence[str], groups: NDArray[np.intp], *, n_folds: int, seed: int) -> NDArray[np.intp]:
    """A fold for each sample (n,): a group's samples together, the samples of a class spread as evenly as that lets.

    Groups are dealt in a seeded order, the largest first, each to the fold with the fewest samples of its classes.
    """
    names, y = np.unique(np.asarray(classes), return_inverse=True)
    rng = np.random.default_rng(seed)
    numbers, sizes = np.unique(groups, return_counts=True)
    order = rng.permutation(len(numbers))
    order = order[np.argsort(-sizes[order], kind="stable")]
    held = np.zeros((n_folds, len(names)))
    folds = np.zeros(len(groups), np.intp)
    for number in numbers[order]:
        members = groups == number
        counts = np.bincount(y[members], minlength=len(names))
        fold = min(range(n_folds), key=lambda f: (float(held[f] @ counts), float(held[f].sum())))
        held[fold] += counts
        folds[members] = fold
    return folds


def cross_calibrated(
    raw: NDArray[np.float64],
    is_clean: NDArray[np.bool_],
    groups: NDArray[np.intp],
    *,
    false_alarm_rate: float,
    seeds: Sequence[int],
    n_folds: int = 5,
) -> NDArray[np.bool_] | None:
    """Which images a gate opens on that was calibrated on the clean images of the other folds: (seeds, n).

    None where a fold's clean images are too few for a finite conformal threshold of the rate.
    """
    opened = np.zeros((len(seeds), len(raw)), np.bool_)
    for row, seed in enumerate(seeds):
        folds = folds_of(np.where(is_clean, "clean", "defective").tolist(), groups, n_folds=n_folds, seed=seed)
        for fold in range(n_folds):
            judged = folds == fold
            threshold = binarization.conformal_threshold(raw[~judged & is_clean], false_alarm_rate=false_alarm_rate)
            if not np.isfinite(threshold):
                return None
            opened[row, judged] = raw[judged] > threshold
    return opened


def mean_rate(opened: NDArray[np.bool_]) -> Rate:
    """The share of (seeds, n) that is True. Seeds judge the same images: the interval is that of one run."""
    n_seeds, n = opened.shape
    hits = int(opened.sum())
    return replace(Rate.of(round(hits / n_seeds), n), rate=hits / (n * n_seeds))


def auroc_deviation(
    raw: NDArray[np.float64], defective: NDArray[np.bool_], groups: NDArray[np.intp], *, seed: int = 0
) -> float:
    """Standard deviation of the image AUROC over resampled groups (bootstrap); NaN where no resample has both kinds."""
    rng = np.random.default_rng(seed)
    numbers = np.unique(groups)
    members = [np.flatnonzero(groups == number) for number in numbers]
    found = []
    for _ in range(N_RESAMPLED):
        chosen = np.concatenate([members[i] for i in rng.integers(0, len(members), len(members))])
        if defective[chosen].any() and not defective[chosen].all():
            found.append(detection_metrics.image_auroc(raw[chosen], defective[chosen]))
    return float(np.std(found, ddof=1)) if len(found) > 1 else float("nan")
