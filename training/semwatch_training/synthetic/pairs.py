"""An inspected field and a reference of the same place on another die, as a review tool saves them side by side.

Both are windows of one rendered field. The reference is another scan of another die: shifted, with line edges of its
own, other drift, contrast, brightness, charging and noise. Its ideal image is the field without the defects.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from semwatch_training.synthetic.rendering import render
from semwatch_training.synthetic.specimen import Image, Rng, smooth_noise


@dataclass(frozen=True, slots=True, eq=False)
class Pair:
    """One synthetic inspected field with its reference and its ground truth."""

    inspected: NDArray[np.uint8]
    """(H, W) gray."""
    reference: NDArray[np.uint8]
    """(H, W) gray, without the defects."""
    masks: NDArray[np.bool_]
    """(n, H, W), one per defect, in pixels of the inspected field; a defect may lie outside of it."""
    shift_px: tuple[float, float]
    """Where a point of the inspected field lies in the reference: at (x + dx, y + dy), drift apart."""


def render_pair(
    stage: str,
    *,
    seed: int,
    size_hw: tuple[int, int] = (384, 480),
    defects: Sequence[str] = (),
    max_shift: float = 0.1,
    edge_px: float = 0.35,
    drift_px: float = 1.5,
    gain: float = 0.1,
    charging: float = 0.02,
    dose: tuple[float, float] = (60.0, 400.0),
) -> Pair:
    """Render an inspected field with ``defects`` and a reference of the same place.

    Args:
        stage: of the process, see ``render``.
        seed: of everything.
        size_hw: of both.
        defects: types, struck into the inspected field only.
        max_shift: the reference lies off by up to this share of each side.
        edge_px: standard deviation by which edges of the two dies differ.
        drift_px: largest shear of one scan against the other over the height of the field.
        gain: spread of contrast; brightness spreads by half of it.
        charging: amplitude of a slow change of brightness, of full white.
        dose: electrons per pixel at full white are drawn between these.
    """
    rng = np.random.default_rng([seed, 0x9EF])
    H, W = size_hw
    margin_y, margin_x = round(max_shift * H) + 8, round(max_shift * W) + 8
    whole = H + 2 * margin_y, W + 2 * margin_x
    struck = render(stage, seed=seed, size_hw=whole, defects=defects)
    clean = render(stage, seed=seed, size_hw=whole).ideal if defects else struck.ideal
    inside = (slice(margin_y, margin_y + H), slice(margin_x, margin_x + W))
    shift = rng.uniform(-max_shift * W, max_shift * W), rng.uniform(-max_shift * H, max_shift * H)
    reference = _other_scan(clean, (margin_x + shift[0], margin_y + shift[1]), size_hw, rng, edge_px, drift_px)
    contrast, brightness = 1 + gain * rng.uniform(-1, 1), gain / 2 * rng.uniform(-1, 1)
    reference = (reference - 0.5) * contrast + 0.5 + brightness
    reference += charging * smooth_noise(rng, size_hw, 0.4 * min(size_hw))
    reference += 0.2 * charging * rng.standard_normal((H, 1), dtype=np.float32)
    electrons = float(np.exp(rng.uniform(*np.log(dose))))
    return Pair(
        inspected=_detected(struck.ideal[inside], rng, electrons),
        reference=_detected(np.asarray(reference, np.float32), rng, electrons),
        masks=struck.masks[:, *inside],
        shift_px=(-shift[0], -shift[1]),
    )


def _other_scan(
    clean: Image, origin_xy: tuple[float, float], size_hw: tuple[int, int], rng: Rng, edge_px: float, drift_px: float
) -> Image:
    """Take the window at ``origin_xy`` with a drift along the rows and edges that wander a little."""
    H, W = size_hw
    progress = np.linspace(-0.5, 0.5, H, dtype=np.float32)[:, None]
    drift = np.float32(rng.uniform(-drift_px, drift_px)) * progress * (1 + progress)
    wander = [np.float32(edge_px) * smooth_noise(rng, size_hw, 6.0) for _ in range(2)]
    map_x = np.arange(W, dtype=np.float32)[None] + np.float32(origin_xy[0]) + drift + wander[0]
    map_y = np.arange(H, dtype=np.float32)[:, None] + np.float32(origin_xy[1]) + 0.5 * drift + wander[1]
    return np.asarray(cv2.remap(clean, map_x, map_y, cv2.INTER_CUBIC, borderMode=cv2.BORDER_REFLECT), np.float32)


def _detected(ideal: Image, rng: Rng, electrons: float) -> NDArray[np.uint8]:
    """Shot noise and read noise of one exposure, 8 bits."""
    counted = rng.poisson(np.maximum(ideal, 0) * electrons) / electrons + 0.01 * rng.standard_normal(ideal.shape)
    return np.asarray(np.clip(counted * 255 + 0.5, 0, 255), np.uint8)
