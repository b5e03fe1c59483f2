"""Where a defect strikes and what shape it has: places found in any pattern, rough-edged shapes drawn in windows.

Places are found in the printed pattern itself, not in the rectangles it came from, so that a user's own layout serves
as well.
"""

import math
from typing import NamedTuple

import numpy as np

from semwatch.errors import ConfigError
from semwatch_training.synthetic.specimen import Image, Layer, Rng, Specimen, Window, blur, smooth_noise

Point = tuple[float, float]
"""``(x, y)`` in pixels."""

EDGE_PX = 1.6
"""Width of a shape's soft edge."""


class NoRoom(ConfigError):
    """This field has no place for that defect: another seed or a larger field has."""


class Chord(NamedTuple):
    """The shortest way across a region: through a line, from wall to wall of a trench."""

    middle: Point
    angle_rad: float
    length_px: float

    def end(self, sign: int, beyond_px: float = 0.0) -> Point:
        """Return one of its two ends (sign -1 or 1), or a point that many pixels further out."""
        reach = sign * (self.length_px / 2 + beyond_px)
        return self.middle[0] + reach * math.cos(self.angle_rad), self.middle[1] + reach * math.sin(self.angle_rad)


# ---------------------------------------------------------------- places


def draw_size(specimen: Specimen, rng: Rng, smallest_px: float = 6.0, largest_share: float = 0.2) -> float:
    """Draw a diameter, log-uniform from a few pixels to a share of the short side."""
    largest = max(largest_share * min(specimen.size_hw), 1.2 * smallest_px)
    return math.exp(rng.uniform(math.log(smallest_px), math.log(largest)))


def anywhere(specimen: Specimen, rng: Rng, margin: float) -> Point:
    """Draw a place at least ``margin`` pixels inside the field, as far as the field allows."""
    height, width = specimen.size_hw
    mx, my = min(margin, 0.4 * width), min(margin, 0.4 * height)
    return float(rng.uniform(mx, width - 1 - mx)), float(rng.uniform(my, height - 1 - my))


def across(specimen: Specimen, region: Image, rng: Rng) -> Chord:
    """Find a place in a region (coverage over 0.5) and the shortest chord through it.

    Of many random places the first is taken whose chord is of a usual width, so that wide open areas are left alone.

    Raises:
        NoRoom: the region is empty.
    """
    best: Chord | None = None
    region = blur(region, 0.06 * specimen.pitch)  # else a bump of a rough edge would pass for a narrow line
    for _ in range(60):
        x, y = anywhere(specimen, rng, 0.1 * min(specimen.size_hw))
        if region[int(y), int(x)] < 0.5:
            continue
        found = _shortest_chord(region, (x, y), 2.0 * specimen.pitch)
        if 0.15 * specimen.pitch < found.length_px < 1.1 * specimen.pitch:
            return found
        if best is None or best.length_px < found.length_px < 2 * specimen.pitch:
            best = found
    if best is None:
        raise NoRoom("no place for this defect in the field; use another seed or a larger size_hw")
    return best._replace(length_px=min(best.length_px, 1.5 * specimen.pitch))


def _shortest_chord(region: Image, start: Point, limit: float) -> Chord:
    angles = np.arange(24) * (math.pi / 24)
    steps = np.arange(1, max(int(limit), 4))
    height, width = region.shape
    ways = []
    for sign in (1, -1):
        x = np.rint(start[0] + sign * np.outer(np.cos(angles), steps)).astype(int)
        y = np.rint(start[1] + sign * np.outer(np.sin(angles), steps)).astype(int)
        inside = (x >= 0) & (y >= 0) & (x < width) & (y < height)
        left = inside & (region[y.clip(0, height - 1), x.clip(0, width - 1)] < 0.5)
        ways.append(np.where(left.any(axis=1), left.argmax(axis=1) + 1, 4 * limit))
    i = int(np.argmin(ways[0] + ways[1]))
    length, middle = float(ways[0][i] + ways[1][i]), float(ways[0][i] - ways[1][i]) / 2
    if length >= 4 * limit:
        middle = 0.0
    return Chord((start[0] + middle * math.cos(angles[i]), start[1] + middle * math.sin(angles[i])), angles[i], length)


