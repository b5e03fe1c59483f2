"""From one score map to its defects: gate, saliency, sweep, plateau, mask, regions, crops and soft masks.

Pure functions on plain arrays, shared by the daemon and by training. A score map (h, w) has one value per cell;
saliency and masks live on a *working grid* (g, q) of the same proportions, see ``grid_hw``. All of them cover the whole
field: a field of (H, W) pixels has grid cells of H/g x W/q pixels. Boxes and windows are in the field frame.

The sweep runs on the working grid and not on the image: a map of 32 x 32 cells holds no more than 32 x 32 values, and
``tests/benchmarks/bench_binarization.py`` shows which grid gives the masks of the 448 x 448 sweep and what it costs.
"""

import math
from dataclasses import dataclass
from typing import assert_never

import cv2
import numpy as np
from numpy.typing import NDArray

from semwatch.defects import Box
from semwatch.errors import ImageError
from semwatch.settings.recipe import Method, Recipe

_RECIPE = Recipe()
_RULE, _CROP = _RECIPE.binarization, _RECIPE.crop
"""Where nothing is said, the default recipe holds: what is measured with these functions is what the daemon does."""

BEFORE_MERGING = 2
"""Components that a mask keeps for each defect that is kept of a page: close ones become one."""

LEAST_CELLS = 0.75
"""Cells of the map that are a defect, at most: on a large map a share of the field would be many."""
SMALL_MAP = 56 * 56
"""Cells of the map that the percentiles and the least area were chosen on."""

_SQUARE_3X3 = np.ones((3, 3), np.uint8)


@dataclass(frozen=True, slots=True, eq=False)
class Binarization:
    """A defect mask and how it came about."""

    mask: NDArray[np.bool_]
    """(g, q) True on defects, after post-processing; all False where nothing stable was found."""
    saliency: NDArray[np.float32]
    """(g, q) in [0, 1], the map that was thresholded."""
    threshold: float
    """``saliency >= threshold`` was the mask before post-processing; ``inf`` where no threshold was stable."""
    counts: NDArray[np.intp]
    """(k,) components at the first k thresholds, as far as the method swept; k = 0 for ``fixed`` and ``otsu``."""


@dataclass(frozen=True, slots=True, eq=False)
class Region:
    """One defect of a mask: one connected component, or several that lie close together."""

    box_xyxy: Box
    """Field frame."""
    area_px: int
    """In field pixels."""
    peak_score: float
    """Largest score-map value inside the region."""
    mask: NDArray[np.bool_]
    """(g, q) True on this region alone."""


def conformal_threshold(normal_scores: NDArray[np.floating], *, false_alarm_rate: float) -> float:
    """Return the raw score that a new normal image exceeds with probability at most ``false_alarm_rate``.

    ``normal_scores`` (n,) are raw scores of normal images the detector was not fitted on. The threshold is their
    ceil((n + 1)(1 - rate))-th smallest. With fewer than 1 / rate - 1 images (99 for 1 %) no finite threshold promises
    the rate: the answer is ``inf``, which would keep the gate shut for good, so a caller should refuse it.

    >>> conformal_threshold(np.arange(1.0, 100.0), false_alarm_rate=0.05)
    95.0
    >>> conformal_threshold(np.arange(1.0, 10.0), false_alarm_rate=0.05)
    inf

    Raises: ValueError for scores that are not finite or a rate outside (0, 1).
    Source: split conformal prediction, Lei et al. 2018, one-sided.
    """
    scores = np.asarray(normal_scores, np.float64).ravel()
    if not 0.0 < false_alarm_rate < 1.0:
        raise ValueError(f"false_alarm_rate must lie between 0 and 1, not {false_alarm_rate}")
    if not np.isfinite(scores).all():
        raise ValueError("normal_scores holds NaN or infinity: leave out the images whose detection failed")
    # n + 1 - floor((n + 1) rate) is the same rank; 1e-9 keeps 0.29 x 100 from falling to 28.
    rank = len(scores) + 1 - math.floor((len(scores) + 1) * false_alarm_rate + 1e-9)
    return float(np.partition(scores, rank - 1)[rank - 1]) if rank <= len(scores) else math.inf


