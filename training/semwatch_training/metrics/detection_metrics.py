"""How well defects are found: by image, by pixel and by region.

Conventions, the same for every engine (METHOD 3): scores are raw, higher is more defective. A figure that ranks two
sides is refused where one side is missing, never given as a number. Pixels are compared at ``size_hw``: score maps are
brought there bilinearly (half-pixel centres), masks by area, and a pixel is defective when at least half of it is; a
mask too thin for that keeps its most covered pixels. Pixels of all images are pooled. An image with a defect but an
empty mask would count as normal: leave it out.

Pixel figures are exact, without histograms: only the normal pixels are sorted, and every defective pixel is looked up
among them. 583 maps of 256 x 256 take about 0.5 GB.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import zip_longest
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from sklearn import metrics

from semwatch.errors import ConfigError
from semwatch_training.metrics.uncertainty import Rate

Scores = NDArray[np.floating]
Truth = NDArray[np.bool_]
Maps = Iterable[NDArray[np.floating]]
Masks = Iterable[NDArray[np.bool_]]

SIZE_HW = (256, 256)
"""Where maps and masks are compared, as INP-Former and MuSc do."""
MAX_FPR = 0.3
"""Share of normal pixels up to which AUPRO is integrated, as MVTec AD does."""


class F1Max(NamedTuple):
    """The best F1 over all thresholds, and the threshold it is reached at (score >= threshold is defective)."""

    f1: float
    threshold: float


@dataclass(frozen=True, slots=True)
class PixelMetrics:
    """All pixel figures of one pass; ``n_regions`` is what AUPRO averages over."""

    auroc: float
    aupro: float
    average_precision: float
    f1_max: F1Max
    n_regions: int


def image_auroc(scores: Scores, defective: Truth) -> float:
    """Area under the ROC curve: the share of (defective, normal) pairs in the right order; ties count half.

    Raises:
        ConfigError: empty, of unequal length, a score is not finite, or all images are of one kind.
    """
    scores, defective = _scores_and_truth(scores, defective)
    if defective.all() or not defective.any():
        kind = "defective" if defective.all() else "normal"
        raise ConfigError(f"all {len(scores)} samples are {kind}; a ROC curve needs both kinds")
    return float(metrics.roc_auc_score(defective, scores))


def class_auroc(scores: Scores, labels: NDArray[np.str_], normal: str) -> dict[str, float]:
    """Image AUROC of each defect class against all normal images, by class name in sorted order.

    Raises:
        ConfigError: as `image_auroc`, or no image is labelled ``normal``.
    """
    labels = np.asarray(labels)
    scores, is_normal = _scores_and_truth(scores, labels == normal)
    if not is_normal.any() or is_normal.all():
        raise ConfigError(
            f"AUROC by class needs images labelled {normal!r} and others; there are {sorted(set(labels))}"
        )
    found = {}
    for label in np.unique(labels[~is_normal]):
        chosen = is_normal | (labels == label)
        found[str(label)] = image_auroc(scores[chosen], ~is_normal[chosen])
    return found


def average_precision(scores: Scores, defective: Truth) -> float:
    """Area under the precision-recall curve, as a step function.

    Raises:
        ConfigError: as `image_auroc`, save that normal images may be missing.
    """
    scores, defective = _scores_and_truth(scores, defective)
    _need_defects(defective)
    return float(metrics.average_precision_score(defective, scores))


def f1_max(scores: Scores, defective: Truth) -> F1Max:
    """Best F1 over all thresholds. The threshold is chosen on the very samples it is judged on: a bound, not a setting.

    Raises:
        ConfigError: as `average_precision`.
    """
    scores, defective = _scores_and_truth(scores, defective)
    _need_defects(defective)
    return _precision_figures(scores[defective], np.sort(scores[~defective]))[1]


def false_alarm_rate(normal_scores: Scores, threshold: float, *, confidence: float = 0.95) -> Rate:
    """Share of normal images that the gate lets through (score > threshold, as the daemon's gate), with its interval.

    Raises:
        ConfigError: empty, or a score is not finite.
    """
    scores, _ = _scores_and_truth(normal_scores, np.zeros(len(normal_scores), bool))
    return Rate.of(int((scores > threshold).sum()), len(scores), confidence=confidence)


def pixel_auroc(maps: Maps, masks: Masks, *, size_hw: tuple[int, int] | None = SIZE_HW) -> float:
    """Area under the ROC curve of all pixels.

    Args:
        maps: score maps (h, w), each of its own size.
        masks: as many masks (H, W) bool, of any size; all-false for a normal image.
        size_hw: where the two are compared (see the head of this file); None: at each mask's own size.

    Raises:
        ConfigError: no maps, unequal numbers, a score that is not finite, or pixels of one kind only.
    """
    pixels = _pool(maps, masks, size_hw)
    return _area(pixels, np.full(len(pixels.defective), 1 / len(pixels.defective)), 1.0)


def aupro(maps: Maps, masks: Masks, *, max_fpr: float = MAX_FPR, size_hw: tuple[int, int] | None = SIZE_HW) -> float:
    """Area under the mean overlap of 8-connected defect regions, up to a share of normal pixels, scaled to 0 to 1.

    Small and large regions count alike, unlike in `pixel_auroc`.

    Raises:
        ConfigError: as `pixel_auroc`, or ``max_fpr`` is not in (0, 1].
    Source: Bergmann et al., IJCV 129 (2021), eq. 2, exact: every score is a threshold.
    """
    if not 0 < max_fpr <= 1:
        raise ConfigError(f"max_fpr {max_fpr} is not in (0, 1]")
    pixels = _pool(maps, masks, size_hw)
    return _area(pixels, pixels.weights, max_fpr)


def pixel_metrics(
    maps: Maps, masks: Masks, *, max_fpr: float = MAX_FPR, size_hw: tuple[int, int] | None = SIZE_HW
) -> PixelMetrics:
    """Take `pixel_auroc`, `aupro`, average precision and best F1 of all pixels, sorting them once.

    Raises:
        ConfigError: as `aupro`.
    """
    if not 0 < max_fpr <= 1:
        raise ConfigError(f"max_fpr {max_fpr} is not in (0, 1]")
    pixels = _pool(maps, masks, size_hw)
    equal = np.full(len(pixels.defective), 1 / len(pixels.defective))
    precision, best = _precision_figures(pixels.defective, pixels.normal)
    return PixelMetrics(
        _area(pixels, equal, 1.0), _area(pixels, pixels.weights, max_fpr), precision, best, pixels.n_regions
    )


class _Pixels(NamedTuple):
    """Scores of defective pixels, their weights (a region weighs 1 / n_regions) and the sorted scores of the others."""

    defective: NDArray[np.float32]
    weights: NDArray[np.float64]
    normal: NDArray[np.float32]
    n_regions: int


def _pool(maps: Maps, masks: Masks, size_hw: tuple[int, int] | None) -> _Pixels:
    defective, weights, normal, n_regions = [], [], [], 0
    for index, (score_map, mask) in enumerate(zip_longest(maps, masks)):
        if score_map is None or mask is None:
            raise ConfigError("there are not as many masks as score maps; give one for each, all-false if normal")
        scores, regions = _at_one_size(index, score_map, mask, size_hw)
        inside = regions > 0
        areas = np.bincount(regions.ravel())
        defective.append(scores[inside])
        weights.append(1 / areas[regions[inside]])
        normal.append(scores[~inside])
        n_regions += len(areas) - 1
    if not n_regions:
        raise ConfigError(f"no mask of {len(normal)} holds a defect; pixel figures need defective pixels")
    pooled = np.concatenate(normal)
    if not len(pooled):
        raise ConfigError("every pixel is defective; pixel figures need normal pixels")
    pooled.sort()
    return _Pixels(np.concatenate(defective), np.concatenate(weights) / n_regions, pooled, n_regions)


def _at_one_size(
    index: int, score_map: NDArray[np.floating], mask: NDArray[np.bool_], size_hw: tuple[int, int] | None
) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """Scores and region numbers (0 is no region), both at the size of comparison."""
    if score_map.ndim != 2 or not score_map.size or mask.ndim != 2 or not mask.size or mask.dtype != bool:
        raise ConfigError(
            f"image {index}: need a score map (h, w) and a bool mask (H, W), "
            f"not {score_map.shape} and {mask.dtype} {mask.shape}"
        )
    if not np.isfinite(score_map).all():
        raise ConfigError(f"image {index}: the score map holds values that are not finite")
    height, width = size_hw or mask.shape
    scores = cv2.resize(score_map.astype(np.float32), (width, height), interpolation=cv2.INTER_LINEAR)
    if mask.shape != (height, width) and mask.any():
        cover = cv2.resize(mask.astype(np.float32), (width, height), interpolation=cv2.INTER_AREA)
        mask = cover >= min(0.5, float(cover.max()))
    elif mask.shape != (height, width):
        mask = np.zeros((height, width), bool)
    regions = cv2.connectedComponents(mask.astype(np.uint8), connectivity=8)[1]
    return scores.astype(np.float32, copy=False), regions.astype(np.int32, copy=False)


def _area(pixels: _Pixels, weights: NDArray[np.float64], max_fpr: float) -> float:
    """Area under the weighted ROC curve up to ``max_fpr``, divided by it.

    A defective pixel lifts the curve by its weight, in a straight line over the share of normal pixels tied with it. So
    each pixel's own area has a closed form, and the curve itself is never built.
    """
    n = len(pixels.normal)
    above = (n - np.searchsorted(pixels.normal, pixels.defective, "right")) / n
    not_below = (n - np.searchsorted(pixels.normal, pixels.defective, "left")) / n
    tied = not_below - above
    rise = np.clip(max_fpr - above, 0, tied)
    area = np.maximum(max_fpr - not_below, 0) + rise**2 / np.where(tied > 0, 2 * tied, 1)
    return min(float(area @ weights) / max_fpr, 1.0)  # rounding of the weights


def _precision_figures(defective: Scores, sorted_normal: Scores) -> tuple[float, F1Max]:
    """Average precision and best F1; both change to the better only at scores of the defective."""
    thresholds, counts = np.unique(defective, return_counts=True)
    hits = counts[::-1].cumsum()[::-1]
    alarms = len(sorted_normal) - np.searchsorted(sorted_normal, thresholds, "left")
    precision = hits / (hits + alarms)
    f1 = 2 * hits / (hits + alarms + len(defective))
    best = int(f1.argmax())
    return float(counts @ precision) / len(defective), F1Max(float(f1[best]), float(thresholds[best]))


def _scores_and_truth(scores: Scores, truth: Truth) -> tuple[NDArray[np.float64], Truth]:
    values, flags = np.asarray(scores, dtype=np.float64), np.asarray(truth)
    if values.ndim != 1 or values.shape != flags.shape or not values.size:
        raise ConfigError(
            f"need one score and one truth per sample, at least one, not {values.shape} and {flags.shape}"
        )
    if flags.dtype != bool:
        raise ConfigError(f"truth is bool, True for defective, not {flags.dtype}")
    if not np.isfinite(values).all():
        raise ConfigError(f"{int((~np.isfinite(values)).sum())} of {len(values)} scores are not finite")
    return values, flags


def _need_defects(defective: Truth) -> None:
    if not defective.any():
        raise ConfigError(f"all {len(defective)} samples are normal; precision and recall need defective ones")
