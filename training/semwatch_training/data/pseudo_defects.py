"""Generic defects planted in normal images, with their masks: for choosing settings and training without real defects.

Six kinds that no single process owns: foreign texture, a misplaced piece, a crack, a hole or spot, broad shading, a
frayed border. Drawn in gray levels at the image's own size; a mask holds only pixels that did change, so that a planted
defect nobody could see (a dark hole in black) is drawn again.

Source: DRAEM (Zavrtanik et al. 2021; noise blobs of foreign texture), CutPaste (Li et al. 2021; patch and scar).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from semwatch.errors import ConfigError

Image = NDArray[np.uint8]
Plane = NDArray[np.float32]
Rng = np.random.Generator

KINDS = ("texture", "paste", "crack", "hole", "shading", "fray")
MIN_SIDE_PX = 16
VISIBLE_LEVELS = 4.0
"""A pixel belongs to the mask where it changed by more gray levels than this."""
MIN_AREA_PX = 12
TRIES = 20


@dataclass(frozen=True, slots=True)
class Planted:
    """A normal image with one defect: pixels (H, W) uint8, mask (H, W) bool, and what was planted."""

    pixels: Image
    mask: NDArray[np.bool_]
    kind: str


def plant(image: Image, rng: Rng, *, kind: str | None = None, donors: Sequence[Image] = ()) -> Planted:
    """Plant one defect.

    Args:
        image: normal, (H, W) uint8, both sides at least ``MIN_SIDE_PX``.
        rng: the same generator state plants the same defect.
        kind: one of ``KINDS``; None draws one.
        donors: images whose texture may be used as foreign; without any, the image's own, turned, is.

    Raises:
        ConfigError: unknown kind, or an image of another type or too small.
    """
    if kind is not None and kind not in KINDS:
        raise ConfigError(f"no pseudo-defect is called {kind!r}; choose one of {', '.join(KINDS)}")
    if image.dtype != np.uint8 or image.ndim != 2 or min(image.shape) < MIN_SIDE_PX:
        raise ConfigError(
            f"pseudo-defects need a uint8 gray image of at least {MIN_SIDE_PX} px a side, "
            f"not {image.dtype} of shape {image.shape}"
        )
    chosen = kind or KINDS[int(rng.integers(len(KINDS)))]
    for _ in range(TRIES):
        planted = _drawn(image, rng, chosen, donors)
        if planted.mask.sum() >= MIN_AREA_PX:
            break
    else:  # a saturated image may hide every try; half the gray range away always shows
        corner = np.zeros(image.shape, np.float32)
        corner[: max(4, image.shape[0] // 4), : max(4, image.shape[1] // 4)] = 1
        planted = _finished(image, np.where(corner > 0, (image + 128.0) % 256, image), corner, chosen)
    return planted


def _drawn(image: Image, rng: Rng, kind: str, donors: Sequence[Image]) -> Planted:
    gray = image.astype(np.float32)
    hw = (image.shape[0], image.shape[1])
    match kind:
        case "texture":
            support = blob(rng, hw, log_uniform(rng, 0.06, 0.5))
            foreign = foreign_texture(rng, hw, donors or (image,))
            opacity = rng.uniform(0.3, 1.0)
            changed = gray + support * opacity * (foreign - gray)
        case "paste":
            changed, support = _pasted(gray, rng)
        case "crack":
            support = crack(rng, hw)
            changed = gray + support * _contrast(rng, 15, 90)
        case "hole":
            support = spots(rng, hw)
            changed = gray + support * _contrast(rng, 20, 120)
        case "shading":
            support = blob(rng, hw, log_uniform(rng, 0.4, 1.0), softness=0.5)
            changed = gray + support * _contrast(rng, 12, 50)
        case _:
            support = frayed_border(rng, hw)
            level = rng.uniform(0, 255) + 8 * noise(rng, hw, 4)
            changed = gray + support * rng.uniform(0.5, 1.0) * (level - gray)
    return _finished(image, changed, support, kind)


def _finished(image: Image, changed: NDArray[np.floating], support: Plane, kind: str) -> Planted:
    pixels = np.clip(np.rint(changed), 0, 255).astype(np.uint8)
    visible = np.abs(pixels.astype(np.int16) - image) > VISIBLE_LEVELS
    # Texture over texture coincides here and there; closing keeps the defect one piece, inside its support.
    closed = cv2.morphologyEx(visible.astype(np.uint8), cv2.MORPH_CLOSE, np.ones((5, 5), np.uint8)).astype(bool)
    return Planted(pixels, closed & (support > 0.1), kind)


def noise(rng: Rng, size_hw: tuple[int, int], cell_px: float) -> Plane:
    """Smooth value noise (H, W), about zero mean and unit variance, with bumps of about ``cell_px``."""
    H, W = size_hw
    cells = (max(2, round(H / cell_px) + 1), max(2, round(W / cell_px) + 1))
    coarse = rng.standard_normal(cells).astype(np.float32)
    return np.asarray(cv2.resize(coarse, (W, H), interpolation=cv2.INTER_CUBIC), np.float32)


def blob(rng: Rng, size_hw: tuple[int, int], diameter: float, softness: float = 0.1) -> Plane:
    """A noisy blob (H, W), range [0, 1], centred anywhere.

    Args:
        rng: its state says which.
        size_hw: of the plane, px.
        diameter: as a share of the shorter side.
        softness: width of the edge as a share of the diameter.
    """
    size = diameter * min(size_hw)
    distance = elliptic_distance(rng, size_hw, size / 2, rng.uniform(1, 2.5))
    ragged = 1 - distance + 0.35 * noise(rng, size_hw, max(2.0, size / 4))
    return np.clip(0.5 + ragged / (2 * softness + 2 / size), 0, 1).astype(np.float32)


def elliptic_distance(rng: Rng, size_hw: tuple[int, int], radius: float, stretch: float) -> Plane:
    """Distance from a random centre in units of an ellipse of mean ``radius`` px, turned at random."""
    H, W = size_hw
    angle, cy, cx = rng.uniform(0, np.pi), rng.uniform(0, H), rng.uniform(0, W)
    y, x = np.mgrid[:H, :W].astype(np.float32)
    along = (x - cx) * np.cos(angle) + (y - cy) * np.sin(angle)
    across = (y - cy) * np.cos(angle) - (x - cx) * np.sin(angle)
    root = np.sqrt(stretch)
    return np.asarray(np.hypot(along / (radius * root), across * root / radius), np.float32)


def foreign_texture(rng: Rng, size_hw: tuple[int, int], donors: Sequence[Image]) -> Plane:
    """A donor turned, scaled and shifted in gray level, or plain noise: (H, W)."""
    H, W = size_hw
    if rng.random() < 0.3:
        cell = log_uniform(rng, 2, 20)
        return (rng.uniform(30, 225) + rng.uniform(10, 50) * noise(rng, size_hw, cell)).astype(np.float32)
    donor = np.rot90(donors[int(rng.integers(len(donors)))], int(rng.integers(1, 4)))
    zoom = log_uniform(rng, 1, 3)
    height, width = (max(8, int(n / zoom)) for n in donor.shape)
    top, left = (int(rng.integers(0, n - m + 1)) for n, m in zip(donor.shape, (height, width), strict=True))
    piece = np.ascontiguousarray(donor[top : top + height, left : left + width]).astype(np.float32)
    resized = cv2.resize(piece, (W, H), interpolation=cv2.INTER_LINEAR)
    return np.asarray(resized * rng.uniform(0.7, 1.3) + rng.uniform(-50, 50), np.float32)


def _pasted(gray: Plane, rng: Rng) -> tuple[Plane, Plane]:
    """Copy a rectangle, turned and shifted in gray level, to another place; return the image and its support."""
    H, W = gray.shape
    area, aspect = min(H, W) ** 2 * log_uniform(rng, 0.003, 0.08), log_uniform(rng, 0.15, 6)
    height, width = (int(np.clip(n, 3, m // 2)) for n, m in ((np.sqrt(area * aspect), H), (np.sqrt(area / aspect), W)))
    sy, ty = rng.integers(0, H - height + 1, 2)
    sx, tx = rng.integers(0, W - width + 1, 2)
    piece = np.flip(gray[sy : sy + height, sx : sx + width], axis=int(rng.integers(2)))
    support = np.zeros((H, W), np.float32)
    box = np.array([[0, 0], [width, 0], [width, height], [0, height]], np.float32) - (width / 2, height / 2)
    angle = rng.uniform(-0.8, 0.8)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    centre = np.array([tx + width / 2, ty + height / 2])
    corners = (box @ turn.T + centre).astype(np.float32)
    cv2.fillConvexPoly(support, np.rint(corners).astype(np.int32), 1.0, lineType=cv2.LINE_8)
    upright = np.array([[0, 0], [width, 0], [width, height]], np.float32)
    affine = cv2.getAffineTransform(upright, corners[:3])
    moved = cv2.warpAffine(np.ascontiguousarray(piece), affine, (W, H), borderMode=cv2.BORDER_REPLICATE)
    changed = np.where(support > 0, moved + rng.uniform(-30, 30), gray).astype(np.float32)
    return changed, support


def crack(rng: Rng, size_hw: tuple[int, int]) -> Plane:
    """A line that wanders and may fork (H, W), range [0, 1]."""
    H, W = size_hw
    side = min(H, W)
    canvas = np.zeros((H, W), np.float32)
    width = max(1, round(side * log_uniform(rng, 0.004, 0.025)))
    for _ in range(int(rng.integers(1, 4)) if rng.random() < 0.3 else 1):
        n_steps = int(rng.integers(6, 40))
        headings = rng.uniform(0, 2 * np.pi) + np.cumsum(rng.normal(0, rng.uniform(0.05, 0.5), n_steps))
        step = side * log_uniform(rng, 0.15, 1.2) / n_steps
        start = rng.uniform(0, 1, 2) * (W, H)
        points = start + np.cumsum(step * np.stack((np.cos(headings), np.sin(headings)), axis=1), axis=0)
        cv2.polylines(canvas, [np.rint(points * 8).astype(np.int32)], False, 1.0, width, cv2.LINE_8, shift=3)
    return np.asarray(cv2.GaussianBlur(canvas, (0, 0), rng.uniform(0.4, 1.0)), np.float32)


def spots(rng: Rng, size_hw: tuple[int, int]) -> Plane:
    """One to four soft-edged round spots (H, W), range [0, 1]."""
    support = np.zeros(size_hw, np.float32)
    for _ in range(int(rng.integers(1, 5)) if rng.random() < 0.3 else 1):
        radius = max(1.5, min(size_hw) * log_uniform(rng, 0.008, 0.08))
        distance = elliptic_distance(rng, size_hw, radius, rng.uniform(1, 2))
        edge = rng.uniform(0.15, 0.6)
        support = np.maximum(support, np.clip((1 - distance) / edge + 0.5, 0, 1))
    return support.astype(np.float32)


def frayed_border(rng: Rng, size_hw: tuple[int, int]) -> Plane:
    """A ragged strip eaten from part of one border (H, W), range [0, 1]."""
    edge = int(rng.integers(4))
    H, W = size_hw if edge < 2 else size_hw[::-1]
    x = np.arange(W, dtype=np.float32)
    reach = W * log_uniform(rng, 0.1, 0.8)
    window = np.clip(1 - (np.abs(x - rng.uniform(0, W)) / (reach / 2)) ** 4, 0, 1)
    ragged = 0.6 + 0.4 * noise(rng, (2, W), max(2.0, W * log_uniform(rng, 0.02, 0.15)))[0]
    depth = H * log_uniform(rng, 0.04, 0.3) * window * np.abs(ragged)
    strip = np.clip(depth[None] - np.arange(H, dtype=np.float32)[:, None], 0, 1)
    return np.ascontiguousarray((strip, strip[::-1], strip.T, strip.T[:, ::-1])[edge], dtype=np.float32)


def _contrast(rng: Rng, low: float, high: float) -> float:
    return float(log_uniform(rng, low, high) * rng.choice((-1, 1), p=(0.65, 0.35)))


def log_uniform(rng: Rng, low: float, high: float) -> float:
    """Draw a number whose logarithm is uniform between those of ``low`` and ``high``."""
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))