def gate(raw_score: float, *, threshold: float) -> bool:
    """Return whether the image is worth a search for defects: its raw score lies above ``threshold``.

    Saliency is normalised per image and so finds a "defect" in every clean one; only the raw score can tell.

    Raises: ImageError for a NaN score, which would otherwise pass as defect-free.
    """
    if math.isnan(raw_score):
        raise ImageError("the detector gave NaN as image score: check the image, then the detector's numeric precision")
    return raw_score > threshold


def grid_hw(map_hw: tuple[int, ...], *, grid_px: int = _RULE.grid_px) -> tuple[int, int]:
    """The working grid (g, q) of a map (h, w): its shorter side has ``grid_px`` cells, or the map's own if more.

    >>> grid_hw((56, 56)), grid_hw((96, 128)), grid_hw((128, 256))
    ((112, 112), (112, 149), (128, 256))
    """
    finer = max(1.0, grid_px / min(map_hw))
    return round(map_hw[0] * finer), round(map_hw[1] * finer)


def saliency(
    score_map: NDArray[np.float32],
    *,
    percentiles: tuple[float, float] = _RULE.percentiles,
    grid_px: int = _RULE.grid_px,
) -> NDArray[np.float32]:
    """Upsample a score map (h, w) bilinearly to (g, q) and map its two percentiles to 0 and 1, clipped.

    On a map of more cells than ``SMALL_MAP`` the upper percentile leaves out as many cells as on one of these: a defect
    of a few pixels is no larger where the field is.

    A constant map gives zeros. Where so little stands out that both percentiles agree, the maximum takes the place of
    the upper one: a defect smaller than 0.1 % of the field is still a defect.

    Raises: ImageError where the map holds NaN or infinity.
    Source: IC-DefectNCD section 3.3, which gives no percentiles. An upper one of 99 saturates: one map in twenty then
    takes a mask of over 30 %.
    """
    if not np.isfinite(score_map).all():
        raise ImageError("the score map holds NaN or infinity: check the image, then the detector's numeric precision")
    grid = grid_hw(score_map.shape, grid_px=grid_px)
    scores = cv2.resize(np.asarray(score_map, np.float32), grid[::-1], interpolation=cv2.INTER_LINEAR)
    lower, upper = percentiles
    upper = 100 - (100 - upper) * min(1.0, SMALL_MAP / score_map.size)
    low, high = (float(value) for value in np.percentile(scores, (lower, upper)))
    rounding = 1e-6 * float(np.abs(scores).max())  # what bilinear weights leave on a constant map
    if high - low <= rounding:
        high = float(scores.max())
    if high - low <= rounding:
        return np.zeros(grid, np.float32)
    return np.asarray(np.clip((scores - low) / (high - low), 0.0, 1.0), np.float32)


def component_counts(
    saliency: NDArray[np.float32], thresholds: NDArray[np.float32], *, min_area_px: int
) -> NDArray[np.intp]:
    """Return the (K,) numbers of 8-connected components of ``saliency >= t`` with at least ``min_area_px`` grid pixels.

    Areas are counted; nothing is eroded, so a thin or tiny defect counts like any other of its area.

    >>> line = np.eye(5, dtype=np.float32)
    >>> component_counts(line, np.float32([0.5]), min_area_px=5).tolist()
    [1]

    Source: MEBin, which erodes 6 x 6 before it counts and so loses every defect up to 5 pixels wide.
    """
    counts = np.zeros(len(thresholds), np.intp)
    for k, threshold in enumerate(thresholds):
        # bincount on plain labels: connectedComponentsWithStats takes twice as long (OpenCV 5).
        _, labels = cv2.connectedComponents((saliency >= threshold).view(np.uint8), connectivity=8)
        counts[k] = np.count_nonzero(np.bincount(labels.ravel())[1:] >= min_area_px)
    return counts


