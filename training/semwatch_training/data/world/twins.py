"""One scene, normal or defective, with the mask of what differs visibly from its normal twin."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from semwatch_training.data import pattern_defects
from semwatch_training.data.pseudo_defects import Image, Plane, Rng, log_uniform, noise
from semwatch_training.data.world.defects import PATTERN, Specimen, change_pattern, change_surface, kinds_for
from semwatch_training.data.world.imaging import (
    Optics,
    deviation,
    exposed_image,
    exposure,
    filed,
    filing,
    levels,
    optics,
    signal,
)
from semwatch_training.data.world.layouts import LAYOUTS, Layout, layout

SHARES = (0.19, 0.1, 0.12, 0.1, 0.07, 0.08, 0.05, 0.09, 0.04, 0.07, 0.04, 0.05)
"""Of ``LAYOUTS``, in their order: most of those whose features often have no like."""
PATTERN_SHARE = 0.6
"""Of defects, where a layout has a pattern."""
ENLARGED_SHARE, ENLARGED = 0.5, (1.3, 6.0)
SMALLEST_DRAWN_PX = 64
LEAST_LEVELS, LEAST_OF_PEAK, LEAST_OF_NOISE = 3.0, 0.15, 0.5
"""A pixel belongs to the mask where it changed by more gray levels, share of the largest change, share of the noise."""
LEAST_PEAK_LEVELS, LEAST_PEAK_SPANS, LEAST_PEAK_NOISE, LEAST_SNR = 7.0, 0.1, 0.8, 10.0
"""What a defect must reach at its most visible pixel: gray levels, share of the picture's own span, share of the noise;
and over its mask, signal to noise."""
LEAST_CONTRAST = 0.2
"""The least mean change over the mask, in standard deviations of the normal picture: less is lost among its pattern."""
PLANTED_SHARE = 0.12
"""Of defective scenes, those whose defect is one of ``pattern_defects``, planted in the normal picture's gray."""
LEAST_AREA_PX, LARGEST_SHARE = 9, 0.2
TRIES = 8


@dataclass(frozen=True, slots=True)
class Scene:
    """A micrograph: image (H, W) uint8, mask (H, W) bool, its layout, and its defect.

    The defect is one of ``DEFECTS``; ``planted`` if one of ``pattern_defects``; ``spot`` where none could be seen; or
    the empty string.
    """

    image: Image
    mask: NDArray[np.bool_]
    kind: str
    defect: str


def scenes(
    n: int, *, seed: int, size_px: int, defective_share: float = 0.5, kinds: Sequence[str] = LAYOUTS
) -> Iterator[tuple[Image, NDArray[np.bool_]]]:
    """Yield n scenes with their masks, both (size_px, size_px); a normal one has an empty mask.

    Args:
        n: how many.
        seed: the same gives the same.
        size_px: of a side, at least 32.
        defective_share: of scenes with a defect, range [0, 1].
        kinds: of ``LAYOUTS``, those that are drawn.
    """
    shares = np.array([SHARES[LAYOUTS.index(kind)] for kind in kinds])
    for child in np.random.SeedSequence(seed).spawn(n):
        rng = np.random.default_rng(child)
        defective, kind = bool(rng.random() < defective_share), str(rng.choice(kinds, p=shares / shares.sum()))
        drawn = scene(rng, (size_px, size_px), defective=defective, kind=kind)
        yield drawn.image, drawn.mask


