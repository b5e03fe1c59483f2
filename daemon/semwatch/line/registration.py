"""An inspected field and a reference of the same place, laid over each other. Pure functions on plain arrays.

The correlation of the gradient *vectors* is computed for every whole shift at once (Padfield 2012: masked normalised
correlation by FFT), because the windowed phase correlation fades where the overlap is small; the best few peaks are
refined by ECC (Evangelidis and Psarakis 2008) on gradient images, and rows are then moved one by one against each other
as far as a raster scan drifts. Gradients do not see brightness and hardly see charging.
"""

import math
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from semwatch.settings.recipe import Recipe

Floats = NDArray[np.float32]
Bools = NDArray[np.bool_]

_RULE = Recipe().reference
"""Where nothing is said, the default recipe holds."""
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
    gx, gy = gradients(image, 2.0)
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
    (ax, ay), (bx, by) = gradients(a, sigma), gradients(b, sigma)
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


def gradients(image: Floats, sigma_px: float) -> tuple[Floats, Floats]:
    """Derivatives along x and y of an image (H, W) smoothed by a Gaussian, gray levels per pixel, (H, W) each."""
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
    (ax, ay), (bx, by) = gradients(a, 1.5), gradients(b, 1.5)
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
    a, b = (np.asarray(np.hypot(*gradients(image, 1.5)), np.float32) for image in (inspected, reference))
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
    gx, gy = gradients(b, 0.8)
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
