"""Fit a head on cached features: logits by regression, p-values by a metric and a calibration that never saw the image.

Source: cross-conformal prediction (Vovk 2015); within-class whitening (Mahalanobis++, arXiv 2505.18032).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import linalg
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits
from torch import Tensor

from semwatch.errors import ConfigError
from semwatch_training.discovery.head import Classifier, Head, class_scores, project, ranges_of

MIN_PER_CLASS = 5
"""With fewer, a fold's metric knows too little of the class to judge its held-out samples."""
MIN_IN_ALL = 40
"""The smallest p-value lies between 1 / (n + 1) and 2 / (n + 1): this many let it fall under 0.05."""
PRINCIPAL_SAMPLES = 2000
"""At most so many give the principal directions: what 10,000 would add is not worth their minute."""


FitClassifier = Callable[[NDArray[np.float32], NDArray[np.intp], int, NDArray[np.float64] | None], Classifier]
"""Features (n, D), class numbers (n,), how many classes, weights (n,) or none."""


@dataclass(frozen=True, slots=True)
class HeadFit:
    """How a head is fitted."""

    frozen_width: int
    """Leading features that the p-values may read."""
    components: int = 500
    """Principal directions kept before whitening, where there are that many samples."""
    shrinkage: float = 0.2
    """Of the within-class covariance towards a multiple of the identity."""
    directions: int = 16
    """Whitened directions kept, those along which classes differ most first; at least one per class."""
    neighbours: int = 3
    """Nearest samples of a class whose mean dissimilarity is a defect's score under it."""
    max_stored: int = 5000
    """Samples a head carries; above, the largest classes are thinned."""
    folds: int = 10
    """Of the cross-conformal calibration; every sample calibrates, judged by a metric fitted without its fold. The
    head's own metric knows more samples than a fold's, so fewer folds make the rule shyer than it says."""
    regularisation: float = 0.1
    """Inverse strength C of the logistic regression on standardised features."""
    seed: int = 0


def fit_head(
    features: NDArray[np.float32],
    labels: Sequence[str],
    fit: HeadFit,
    *,
    images: Sequence[int] | None = None,
    weights: NDArray[np.float64] | None = None,
    classify: FitClassifier | None = None,
) -> Head:
    """Fit a head on cached features.

    Logits: multinomial logistic regression on standardised features, or another family's. P-values: the samples
    themselves in a space whitened within classes, with cross-conformal calibration.

    Args:
        features: (n, D).
        labels: n class names.
        fit: how.
        images: n image numbers; crops of one image never judge each other in the calibration. None: all differ.
        weights: (n,) how much each crop counts in the logits, over 0; None: all count alike.
        classify: what fits the logits of another family; None: the regression.

    Raises:
        ConfigError: features that are not finite or not n rows, fewer than two classes, too few samples of a class or
            in all.
    """
    names = sorted(set(labels))
    y = np.array([names.index(label) for label in labels], np.intp)
    groups = np.arange(len(y)) if images is None else np.asarray(images)
    _check(features, names, y, groups)
    if len(np.unique(groups)) == 1:
        raise ConfigError("all crops come from one image; calibration needs crops of several, ten or more at best")
    # On matrices of this size a second thread of the linear algebra mostly waits, and spins while it does: beside any
    # other work on the machine a fit took nine times the processor time.
    with threadpool_limits(limits=1, user_api="blas"):
        state = _fit_p_values(features[:, : fit.frozen_width], y, groups, fit)
        classifier = None if classify is None else classify(features, y, len(names), weights)
        if classifier is None:
            state = _fit_logits(features, y, fit, weights) | state
    return Head(state, names, fit.frozen_width, fit.neighbours, classifier)


def _check(features: NDArray[np.float32], names: list[str], y: NDArray[np.intp], groups: NDArray[np.intp]) -> None:
    if features.ndim != 2 or not len(features) == len(y) == len(groups):
        raise ConfigError(
            f"a head needs one row of features, one label and one image number per crop; got features of shape "
            f"{features.shape}, {len(y)} labels, {len(groups)} image numbers"
        )
    if (n_bad := int(np.count_nonzero(~np.isfinite(features).all(axis=1)))) > 0:
        raise ConfigError(f"{n_bad} of {len(y)} rows of features hold NaN or infinity; encode those crops again")
    counts = np.bincount(y, minlength=len(names))
    if len(names) < 2 or counts.min() < MIN_PER_CLASS or len(y) < MIN_IN_ALL:
        rare = {name: int(n) for name, n in zip(names, counts, strict=True) if n < MIN_PER_CLASS}
        raise ConfigError(
            f"a head needs two classes or more, each with at least {MIN_PER_CLASS} samples, and {MIN_IN_ALL} in all; "
            f"got {len(y)} samples of {len(names)} classes, too few of {rare}"
        )


def _fit_logits(
    features: NDArray[np.float32], y: NDArray[np.intp], fit: HeadFit, weights: NDArray[np.float64] | None
) -> dict[str, Tensor]:
    mean, std = features.mean(axis=0), features.std(axis=0) + 1e-3
    regression = LogisticRegression(
        C=fit.regularisation, max_iter=2000, class_weight="balanced", random_state=fit.seed
    ).fit((features - mean) / std, y, sample_weight=weights)
    weight, bias = regression.coef_, regression.intercept_
    if len(weight) == 1:  # two classes: scikit-learn gives one row
        weight, bias = np.vstack((-weight, weight)) / 2, np.array((-bias[0], bias[0])) / 2
    return {
        "feature_mean": _tensor(mean),
        "feature_std": _tensor(std),
        "weight": _tensor(weight),
        "bias": _tensor(bias),
    }


