"""Principal directions, and directions in which labelled classes are round.

What varies inside known classes (background, lighting, place) is mere variation, and counts little for novel ones too.

Source: within-class whitening as in linear discriminant analysis.
"""

import numpy as np
from sklearn.covariance import ledoit_wolf

from semwatch_training.discovery.clustering import Floats, Labels, class_means

N_COMPONENTS = 48
MIN_SHRINKAGE = 0.3
"""Of the scatter within labelled classes towards a sphere: a few dozen labelled samples must not fit 48 axes."""


def principal_components(features: Floats, width: int = N_COMPONENTS) -> Floats:
    """Project centred features (n, D) onto their leading axes: (n, at most width)."""
    centred = features - features.mean(axis=0)
    return np.asarray(centred @ principal_directions(centred, width), np.float32)


def principal_directions(centred: Floats, components: int) -> Floats:
    """Return the leading directions (D, d) of centred samples (n, D); d is less where D or n is."""
    n, D = centred.shape
    if n >= D:
        return np.ascontiguousarray(np.linalg.eigh(centred.T @ centred)[1][:, ::-1][:, :components], np.float32)
    return np.ascontiguousarray(np.linalg.svd(centred, full_matrices=False)[2].T[:, :components], np.float32)


def within_class_metric(
    views: Floats, labels: Labels, components: int, *, whitened_components: int
) -> tuple[Floats, Floats]:
    """Return mean (D,) and directions (D, at most ``components``) of a space for samples of known and novel classes.

    Principal directions, whitened by how samples of one labelled class differ from each other, then the principal
    directions of that. Without two samples of a class there is nothing to whiten by, and plain principal directions
    remain.

    Args:
        views: (V, n, D); differences are those of all views, directions those of the first.
        labels: (n,) 0..C-1 without gaps, or -1.
        components: directions kept.
        whitened_components: principal directions that are whitened; 0 for no whitening.

    Source: Ledoit-Wolf shrinkage.
    """
    mean = views[0].mean(axis=0)
    known = labels >= 0
    residual = views[:, known] - class_means(views[0], labels)[labels[known]]
    if not whitened_components or not residual.any():
        return mean, principal_directions(views[0] - mean, components)
    wide = principal_directions(views[0] - mean, whitened_components)
    covariance, _ = ledoit_wolf((residual @ wide).reshape(-1, wide.shape[1]), assume_centered=True)
    values, axes = np.linalg.eigh(covariance)
    whitening = wide @ (axes / np.sqrt(np.maximum(values, 1e-6 * values[-1]))).astype(np.float32)
    return mean, whitening @ principal_directions((views[0] - mean) @ whitening, components)


def whitened(features: Floats, labels: Labels) -> Floats:
    """Scale axes so that labelled classes are round, (n, d); unchanged where labels cannot tell.

    Source: oracle approximating shrinkage (Chen et al. 2010), with a floor.
    """
    known = labels >= 0
    classes = np.unique(labels[known])
    n, d = int(known.sum()) - len(classes), features.shape[1]
    if n < 2:
        return features
    within = features[known] - class_means(features, labels)[np.searchsorted(classes, labels[known])]
    scatter = (within.T @ within / n).astype(np.float64)
    trace, square = float(np.trace(scatter)), float(np.square(scatter).sum())
    if trace <= 0:
        return features
    spread = (n + 1 - 2 / d) * (square - trace**2 / d)
    shrinkage = min(1.0, ((1 - 2 / d) * square + trace**2) / spread) if spread > 0 else 1.0
    shrinkage = max(shrinkage, MIN_SHRINKAGE)
    values, axes = np.linalg.eigh((1 - shrinkage) * scatter + shrinkage * trace / d * np.eye(d))
    return np.ascontiguousarray(features @ (axes / np.sqrt(values)), np.float32)
