"""What differs between an inspected field and its registered reference. Pure functions on plain arrays.

Gain and offset are fitted locally, the residual is smoothed at several scales, lowered by what a displacement of a
pixel explains, and divided by a spread that the pair itself gives as a function of gray level and of edge strength. So
the map is in standard deviations, with heavier noise and rougher edges already paid for.
"""

import math
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from semwatch.line.registration import gradients
from semwatch.settings.recipe import Recipe

Floats = NDArray[np.float32]
Bools = NDArray[np.bool_]

CELL_PX = 8
"""Side of a cell of the difference map, in pixels of the field."""
_RULE = Recipe().reference
"""Where nothing is said, the default recipe holds."""
LIKELY = 0.6
"""Share of the threshold above which a cell says no more how far the two differ without a defect."""
_N_LEVELS, _N_LINE_LEVELS = 4, 2
"""Levels of the pyramid, and on how many of them scratches are looked for: 8 px is a cell."""
_LINE_SIGMA_PX, _LINE_LENGTH_PX, _N_DIRECTIONS = 1.0, 5.0, 8
"""Standard deviations across and along of the filters for scratches, and how many directions they have."""
_N_PASSES = 2
"""How often what differs is looked for, without scratches, to leave it out of gain, offset and spread."""
_RIM_PX = 3
"""Pixels along the border of the overlap that are not judged."""
_SLACK_PX = 0.5
_N_BINS, _SAMPLE, _FEWEST = 12, 60_000, 256
"""Bins of gray level and of edge strength, the most pixels that fill them, and the fewest that are believed."""
_LEAST_SPREAD = 0.1
"""Gray levels: below, rounding is all that is left of a difference."""


def compare(
    inspected: NDArray[np.uint8], aligned: Floats, overlap: Bools, *, threshold: float = _RULE.threshold
) -> Floats:
    """Return the difference of two registered images in standard deviations of the pair, (ceil(H/8), ceil(W/8)).

    Args:
        inspected: (H, W) gray.
        aligned: (H, W) gray levels of the reference as the inspected field sees them.
        overlap: (H, W) True where there is a counterpart.
        threshold: the recipe's; what comes near it has no part in the spread.

    Returns:
        The largest difference in each cell of 8 x 8 pixels, 0 where there is no counterpart. Never NaN.
    """
    # The counterpart of an edge that wanders may lie just outside, also where the field itself ends.
    rim = np.ones((2 * _RIM_PX + 1, 2 * _RIM_PX + 1), np.uint8)
    inside = cv2.erode(overlap.view(np.uint8), rim, borderType=cv2.BORDER_CONSTANT, borderValue=0).view(np.bool_)
    inside = _padded(inside)
    image, aligned = _padded(inspected.astype(np.float32)), _padded(aligned)
    H, W = inspected.shape
    inside[H:], inside[:, W:] = False, False
    size_hw = len(image) // CELL_PX, image.shape[1] // CELL_PX
    if not inside.any():
        return np.zeros(size_hw, np.float32)
    is_common = np.ones(size_hw, np.bool_)
    for _ in range(_N_PASSES):
        matched = match_gray(image, aligned, inside & _enlarged(is_common))
        found = _in_spreads(image, matched, inside, is_common, n_line_levels=0)
        differs = cv2.dilate((found > LIKELY * threshold).view(np.uint8), np.ones((3, 3), np.uint8)).view(np.bool_)
        if differs.mean() > 0.5:
            break
        is_common = ~differs  # gain, offset and spread are those of what agrees: a large defect would add to them
    matched = match_gray(image, aligned, inside & _enlarged(is_common))
    return _in_spreads(image, matched, inside, is_common, n_line_levels=_N_LINE_LEVELS)


