"""Is there an image on a page, and is it a good one? Measured on the pixels of the field, before any model looks.

    flag        measure                                                                     unit
    blank       span of the gray levels after a 3 x 3 median                                gray levels
    info-bar    share of pixels that are flat background or text                            share
    saturated   pixels at 0 or 255                                                          share
    faint       span of the middle 99 % of the gray levels                                  gray levels
    defocus     sigma of the Gaussian that would make sharp edges as soft, see ``_blur_px`` px
    streaks     brightness of rows against their neighbours, see ``_streaks``               share of the gray range
    drift       sideways shift of rows against their neighbours, see ``_drift_px``          px, root mean square

A page that is blank or an info bar alone holds no image, and nothing else is measured on it. The other flags are of
images. What cannot be measured is not flagged: a bare wafer has no edges to be soft.

Focus and drift are measured on nine tiles of a large field at its own scale, which is enough: they are of all of it.
"""

from collections.abc import Sequence
from itertools import pairwise

import cv2
import numpy as np
from numpy.typing import NDArray

from semwatch.defects import Micrograph, Quality, QualityFlag, QualityName
from semwatch.errors import ImageError
from semwatch.intake.info_bar import is_only_bar
from semwatch.settings.recipe import QualityRule

Gray = NDArray[np.uint8]
Real = NDArray[np.float32]

TILE_PX, TILES = 128, 3
"""Side of a tile, and how many there are along either axis; a field that is not larger than all of them is one tile."""
MIN_SIDE_PX = 96
"""Streaks and drift are not measured on a lower or narrower field: there are too few rows to tell them from layout."""
SEGMENTS = 8
"""Rows are averaged in as many parts: a streak may begin or end at a bright feature."""

# Set on synthetic degradations and real images, see docs/results.md.
_TWO_TONED = 0.95
_MIN_WHITENESS, _MIN_FLATNESS, _MIN_ROWS = 0.75, 0.3, 0.2
_MIN_EXPLAINED = 0.15
_MIN_EDGE_ENERGY, _MIN_EDGE_SNR, _MIN_EDGE_COVER = 0.05, 5.0, 0.15
_SCALES = (2.0, 4.0)
_SHADING_PX = 16.0
_BLOCK_PX = 32
_ROWS_AROUND = 15


def admit(page: Micrograph, rule: QualityRule) -> Quality:
    """Judge a page, and refuse its file where the recipe says so.

    Raises:
        ImageError: the page holds no image, or a bad one, and the recipe's action is ``quarantine``.
    """
    found = judge(page.field, rule)
    if not found.is_image and rule.no_image == "quarantine":
        raise ImageError(f"page {page.page} holds no image: {found.in_words}; see quality.no_image in the recipe")
    if found.is_image and found.flags and rule.bad_quality == "quarantine":
        raise ImageError(f"page {page.page} is a bad image: {found.in_words}; see quality.bad_quality in the recipe")
    return found


def judge(field: Gray, rule: QualityRule) -> Quality:
    """Judge one field.

    Args:
        field: (H, W) gray, any size.
        rule: the limits.
    """
    counts = _histogram(field)
    if (blank := _blank(field, rule)) is not None:
        return Quality((blank,), is_image=False)
    if (bar := _info_bar(field, counts)) is not None:
        return Quality((bar,), is_image=False)
    span = _span(counts)
    tiles = _tiles(field)
    noise = _noise(tiles)
    found = [
        _above("saturated", float(counts[0] + counts[255]), rule.max_saturated),
        QualityFlag("faint", span, rule.min_range) if span < rule.min_range else None,
        _above("defocus", _blur_px(tiles, noise), rule.max_blur_px),
        _above("streaks", _streaks(field, noise) / max(span, 1.0), rule.max_streaks),
        _above("drift", _drift_px(tiles), rule.max_drift_px),
    ]
    return Quality(tuple(flag for flag in found if flag is not None))


