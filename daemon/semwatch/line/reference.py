"""An inspected field against a reference of the same place: register, compare, score. Pure functions on plain arrays.

    inspected, reference -> register -> aligned reference, overlap -> compare -> difference map -> score_map

What both images show is layout; what only one of them shows is a defect. So a page with a valid reference needs no
likeness within itself, which a logic layout does not have.

Registration. The correlation of the gradient *vectors* is computed for every whole shift at once (Padfield 2012: masked
normalised correlation by FFT), because the windowed phase correlation fades where the overlap is small; the best few
peaks are refined by ECC (Evangelidis and Psarakis 2008) on gradient images, and rows are then moved one by one against
each other as far as a raster scan drifts. Gradients do not see brightness and hardly see charging.

Comparison. Gain and offset are fitted locally, the residual is smoothed at several scales, lowered by what a
displacement of a pixel explains, and divided by a spread that the pair itself gives as a function of gray level and of
edge strength. So the map is in standard deviations, with heavier noise and rougher edges already paid for.

The difference alone decides: taken together with the detector's map it found less, see ``docs/reference.md``.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from semwatch.defects import Micrograph, Reference, ScoreMap
from semwatch.settings.recipe import Recipe
from semwatch.settings.recipe import Reference as Rule

Floats = NDArray[np.float32]
Bools = NDArray[np.bool_]

Compared = tuple[ScoreMap | None, Reference | None]
"""What ``compared`` returns."""

CELL_PX = 8
"""Side of a cell of the difference map, in pixels of the field."""

_RULE = Recipe().reference
"""Where nothing is said, the default recipe holds."""

LIKELY = 0.6
"""Share of the threshold above which a cell says no more how far the two differ without a defect."""
GOES_ON = 0.7
"""Share of the threshold above which a defect goes on."""
MAX_PLACES = 16
"""A reference that differs in more places shows another place; ``register`` cannot see it where a layout repeats."""
ASPECT_TOLERANCE = 0.02
"""A reference of another size is resampled if its sides have the same ratio within this."""

_COARSE_PX = 384
"""Longer side at which shifts are searched."""
_FINE_PX = 1024
"""Longer side at which the shift is refined."""
_N_PEAKS, _LIKELY = 4, 0.05
"""Most shifts that are refined, and how far below the best correlation they may lie before that."""
_TIE = 0.015
"""Correlations that differ by less are equal, as of neighbouring periods: the smaller shift is taken."""
_BLOCKS, _AGREEING = 12, 0.8
"""Blocks along each side of the field, and the share of them whose correlation counts."""
_MIN_TEXTURE = 6.0
_NOISE_IN_GRADIENT = 1 / (8 * math.pi)
"""Variance of one derivative of white noise after a Gaussian of sigma, times sigma^4 (Scharr widens it a little)."""
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


@dataclass(frozen=True, slots=True, eq=False)
class Registration:
    """A reference laid over an inspected field, or the reason why it could not be."""

    reason: str
    """Why the reference cannot be used; empty where it can."""
    shift_px: tuple[float, float] | None = None
    """A point (x, y) in the middle of the inspected field lies in the reference at (x + dx, y + dy)."""
    correlation: float | None = None
    """Of the gradient fields in the overlap after alignment, range [-1, 1]."""
    aligned: Floats | None = None
    """(H, W) gray levels of the reference as the inspected field sees them; None where there is a reason."""
    overlap: Bools | None = None
    """(H, W) True where the inspected field has a counterpart."""


# --- registration --------------------------------------------------------------------------------------------------


def register(
    inspected: NDArray[np.uint8],
    reference: NDArray[np.uint8],
    *,
    max_shift: float = _RULE.max_shift,
    min_correlation: float = _RULE.min_correlation,
) -> Registration:
    """Lay a reference over an inspected field.

    Args:
        inspected: (H, W) gray.
        reference: (h, w) gray; of another size only if the ratio of the sides is the same.
        max_shift: as a share of each side.
        min_correlation: see ``gradient_correlation``.

    Returns:
        The reference as the inspected field sees it; or the reason, in plain words, why it cannot be used.
    """
    reference_f, reason = _same_size(inspected, reference)
    if reason:
        return Registration(reason)
    inspected_f = inspected.astype(np.float32)
    for image, name in ((inspected_f, "inspected image"), (reference_f, "reference")):
        if texture(image) < _MIN_TEXTURE:
            return Registration(f"no texture: the {name} shows nothing that could be registered")
    H, W = inspected.shape
    scale = min(1.0, _FINE_PX / max(H, W))
    fine, fine_reference = _shrunk(inspected_f, scale), _shrunk(reference_f, scale)
    warp, correlation = _best_warp(fine, fine_reference, max_shift)
    shift_px = _shift_at_centre(warp, fine.shape, scale)
    if correlation < min_correlation:
        return Registration(
            f"another place: the images agree with a correlation of {correlation:.2f}, under {min_correlation}",
            shift_px,
            correlation,
        )
    too_far = abs(shift_px[0]) > max_shift * W + 2 or abs(shift_px[1]) > max_shift * H + 2
    if too_far:
        return Registration(
            f"too little overlap: the reference is shifted by {shift_px[0]:.0f}, {shift_px[1]:.0f} px, over "
            f"{max_shift:.0%} of the field",
            shift_px,
            correlation,
        )
    maps = _sampling_maps(warp, (H, W), scale)
    maps = _follow_rows(inspected_f, reference_f, maps)
    aligned, overlap = _sample(reference_f, maps)
    correlation = gradient_correlation(inspected_f, aligned, overlap)
    return Registration("", shift_px, correlation, aligned, overlap)


def _same_size(inspected: NDArray[np.uint8], reference: NDArray[np.uint8]) -> tuple[Floats, str]:
    (H, W), (h, w) = inspected.shape, reference.shape
    if (h, w) == (H, W):
        return reference.astype(np.float32), ""
    if abs(h * W / (w * H) - 1) > ASPECT_TOLERANCE:
        return reference.astype(np.float32), f"another size: the reference has {w} x {h} px, the image {W} x {H} px"
    interpolation = cv2.INTER_AREA if h >= H else cv2.INTER_CUBIC
    return np.asarray(cv2.resize(reference.astype(np.float32), (W, H), interpolation=interpolation), np.float32), ""


def texture(image: Floats) -> float:
    """Return how far the strongest edges of an image (H, W) stand out of its noise; 0 for a constant image.

    It is the 99 % point of the smoothed gradient over the gradient that the image's white noise leaves after smoothing:
    about 3 where there is noise alone.
    """
    gx, gy = _gradients(image, 2.0)
    strength = float(np.percentile(np.hypot(gx, gy), 99))
    expected = max(noise(image), 0.25) * math.sqrt(_NOISE_IN_GRADIENT) / 4.0
    return strength / expected


def noise(image: Floats) -> float:
    """Return the standard deviation of an image's white noise, robustly.

    Source: Immerkaer 1996, with the median in place of the mean: edges are few.
    """
    kernel = np.array([[1, -2, 1], [-2, 4, -2], [1, -2, 1]], np.float32)
    return float(np.median(np.abs(cv2.filter2D(image, cv2.CV_32F, kernel)))) / (0.6745 * 6)


def gradient_correlation(a: Floats, b: Floats, overlap: Bools) -> float:
    """Return the correlation of the gradient vectors of two images (H, W) inside the overlap, range [-1, 1].

    What white noise adds to the energy of the gradients is taken off, so that two noisy scans of one place come near to
    1 as well, as far as there is something beside noise. The fifth of the field that agrees least is left out: a large
    defect is no other place. 0 where one is flat.
    """
    sigma = 1.5
    (ax, ay), (bx, by) = _gradients(a, sigma), _gradients(b, sigma)
    inside = cv2.erode(overlap.view(np.uint8), np.ones((5, 5), np.uint8), borderValue=0).astype(np.float32)
    share, both, of_a, of_b = (
        cv2.resize(inside * values, (_BLOCKS, _BLOCKS), interpolation=cv2.INTER_AREA).astype(np.float64).ravel()
        for values in (np.ones_like(a), ax * bx + ay * by, ax * ax + ay * ay, bx * bx + by * by)
    )
    noise_a, noise_b = (2 * noise(image) ** 2 * _NOISE_IN_GRADIENT / sigma**4 for image in (a, b))
    disagreement = of_a + of_b - 2 * both - (noise_a + noise_b) * share
    kept = np.argsort(disagreement, kind="stable")[: round(_AGREEING * len(share))]
    energy_a, energy_b = (
        max(float(energy[kept].sum() - of_noise * share[kept].sum()), 0.25 * float(energy[kept].sum()))
        for energy, of_noise in ((of_a, noise_a), (of_b, noise_b))
    )
    product = energy_a * energy_b
    return float(np.clip(both[kept].sum() / math.sqrt(product), -1, 1)) if product > 1e-9 else 0.0


def _gradients(image: Floats, sigma_px: float) -> tuple[Floats, Floats]:
    smooth = cv2.GaussianBlur(image, (0, 0), sigma_px)
    gx = cv2.Scharr(smooth, cv2.CV_32F, 1, 0, scale=1 / 32)
    gy = cv2.Scharr(smooth, cv2.CV_32F, 0, 1, scale=1 / 32)
    return np.asarray(gx, np.float32), np.asarray(gy, np.float32)


def _shrunk(image: Floats, scale: float) -> Floats:
    if scale >= 1:
        return image
    H, W = image.shape
    size_wh = max(1, round(W * scale)), max(1, round(H * scale))
    return np.asarray(cv2.resize(image, size_wh, interpolation=cv2.INTER_AREA), np.float32)


def _best_warp(inspected: Floats, reference: Floats, max_shift: float) -> tuple[Floats, float]:
    """Return the affine warp (2, 3) from inspected to reference pixels, and the correlation of gradients under it.

    Likely shifts are compared on shrunk images; the best one is refined on these.
    """
    scale = min(1.0, _COARSE_PX / max(inspected.shape))
    coarse, coarse_reference = _shrunk(inspected, scale), _shrunk(reference, scale)
    tried = []
    for shift_xy in _shifts(coarse, coarse_reference, max_shift):
        warp = _refined(coarse, coarse_reference, shift_xy)
        tried.append((_correlation_under(coarse, coarse_reference, warp), warp))
    top = max(correlation for correlation, _ in tried)
    correlation, warp = min((one for one in tried if one[0] >= top - _TIE), key=lambda one: np.hypot(*one[1][:, 2]))
    if scale == 1:
        return warp, correlation
    warp = warp.copy()
    # Pixel centres: x_fine = (x_coarse + 1/2) / scale - 1/2.
    centre = np.full(2, 0.5, np.float32)
    warp[:, 2] = (warp[:, 2] + centre - warp[:, :2] @ centre) / scale - centre + warp[:, :2] @ centre
    warp = _refined(inspected, reference, warp)
    return warp, _correlation_under(inspected, reference, warp)


def _shifts(inspected: Floats, reference: Floats, max_shift: float) -> list[Floats]:
    """Return likely shifts of these images as warps (2, 3): peaks of the correlation nearly as high as the highest."""
    surface, reach_yx = _correlations(inspected, reference, max_shift)
    lowest = float(surface.max()) - _LIKELY
    apart = max(3, round(0.02 * max(inspected.shape)))
    found = []
    for _ in range(_N_PEAKS):
        row, column = (int(index) for index in np.unravel_index(int(surface.argmax()), surface.shape))
        if surface[row, column] < lowest:
            break
        found.append(np.array([[1, 0, column - reach_yx[1]], [0, 1, row - reach_yx[0]]], np.float32))
        surface[max(0, row - apart) : row + apart + 1, max(0, column - apart) : column + apart + 1] = -2
    return found


def _correlations(a: Floats, b: Floats, max_shift: float) -> tuple[Floats, tuple[int, int]]:
    """Return the correlation of gradient vectors for every whole shift within the limit, and where shift 0 lies.

    Entry [reach_y + dy, reach_x + dx] compares a(x, y) with b(x + dx, y + dy) where both exist.
    """
    H, W = a.shape
    reach = math.ceil(max_shift * H) + 1, math.ceil(max_shift * W) + 1
    size = cv2.getOptimalDFTSize(H + reach[0]), cv2.getOptimalDFTSize(W + reach[1])
    (ax, ay), (bx, by) = _gradients(a, 1.5), _gradients(b, 1.5)
    fa, fb = (np.fft.fft2(gx + 1j * gy, size) for gx, gy in ((ax, ay), (bx, by)))
    ea, eb = (np.fft.rfft2(gx * gx + gy * gy, size) for gx, gy in ((ax, ay), (bx, by)))
    ones = np.fft.rfft2(np.ones((H, W), np.float32), size)
    both = np.fft.ifft2(np.conj(fa) * fb).real
    energy_a = np.fft.irfft2(np.conj(ea) * ones, size)
    energy_b = np.fft.irfft2(np.conj(ones) * eb, size)
    energy = np.maximum(energy_a, 0) * np.maximum(energy_b, 0)
    least = 1e-4 * float(energy[0, 0]) + 1e-9
    surface = both / np.sqrt(np.maximum(energy, least))
    rows, columns = np.arange(-reach[0], reach[0] + 1), np.arange(-reach[1], reach[1] + 1)
    return surface[np.ix_(rows, columns)].astype(np.float32), reach


def _refined(inspected: Floats, reference: Floats, warp: Floats) -> Floats:
    """Return the affine warp (2, 3), inspected to reference pixels, that ECC finds from another; that one if none."""
    a, b = (np.asarray(np.hypot(*_gradients(image, 1.5)), np.float32) for image in (inspected, reference))
    everywhere = np.full(a.shape, 255, np.uint8)
    for motion in (cv2.MOTION_TRANSLATION, cv2.MOTION_AFFINE):
        criteria = (cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_COUNT, 40, 1e-4)
        try:
            _, answer = cv2.findTransformECC(a, b, warp.copy(), motion, criteria, everywhere, 5)
        except cv2.error:
            return warp
        found = np.asarray(answer, np.float32)
        if not _is_near(found, warp, inspected.shape):
            return warp
        warp = found
    return warp


def _is_near(found: Floats, before: Floats, size_hw: tuple[int, ...]) -> bool:
    """Say whether a refined warp is one that two scans of one recipe can differ by: 3 %, and 4 % of the field."""
    if not np.isfinite(found).all() or np.abs(found[:, :2] - np.eye(2)).max() > 0.03:
        return False
    H, W = size_hw
    centre = np.array([W / 2, H / 2, 1], np.float32)
    return bool(np.abs((found - before) @ centre).max() <= 0.02 * max(size_hw) + 3)


def _correlation_under(inspected: Floats, reference: Floats, warp: Floats) -> float:
    H, W = inspected.shape
    aligned, overlap = _sample(reference, _sampling_maps(warp, (H, W), 1.0))
    return gradient_correlation(inspected, aligned, overlap)


def _shift_at_centre(warp: Floats, size_hw: tuple[int, ...], scale: float) -> tuple[float, float]:
    centre = np.array([size_hw[1] / 2, size_hw[0] / 2])
    dx, dy = (warp[:, :2] @ centre + warp[:, 2] - centre) / scale
    return float(dx), float(dy)


def _sampling_maps(warp: Floats, size_hw: tuple[int, int], scale: float) -> tuple[Floats, Floats]:
    """Return x and y maps (H, W): where each inspected pixel lies in the reference, the warp being of a shrunk one."""
    H, W = size_hw
    x = (np.arange(W, dtype=np.float32)[None] + 0.5) * scale - 0.5
    y = (np.arange(H, dtype=np.float32)[:, None] + 0.5) * scale - 0.5
    maps = [(row[0] * x + row[1] * y + row[2] + 0.5) / scale - 0.5 for row in warp]
    return np.asarray(maps[0], np.float32), np.asarray(maps[1], np.float32)


def _sample(image: Floats, maps: tuple[Floats, Floats]) -> tuple[Floats, Bools]:
    H, W = image.shape
    aligned = cv2.remap(image, maps[0], maps[1], cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE)
    overlap = (maps[0] >= 0) & (maps[0] <= W - 1) & (maps[1] >= 0) & (maps[1] <= H - 1)
    return np.asarray(aligned, np.float32), np.asarray(overlap, np.bool_)


def _follow_rows(inspected: Floats, reference: Floats, maps: tuple[Floats, Floats]) -> tuple[Floats, Floats]:
    """Move bands of rows by what is left of the drift: a raster scan is displaced by rows, not by pixels."""
    H = len(inspected)
    for _ in range(3):
        aligned, overlap = _sample(reference, maps)
        step_x, step_y = _row_steps(inspected, aligned, overlap)
        if max(np.abs(step_x).max(), np.abs(step_y).max()) < 0.02:
            break
        maps = maps[0] + step_x[:, None], maps[1] + step_y[:, None]
    assert len(maps[0]) == H
    return maps


def _row_steps(inspected: Floats, aligned: Floats, overlap: Bools) -> tuple[Floats, Floats]:
    """Return displacements (H,) along x and y, one step of Lucas and Kanade for each row with its neighbours."""
    a, b = _band_passed(inspected, overlap), _band_passed(aligned, overlap)
    gx, gy = _gradients(b, 0.8)
    weight = cv2.erode(overlap.view(np.uint8), np.ones((7, 7), np.uint8), borderValue=0).astype(np.float32)
    spread = max(float(np.median(np.abs(a - b)[overlap])) / 0.6745, 1e-3)
    left = a - b
    weight = weight / (1 + (left / (3 * spread)) ** 2)  # a defect has no vote
    parts = [np.sum(weight * p, axis=1) for p in (gx * gx, gx * gy, gy * gy, gx * left, gy * left)]
    sigma = max(4.0, len(a) / 24)
    xx, xy, yy, xl, yl = (cv2.GaussianBlur(p.astype(np.float64)[:, None], (0, 0), sigma)[:, 0] for p in parts)
    ridge = 0.05 * float(np.mean(xx + yy)) + 1e-6
    xx, yy = xx + ridge, yy + ridge
    determinant = xx * yy - xy * xy
    step_x, step_y = (yy * xl - xy * yl) / determinant, (xx * yl - xy * xl) / determinant
    return np.clip(step_x, -1, 1).astype(np.float32), np.clip(step_y, -1, 1).astype(np.float32)


def _band_passed(image: Floats, overlap: Bools) -> Floats:
    """Fine structure in standard deviations: without brightness, charging and gain."""
    fine = cv2.GaussianBlur(image, (0, 0), 1.2) - cv2.GaussianBlur(image, (0, 0), 12.0)
    return np.asarray(fine / max(float(fine[overlap].std()), 1e-3), np.float32)


# --- comparison ----------------------------------------------------------------------------------------------------


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
    of_both = [cv2.dilate(np.hypot(*_gradients(one, 1.5)), near) for one in (image, matched)]
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


# --- the line ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Differing:
    """What differs, on the working grid."""

    mask: Bools
    """(g, g) True on defects."""
    values: Floats
    """(g, g) the difference map, no maximum of it lost."""
    saliency: Floats
    """(g, g) in [0, 1]."""


def compared(page: Micrograph, given: tuple[str, Micrograph | None, str] | None, rule: Rule = _RULE) -> Compared:
    """Compare a page with its reference.

    Args:
        page: the inspected page.
        given: name of the reference, the reference, and why there is none; None where none is asked for.
        rule: the recipe's.

    Returns:
        The difference as a score map, None where the page must be judged alone; and what became of the reference, None
        where none was asked for.
    """
    if given is None:
        return None, None
    name, other, reason = given
    if other is None:
        return None, Reference(name, reason)
    met = register(page.field, other.field, max_shift=rule.max_shift, min_correlation=rule.min_correlation)
    if met.aligned is None or met.overlap is None:
        return None, Reference(name, met.reason, met.shift_px, met.correlation)
    values = compare(page.field, met.aligned, met.overlap, threshold=rule.threshold)
    n_places = _count(values > rule.threshold)
    if n_places > MAX_PLACES:
        reason = f"another place: the images differ in {n_places} places, over {MAX_PLACES}"
        return None, Reference(name, reason, met.shift_px, met.correlation)
    matched = match_gray(page.field.astype(np.float32), met.aligned, met.overlap)
    shown = np.clip(np.rint(matched), 0, 255).astype(np.uint8)
    difference = ScoreMap(values, float(values.max()))
    return difference, Reference(name, "", met.shift_px, met.correlation, shown, met.overlap)


def binarize(values: Floats, *, threshold: float, grid_px: int) -> Differing:
    """Return what differs on the working grid (g, g): places above the threshold, with what hangs on to them.

    A place goes on as far as the difference stays above ``GOES_ON`` thresholds (hysteresis, Canny 1986).
    """
    shown = _on_grid(values, grid_px)
    low = GOES_ON * threshold
    _, labels = cv2.connectedComponents((shown > low).view(np.uint8), connectivity=8)
    is_defect = np.zeros(int(labels.max()) + 1, np.bool_)
    is_defect[labels[shown > threshold]] = True
    is_defect[0] = False
    saliency = np.clip((shown - low) / (2 * threshold - low), 0, 1)
    return Differing(is_defect[labels], shown, np.asarray(saliency, np.float32))


def _on_grid(values: Floats, grid_px: int) -> Floats:
    """Return a map (h, w) on a grid (g, g): a grid cell has the largest value of the cells that it touches."""
    h, w = values.shape
    rows, columns = ((np.arange(grid_px) * n // grid_px, -(-(np.arange(grid_px) + 1) * n // grid_px)) for n in (h, w))
    by_row = np.stack([values[first:last].max(axis=0) for first, last in zip(*rows, strict=True)])
    return np.stack([by_row[:, first:last].max(axis=1) for first, last in zip(*columns, strict=True)], axis=1)


def _count(mask: Bools) -> int:
    return int(cv2.connectedComponents(mask.view(np.uint8), connectivity=8)[0]) - 1
