"""Views of a defect crop as other shots of the same defect would look: what an SEM varies, and nothing else.

Turned, mirrored and framed anew, together with its soft mask; then contrast, brightness, gamma, charging, defocus and
shot noise, in the order in which the microscope adds them. No colour (an SEM has none) and no heavy blur: a kernel of 9
to 33 px, as the parent applies always, wipes out a small defect.

Source: IC-DefectNCD section 3.4 ("augmented views", no list); AnomalyNCD's list, cut down to gray micrographs.
"""

from dataclasses import dataclass
from typing import TypeVar

import cv2
import numpy as np
from numpy.typing import NDArray

from semwatch.errors import ConfigError
from semwatch.line import binarization

Pixel = TypeVar("Pixel", np.uint8, np.float32)


@dataclass(frozen=True, slots=True)
class Augmentation:
    """How far each effect may go; 0 (or a scale of 1 to 1) switches it off."""

    turns: bool = True
    """One of the eight turns and mirrorings of the square."""
    scale: tuple[float, float] = (0.7, 1.15)
    """Side of the new frame over the crop's side; above 1 the border is mirrored, as the daemon's cut does."""
    contrast: float = 0.3
    """Largest relative change about the crop's mean gray."""
    brightness: float = 0.1
    """Largest shift, of the full range."""
    gamma: float = 0.3
    """Largest change of the exponent, in units of log2."""
    charging: float = 0.15
    """Largest gray difference of a linear ramp across the crop, of the full range."""
    defocus_px: float = 1.0
    """Largest standard deviation of a Gaussian blur, for a crop of 224 px; applied to one view in three."""
    shot_noise: float = 0.02
    """Largest noise at white, as a standard deviation of the full range; it falls with the root of the gray."""


NOTHING = Augmentation(False, (1.0, 1.0), 0, 0, 0, 0, 0, 0)
"""Gives a crop back as it is."""


def augment(
    crop: NDArray[np.uint8],
    soft_mask: NDArray[np.float32],
    augmentation: Augmentation,
    rng: np.random.Generator,
    *,
    side_px: int | None = None,
    tokens: int | None = None,
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Make one view of a crop (S, S) and its soft mask (t, t).

    Args:
        crop: gray.
        soft_mask: in [0, 1], over the whole crop.
        augmentation: how far to go.
        rng: where chance comes from.
        side_px: side of the view, S by default.
        tokens: side of the view's mask, t by default.

    Returns:
        The view (side_px, side_px) and its mask (tokens, tokens).

    Raises:
        ConfigError: crop or mask is not square, or the mask holds NaN or leaves [0, 1].
    """
    check(crop, soft_mask)
    if augmentation.turns:
        turns, mirrored = int(rng.integers(4)), bool(rng.integers(2))
        crop, soft_mask = turned(crop, turns, mirrored), turned(soft_mask, turns, mirrored)
    crop, soft_mask = reframed(
        crop, soft_mask, augmentation.scale, rng, side_px=side_px or len(crop), tokens=tokens or len(soft_mask)
    )
    return imaged(crop, augmentation, rng), soft_mask


def check(crop: NDArray[np.uint8], soft_mask: NDArray[np.float32]) -> None:
    """Refuse what no view can be made of.

    Raises:
        ConfigError: crop or mask is not square, or the mask holds NaN or leaves [0, 1].
    """
    for name, array in (("crop", crop), ("soft mask", soft_mask)):
        if array.ndim != 2 or array.shape[0] != array.shape[1] or array.size == 0:
            raise ConfigError(f"a {name} must be square, got {array.shape}; cut it as the daemon does")
    if not (soft_mask.min() >= 0 and soft_mask.max() <= 1):  # NaN fails both
        raise ConfigError("a soft mask must lie in [0, 1] without NaN; cut it as the daemon does")


def turned(image: NDArray[Pixel], turns: int, mirrored: bool) -> NDArray[Pixel]:
    """Turn an image by ``turns`` right angles, after mirroring it left to right if asked; a copy."""
    return np.ascontiguousarray(np.rot90(image[:, ::-1] if mirrored else image, turns))


def reframed(
    crop: NDArray[np.uint8],
    soft_mask: NDArray[np.float32],
    scale: tuple[float, float],
    rng: np.random.Generator,
    *,
    side_px: int,
    tokens: int,
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Cut a window of random side and place out of a crop, and the same one out of its soft mask.

    The window always holds the mask's centre of mass, in its middle half: a view without the defect would teach the
    network to forget it.
    """
    S = len(crop)
    side = max(round(S * rng.uniform(*scale)), 1)
    window = (0, 0, S, S)
    if side != S:
        x, y = (round(S * c) for c in centre_of_mass(soft_mask))
        left, top = (int(centre - side * rng.uniform(0.25, 0.75)) for centre in (x, y))
        if side <= S:  # a smaller frame stays inside the crop
            left, top = (min(max(first, 0), S - side) for first in (left, top))
        window = (left, top, left + side, top + side)
    everywhere = np.ones(soft_mask.shape, np.bool_)
    mask = binarization.soft_mask(soft_mask, everywhere, window, size_hw=(S, S), tokens=tokens)
    return binarization.cut(crop, window, side_px=side_px), mask


def centre_of_mass(soft_mask: NDArray[np.float32]) -> tuple[float, float]:
    """The mask's centre (x, y) in [0, 1]; the middle where the mask is empty."""
    total = float(soft_mask.sum())
    if total == 0:
        return 0.5, 0.5
    centres = (np.arange(len(soft_mask)) + 0.5) / len(soft_mask)
    return float(soft_mask.sum(axis=0) @ centres) / total, float(soft_mask.sum(axis=1) @ centres) / total


def imaged(crop: NDArray[np.uint8], augmentation: Augmentation, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Change gray values as detector gain, charging, focus and dose do; (S, S) in and out."""
    settings = augmentation
    S = len(crop)
    # Every number is drawn whatever is switched on: one effect less leaves the others as they were.
    contrast, brightness, gamma, slope = rng.uniform(-1, 1, 4)
    angle, defocus, dose = rng.uniform(0, 2 * np.pi), rng.uniform(-2, 1), rng.uniform()
    noise = rng.standard_normal((S, S), np.float32)
    gray = crop.astype(np.float32) / 255
    gray = gray.mean() + (1 + settings.contrast * contrast) * (gray - gray.mean()) + settings.brightness * brightness
    gray = np.clip(gray, 0, 1) ** np.float32(2.0 ** (settings.gamma * gamma))
    along = np.linspace(-0.5, 0.5, S, dtype=np.float32)
    ramp = np.cos(angle) * along[None, :] + np.sin(angle) * along[:, None]
    gray = np.clip(gray + settings.charging * slope * ramp, 0, 1)
    if (sigma := settings.defocus_px * defocus * S / 224) > 0:
        gray = cv2.GaussianBlur(gray, (0, 0), sigma)
    gray = gray + settings.shot_noise * dose * np.sqrt(gray) * noise
    return np.asarray(np.clip(np.rint(gray * 255), 0, 255), np.uint8)
