"""Heads over cached features, and the calibration of the unknown rule.

A head gives two answers per class: a logit (trained) and a conformal p-value (measured). The p-value compares a
defect's distance to the class, on frozen features only, with the distances of the class's own samples, each judged by
a metric fitted without it; the share of samples at least as far away is the p-value. So a class needs 20 samples before
a p-value can fall under 0.05, and "about 5 % of true members are called unknown" holds as long as samples and stream
come from the same process.

Source: class-conditional cross-conformal prediction (Vovk 2015); Mahalanobis distance on unit-length features
(Mahalanobis++).
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.cluster import KMeans
from sklearn.covariance import ledoit_wolf
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from semwatch.errors import ConfigError
from semwatch_training import weights_file

MIN_PER_CLASS = 20
"""With fewer, no p-value of the class can fall under 0.05: it would fit everything and nothing would be unknown."""
SAMPLES_PER_PROTOTYPE = 8


@dataclass(frozen=True, slots=True)
class HeadFit:
    """How a head is fitted."""

    frozen_width: int
    """Leading features that the p-values may read."""
    components: int = 96
    """Principal directions kept before whitening."""
    prototypes: int = 3
    """Centres per class at most: one name may cover several looks."""
    folds: int = 5
    """Of the cross-conformal calibration; every sample calibrates, judged by a metric fitted without its fold."""
    regularisation: float = 0.1
    """Inverse strength C of the logistic regression on standardised features."""
    seed: int = 0


class Head(nn.Module):
    """K classes over D features: ``forward(features) -> (logits, p_values)``."""

    def __init__(self, state: "dict[str, Tensor]", labels: Sequence[str], frozen_width: int) -> None:
        super().__init__()
        self.labels, self.frozen_width = tuple(labels), frozen_width
        for name, value in state.items():
            self.register_buffer(name, value)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Judge features (B, D).

        Returns:
            Logits (B, K) and p-values (B, K) in (0, 1].
        """
        buffer = dict(self.named_buffers())
        standard = (features - buffer["feature_mean"]) / buffer["feature_std"]
        logits = standard @ buffer["weight"].T + buffer["bias"]
        distance = class_distances(features[:, : self.frozen_width], buffer)
        # Padding is -inf, which is never as far away as a defect.
        at_least_as_far = (buffer["calibration"][None] >= distance[..., None]).float().sum(dim=-1)
        return logits, (1 + at_least_as_far) / (1 + buffer["n_calibration"])


def class_distances(frozen: Tensor, buffer: "dict[str, Tensor]") -> Tensor:
    """Squared whitened distance of features (B, F) to each class's nearest prototype: (B, K)."""
    whitened = (frozen - buffer["frozen_mean"]) @ buffer["whitening"]
    to_prototypes = (whitened[:, None, None] - buffer["prototypes"][None]).square().sum(dim=-1)
    return to_prototypes.amin(dim=-1)


def fit_head(features: NDArray[np.float32], labels: Sequence[str], fit: HeadFit) -> Head:
    """Fit a head on cached features.

    Logits: multinomial logistic regression on standardised features. P-values: within-class whitening (Ledoit-Wolf) of
    the leading principal directions, up to ``prototypes`` centres per class, cross-conformal calibration.

    Args:
        features: (n, D).
        labels: n class names.
        fit: how.

    Raises:
        ConfigError: fewer than two classes, or a class with fewer than 20 samples.
    """
    names = sorted(set(labels))
    y = np.array([names.index(label) for label in labels])
    counts = np.bincount(y, minlength=len(names))
    if len(names) < 2 or counts.min() < MIN_PER_CLASS:
        rare = {name: int(n) for name, n in zip(names, counts, strict=True) if n < MIN_PER_CLASS}
        raise ConfigError(
            f"a head needs two classes or more, each with at least {MIN_PER_CLASS} samples; got {len(names)} classes, "
            f"too few of {rare}"
        )
    state = _fit_logits(features, y, fit) | _fit_p_values(features[:, : fit.frozen_width], y, fit)
    return Head(state, names, fit.frozen_width)


def _fit_logits(features: NDArray[np.float32], y: NDArray[np.intp], fit: HeadFit) -> dict[str, Tensor]:
    mean, std = features.mean(axis=0), features.std(axis=0) + 1e-3
    regression = LogisticRegression(
        C=fit.regularisation, max_iter=2000, class_weight="balanced", random_state=fit.seed
    ).fit((features - mean) / std, y)
    weight, bias = regression.coef_, regression.intercept_
    if len(weight) == 1:  # two classes: scikit-learn gives one row
        weight, bias = np.vstack((-weight, weight)) / 2, np.array((-bias[0], bias[0])) / 2
    return {
        "feature_mean": _tensor(mean),
        "feature_std": _tensor(std),
        "weight": _tensor(weight),
        "bias": _tensor(bias),
    }


