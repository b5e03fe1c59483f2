"""Pseudo-defects of printed patterns: structure gone wrong rather than foreign texture, planted in normal micrographs.

Lines that swell or shrink, lines bent out of place, structure that is missing or out of phase, domes and holes with
the bright rim that an electron beam gives every edge. Made from the image's own gray levels and from nothing that one
process owns, so that a detector trained on them may be shown a process it has never seen. ``plant`` draws from these
and from the foreign textures of ``pseudo_defects``.
"""

from collections.abc import Callable, Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

from semwatch.errors import ConfigError
from semwatch_training.data import pseudo_defects
from semwatch_training.data.pseudo_defects import (
    Image,
    Plane,
    Planted,
    Rng,
    blob,
    elliptic_distance,
    log_uniform,
    noise,
)

KINDS = ("swell", "warp", "erase", "lump")
FOREIGN_KINDS = ("texture", "paste", "crack", "hole")
"""Of ``pseudo_defects``; broad shading and frayed borders are everyday in a micrograph."""
FOREIGN_SHARE = 0.4
SHARES = (0.3, 0.25, 0.2, 0.25)
"""Of ``KINDS``, among what is not foreign."""
VISIBLE_LEVELS = 6.0
"""A pixel belongs to the mask where it changed, smoothed over a pixel, by more gray levels than this."""
AREA_PX = 20
LARGEST_SHARE = 0.2
TRIES = 10


def plant(image: Image, rng: Rng, *, donors: Sequence[Image] = ()) -> Planted:
    """Plant one defect of a random kind in a normal image (H, W) uint8.

    Drawn again where it changes too little to be seen, or more than a fifth of the image.

    Args:
        image: both sides at least ``pseudo_defects.MIN_SIDE_PX``.
        rng: the same generator state plants the same defect.
        donors: images whose texture may be used as foreign; without any, the image's own is.

    Raises:
        ConfigError: an image of another type or too small.
    """
    for _ in range(TRIES):
        if rng.random() < FOREIGN_SHARE:
            planted = pseudo_defects.plant(image, rng, kind=str(rng.choice(FOREIGN_KINDS)), donors=donors)
        else:
            planted = distort(image, rng, kind=str(rng.choice(KINDS, p=SHARES)))
        if planted.mask.sum() >= AREA_PX and planted.mask.mean() <= LARGEST_SHARE:
            return planted
    return pseudo_defects.plant(image, rng, kind="texture", donors=donors)  # a black image has no structure to distort


def distort(image: Image, rng: Rng, *, kind: str) -> Planted:
    """Distort the structure of an image (H, W) uint8; the mask may be empty where there is none.

    Raises:
        ConfigError: unknown kind, or an image of another type or too small.
    """
    if kind not in KINDS:
        raise ConfigError(f"no pattern defect is called {kind!r}; choose one of {', '.join(KINDS)}")
    if image.dtype != np.uint8 or image.ndim != 2 or min(image.shape) < pseudo_defects.MIN_SIDE_PX:
        raise ConfigError(
            f"pattern defects need a uint8 gray image of at least {pseudo_defects.MIN_SIDE_PX} px a side, "
            f"not {image.dtype} of shape {image.shape}"
        )
    changed, support = _DISTORTIONS[kind](image.astype(np.float32), rng)
    pixels = np.clip(np.rint(changed), 0, 255).astype(np.uint8)
    difference = cv2.GaussianBlur(np.abs(pixels.astype(np.float32) - image), (0, 0), 1.0)
    visible = ((difference > VISIBLE_LEVELS) & (support > 0.05)).astype(np.uint8)
    mask = cv2.morphologyEx(visible, cv2.MORPH_CLOSE, np.ones((5, 5), np.uint8)).astype(bool)
    return Planted(pixels, mask, kind)


def _swollen(gray: Plane, rng: Rng) -> tuple[Plane, Plane]:
    """Thicken or thin bright structures, or bridge and cut them, inside a blob; the noise stays as it was."""
    support = _spot(rng, gray)
    side = 2 * int(rng.integers(1, 8)) + 1
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side, side))
    operation = (cv2.MORPH_ERODE, cv2.MORPH_DILATE, cv2.MORPH_OPEN, cv2.MORPH_CLOSE)[int(rng.integers(4))]
    smooth = cv2.GaussianBlur(gray, (0, 0), 1.0)
    return _blend(gray, cv2.morphologyEx(smooth, operation, kernel) + gray - smooth, support), support