def sweep(
    saliency: NDArray[np.float32],
    *,
    n_thresholds: int = _RULE.n_thresholds,
    min_area_px: int,
    max_mask_fraction: float = 1.0,
) -> tuple[NDArray[np.float32], NDArray[np.float64], NDArray[np.intp]]:
    """Return descending thresholds, the share of the grid at or above each, and ``component_counts``; (k,) all three.

    Thresholds are the midpoints of K equal steps of [0, 1]: never 0 or 1, and exact in float32 for K = 64. Those whose
    mask covers more than ``max_mask_fraction`` are left out unlabelled, which halves the cost.

    >>> sweep(np.float32([[0.3, 0, 1]]), n_thresholds=4, min_area_px=1)[0].tolist()
    [0.875, 0.625, 0.375, 0.125]
    """
    thresholds = ((np.arange(n_thresholds)[::-1] + 0.5) / n_thresholds).astype(np.float32)
    fractions = np.array([np.count_nonzero(saliency >= t) for t in thresholds], np.float64) / saliency.size
    within = fractions <= max_mask_fraction
    counts = component_counts(saliency, thresholds[within], min_area_px=min_area_px)
    return thresholds[within], fractions[within], counts


def plateau(
    counts: NDArray[np.intp],
    fractions: NDArray[np.float64],
    *,
    epsilon: int = _RULE.epsilon,
    min_length: int = _RULE.min_plateau,
    max_mask_fraction: float = _RULE.max_mask_fraction,
) -> tuple[int, int] | None:
    """Return the indices of the highest and lowest threshold of the longest stable run of component counts, or None.

    ``counts`` and ``fractions`` (K,) belong to descending thresholds. A run is ``min_length`` or more neighbours, all
    with at least one component and at most ``max_mask_fraction`` of the grid; its largest and smallest count differ by
    at most ``epsilon`` (bounding single steps instead would let the count drift without limit). Among equally long runs
    the one with the highest mean IoU of neighbouring masks wins, then the one at higher thresholds.

    >>> plateau(np.array([0, 1, 1, 1, 1, 1, 2, 5]), np.array([0, .01, .02, .03, .03, .04, .06, .2]))
    (1, 5)

    Source: IC-DefectNCD section 3.3; the three limits are ours and keep out the empty and the whole-image run.
    """
    values, usable = counts.tolist(), (counts >= 1) & (fractions <= max_mask_fraction)
    iou_sums = _iou_sums(fractions)
    run, best, start = None, (min_length, -1.0), 0
    for stop, count_is_usable in enumerate(usable):
        if not count_is_usable:
            start = stop + 1
            continue
        while max(values[start : stop + 1]) - min(values[start : stop + 1]) > epsilon:
            start += 1
        rank = (stop + 1 - start, (iou_sums[stop] - iou_sums[start]) / max(stop - start, 1))
        if rank > best:
            run, best = (start, stop), rank
    return run


def literal_plateau(counts: NDArray[np.intp], fractions: NDArray[np.float64], *, epsilon: int = _RULE.epsilon) -> int:
    """Return the index of the lowest threshold on the longest run of steps of at most ``epsilon``, as printed.

    The run may be that of empty masks or of the whole image. Ties as in ``plateau``. ``counts`` has K >= 1 values.

    >>> literal_plateau(np.array([3, 3, 1, 1, 1]), np.array([.1, .2, .8, .9, 1.]))
    4

    Source: IC-DefectNCD section 3.3; kept so that both rules can be measured in one run.
    """
    iou_sums = _iou_sums(fractions)
    runs = np.split(np.arange(len(counts)), np.flatnonzero(np.abs(np.diff(counts)) > epsilon) + 1)
    best = max(runs, key=lambda run: (len(run), (iou_sums[run[-1]] - iou_sums[run[0]]) / max(len(run) - 1, 1)))
    return int(best[-1])


def _iou_sums(fractions: NDArray[np.float64]) -> list[float]:
    """Return (K,) running sums of the IoU of neighbouring masks: a ratio of areas, since the masks are nested."""
    smaller, larger = fractions[:-1], fractions[1:]
    iou = np.divide(smaller, larger, out=np.ones_like(larger), where=larger > 0)
    return [0.0, *np.cumsum(iou).tolist()]