# ---------------------------------------------------------------- shapes


def window_around(specimen: Specimen, centre: Point, reach: float) -> Window:
    """Return the window ``reach`` pixels around a point, cut to the field."""
    height, width = specimen.size_hw
    x0, x1 = max(math.floor(centre[0] - reach), 0), min(math.ceil(centre[0] + reach) + 1, width)
    y0, y1 = max(math.floor(centre[1] - reach), 0), min(math.ceil(centre[1] + reach) + 1, height)
    return slice(y0, y1), slice(x0, x1)


def turned(window: Window, centre: Point, angle: float) -> tuple[Image, Image]:
    """Return each pixel's coordinates along and across a direction, from ``centre``."""
    y, x = np.mgrid[window].astype(np.float32)
    x, y = x - np.float32(centre[0]), y - np.float32(centre[1])
    cos, sin = np.float32(math.cos(angle)), np.float32(math.sin(angle))
    return cos * x + sin * y, cos * y - sin * x


def uneven_ellipse(
    specimen: Specimen, rng: Rng, centre: Point, radii: tuple[float, float], *, angle: float, rough: float
) -> tuple[Window, Image]:
    """Draw an uneven ellipse: its window, and there the distance from its centre, 1 on its outline."""
    window = window_around(specimen, centre, 2.0 * max(radii) + 4)
    on, off = turned(window, centre, angle)
    theta = np.arctan2(off, on)
    uneven = np.ones_like(theta)
    for k in range(2, 8):
        uneven += np.float32(rough * rng.normal() / k**0.7) * np.cos(k * theta + np.float32(rng.uniform(0, 6.3)))
    q = np.hypot(on / np.float32(radii[0]), off / np.float32(radii[1]))
    return window, np.asarray(q / np.maximum(uneven, 0.4), np.float32)


def filled(q: Image, radius_px: float, edge_px: float = EDGE_PX) -> Image:
    """Turn the distance of ``uneven_ellipse`` into coverage with a soft edge."""
    return np.asarray(np.clip((1 - q) * np.float32(radius_px / edge_px) + 0.5, 0, 1), np.float32)


def rough_band(specimen: Specimen, rng: Rng, chord: Chord, overlap_px: float, half_px: float) -> tuple[Window, Image]:
    """Draw a band with rough flanks along a chord, reaching over its ends: its window and coverage."""
    half_length = chord.length_px / 2 + overlap_px
    window = window_around(specimen, chord.middle, 1.3 * math.hypot(half_length, half_px) + 6)
    along, off = turned(window, chord.middle, chord.angle_rad)
    shape_hw = along.shape[0], along.shape[1]
    sway, frill = smooth_noise(rng, shape_hw, 1.5 * half_px), smooth_noise(rng, shape_hw, max(0.4 * half_px, 2.0))
    flank = np.float32(half_px) - np.abs(off + np.float32(0.15 * half_px) * sway) + np.float32(0.08 * half_px) * frill
    tip = np.float32(half_length) - np.abs(along)
    return window, np.asarray(np.clip(np.minimum(flank, tip) / np.float32(EDGE_PX) + 0.5, 0, 1), np.float32)


# ---------------------------------------------------------------- edits


def add(coverage: Image, window: Window, shape: Image) -> None:
    """Add a shape to a coverage, in place."""
    np.maximum(coverage[window], shape, out=coverage[window])


def cut(coverage: Image, window: Window, shape: Image) -> None:
    """Cut a shape out of a coverage, in place."""
    np.minimum(coverage[window], 1 - shape, out=coverage[window])


def cover(specimen: Specimen, window: Window, shape: Image, height: float, gray: float) -> None:
    """Lay foreign material over the stack, in place."""
    coverage = np.zeros(specimen.size_hw, np.float32)
    coverage[window] = shape
    specimen.layers[f"foreign-{len(specimen.layers)}"] = Layer(coverage, height, gray)