def _warped(gray: Plane, rng: Rng) -> tuple[Plane, Plane]:
    """Push the pattern aside, or pinch or bulge it, within a Gaussian window."""
    H, W = gray.shape
    radius = min(H, W) * log_uniform(rng, 0.03, 0.2)
    y, x = np.mgrid[:H, :W].astype(np.float32)
    x_from, y_from = x - rng.uniform(0, W), y - rng.uniform(0, H)
    angle, stretch = rng.uniform(0, np.pi), rng.uniform(1, 3)
    along = (x_from * np.cos(angle) + y_from * np.sin(angle)) / stretch
    across = y_from * np.cos(angle) - x_from * np.sin(angle)
    window = np.exp(-2 * (along**2 + across**2) / radius**2)
    if rng.random() < 0.6:
        way, reach = rng.uniform(0, 2 * np.pi), radius * rng.uniform(0.4, 1.0)
        dx, dy = reach * np.cos(way) * window, reach * np.sin(way) * window
    else:
        strength = rng.choice((-1, 1)) * rng.uniform(0.3, 0.8)
        dx, dy = strength * x_from * window, strength * y_from * window
    map_x, map_y = (x - dx).astype(np.float32), (y - dy).astype(np.float32)
    moved = cv2.remap(gray, map_x, map_y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)
    return np.asarray(moved, np.float32), np.asarray(window, np.float32)


def _erased(gray: Plane, rng: Rng) -> tuple[Plane, Plane]:
    """Blur the structure out and keep the noise, or put another place of the same image there."""
    support = _spot(rng, gray)
    if rng.random() < 0.5:
        fine = gray - cv2.GaussianBlur(gray, (0, 0), 1.2)
        other = cv2.GaussianBlur(gray, (0, 0), rng.uniform(4, 16)) + fine
    else:
        most = max(9, min(gray.shape) // 2)
        other = np.roll(gray, (int(rng.integers(8, most)), int(rng.integers(8, most))), axis=(0, 1))
    return _blend(gray, np.asarray(other, np.float32), support), support


def _lump(gray: Plane, rng: Rng) -> tuple[Plane, Plane]:
    """Raise a dome or sink a hole: flattened inside, rim brightened, shaded from one side, sometimes a dark halo."""
    H, W = gray.shape
    radius = min(H, W) * log_uniform(rng, 0.008, 0.1)
    distance = elliptic_distance(rng, (H, W), radius, rng.uniform(1, 2))
    distance = distance + np.float32(0.12) * noise(rng, (H, W), max(2.0, radius))
    body = np.clip((1 - distance) * radius / 2 + 0.5, 0, 1)
    rim = np.exp(-(((distance - 1) * radius / rng.uniform(1, 2.5)) ** 2))
    dy, dx = np.gradient(np.clip(distance, 0, 1.3))
    angle = rng.uniform(0, 2 * np.pi)
    shade = (dx * np.cos(angle) + dy * np.sin(angle)) * radius
    level = rng.uniform(15, 70) * rng.choice((-1, 1))
    flattened = rng.uniform(0, 1) * (cv2.GaussianBlur(gray, (0, 0), 8.0) - gray)
    changed = gray + body * (flattened + level + rng.uniform(0, 25) * shade)
    changed += rim * rng.uniform(0, 80) * rng.choice((1, -1), p=(0.8, 0.2)) * rng.uniform(0.3, 1)
    if rng.random() < 0.3:
        changed -= 25 * np.clip(1 - 2.5 * np.maximum(distance - 1, 0), 0, 1) * (1 - body)
    return np.asarray(changed, np.float32), np.asarray(np.clip(body + rim, 0, 1), np.float32)


def _spot(rng: Rng, gray: Plane) -> Plane:
    return blob(rng, (gray.shape[0], gray.shape[1]), log_uniform(rng, 0.03, 0.22), softness=0.25)


def _blend(gray: Plane, other: NDArray[np.floating], support: Plane) -> Plane:
    return np.asarray(gray + support * (other - gray), np.float32)


_DISTORTIONS: dict[str, Callable[[Plane, Rng], tuple[Plane, Plane]]] = {
    "swell": _swollen,
    "warp": _warped,
    "erase": _erased,
    "lump": _lump,
}