def _in_spreads(image: Floats, matched: Floats, inside: Bools, is_common: Bools, *, n_line_levels: int) -> Floats:
    """Return the difference in each cell (h, w), the largest over a pyramid of halved images.

    Args:
        image: (8h, 8w) gray levels of the inspected field.
        matched: (8h, 8w) of the reference, after ``match_gray``.
        inside: (8h, 8w) True where there is a counterpart.
        is_common: (h, w) cells that say how far two images without a defect differ.
        n_line_levels: on how many levels scratches are looked for.
    """
    left = np.where(inside, image - matched, np.float32(0))
    left -= _row_offsets(left, inside)[:, None]
    left[~inside] = 0
    found = np.zeros(is_common.shape, np.float32)
    weight = inside.astype(np.float32)
    for level in range(_N_LEVELS):
        if level:
            image, matched, left, weight = (_halved(one) for one in (image, matched, left, weight))
        # Beyond a border there is nothing: noise there is that of half a kernel; its square is a Gaussian of 1/sqrt(2).
        share = cv2.GaussianBlur(weight, (0, 0), math.sqrt(0.5), borderType=cv2.BORDER_CONSTANT)
        judged = weight > 0.5
        even = cv2.GaussianBlur(left, (0, 0), 1.0, borderType=cv2.BORDER_CONSTANT) / np.sqrt(np.maximum(share, 0.2))
        filtered = [[np.asarray(even, np.float32)]]
        if level < n_line_levels:
            filtered.append([_filtered(left, kernel) for kernel in _line_kernels()])
        learns = judged & np.kron(is_common, np.ones((CELL_PX >> level, CELL_PX >> level), np.bool_))
        if np.count_nonzero(learns) < _FEWEST:
            break
        edges = _edge_strength(image, matched)
        gray = np.asarray(cv2.GaussianBlur(matched, (0, 0), 1.5), np.float32)
        for smooth in filtered:
            values = _standardised(smooth, edges, gray, judged, learns)
            found = np.maximum(found, _cells(values, CELL_PX >> level))
    return found


def _filtered(left: Floats, kernel: Floats) -> Floats:
    return np.asarray(cv2.filter2D(left, cv2.CV_32F, kernel, borderType=cv2.BORDER_CONSTANT), np.float32)


def _padded(values: NDArray[Any]) -> NDArray[Any]:
    """Repeat the last row and column of (H, W) until both sides are whole cells."""
    H, W = values.shape
    return np.pad(values, ((0, -H % CELL_PX), (0, -W % CELL_PX)), mode="edge")


def _enlarged(cells: Bools) -> Bools:
    return np.asarray(np.kron(cells, np.ones((CELL_PX, CELL_PX), np.bool_)), np.bool_)