def _fit_p_values(
    frozen: NDArray[np.float32], y: NDArray[np.intp], groups: NDArray[np.intp], fit: HeadFit
) -> dict[str, Tensor]:
    """Metric and samples from all crops; each crop's calibration score from a metric that never saw its image."""
    calibration = np.empty(len(y), np.float32)
    fold_of = _folds(y, groups, fit)
    for fold in np.unique(fold_of):
        held_out = fold_of == fold
        metric = _fit_metric(frozen[~held_out], y[~held_out], fit)
        calibration[held_out] = _nearest_score(frozen[held_out], metric, fit)
    state = {"calibration": _tensor(np.sort(calibration))}
    return state | _fit_metric(frozen, y, fit)


def _nearest_score(frozen: NDArray[np.float32], metric: dict[str, Tensor], fit: HeadFit) -> NDArray[np.float32]:
    ranges = ranges_of(metric["n_stored"])
    scores = class_scores(project(torch.from_numpy(frozen), metric), metric["stored"], ranges, fit.neighbours)
    return scores.amin(dim=-1).numpy()


def _folds(y: NDArray[np.intp], groups: NDArray[np.intp], fit: HeadFit) -> NDArray[np.intp]:
    """A fold for each crop: an image's crops together, the images that hold a class first spread evenly."""
    rng = np.random.default_rng(fit.seed)
    images, first, image_of = np.unique(groups, return_index=True, return_inverse=True)
    order = rng.permutation(len(images))
    order = order[np.argsort(y[first][order], kind="stable")]
    fold_of = np.empty(len(images), np.intp)
    fold_of[order] = np.arange(len(images)) % fit.folds
    return fold_of[image_of]


def _fit_metric(frozen: NDArray[np.float32], y: NDArray[np.intp], fit: HeadFit) -> dict[str, Tensor]:
    """Within-class whitening of the leading principal directions, and the samples in it, class by class."""
    samples = frozen.astype(np.float64)
    classes, y = np.unique(y, return_inverse=True)
    mean = samples.mean(axis=0)
    some = _thinned(y, PRINCIPAL_SAMPLES, fit.seed)
    directions = _leading(samples[some] - mean, max(1, min(fit.components, len(some) - len(classes))))
    projected = (samples - mean) @ directions
    weight = 1 / np.bincount(y)[y]  # every class counts alike, however many samples it has
    whiten = _inverse_root(_moment(projected - _class_means(projected, y)[y], weight), fit.shrinkage)
    whitened = projected @ whiten
    centre = _class_means(whitened, y).mean(axis=0)
    _, axes = np.linalg.eigh(_moment(whitened - centre, weight))
    kept = axes[:, ::-1][:, : max(fit.directions, len(classes))]
    stored = _thinned(y, fit.max_stored, fit.seed)
    return {
        "frozen_mean": _tensor(mean),
        "projection": _tensor(directions @ whiten @ kept),
        "centre": _tensor(centre @ kept),  # between the classes: directions are told apart as seen from there
        "stored": _tensor((whitened[stored] - centre) @ kept),
        "n_stored": _tensor(np.bincount(y[stored])),
    }


def _leading(centred: NDArray[np.float64], n: int) -> NDArray[np.float64]:
    """Return the n leading principal directions of centred rows (m, F): (F, n), by way of the smaller product."""
    m, width = centred.shape
    if width <= m:
        return _last_vectors(centred.T @ centred, n)
    directions: NDArray[np.float64] = np.linalg.qr(centred.T @ _last_vectors(centred @ centred.T, n))[0]
    return directions


def _last_vectors(symmetric: NDArray[np.float64], n: int) -> NDArray[np.float64]:
    """Eigenvectors (N, n) of the n largest eigenvalues of (N, N), the largest first."""
    vectors: NDArray[np.float64] = linalg.eigh(symmetric, driver="evd")[1]
    return vectors[:, ::-1][:, :n]


def _class_means(rows: NDArray[np.float64], y: NDArray[np.intp]) -> NDArray[np.float64]:
    return np.array([rows[y == k].mean(axis=0) for k in range(y.max() + 1)])


def _moment(rows: NDArray[np.float64], weight: NDArray[np.float64]) -> NDArray[np.float64]:
    moment: NDArray[np.float64] = (rows * weight[:, None]).T @ rows / weight.sum()
    return moment


def _inverse_root(covariance: NDArray[np.float64], shrinkage: float) -> NDArray[np.float64]:
    """W with W W^T the inverse of the shrunken covariance; the floor serves samples that are all the same."""
    width = len(covariance)
    floor = shrinkage * np.trace(covariance) / width + 1e-9
    return np.linalg.cholesky(np.linalg.inv((1 - shrinkage) * covariance + floor * np.eye(width)))


def _thinned(y: NDArray[np.intp], n: int, seed: int) -> NDArray[np.intp]:
    """Rows class by class: all, or where they are more than n, a chance part of the largest classes alone."""
    counts = np.bincount(y)
    cap = next(cap for cap in range(counts.max(), 0, -1) if cap == 1 or np.minimum(counts, cap).sum() <= n)
    rng = np.random.default_rng(seed)
    return np.concatenate([np.sort(rng.permutation(np.flatnonzero(y == k))[:cap]) for k in range(len(counts))])


def _tensor(values: NDArray[np.floating] | NDArray[np.integer]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))
