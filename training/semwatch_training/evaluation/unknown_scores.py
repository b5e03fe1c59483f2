"""Scores that tell strangers from known defects, beside the p-value that the product uses.

All grow with strangeness; each is of crops (m, D) by crops (n, D) of known classes. Sources: Mahalanobis distance (Lee
et al. 2018), relative to the distance from all classes together (Ren et al. 2021); nearest neighbours at unit length
(Sun et al. 2022); the head's own doubt (Hendrycks and Gimpel 2017).
"""

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import softmax

from semwatch_training.discovery.clustering import class_means
from semwatch_training.discovery.head import Head

SHRINKAGE = 0.3
"""Of covariances towards a multiple of the identity; of .1 and .3 the better on synthetic and printed lines."""
MOST_DIRECTIONS = 400
OURS, DOUBT, OF_FAVOURITE = "p-value (ours)", "head's doubt", "p-value of the favourite"
TOGETHER = {
    "p-value and doubt": (OURS, DOUBT),
    "p-value and relative Mahalanobis": (OURS, "relative Mahalanobis"),
    "p-value and neighbours": (OURS, "nearest neighbour"),
    "all four": (OURS, DOUBT, "relative Mahalanobis", "nearest neighbour"),
}
"""Scores that are joined by the mean of their ranks among known crops."""

Values = NDArray[np.float64]


def scores(
    head: Head, learnt: NDArray[np.float32], labels: NDArray[np.intp], judged: NDArray[np.float32]
) -> Mapping[str, Values]:
    """Every score alone, (m,) each.

    Args:
        head: fitted on the learnt crops.
        learnt: (n, D).
        labels: (n,) their classes, 0..C-1.
        judged: (m, D).
    """
    with torch.no_grad():
        logits, p_values = (values.numpy() for values in head(torch.from_numpy(judged)))
    known, others = learnt[:, : head.frozen_width], judged[:, : head.frozen_width]
    to_class, to_all = _mahalanobis(known, labels, others)
    return {
        OURS: 1 - p_values.max(axis=1).astype(np.float64),
        OF_FAVOURITE: 1 - p_values[np.arange(len(logits)), logits.argmax(axis=1)].astype(np.float64),
        DOUBT: 1 - softmax(logits.astype(np.float64), axis=1).max(axis=1),
        "Mahalanobis": to_class,
        "relative Mahalanobis": to_class - to_all,
        "nearest neighbour": _to_nearest(known, others),
    }


def together(alone: Mapping[str, Values], is_known: NDArray[np.bool_]) -> dict[str, Values]:
    """Joined scores (m,): the mean of ranks among known crops.

    Args:
        alone: by name.
        is_known: (m,) which crops are of known classes.
    """
    ranks = {name: np.searchsorted(np.sort(of[is_known]), of) / is_known.sum() for name, of in alone.items()}
    return {name: np.mean([ranks[part] for part in parts], axis=0) for name, parts in TOGETHER.items()}


def recognised(known: Values, strange: Values, false_unknown: float) -> float:
    """Share of strangers above the score that ``false_unknown`` of known crops exceed.

    >>> recognised(np.arange(20.0), np.array([17.5, 18.5, 30.0]), 0.05)
    0.6666666666666666
    """
    return float((strange > np.quantile(known, 1 - false_unknown, method="lower")).mean())


def _mahalanobis(
    learnt: NDArray[np.float32], labels: NDArray[np.intp], judged: NDArray[np.float32]
) -> tuple[Values, Values]:
    """Squared distance to the nearest class, and to all of them as one, (m,) each, in the leading directions."""
    mean = learnt.mean(axis=0)
    _, _, axes = np.linalg.svd(learnt - mean, full_matrices=False)
    directions = axes[: min(MOST_DIRECTIONS, len(learnt) - 1)].T
    known, others = (((rows - mean) @ directions).astype(np.float64) for rows in (learnt, judged))
    means = class_means(known.astype(np.float32), labels).astype(np.float64)
    within = _precision(known - means[labels])
    between = _precision(known)
    to_class = np.stack([_squared(others - one, within) for one in means]).min(axis=0)
    return to_class, _squared(others, between)


def _precision(deviations: Values) -> Values:
    covariance = deviations.T @ deviations / len(deviations)
    width = len(covariance)
    shrunken = (1 - SHRINKAGE) * covariance + (SHRINKAGE * np.trace(covariance) / width + 1e-12) * np.eye(width)
    return np.asarray(np.linalg.inv(shrunken), np.float64)


def _squared(deviations: Values, precision: Values) -> Values:
    return np.asarray(((deviations @ precision) * deviations).sum(axis=1), np.float64)


def _to_nearest(learnt: NDArray[np.float32], judged: NDArray[np.float32]) -> Values:
    """One minus the cosine to the nearest learnt crop, features standardised."""
    mean, std = learnt.mean(axis=0), learnt.std(axis=0) + 1e-3
    own, others = ((rows - mean) / std for rows in (learnt, judged))
    own, others = (rows / np.linalg.norm(rows, axis=1, keepdims=True).clip(1e-9) for rows in (own, others))
    return np.asarray(1 - (others @ own.T).max(axis=1), np.float64)
