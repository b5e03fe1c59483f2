"""How well defects are told apart: clusters or predicted classes against true classes.

Clusters carry no names, so figures that need names take one one-to-one match (Hungarian) over ALL samples given, as
GCD's "v2" and AnomalyNCD do; a match of its own for each part ("v1") would be optimistic. Where only some samples are
judged, ``where`` marks them: the match still sees all. Samples in clusters beyond the number of classes count as wrong.
Labels are 1-d arrays of whole numbers or words.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import linear_sum_assignment  # type: ignore[attr-defined]  # of a compiled module
from sklearn import metrics

from semwatch.errors import ConfigError
from semwatch_training.metrics.detection_metrics import image_auroc
from semwatch_training.metrics.uncertainty import Rate

UNMATCHED = -1


@dataclass(frozen=True, slots=True)
class KnownNovel:
    """Clustering accuracy of all samples, and of those of known and of novel classes apart; NaN for a part of none."""

    total: float
    known: float
    novel: float
    n_known: int
    n_novel: int


@dataclass(frozen=True, slots=True)
class KErrors:
    """Errors of an estimate of k over n problems.

    ``mean_abs`` is mean |k - k*|, ``bias`` mean k - k*, ``exact`` the share of right ones and ``coverage`` the share of
    intervals that hold k* (None without intervals).
    """

    mean_abs: float
    bias: float
    exact: Rate
    coverage: Rate | None
    n: int


def nmi(truth: ArrayLike, predicted: ArrayLike) -> float:
    """Normalised mutual information, 0 to 1, divided by the arithmetic mean of the entropies.

    One class in one cluster gives 1, one class in several or several in one 0 (scikit-learn's convention).

    Raises:
        ConfigError: empty, of unequal length, or labels that are neither whole numbers nor words.
    """
    return float(metrics.normalized_mutual_info_score(*_codes(truth, predicted)))


def ari(truth: ArrayLike, predicted: ArrayLike) -> float:
    """Rand index adjusted for chance: 1 for the same partition, about 0 for a random one, at worst -0.5.

    Raises:
        ConfigError: as `nmi`.
    """
    return float(metrics.adjusted_rand_score(*_codes(truth, predicted)))


def match(truth: ArrayLike, predicted: ArrayLike) -> dict[Any, Any]:
    """Match clusters to classes one to one so that most samples agree: {cluster: class}.

    Clusters beyond the number of classes are absent. Of equally good matches one is taken, always the same.

    Raises:
        ConfigError: as `nmi`.
    """
    true_codes, cluster_codes = _codes(truth, predicted)
    classes, clusters = np.unique(np.asarray(truth)), np.unique(np.asarray(predicted))
    found = _match_codes(true_codes, cluster_codes)
    return {clusters[i].item(): classes[c].item() for i, c in enumerate(found) if c != UNMATCHED}


def accuracy(truth: ArrayLike, predicted: ArrayLike, *, where: NDArray[np.bool_] | None = None) -> float:
    """Clustering accuracy: share of samples whose cluster is matched to their class; judged ``where`` True.

    This is also what AnomalyNCD prints as "F1" (micro-F1), with ``where`` marking the samples of novel classes.

    Raises:
        ConfigError: as `nmi`, or ``where`` is of another length or marks nothing.
    """
    true_codes, named = _named(truth, predicted)
    chosen = _chosen(where, len(named))
    return float((true_codes == named)[chosen].mean())


def macro_f1(truth: ArrayLike, predicted: ArrayLike, *, where: NDArray[np.bool_] | None = None) -> float:
    """Mean over true classes of the F1 after matching: a rare class counts as much as a frequent one.

    A class that no cluster was matched to counts 0. With ``where``, classes and samples are those marked.

    Raises:
        ConfigError: as `accuracy`.
    """
    true_codes, named = _named(truth, predicted)
    chosen = _chosen(where, len(named))
    true_codes, named = true_codes[chosen], named[chosen]
    classes = np.unique(true_codes)
    return float(metrics.f1_score(true_codes, named, labels=classes, average="macro", zero_division=0.0))


def known_novel(truth: ArrayLike, predicted: ArrayLike, known_classes: Collection[Any]) -> KnownNovel:
    """Split clustering accuracy by known and novel classes, with one match over all samples (GCD's "v2").

    Raises:
        ConfigError: as `nmi`.
    Source: Vaze et al., CVPR 2022, section 5.1, and the authors' code.
    """
    true_codes, named = _named(truth, predicted)
    right = true_codes == named
    known = np.array([label in known_classes for label in np.asarray(truth).tolist()])
    return KnownNovel(_mean(right), _mean(right[known]), _mean(right[~known]), int(known.sum()), int((~known).sum()))


def k_errors(estimated: ArrayLike, true: ArrayLike, intervals: ArrayLike | None = None) -> KErrors:
    """Judge estimates of k over many problems.

    Args:
        estimated: (n,) estimates.
        true: (n,) true numbers of classes.
        intervals: (n, 2) lowest and highest k, both inclusive.

    Raises:
        ConfigError: empty, or of unequal length.
    """
    found, wanted = np.asarray(estimated), np.asarray(true)
    if found.ndim != 1 or found.shape != wanted.shape or not found.size:
        raise ConfigError(f"need one estimate and one true k per problem, not {found.shape} and {wanted.shape}")
    error = found.astype(np.int64) - wanted.astype(np.int64)
    exact = Rate.of(int((error == 0).sum()), len(error))
    coverage = None
    if intervals is not None:
        bounds = np.asarray(intervals)
        if bounds.shape != (len(error), 2):
            raise ConfigError(f"need an interval (low, high) per problem, not {bounds.shape} for {len(error)}")
        coverage = Rate.of(int(((bounds[:, 0] <= wanted) & (wanted <= bounds[:, 1])).sum()), len(error))
    return KErrors(float(abs(error).mean()), float(error.mean()), exact, coverage, len(error))


def unknown_auroc(known_scores: NDArray[np.floating], unknown_scores: NDArray[np.floating]) -> float:
    """AUROC of unknown against known defects; a score is higher the less a defect looks like a known class.

    Raises:
        ConfigError: one side is empty, or a score is not finite.
    """
    is_unknown = np.repeat([False, True], [len(known_scores), len(unknown_scores)])
    return image_auroc(np.concatenate([known_scores, unknown_scores]), is_unknown)


def _named(truth: ArrayLike, predicted: ArrayLike) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """True codes, and the code of the class that each sample's cluster is matched to."""
    true_codes, cluster_codes = _codes(truth, predicted)
    return true_codes, _match_codes(true_codes, cluster_codes)[cluster_codes]


def _match_codes(true_codes: NDArray[np.intp], cluster_codes: NDArray[np.intp]) -> NDArray[np.intp]:
    """Class code of each cluster code, or UNMATCHED."""
    counts = np.zeros((cluster_codes.max() + 1, true_codes.max() + 1), np.int64)
    np.add.at(counts, (cluster_codes, true_codes), 1)
    rows, columns = linear_sum_assignment(counts, maximize=True)
    found = np.full(len(counts), UNMATCHED, np.intp)
    found[rows] = columns
    return found


def _codes(truth: ArrayLike, predicted: ArrayLike) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Labels as 0, 1, ... in sorted order, checked."""
    labels, clusters = np.asarray(truth), np.asarray(predicted)
    if labels.ndim != 1 or labels.shape != clusters.shape or not labels.size:
        raise ConfigError(f"need one true and one predicted label per sample, not {labels.shape} and {clusters.shape}")
    for name, values in (("true", labels), ("predicted", clusters)):
        if values.dtype.kind not in "biuU":
            raise ConfigError(f"{name} labels are whole numbers or words, none missing, not {values.dtype}")
    return np.unique(labels, return_inverse=True)[1], np.unique(clusters, return_inverse=True)[1]


def _mean(flags: NDArray[np.bool_]) -> float:
    return float(flags.mean()) if flags.size else math.nan


def _chosen(where: NDArray[np.bool_] | None, n: int) -> NDArray[np.bool_]:
    if where is None:
        return np.ones(n, bool)
    if where.shape != (n,) or where.dtype != bool or not where.any():
        raise ConfigError(f"`where` marks at least one of {n} samples by True, not {where.dtype} {where.shape}")
    return where
