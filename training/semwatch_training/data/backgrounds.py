"""Procedural backgrounds that belong to no process: textures, gratings, crossed bars, dots and blocks.

A detector that is to be shown a process it has never seen must not take the first unfamiliar pattern for a defect.
Shown beside the normal images of its own process, these tell it that most patterns are normal, whatever they look like.

Source: domain randomisation (Tobin et al. 2017); DRAEM takes textures of other things for the same end.
"""

from collections.abc import Iterator

import cv2
import numpy as np

from semwatch_training.data.pseudo_defects import Image, Plane, Rng, log_uniform

KINDS = ("texture", "texture", "grating", "crossed", "dots", "blocks")


def backgrounds(n: int, *, seed: int, size_px: int) -> Iterator[Image]:
    """Yield n backgrounds (size_px, size_px) uint8, the kinds in turn."""
    rng = np.random.default_rng(seed)
    for index in range(n):
        yield background(KINDS[index % len(KINDS)], rng, size_px)


def background(kind: str, rng: Rng, size_px: int) -> Image:
    """Draw one background (size_px, size_px) uint8 of one of ``KINDS``, as an electron microscope would see it."""
    if kind == "texture":
        return _exposed(_texture(rng, size_px), rng, edges=rng.uniform(0, 0.3))
    period = size_px * log_uniform(rng, 0.03, 0.16)
    plane = _blocks(rng, size_px, period) if kind == "blocks" else _bars(rng, size_px, period, broken=kind == "grating")
    if kind == "crossed":
        under = _bars(rng, size_px, period * rng.uniform(0.6, 1.6), broken=rng.random() < 0.3).T
        plane = np.maximum(plane, np.float32(rng.uniform(0.2, 0.7)) * under)
    if kind == "dots":
        plane = (plane if rng.random() < 0.6 else 0 * plane) + np.float32(rng.choice((-0.5, 0.5))) * _dots(
            rng, size_px, period
        )
    plane = plane if rng.random() < 0.5 else plane.T
    grain = np.float32(rng.uniform(0, 0.15)) * _band(rng, size_px, log_uniform(rng, 1, 6))
    return _exposed(_roughened(plane, rng) + grain, rng, edges=rng.uniform(0.2, 1.2))


def _texture(rng: Rng, side: int) -> Plane:
    """Band-limited noise, straight, ridged or saturated: grain, networks and islands."""
    scale = log_uniform(rng, 1.0, 12.0)
    field = _band(rng, side, scale)
    match int(rng.integers(4)):
        case 0:
            shaped = field
        case 1:
            shaped = -np.abs(field)
        case 2:
            shaped = np.tanh(rng.uniform(2, 6) * field)
        case _:
            shaped = np.maximum(field, _band(rng, side, scale))
    coarse = _band(rng, side, 3 * scale)
    return np.asarray(shaped + rng.uniform(0, 0.4) * coarse, np.float32)


def _band(rng: Rng, side: int, scale_px: float) -> Plane:
    """Noise of unit variance without what is much finer or much coarser than ``scale_px``."""
    white = rng.standard_normal((side, side)).astype(np.float32)
    field = cv2.GaussianBlur(white, (0, 0), scale_px) - cv2.GaussianBlur(white, (0, 0), 2.2 * scale_px)
    return np.asarray(field / (field.std() + 1e-6), np.float32)


def _bars(rng: Rng, side: int, period: float, *, broken: bool) -> Plane:
    """Vertical bars of one width, each at a constant gray, some of them cut or left out."""
    plane = np.zeros((side, side), np.float32)
    width = period * rng.uniform(0.3, 0.7)
    left = -rng.uniform(0, period)
    while left < side:
        x0, x1 = round(left), round(left + width)
        if not (broken and rng.random() < 0.1):
            plane[:, max(x0, 0) : max(x1, 0)] = 1
        y = rng.uniform(0, 8 * period) if broken else side
        while y < side:
            plane[round(y) : round(y + rng.uniform(0.5, 2.0) * period), max(x0 - 1, 0) : max(x1 + 1, 0)] = 0
            y += rng.uniform(3, 15) * period
        left += period
    return plane


def _dots(rng: Rng, side: int, period: float) -> Plane:
    """Discs on a grid, or anywhere."""
    plane = np.zeros((side, side), np.float32)
    radius = max(2, round(period * rng.uniform(0.15, 0.35)))
    at = np.arange(period / 2, side, period * rng.choice((1, 2)))
    centres = np.stack(np.meshgrid(at, at), axis=-1).reshape(-1, 2)
    if rng.random() < 0.5:
        centres = rng.uniform(0, side, (len(centres) // 2, 2))
    for x, y in centres:
        cv2.circle(plane, (round(x), round(y)), radius, 1.0, cv2.FILLED)
    return plane


def _blocks(rng: Rng, side: int, period: float) -> Plane:
    """Rectangles of all proportions on one grid."""
    plane = np.zeros((side, side), np.float32)
    for _ in range(int((side / period) ** 2 / 6)):
        width, height = (round(period * int(n)) for n in rng.integers(1, 7, 2) * rng.permutation((1, 0.5)) + 0.5)
        x, y = (round(period * int(v)) for v in rng.uniform(-1, side / period, 2))
        plane[max(y, 0) : max(y + height, 0), max(x, 0) : max(x + width, 0)] = rng.choice((0.0, 1.0), p=(0.3, 0.7))
    return plane


def _roughened(plane: Plane, rng: Rng) -> Plane:
    """Displace every edge a little, as printed ones are."""
    side = plane.shape[0]
    y, x = np.mgrid[:side, :side].astype(np.float32)
    reach, scale = rng.uniform(0, 2.0), log_uniform(rng, 2, 8)
    map_x, map_y = (axis + np.float32(reach) * _band(rng, side, scale) for axis in (x, y))
    return np.asarray(cv2.remap(plane, map_x, map_y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT), np.float32)


def _exposed(plane: Plane, rng: Rng, *, edges: float) -> Image:
    """Brighten edges, choose contrast, defocus, add noise: gray levels."""
    smooth = cv2.GaussianBlur(plane, (0, 0), rng.uniform(0.8, 2.0))
    smooth = (smooth - smooth.mean()) / (smooth.std() + 1e-6)
    dy, dx = np.gradient(smooth)
    rim = np.hypot(dx, dy)
    signal = smooth + np.float32(edges) * rim / (rim.std() + 1e-6)
    signal = (signal - signal.mean()) / (signal.std() + 1e-6)
    level = rng.uniform(90, 135) + rng.uniform(12, 45) * signal + rng.normal(0, rng.uniform(2, 14), plane.shape)
    return np.asarray(np.clip(np.rint(level), 0, 255), np.uint8)