def _fit_p_values(frozen: NDArray[np.float32], y: NDArray[np.intp], fit: HeadFit) -> dict[str, Tensor]:
    """Metric and prototypes from all samples; calibration distances of each sample from a metric that never saw it."""
    own = np.empty(len(y), np.float32)
    fold_of = _folds(y, fit)
    for fold in range(fit.folds):
        held_out = fold_of == fold
        metric = _fit_metric(frozen[~held_out], y[~held_out], fit)
        distance = class_distances(torch.from_numpy(frozen[held_out]), metric).numpy()
        own[held_out] = distance[np.arange(held_out.sum()), y[held_out]]
    counts = np.bincount(y)
    calibration = np.full((len(counts), counts.max()), -np.inf, np.float32)
    for k, row in enumerate(calibration):
        row[: counts[k]] = np.sort(own[y == k])
    state = {"calibration": _tensor(calibration), "n_calibration": _tensor(counts)}
    return state | _fit_metric(frozen, y, fit)


def _folds(y: NDArray[np.intp], fit: HeadFit) -> NDArray[np.intp]:
    """A fold for each sample, every class spread evenly."""
    rng = np.random.default_rng(fit.seed)
    fold_of = np.empty(len(y), np.intp)
    for k in np.unique(y):
        members = rng.permutation(np.flatnonzero(y == k))
        fold_of[members] = np.arange(len(members)) % fit.folds
    return fold_of


def _fit_metric(frozen: NDArray[np.float32], y: NDArray[np.intp], fit: HeadFit) -> dict[str, Tensor]:
    """Within-class whitening (Ledoit-Wolf) of the leading principal directions, and each class's prototypes in it."""
    samples = frozen.astype(np.float64)
    mean = samples.mean(axis=0)
    directions = np.linalg.svd(samples - mean, full_matrices=False)[2][: fit.components].T
    projected = (samples - mean) @ directions
    prototypes = _prototypes(projected, y, fit)
    nearest = np.square(projected[:, None] - prototypes[y]).sum(axis=-1).argmin(axis=1)
    covariance, _ = ledoit_wolf(projected - prototypes[y, nearest], assume_centered=True)
    whiten = np.linalg.cholesky(np.linalg.inv(covariance))
    return {
        "frozen_mean": _tensor(mean),
        "whitening": _tensor(directions @ whiten),
        "prototypes": _tensor(prototypes @ whiten),
    }


def _prototypes(projected: NDArray[np.float64], y: NDArray[np.intp], fit: HeadFit) -> NDArray[np.float64]:
    """Up to P centres per class, (K, P, d); a class with few samples repeats its only centre."""
    centres = []
    for k in np.unique(y):
        members = projected[y == k]
        n = min(fit.prototypes, max(1, len(members) // SAMPLES_PER_PROTOTYPE))
        found = KMeans(n, n_init=4, random_state=fit.seed).fit(members).cluster_centers_
        centres.append(np.vstack([found, np.repeat(found[:1], fit.prototypes - n, axis=0)]))
    return np.stack(centres)


def _tensor(values: NDArray[np.floating] | NDArray[np.integer]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))


def save_head(head: Head, path: Path, *, encoder_form: str, provenance: dict[str, str | float | int]) -> None:
    """Write a head as safetensors (fp16, calibration in fp32) with labels, encoder form, provenance."""
    exact = ("calibration", "n_calibration", "feature_mean", "feature_std", "frozen_mean")
    state = {name: value if name in exact else value.half() for name, value in head.state_dict().items()}
    header = {
        "labels": json.dumps(head.labels),
        "frozen_width": str(head.frozen_width),
        "encoder_form": encoder_form,
        "provenance": json.dumps(provenance),
    }
    weights_file.write(path, state, header)


def load_head(path: Path) -> tuple[Head, str, dict[str, str | float | int]]:
    """Read what ``save_head`` wrote: the head in fp32, the form of the encoder it belongs to, its provenance.

    Raises:
        ConfigError: the file is absent or holds no head.
    """
    state, header = weights_file.read(path, what="head")
    try:
        head = Head(state, json.loads(header["labels"]), int(header["frozen_width"]))
        return head.eval(), header["encoder_form"], json.loads(header["provenance"])
    except (KeyError, ValueError) as error:
        raise weights_file.not_ours(path, "head", error) from error
