"""One micrograph: specimen, defects, microscope."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from semwatch.errors import ConfigError
from semwatch_training.synthetic import imaging
from semwatch_training.synthetic.defects import DEFECT_TYPES, STAGES, strike
from semwatch_training.synthetic.geometry import build
from semwatch_training.synthetic.shapes import NoRoom
from semwatch_training.synthetic.specimen import Image, Rng, Specimen, Window

MIN_SIDE = 64
VISIBLE = 0.03
"""Difference between clean and defective field that counts as visible, of full white (8 gray levels)."""
DETECTABLE = 8.0
"""Signal-to-noise ratio of a whole defect under which nobody could name it; Rose's criterion for seeing it is 5."""
MAX_TRIES = 10
PITCH_NM = 64.0
"""Period that a pattern's pitch in pixels stands for: metal of a 14 nm node; it makes ``pixel_nm``."""


@dataclass(frozen=True, slots=True, eq=False)
class SyntheticMicrograph:
    """A rendered field with its ground truth."""

    pixels: NDArray[np.uint8]
    """(H, W) gray."""
    masks: NDArray[np.bool_]
    """(n, H, W), one per defect, in the order of ``labels``."""
    labels: tuple[str, ...]
    stage: str
    seed: int
    pixel_nm: float
    ideal: Image
    """(H, W) in about [0, 1]: what the detector would have seen without noise."""


def render(
    stage: str,
    *,
    seed: int,
    size_hw: tuple[int, int] = (1024, 1024),
    defects: Sequence[str] = (),
    layout_svg: Path | None = None,
) -> SyntheticMicrograph:
    """Render one field of a process stage with the given defects.

    The same seed gives the same background, microscope and noise whatever the defects, so a clean twin always exists.

    Raises:
        ConfigError: unknown stage or defect type, a side under 64 px, or a layout that cannot be read.
        NoRoom: a ConfigError: this field has no place for one of the defects; take another seed.
    """
    _check(stage, size_hw, defects, layout_svg)
    stage_idx = STAGES.index(stage)
    background, beam, noise = (np.random.default_rng([seed, stage_idx, part]) for part in range(3))
    specimen = build(stage, background, size_hw, layout_svg)
    optics = imaging.draw_optics(beam, size_hw)
    maps = imaging.scan_maps(beam, size_hw, optics)
    signal = imaging.secondary_electrons(specimen, optics)
    scanned = imaging.scan(signal, maps, optics)
    scale, offset = imaging.gray_scale(scanned, optics)
    gain, charge = imaging.illumination(beam, scanned, optics)
    view = _View(optics, maps, scale, offset)
    shot = _Shot(specimen, signal, imaging.expose(scanned, scale, offset), np.zeros(size_hw, np.bool_))
    masks = np.zeros((len(defects), *size_hw), np.bool_)
    for i, label in enumerate(defects):
        shot = _add_defect(
            shot, label, np.random.default_rng([seed, stage_idx, 3, i]), view, np.asarray(masks[:i].any(axis=0))
        )
        masks[i] = shot.mask
    ideal = shot.exposed * gain + charge
    pixels = imaging.detect(ideal, noise, optics)
    pixel_nm = round(PITCH_NM / specimen.pitch, 4)
    return SyntheticMicrograph(pixels, masks, tuple(defects), stage, seed, pixel_nm, ideal)


def _check(stage: str, size_hw: tuple[int, int], defects: Sequence[str], layout_svg: Path | None) -> None:
    if stage not in STAGES:
        raise ConfigError(f"unknown process stage {stage!r}; choose from {', '.join(STAGES)}")
    for label in defects:
        if label not in DEFECT_TYPES[stage]:
            raise ConfigError(f"unknown defect type {label!r} at {stage}; choose from {', '.join(DEFECT_TYPES[stage])}")
    if min(size_hw) < MIN_SIDE:
        raise ConfigError(f"size_hw {size_hw} is too small; each side needs at least {MIN_SIDE} px")
    if layout_svg is not None and stage != "BEOL":
        raise ConfigError(f"a layout draws metal: use it with stage 'BEOL', not {stage!r}")


class _View(NamedTuple):
    optics: imaging.Optics
    maps: tuple[Image, Image]
    scale: float
    offset: float


class _Shot(NamedTuple):
    specimen: Specimen
    signal: Image
    exposed: Image
    mask: NDArray[np.bool_]
    """What the last defect changed."""


def _add_defect(before: _Shot, label: str, rng: Rng, view: _View, taken: NDArray[np.bool_]) -> _Shot:
    """Strike until the defect stands out of the noise and clear of the others; after some tries take the clearest."""
    best, best_ratio = None, 0.0
    for _ in range(MAX_TRIES):
        struck, window = strike(before.specimen, label, rng)
        after, ratio = _retake(before, struck, window, view)
        free = not (after.mask & taken).any()
        if after.mask.any() and ratio >= DETECTABLE and free:
            return after
        if after.mask.any() and (best is None or ratio > best_ratio):
            best, best_ratio = after, ratio
    if best is None:
        raise NoRoom(f"no place where {label!r} would be visible; use another seed or a larger size_hw")
    return best


def _retake(before: _Shot, struck: Specimen, window: Window, view: _View) -> tuple[_Shot, float]:
    """Image the struck specimen again, around the window only: the shot and its signal-to-noise ratio."""
    size_hw, reach = before.specimen.size_hw, imaging.reach_px(view.optics)
    outer = imaging.grow(window, reach, size_hw)
    light = imaging.secondary_electrons(struck, view.optics, outer)
    light -= imaging.secondary_electrons(before.specimen, view.optics, outer)
    signal, exposed, mask = before.signal.copy(), before.exposed.copy(), np.zeros(size_hw, np.bool_)
    signal[outer] += light
    seen = imaging.grow(outer, 8, size_hw)
    exposed[seen] = imaging.expose(imaging.scan(signal, view.maps, view.optics, seen), view.scale, view.offset)
    difference = exposed[seen] - before.exposed[seen]
    mask[seen] = _visible(difference)
    variance = imaging.noise_variance(float(before.exposed[seen].mean()), view.optics)
    ratio = float(np.sqrt(np.sum(difference[mask[seen]] ** 2) / variance))
    return _Shot(struck, signal, exposed, mask), ratio


def _visible(difference: Image) -> NDArray[np.bool_]:
    """Mark what differs visibly: over the threshold, without lone specks."""
    seen = (np.abs(difference) > VISIBLE).astype(np.uint8)
    _, labels, stats, _ = cv2.connectedComponentsWithStats(seen, connectivity=8)
    areas = stats[:, cv2.CC_STAT_AREA]
    keep = areas >= max(6, 0.02 * areas[1:].max(initial=0))
    keep[0] = False
    return np.asarray(keep[labels], np.bool_)