def binarize(
    score_map: NDArray[np.float32],
    *,
    method: Method = _RULE.method,
    grid_px: int = _RULE.grid_px,
    percentiles: tuple[float, float] = _RULE.percentiles,
    n_thresholds: int = _RULE.n_thresholds,
    epsilon: int = _RULE.epsilon,
    min_length: int = _RULE.min_plateau,
    max_mask_fraction: float = _RULE.max_mask_fraction,
    min_area_fraction: float = 2e-4,
    max_defects: int = BEFORE_MERGING * _RULE.max_defects,
    hot_score: float = math.inf,
) -> Binarization:
    """Find the defect mask of a score map (h, w) whose image has passed the gate.

    ``plateau`` is the default: the threshold in the middle of the longest stable run. For comparison: ``lowest`` (that
    run's lowest threshold), ``literal`` (the rule as printed), ``fixed`` (0.5), ``otsu`` (of the saliency). All share
    the post-processing of ``clean_mask``.

    The paper and MEBin take the run's lowest threshold, where the defect is about to flow into something else: on the
    shipped detector's maps its masks are twice too wide. The middle is farthest from both ends, as the most stable
    region of Matas et al. (MSER, 2002) is; ``semwatch-train experiment binarization`` measures both.

    A component of the map at ``hot_score`` or above is a defect even where the plateau's mask leaves it out: beside a
    strong defect a weak one lies under every threshold that is stable. Where that is more than the mask may cover, the
    map has another unit than the gate, and the plateau alone counts.

    Raises: ImageError where the map holds NaN or infinity.
    """
    shown = saliency(score_map, percentiles=percentiles, grid_px=grid_px)
    finer = shown.size / score_map.size
    min_area_px = math.ceil(min(min_area_fraction * shown.size, LEAST_CELLS * finer))
    counts = np.zeros(0, np.intp)
    match method:
        case "plateau" | "lowest":
            limits = {"max_mask_fraction": max_mask_fraction}
            thresholds, fractions, counts = sweep(shown, n_thresholds=n_thresholds, min_area_px=min_area_px, **limits)
            run = plateau(counts, fractions, epsilon=epsilon, min_length=min_length, **limits)
            threshold = math.inf if run is None else float(thresholds[run[1] if method == "lowest" else sum(run) // 2])
        case "literal":
            thresholds, fractions, counts = sweep(shown, n_thresholds=n_thresholds, min_area_px=1)
            threshold = float(thresholds[literal_plateau(counts, fractions, epsilon=epsilon)])
        case "fixed":
            threshold = 0.5
        case "otsu":
            threshold = _otsu_threshold(shown)
        case _:
            assert_never(method)
    hot = np.asarray(score_map, np.float32) >= hot_score
    mask = clean_mask(
        with_hot(shown >= threshold, hot) if hot.mean() <= max_mask_fraction else shown >= threshold,
        min_area_px=min_area_px,
        max_hole_px=int(max_mask_fraction * shown.size),
        max_defects=max_defects,
    )
    return Binarization(mask=mask, saliency=shown, threshold=threshold, counts=counts)


def _otsu_threshold(saliency: NDArray[np.float32]) -> float:
    """Return Otsu's threshold on 256 levels, as a value for ``saliency >= t``."""
    level, _ = cv2.threshold(np.rint(saliency * 255).astype(np.uint8), 0, 255, cv2.THRESH_BINARY + cv2.THRESH_OTSU)
    return (float(level) + 0.5) / 255


def with_hot(mask: NDArray[np.bool_], hot: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Add to a mask (g, q) those components of hot cells (h, w) of the map that it does not touch."""
    if not hot.any():
        return mask
    larger = cv2.resize(hot.view(np.uint8), mask.shape[::-1], interpolation=cv2.INTER_NEAREST_EXACT)
    n, labels = cv2.connectedComponents(larger, connectivity=8)
    touched = np.zeros(n, np.bool_)
    touched[np.unique(labels[mask])] = True
    touched[0] = True
    return np.asarray(mask | ~touched[labels], np.bool_)


def clean_mask(mask: NDArray[np.bool_], *, min_area_px: int, max_hole_px: int, max_defects: int) -> NDArray[np.bool_]:
    """Close (g, q) by 3 x 3, fill holes, drop components under ``min_area_px``, keep the ``max_defects`` largest.

    What is larger than ``max_hole_px`` and has defect all around it is the field seen through a frame, and stays open.

    Source: ours; the paper writes only "post".
    """
    if not mask.any():
        return mask
    closed = cv2.morphologyEx(mask.view(np.uint8), cv2.MORPH_CLOSE, _SQUARE_3X3).view(np.bool_)
    _, gaps = cv2.connectedComponents((~closed).view(np.uint8), connectivity=4)
    is_hole = np.bincount(gaps.ravel()) <= max_hole_px
    is_hole[np.concatenate([gaps[0], gaps[-1], gaps[:, 0], gaps[:, -1]])] = False
    is_hole[0] = False  # label 0 is the mask itself
    filled = closed | is_hole[gaps]
    _, labels = cv2.connectedComponents(filled.view(np.uint8), connectivity=8)
    areas = np.bincount(labels.ravel())
    areas[0] = 0
    largest = np.argsort(-areas, kind="stable")[:max_defects]
    is_kept = np.zeros(len(areas), np.bool_)
    is_kept[largest] = areas[largest] >= max(min_area_px, 1)
    return is_kept[labels]


def regions(
    mask: NDArray[np.bool_],
    score_map: NDArray[np.float32],
    *,
    size_hw: tuple[int, int],
    merge_fraction: float = _RULE.merge_fraction,
    max_regions: int = _RULE.max_defects,
) -> list[Region]:
    """Return the defects of a mask (g, q) in a field of ``size_hw`` pixels, largest first, at most ``max_regions``.

    Components whose boxes lie closer than ``merge_fraction`` of the field's side, on both axes, are one region; so are
    their unions, until no two boxes are that close. Boxes hold every pixel that the region's grid cells touch.

    >>> mask = np.zeros((8, 8), np.bool_)
    >>> mask[1:3, 2:6] = True
    >>> [(r.box_xyxy, r.area_px) for r in regions(mask, np.ones((4, 4), np.float32), size_hw=(80, 160))]
    [((40, 10, 120, 30), 1600)]
    """
    n_labels, labels = cv2.connectedComponents(mask.view(np.uint8), connectivity=8)
    boxes = [_bounding_box(labels == label) for label in range(1, n_labels)]
    scores = cv2.resize(score_map, mask.shape[::-1], interpolation=cv2.INTER_NEAREST_EXACT)
    found = []
    for box, members in _merged(boxes, reach=merge_fraction * min(mask.shape)):
        own = np.isin(labels, np.array(members) + 1)
        area_px = round(np.count_nonzero(own) * size_hw[0] * size_hw[1] / mask.size)
        found.append(Region(_field_box(box, mask.shape, size_hw), max(area_px, 1), float(scores[own].max()), own))
    return sorted(found, key=lambda region: -region.area_px)[:max_regions]


def _bounding_box(mask: NDArray[np.bool_]) -> Box:
    """Return the box of the True pixels of a mask that has some."""
    x0, y0, width, height = cv2.boundingRect(mask.view(np.uint8))
    return x0, y0, x0 + width, y0 + height


def _merged(boxes: list[Box], *, reach: float) -> list[tuple[Box, list[int]]]:
    """Return boxes united until no two lie closer than ``reach`` on both axes, each with the indices it unites."""
    apart: list[tuple[Box, list[int]]] = []
    for idx, first in enumerate(boxes):
        box, members = first, [idx]
        while near := [other for other in apart if _gap(box, other[0]) < reach]:
            apart = [other for other in apart if other not in near]
            for other, others in near:
                box = min(box[0], other[0]), min(box[1], other[1]), max(box[2], other[2]), max(box[3], other[3])
                members += others
        apart.append((box, members))
    return apart


def _gap(a: Box, b: Box) -> int:
    """Return the larger of the gaps between two boxes along x and along y; 0 or less where they touch or overlap."""
    return max(b[0] - a[2], a[0] - b[2], b[1] - a[3], a[1] - b[3])


def _field_box(box: Box, grid: tuple[int, ...], size_hw: tuple[int, int]) -> Box:
    """Return the smallest box of field pixels that holds a box of grid cells."""
    (height, width), (rows, columns), (x0, y0, x1, y1) = size_hw, grid, box
    return x0 * width // columns, y0 * height // rows, -(-x1 * width // columns), -(-y1 * height // rows)


def crop_window(
    box: Box,
    *,
    size_hw: tuple[int, int],
    context: float = _CROP.context,
    min_side_fraction: float = _CROP.min_side_fraction,
) -> Box:
    """Return the square window around a box in a field of ``size_hw`` pixels; it may leave the field.

    Its side is ``context`` times the longer side of the box, at least ``min_side_fraction`` of the shorter and at most
    the longer side of the field: more than that would only be reflection.

    >>> crop_window((10, 20, 50, 40), size_hw=(400, 600))
    (-10, -10, 70, 70)
    >>> crop_window((10, 20, 12, 21), size_hw=(400, 600))
    (-9, 0, 31, 40)
    """
    x0, y0, x1, y1 = box
    wanted = max(context * max(x1 - x0, y1 - y0), min_side_fraction * min(size_hw))
    side = max(min(math.ceil(wanted), max(size_hw)), x1 - x0, y1 - y0)
    left, top = (x0 + x1 - side) // 2, (y0 + y1 - side) // 2
    return left, top, left + side, top + side


def cut(pixels: NDArray[np.uint8], window: Box, *, side_px: int) -> NDArray[np.uint8]:
    """Return the window of a field (H, W), resized to (S, S); outside, the field is mirrored about its border pixels.

    The window may be larger than the field. Shrinking averages areas, so that no pixel is skipped; enlarging is linear.
    """
    x0, y0, x1, y1 = window
    height, width = pixels.shape
    if x0 >= 0 and y0 >= 0 and x1 <= width and y1 <= height:
        source = pixels[y0:y1, x0:x1]
    else:
        source = pixels.take(_mirrored(y0, y1, height), axis=0).take(_mirrored(x0, x1, width), axis=1)
    interpolation = cv2.INTER_AREA if x1 - x0 > side_px else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(source, (side_px, side_px), interpolation=interpolation), np.uint8)


def _mirrored(first: int, last: int, n: int) -> NDArray[np.intp]:
    """Return first..last - 1 folded into 0..n - 1, border not repeated (OpenCV's reflect-101), from any distance."""
    period = max(2 * (n - 1), 1)
    folded = np.arange(first, last) % period
    return np.minimum(folded, period - folded) if n > 1 else np.zeros_like(folded)


def soft_mask(
    saliency: NDArray[np.float32],
    region_mask: NDArray[np.bool_],
    window: Box,
    *,
    size_hw: tuple[int, int],
    tokens: int,
) -> NDArray[np.float32]:
    """Return the saliency (g, q) of one region as seen through a crop window, (t, t) in [0, 1], 0 outside the field.

    Saliency under the region, dilated by 3 x 3, is averaged over each token's area, which is that of the same token
    of the crop. The values stay those of the heat map and are not stretched to 1: a faint defect biases attention less.
    All of them are zero only where the window misses the region.

    Source: IC-DefectNCD section 3.4.1, "segmentation heatmap of the cropped image"; keeping to one region is ours.
    """
    near = cv2.dilate(region_mask.view(np.uint8), _SQUARE_3X3).view(np.bool_)
    heat = np.where(near, saliency, np.float32(0.0))
    (height, width), (x0, y0, x1, y1) = size_hw, window
    rows = _overlaps(y0 / height, y1 / height, tokens, heat.shape[0])
    cols = _overlaps(x0 / width, x1 / width, tokens, heat.shape[1])
    return np.asarray(np.clip(rows @ heat @ cols.T, 0.0, 1.0), np.float32)


def region_features(
    patch_features: NDArray[np.float32], saliency: NDArray[np.float32], region_mask: NDArray[np.bool_]
) -> NDArray[np.float32]:
    """Average what a detector says of places (C, h, w), under the saliency (g, q) of one region: (C,)."""
    near = cv2.dilate(region_mask.view(np.uint8), _SQUARE_3X3).view(np.bool_)
    heat = np.where(near, saliency, np.float32(0.0)) + np.float32(1e-6)  # without any heat all places count alike
    h, w = patch_features.shape[1:]
    weights = _overlaps(0, 1, h, heat.shape[0]) @ heat @ _overlaps(0, 1, w, heat.shape[1]).T
    return np.asarray(np.tensordot(patch_features, weights / weights.sum(), 2), np.float32)


def _overlaps(first: float, last: float, tokens: int, grid_px: int) -> NDArray[np.float32]:
    """Return (t, g): the share of each of t equal steps from ``first`` to ``last`` inside each cell of [0, 1]."""
    edges, cells = np.linspace(first * grid_px, last * grid_px, tokens + 1)[:, None], np.arange(grid_px)
    covered = np.minimum(edges[1:], cells + 1) - np.maximum(edges[:-1], cells)
    return np.asarray(np.maximum(covered, 0.0) / (edges[1:] - edges[:-1]), np.float32)