def _above(name: QualityName, measure: float, limit: float) -> QualityFlag | None:
    return QualityFlag(name, measure, limit) if measure > limit else None


# --- no image ------------------------------------------------------------------------------------------------------


def _blank(field: Gray, rule: QualityRule) -> QualityFlag | None:
    """Flag a field of one level, or of dark noise alone. A particle of nine pixels on black is enough for an image.

    The 3 x 3 median takes out single hot pixels. Noise counts: at one level, it must be below what eight bits show.
    """
    calm = np.asarray(cv2.medianBlur(field, 3) if min(field.shape) >= 3 else field, np.uint8)
    low, high = float(calm.min()), float(calm.max())
    if low >= 255 - rule.blank_margin or high <= rule.blank_margin:
        return QualityFlag("blank", high - low, rule.blank_margin)
    if high - low <= rule.blank_range and np.ptp(np.percentile(field, [0.1, 99.9])) <= rule.blank_range:
        return QualityFlag("blank", high - low, rule.blank_range)
    return None


def _info_bar(field: Gray, counts: NDArray[np.float64]) -> QualityFlag | None:
    """Flag a field of two tones that reads as lines of text; most fields are turned away by their histogram."""
    background = int(counts.argmax())
    two_toned = float(counts[max(0, background - 12) : background + 13].sum())
    two_toned += float(counts[: max(0, background - 100)].sum() + counts[background + 101 :].sum())
    if two_toned < _TWO_TONED or not is_only_bar(field):
        return None
    return QualityFlag("info-bar", two_toned, _TWO_TONED)


# --- gray levels ---------------------------------------------------------------------------------------------------