def scene(
    rng: Rng, size_hw: tuple[int, int], *, defective: bool, kind: str | None = None, defect: str | None = None
) -> Scene:
    """Draw a scene (H, W); without its defect, the same state draws the same layout, microscope and noise.

    Args:
        rng: its state says which.
        size_hw: of the image, both sides at least 32 px.
        defective: whether to plant a defect. One that cannot be seen is drawn again.
        kind: one of ``LAYOUTS``; None draws one.
        defect: one of ``DEFECTS``; None draws one that the layout can show.
    """
    H, W = size_hw
    # Each part has its own state, so that what one part draws does not change the next one.
    of_size, of_layout, of_optics, of_filing, of_defect = (
        np.random.default_rng(state) for state in rng.integers(0, 2**63, 5)
    )
    chosen = kind or str(of_size.choice(LAYOUTS, p=SHARES))
    enlarged = log_uniform(of_size, *ENLARGED) if of_size.random() < ENLARGED_SHARE else 1.0
    enlarged = max(1.0, min(float(enlarged), min(H, W) / SMALLEST_DRAWN_PX))
    drawn_hw = (round(H / enlarged), round(W / enlarged))
    cubic = cv2.INTER_CUBIC if of_size.random() < 0.5 else cv2.INTER_LINEAR

    drawn = layout(chosen, of_layout, drawn_hw)
    process = int(of_layout.integers(2**62))
    flat = chosen == "bare"
    beam = optics(of_optics, drawn_hw, width_px=drawn.width_px, flat=flat)
    specimen = _printed(drawn, np.random.default_rng(process))
    found = signal(specimen, beam)
    exposed = exposure(found, beam, flat=flat)
    gray = levels(found, beam, exposed)
    mask, planted = np.zeros(drawn_hw, bool), ""
    planting = defective and defect is None and of_defect.random() < PLANTED_SHARE
    if defective and not planting:
        kept = _seen(of_filing.bit_generator.state, size_hw, drawn_hw)
        for turn in range(TRIES):
            planted = defect or _choice(drawn, of_defect)
            changed = _defective(drawn, specimen, process, of_defect, planted, strength=1.0 + 0.5 * turn)
            changed_gray = levels(signal(changed, beam), beam, exposed)
            mask = visible(gray, changed_gray, beam, pitch_px=drawn.pitch_px) & kept
            if LEAST_AREA_PX <= mask.sum() <= LARGEST_SHARE * mask.size:
                gray = changed_gray
                break
        else:
            planted = "spot"
            gray, mask = _last_resort(gray, of_defect, kept)
    image = exposed_image(gray, beam)
    if enlarged > 1:
        image = np.asarray(cv2.resize(image, (W, H), interpolation=cubic), np.uint8)
        mask = cv2.resize(mask.astype(np.float32), (W, H), interpolation=cv2.INTER_LINEAR) > 0.5
    kept_as = filing(of_filing, size_hw)
    if planting:
        pseudo = pattern_defects.plant(image, of_defect)
        image, mask, planted = pseudo.pixels, pseudo.mask & ~kept_as.frame, "planted"
    return Scene(filed(image, kept_as), mask, chosen, planted)


def _seen(state: Mapping[str, Any], size_hw: tuple[int, int], drawn_hw: tuple[int, int]) -> NDArray[np.bool_]:
    """Where a picture is seen (h, w) at the size it is drawn at, given the state that its frame will be drawn from."""
    rng = np.random.default_rng()
    rng.bit_generator.state = state
    hidden = filing(rng, size_hw).frame.astype(np.float32)
    return np.asarray(cv2.resize(hidden, drawn_hw[::-1], interpolation=cv2.INTER_AREA) < 0.01)


def _choice(drawn: Layout, rng: Rng) -> str:
    kinds = kinds_for(drawn)
    pattern = [kind for kind in kinds if kind in PATTERN]
    surface = [kind for kind in kinds if kind not in PATTERN]
    return str(rng.choice(pattern if pattern and rng.random() < PATTERN_SHARE else surface))


def _defective(drawn: Layout, specimen: Specimen, process: int, rng: Rng, defect: str, *, strength: float) -> Specimen:
    if defect in PATTERN:
        return _printed(change_pattern(drawn, rng, kind=defect), np.random.default_rng(process))
    return change_surface(specimen, rng, kind=defect, strength=strength)