def _halved(values: Floats) -> Floats:
    H, W = values.shape
    return np.asarray(values.reshape(H // 2, 2, W // 2, 2).mean(axis=(1, 3)), np.float32)


def _cells(values: Floats, side_px: int) -> Floats:
    """Return the largest value of each cell of (h * side, w * side): (h, w)."""
    H, W = values.shape
    return np.asarray(values.reshape(H // side_px, side_px, W // side_px, side_px).max(axis=(1, 3)), np.float32)


def _line_kernels() -> list[Floats]:
    """Return smoothing kernels along eight directions, for scratches: a thin line is noise across and signal along."""
    reach = round(2 * _LINE_LENGTH_PX)
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1].astype(np.float32)
    kernels = []
    for angle in np.arange(_N_DIRECTIONS) * math.pi / _N_DIRECTIONS:
        along, across = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
        kernel = np.exp(-0.5 * ((along / _LINE_LENGTH_PX) ** 2 + (across / _LINE_SIGMA_PX) ** 2))
        kernels.append(np.asarray(kernel / kernel.sum(), np.float32))
    return kernels


def match_gray(image: Floats, aligned: Floats, inside: Bools) -> Floats:
    """Return the reference (H, W) with the local gain and offset of the inspected image.

    Both are fitted by least squares in Gaussian windows of an eighth of the shorter side, three times, each time
    without what differed most in the one before, which is defects. The gain is drawn towards that of the whole field.
    """
    sigma = max(16.0, min(image.shape) / 8)
    weight = inside.astype(np.float32)
    a, b = (np.asarray(cv2.GaussianBlur(one, (0, 0), 1.5), np.float32) for one in (image, aligned))
    matched = aligned
    for _ in range(3):
        gain, offset = _local_line(b, a, weight, sigma)
        matched = gain * aligned + offset
        left = np.abs(a - (gain * b + offset))
        spread = max(float(np.median(left[inside])) / 0.6745, 0.5)
        weight = np.where(left < 3 * spread, inside.astype(np.float32), np.float32(0.02) * inside)
    return np.asarray(matched, np.float32)


def _local_line(x: Floats, y: Floats, weight: Floats, sigma: float) -> tuple[Floats, Floats]:
    """Return gain and offset (H, W) of y against x, by weighted least squares in Gaussian windows."""
    total = float(weight.sum())
    mean_x, mean_y = float((weight * x).sum()) / total, float((weight * y).sum()) / total
    x, y = x - np.float32(mean_x), y - np.float32(mean_y)
    whole = float((weight * x * x).sum()) / total
    whole_gain = float((weight * x * y).sum()) / total / max(whole, 1e-3)
    whole_gain = float(np.clip(whole_gain, 0.5, 2.0)) if whole > 1 else 1.0
    w, wx, wy, wxx, wxy = (
        _wide_blur(p, sigma) for p in (weight, weight * x, weight * y, weight * x * x, weight * x * y)
    )
    w = np.maximum(w, 1e-4)
    wx, wy, wxx, wxy = wx / w, wy / w, wxx / w, wxy / w
    ridge = np.float32(0.5 * whole + 1.0)
    gain = (wxy - wx * wy + ridge * whole_gain) / (np.maximum(wxx - wx * wx, 0) + ridge)
    offset = wy - gain * wx
    return np.asarray(gain, np.float32), np.asarray(offset + mean_y - gain * mean_x, np.float32)


def _wide_blur(values: Floats, sigma: float) -> Floats:
    """A wide Gaussian on a quarter of the resolution: what it leaves has no finer detail."""
    H, W = values.shape
    small = cv2.resize(values, (max(1, W // 4), max(1, H // 4)), interpolation=cv2.INTER_AREA)
    small = cv2.GaussianBlur(small, (0, 0), sigma / 4, borderType=cv2.BORDER_REFLECT)
    return np.asarray(cv2.resize(small, (W, H), interpolation=cv2.INTER_LINEAR), np.float32)


def _row_offsets(left: Floats, inside: Bools) -> Floats:
    """Return the median residual (H,) of each row: rows of a scan flicker, and a defect seldom fills half of one."""
    masked = np.where(inside, left, np.float32(np.nan))
    counts = inside.sum(axis=1)
    offsets = np.zeros(len(left), np.float32)
    enough = counts >= 32
    if enough.any():
        offsets[enough] = np.nanmedian(masked[enough], axis=1)
    return offsets


def _edge_strength(image: Floats, matched: Floats) -> Floats:
    """Return the gray levels (H, W) that a pixel of displacement can make: the gradient nearby that both images have.

    What only one of them has is no edge of the layout but the defect's own. What noise leaves is taken off.
    """
    near = np.ones((5, 5), np.uint8)
    of_both = [cv2.dilate(np.hypot(*gradients(one, 1.5)), near) for one in (image, matched)]
    strength = np.minimum(*of_both)
    return np.asarray(np.maximum(strength - np.percentile(strength, 20), 0), np.float32)


def _standardised(smooth: Sequence[Floats], edges: Floats, level: Floats, judged: Bools, learns: Bools) -> Floats:
    """Return the largest |residual| (H, W) beyond the slack, over the spread at such gray levels and edges.

    Args:
        smooth: residuals (H, W), smoothed by filters that differ in direction only.
        edges: see ``_edge_strength``.
        level: gray levels.
        judged: where there is an answer; 0 elsewhere.
        learns: pixels that say how far the two differ without a defect.
    """
    largest = np.abs(smooth[0])
    for one in smooth[1:]:
        np.maximum(largest, np.abs(one), out=largest)
    chosen = np.flatnonzero(learns)[:: max(1, np.count_nonzero(learns) // _SAMPLE)]
    sizes = np.stack([np.abs(one.ravel()[chosen]) for one in smooth])
    levels, strengths = level.ravel()[chosen], edges.ravel()[chosen]
    flat = strengths <= np.median(strengths)
    of_level = _spreads(levels[flat], sizes[:, flat])
    ratios = sizes / _looked_up(levels, of_level)
    centres, spreads = _spreads(strengths, ratios)
    of_edges = centres, np.maximum(np.maximum.accumulate(spreads), 1)
    spread = _looked_up(level, of_level) * _looked_up(edges, of_edges)
    beyond = np.maximum(largest - _SLACK_PX * edges, 0)
    return np.where(judged, beyond / spread, np.float32(0))


def _spreads(keys: Floats, sizes: NDArray[np.floating]) -> tuple[Floats, Floats]:
    """Return the standard deviation of residuals in bins of a key, as centres and values (n,): robust, and of the tail.

    Args:
        keys: (n,) gray level or edge strength.
        sizes: (filters, n) |residual|.
    """
    parts = [part for part in np.array_split(np.argsort(keys, kind="stable"), _N_BINS) if len(part)]
    centres = [float(np.median(keys[part])) for part in parts]
    spreads = []
    for part in parts:
        middle, tail = np.percentile(sizes[:, part], [50, 95])
        spreads.append(max(float(middle) / 0.6745, float(tail) / 1.96, _LEAST_SPREAD))
    return np.array(centres, np.float32), np.array(spreads, np.float32)


def _looked_up(keys: Floats, table: tuple[Floats, Floats]) -> Floats:
    """Interpolate a table at every key, through 256 steps: a field has a million keys."""
    centres, values = table
    low, high = float(centres[0]), float(centres[-1])
    if high - low < 1e-6:
        return np.full(keys.shape, values[-1], np.float32)
    steps = np.interp(np.linspace(low, high, 256), centres, values).astype(np.float32)
    return np.asarray(steps[np.clip((keys - low) * (255 / (high - low)), 0, 255).astype(np.uint8)], np.float32)