def _histogram(field: Gray) -> NDArray[np.float64]:
    """(256,) share of the pixels at each gray level; of a high field, every second or third row is enough."""
    rows = np.ascontiguousarray(field[:: max(1, len(field) // 1024)])
    counts = cv2.calcHist([rows], [0], None, [256], [0, 256])
    return counts.ravel().astype(np.float64) / rows.size


def _span(counts: NDArray[np.float64]) -> float:
    """Gray levels between the 0.5 and the 99.5 percentile."""
    low, high = np.searchsorted(np.cumsum(counts), [0.005, 0.995])
    return float(high - low)


def _tiles(field: Gray) -> list[Real]:
    """Cut the tiles that focus and drift are measured on."""
    H, W = field.shape
    if H * W <= (TILES * TILE_PX) ** 2:
        return [field.astype(np.float32)]
    h, w = min(H, TILE_PX), min(W, TILE_PX)
    tops = [round(i * (H - h) / (TILES - 1)) for i in range(TILES)]
    lefts = [round(i * (W - w) / (TILES - 1)) for i in range(TILES)]
    return [field[top : top + h, left : left + w].astype(np.float32) for top in tops for left in lefts]


def _noise(tiles: Sequence[Real]) -> float:
    """Standard deviation of the noise in gray levels, from the median of mixed second differences.

    Lines along either axis drop out of the differences, and the median passes over what edges are left. It is the
    median of whole numbers: within the step it is interpolated, so that fine noise is not told in thirds.
    """
    mixed = [tile[1:, 1:] - tile[1:, :-1] - tile[:-1, 1:] + tile[:-1, :-1] for tile in tiles]
    sizes = np.abs(np.concatenate([part.ravel() for part in mixed])).astype(np.int64)
    if not sizes.size:
        return 0.0
    below = np.cumsum(np.bincount(sizes)) / sizes.size
    at = int(np.searchsorted(below, 0.5))
    under = below[at - 1] if at else 0.0
    median = max(0.0, at - 0.5 + (0.5 - under) / (below[at] - under)) if at else 0.5 * 0.5 / below[0]
    return float(median / 0.6745 / 2)


# --- focus ---------------------------------------------------------------------------------------------------------


def _blur_px(tiles: Sequence[Real], noise: float) -> float:
    """Softness of the edges as the sigma of a Gaussian in px; 0 for sharp edges, and where there are too few to tell.

    The gradient energy of edges is taken at two scales, each less what the noise has in it. Its ratio tells their
    softness, whatever contrast and number of the edges; lines and dots that are finer than the scales look sharp.
    Shading is taken away first: it is soft in every focus. Edges must stand above the noise and be spread over the
    field: one soft spot on a bare wafer is no sign of focus.

    Source: ratio of two blurs, Zhuo and Sim 2011, Defocus map estimation from a single image, section 3.
    """
    fine, coarse = _edge_energies(tiles)
    blocks = np.concatenate([_in_blocks(energy).ravel() for energy in coarse])
    n_fine, n_coarse = (_noise_energy(scale) * noise**2 for scale in _SCALES)
    signal_fine = float(np.mean([energy.mean() for energy in fine])) - n_fine
    signal_coarse = float(np.mean([energy.mean() for energy in coarse])) - n_coarse
    is_seen = signal_coarse >= max(_MIN_EDGE_ENERGY, _MIN_EDGE_SNR * n_coarse) and signal_fine > 0
    if not is_seen or _cover(blocks) < _MIN_EDGE_COVER:
        return 0.0
    softness = np.linspace(0, 12, 121)
    ratio = _step_energy(softness, _SCALES[1]) / _step_energy(softness, _SCALES[0])
    return float(np.interp(signal_coarse / signal_fine, ratio, softness))


def _step_energy(softness_px: NDArray[np.float64], scale: float) -> NDArray[np.float64]:
    """Gradient energy of a step edge of that softness at a scale, up to a factor; what is shading is taken away.

    Its gradient is a Gaussian of sigma s less one of sigma S, and the integral of a product of two Gaussians is known.
    """
    s2 = softness_px**2 + scale**2
    S2 = s2 + _SHADING_PX**2
    return np.asarray(1 / np.sqrt(s2) + 1 / np.sqrt(S2) - 2 * np.sqrt(2 / (s2 + S2)), np.float64)


def _edge_energies(tiles: Sequence[Real]) -> tuple[list[Real], list[Real]]:
    flattened = [tile - _shading(tile) for tile in tiles if min(tile.shape) > _BLOCK_PX]
    flattened = flattened or [np.zeros((_BLOCK_PX, _BLOCK_PX), np.float32)]
    fine, coarse = ([_energy(tile, scale) for tile in flattened] for scale in _SCALES)
    return fine, coarse


def _shading(tile: Real) -> Real:
    """What a Gaussian of ``_SHADING_PX`` leaves, made at a quarter of the size."""
    H, W = tile.shape
    small = cv2.resize(tile, (max(1, W // 4), max(1, H // 4)), interpolation=cv2.INTER_AREA)
    smooth = cv2.GaussianBlur(small, (0, 0), _SHADING_PX / 4)
    return np.asarray(cv2.resize(smooth, (W, H), interpolation=cv2.INTER_LINEAR), np.float32)


def _energy(tile: Real, scale: float) -> Real:
    """(H - 2, W - 2) squared gradient after a Gaussian of sigma ``scale``."""
    seen = cv2.GaussianBlur(tile, (0, 0), scale)
    across, down = seen[1:-1, 2:] - seen[1:-1, :-2], seen[2:, 1:-1] - seen[:-2, 1:-1]
    return np.asarray((across * across + down * down) / 4, np.float32)


def _noise_energy(scale: float) -> float:
    """What ``_energy`` gives of white noise of variance 1."""
    point = np.zeros((65, 65), np.float32)
    point[32, 32] = 1
    return float(_energy(point, scale).sum())


def _in_blocks(energy: Real) -> Real:
    H, W = energy.shape
    size_wh = max(1, W // _BLOCK_PX), max(1, H // _BLOCK_PX)
    return np.asarray(cv2.resize(energy, size_wh, interpolation=cv2.INTER_AREA), np.float32)


def _cover(energies: NDArray[np.floating]) -> float:
    """Share of the places that hold the energy: 1 where all have the same, 1 / n where one has it all."""
    mean2 = float((energies.astype(np.float64) ** 2).mean())
    return float(energies.mean(dtype=np.float64)) ** 2 / mean2 if mean2 > 0 else 0.0


# --- rows against rows ---------------------------------------------------------------------------------------------


def _streaks(field: Gray, noise: float) -> float:
    """Brightness of rows against their neighbours in gray levels, beyond what noise explains; 0 where it is layout.

    Charging and unsteady detectors shift whole rows, or parts of them, each by its own amount. Layout has rows that
    differ as well, but its edges are never sharper than the beam, it repeats, or there are few of them. So the offsets
    must be white: their fourth difference about as large as their first; their spectrum without peaks; and on many
    rows.
    """
    H, W = field.shape
    if min(H, W) < MIN_SIDE_PX:
        return 0.0
    edges = np.linspace(0, W, SEGMENTS + 1).astype(int)
    parts = [cv2.reduce(field[:, a:b], 1, cv2.REDUCE_AVG, dtype=cv2.CV_32F) for a, b in pairwise(edges)]
    rows = np.hstack(parts).astype(np.float64)
    first, fourth = np.diff(rows, axis=0) / np.sqrt(2), np.diff(rows, n=4, axis=0) / np.sqrt(70)
    power1, power4 = float((first**2).mean()), float((fourth**2).mean())
    excess = power4 - noise**2 * SEGMENTS / W
    if excess <= 0 or power4 < _MIN_WHITENESS**2 * power1:
        return 0.0
    spectrum = (np.abs(np.fft.rfft(first, axis=0)[1:]) ** 2).mean(axis=1) + 1e-9
    flatness = float(np.exp(np.log(spectrum).mean()) / spectrum.mean())
    if flatness < _MIN_FLATNESS or _cover((fourth**2).mean(axis=1)) < _MIN_ROWS:
        return 0.0
    return float(np.sqrt(excess))


def _drift_px(tiles: Sequence[Real]) -> float:
    """Sideways shift of rows against their neighbours, root mean square in px; 0 where shifts do not explain the rows.

    Each row is fitted to the one above by a shift (least squares, Lucas and Kanade 1981 in one dimension). What stays
    the same over many rows is a slanted line and is taken away; what is left must explain a good part of all
    differences between rows, which noise and layout do not.
    """
    shifted, explained, differences, weights = 0.0, 0.0, 0.0, 0.0
    for tile in tiles:
        if min(tile.shape) < MIN_SIDE_PX:
            continue
        smooth = cv2.sepFilter2D(tile, -1, cv2.getGaussianKernel(11, 1.5), np.ones((1, 1)))
        slope = (smooth[:, 2:] - smooth[:, :-2]) / 2
        slope = (slope[1:] + slope[:-1]) / 2
        step = (smooth[1:] - smooth[:-1])[:, 1:-1]
        weight = np.einsum("ij,ij->i", slope, slope).astype(np.float64)
        moment = -np.einsum("ij,ij->i", step, slope).astype(np.float64)
        steady = _around(moment) / np.maximum(_around(weight), 1e-6)
        shift = np.clip(moment / np.maximum(weight, 1e-6) - steady, -5, 5)
        shifted += float((weight * shift**2).sum())
        differences += float(np.einsum("ij,ij->", step, step))
        weights += float(weight.sum())
    explained = shifted
    if weights <= 0 or differences <= 0 or explained < _MIN_EXPLAINED * differences:
        return 0.0
    return float(np.sqrt(shifted / weights))


def _around(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean of each value and its neighbours, mirrored at the ends."""
    padded = np.pad(values, _ROWS_AROUND // 2, mode="reflect")
    return np.convolve(padded, np.full(_ROWS_AROUND, 1 / _ROWS_AROUND), "valid")