def _printed(drawn: Layout, rng: Rng) -> Specimen:
    """Round corners, roughen edges, put the patterned layer on its ground; add grain to the materials."""
    top = drawn.top
    H, W = top.shape
    if drawn.printed and drawn.width_px >= 3:
        rounding = min(drawn.width_px * rng.uniform(0.03, 0.25), 12.0)
        if rounding > 0.4:
            soft = cv2.GaussianBlur(top, (0, 0), rounding)
            top = np.asarray(np.clip((soft - 0.5) * np.float32(1 + 2.0 * rounding) + 0.5, 0, 1), np.float32)
    if drawn.patterned and drawn.printed and rng.random() < 0.5:
        y, x = np.mgrid[:H, :W].astype(np.float32)
        reach = np.float32(min(2.5, drawn.width_px * rng.uniform(0, 0.06)))
        cell = max(2.0, drawn.width_px * rng.uniform(0.3, 2))
        maps = (x + reach * noise(rng, (H, W), cell), y + reach * noise(rng, (H, W), cell))
        top = np.asarray(cv2.remap(top, *maps, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE), np.float32)
    tone = drawn.ground_tone + top * (drawn.top_tone - drawn.ground_tone)
    height = drawn.ground_height + top * (drawn.top_height - drawn.ground_height)
    if rng.random() < 0.4:
        grain = noise(rng, (H, W), rng.uniform(1.2, 7))
        tone = tone + np.float32(rng.uniform(0, 0.08)) * grain * (top if rng.random() < 0.5 else 1)
        height = height + np.float32(rng.uniform(0, 0.1)) * grain
    return Specimen(np.asarray(height, np.float32), np.asarray(tone, np.float32))


def visible(gray: Plane, changed: Plane, beam: Optics, *, pitch_px: float) -> NDArray[np.bool_]:
    """Where two pictures differ by what can be seen through the noise and beside the pattern (H, W); else nothing.

    Args:
        gray: (H, W) levels of the normal one, without noise.
        changed: (H, W) of the defective one.
        beam: what both were imaged with.
        pitch_px: gaps in the mask much narrower than this are closed.
    """
    difference = cv2.GaussianBlur(cv2.absdiff(changed, gray), (0, 0), 0.7)
    peak = float(difference.max())
    nothing = np.zeros(gray.shape, bool)
    spread = deviation(gray, beam)
    noisy = LEAST_PEAK_NOISE * float(np.median(spread))
    if peak < max(LEAST_PEAK_LEVELS, LEAST_PEAK_SPANS * beam.levels[1], noisy):
        return nothing
    seen = difference > np.maximum(max(LEAST_LEVELS, LEAST_OF_PEAK * peak), LEAST_OF_NOISE * spread)
    snr = float(np.sqrt(np.square(difference[seen] / np.maximum(spread[seen], 0.5)).sum()))
    contrast = float(difference[seen].mean()) / (float(gray[::2, ::2].std()) + LEAST_LEVELS) if seen.any() else 0.0
    if snr < LEAST_SNR or contrast < LEAST_CONTRAST:
        return nothing
    # A particle of a line's own gray differs beside the line only; closing keeps the defect one piece.
    side = 2 * int(np.clip(0.25 * pitch_px, 2, 6)) + 1
    whole = cv2.morphologyEx(seen.astype(np.uint8), cv2.MORPH_CLOSE, np.ones((side, side), np.uint8))
    return np.asarray(whole.astype(bool))


def _last_resort(gray: Plane, rng: Rng, kept: NDArray[np.bool_]) -> tuple[Plane, NDArray[np.bool_]]:
    """A plain spot half the gray range away, within what is kept; it always shows."""
    y, x = np.nonzero(kept)
    i = int(rng.integers(len(y)))
    spot = np.zeros(gray.shape, np.uint8)
    cv2.circle(spot, (int(x[i]), int(y[i])), max(3, min(gray.shape) // 24), 1, cv2.FILLED)
    mask = spot.astype(bool) & kept
    return np.asarray(np.where(mask, (gray + 128) % 256, gray), np.float32), mask
