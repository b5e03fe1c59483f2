"""What goes wrong on a wafer, made in the geometry before a microscope sees it.

Pattern defects change the patterned plane of a layout and are printed with it, so that lithography rounds them like
everything else: bridge, open, protrusion, necking, missing, extra, collapse, roughness. Surface defects lie on the
printed specimen: particle, pit, scratch, residue, crack, blur.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import cv2
import numpy as np
from numpy.typing import NDArray

from semwatch_training.data import pseudo_defects
from semwatch_training.data.pseudo_defects import Plane, Rng, log_uniform, noise
from semwatch_training.data.world.layouts import Layout

LARGEST_RADIUS = 0.2
"""As a share of the shorter side of the field."""
LARGEST_BITE = 0.06
"""The same, of protrusions and necks: a wide plate has no larger ones."""
SEVERAL_SHARE = 0.1
"""Of pattern defects, how many come in twos or threes."""
ROUGH_TIMES = 4.0
"""How many times the roughness of its edge a protrusion or a neck has as its radius, at least."""


@dataclass(frozen=True, slots=True)
class Specimen:
    """What is imaged: height, tone and blurred, each (H, W) float32; ``blurred`` says where focus is lost, [0, 1]."""

    height: Plane
    tone: Plane
    blurred: Plane | None = None


def kinds_for(drawn: Layout) -> tuple[str, ...]:
    """Name the defects that a layout can show: a missing feature can be told only where every feature has its like."""
    if not drawn.patterned:
        return SURFACE
    return SURFACE + (PATTERN if drawn.regular else tuple(k for k in PATTERN if k not in NEED_LIKE))


# ---- pattern ----


def change_pattern(drawn: Layout, rng: Rng, *, kind: str) -> Layout:
    """Plant one of ``PATTERN`` in a layout."""
    for _ in range(int(rng.integers(2, 4)) if rng.random() < SEVERAL_SHARE else 1):
        drawn = replace(drawn, top=np.clip(_PATTERN[kind](drawn, rng), 0, 1).astype(np.float32))
    return drawn


def _bridge(drawn: Layout, rng: Rng) -> Plane:
    """Join neighbours: material fills the space between them inside a ragged spot."""
    radius = _radius(drawn, rng, 0.35 * drawn.pitch_px, 1.6 * drawn.pitch_px)
    if rng.random() < 0.5:  # a thin thread from one to the next
        spot = _spot(rng, drawn.top.shape, _place(drawn, rng, "space"), radius, log_uniform(rng, 2, 6), 0.25)
    else:
        spot = _spot(rng, drawn.top.shape, _place(drawn, rng, "space"), radius, log_uniform(rng, 1, 2), 0.35)
    return np.maximum(drawn.top, spot)


def _open(drawn: Layout, rng: Rng) -> Plane:
    """Cut a feature."""
    radius = _radius(drawn, rng, 0.45 * drawn.width_px, 2.2 * drawn.width_px)
    ragged = float(rng.choice((0.03, 0.15, 0.35)))
    spot = _spot(rng, drawn.top.shape, _place(drawn, rng, "feature"), radius, log_uniform(rng, 1, 4), ragged)
    return np.minimum(drawn.top, 1 - spot)


def _protrusion(drawn: Layout, rng: Rng) -> Plane:
    radius = _bite(drawn, rng, 0.15, 0.7)
    spot = _spot(rng, drawn.top.shape, _place(drawn, rng, "edge"), radius, log_uniform(rng, 1, 2), 0.2)
    return np.maximum(drawn.top, spot)


def _necking(drawn: Layout, rng: Rng) -> Plane:
    """Bite into an edge: mouse bite, or a neck where the bite is long."""
    radius = _bite(drawn, rng, 0.2, 0.8)
    spot = _spot(rng, drawn.top.shape, _place(drawn, rng, "edge"), radius, log_uniform(rng, 1, 3), 0.2)
    return np.minimum(drawn.top, 1 - spot)


def _missing(drawn: Layout, rng: Rng) -> Plane:
    """Take out a whole feature, or a length of one that runs through the field."""
    y, x = _place(drawn, rng, "feature")
    _, label = cv2.connectedComponents((drawn.top > 0.5).astype(np.uint8), connectivity=4)
    whole = (label == label[y, x]) if label[y, x] else np.zeros(drawn.top.shape, bool)
    grown = cv2.dilate(whole.astype(np.uint8), np.ones((3, 3), np.uint8)).astype(np.float32)
    if whole.mean() > 0.02:
        grown *= _spot(rng, drawn.top.shape, (y, x), _radius(drawn, rng, drawn.pitch_px, 4 * drawn.pitch_px), 1.5, 0.1)
    return drawn.top * (1 - grown)


def _extra(drawn: Layout, rng: Rng) -> Plane:
    """An island or via where there should be none, as sharp as the pattern."""
    H, W = drawn.top.shape
    y, x = _place(drawn, rng, "space")
    radius = _radius(drawn, rng, 0.3 * drawn.width_px, 0.8 * drawn.width_px)
    stretch = log_uniform(rng, 0.5, 3)
    canvas = np.zeros((H, W), np.uint8)
    half = (max(1, round(radius * stretch)), max(1, round(radius)))
    if rng.random() < 0.5:
        cv2.ellipse(canvas, (x, y), half, float(rng.choice((0, 90))), 0, 360, 255, cv2.FILLED)
    else:
        cv2.rectangle(canvas, (x - half[0], y - half[1]), (x + half[0], y + half[1]), 255, cv2.FILLED)
    return np.maximum(drawn.top, canvas.astype(np.float32) / 255)


def _collapse(drawn: Layout, rng: Rng) -> Plane:
    """Lines lean on their neighbours: the pattern is pushed aside within a window."""
    H, W = drawn.top.shape
    cy, cx = _place(drawn, rng, "feature")
    radius = _radius(drawn, rng, 0.8 * drawn.pitch_px, 4 * drawn.pitch_px)
    y, x = np.mgrid[:H, :W].astype(np.float32)
    along = log_uniform(rng, 1, 3)
    upright = rng.random() < 0.5
    ry, rx = (radius * along, radius) if upright else (radius, radius * along)
    window = np.exp(-2 * (((y - cy) / ry) ** 2 + ((x - cx) / rx) ** 2))
    reach = drawn.pitch_px * rng.uniform(0.25, 0.8) * rng.choice((-1, 1))
    if rng.random() < 0.4:  # toward each other
        window = window * np.clip(((x - cx) / rx if upright else (y - cy) / ry) * 2, -1, 1)
    shift = (reach * window).astype(np.float32)
    maps = (x + shift, y + 0.3 * shift) if upright else (x + 0.3 * shift, y + shift)
    return np.asarray(cv2.remap(drawn.top, *maps, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE), np.float32)


def _roughness(drawn: Layout, rng: Rng) -> Plane:
    """A burst of edge roughness within a window."""
    H, W = drawn.top.shape
    radius = _radius(drawn, rng, drawn.pitch_px, 5 * drawn.pitch_px)
    window = _spot(rng, (H, W), _place(drawn, rng, "edge"), radius, log_uniform(rng, 1, 3), 0.2, soft=0.4)
    y, x = np.mgrid[:H, :W].astype(np.float32)
    reach = drawn.pitch_px * log_uniform(rng, 0.08, 0.4)
    cell = max(1.5, drawn.pitch_px * rng.uniform(0.15, 0.6))
    dx, dy = (np.float32(reach) * window * noise(rng, (H, W), cell) for _ in range(2))
    return np.asarray(
        cv2.remap(drawn.top, x + dx, y + dy, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE), np.float32
    )


# ---- surface ----


def change_surface(specimen: Specimen, rng: Rng, *, kind: str, strength: float) -> Specimen:
    """Plant one of ``SURFACE`` on a printed specimen.

    Args:
        specimen: the normal one.
        rng: the same state plants the same defect.
        kind: which.
        strength: of its contrast, 1 as drawn; larger where the first try could not be seen.
    """
    return _SURFACE[kind](specimen, rng, strength)


def _particle(specimen: Specimen, rng: Rng, strength: float) -> Specimen:
    """A body on the surface, smooth or faceted, alone or in pieces, often with a shadow beside it."""
    height, tone = specimen.height, specimen.tone
    shape = tone.shape
    radius = _free_radius(shape, rng, 0.004, 0.1)
    cy, cx = _anywhere(shape, rng)
    n = int(rng.integers(2, 12)) if rng.random() < 0.25 else 1
    own, ragged = rng.uniform(-0.3, 1.6), rng.choice((0.05, 0.25, 0.5))
    raised, shadow = strength * log_uniform(rng, 0.2, 2.5), strength * rng.choice((0, 1)) * rng.uniform(0.1, 0.6)
    opacity = min(1.0, strength * log_uniform(rng, 0.2, 1.5))
    lumps, crumb = rng.choice((0.0, 0.3, 0.8, 1.5)), rng.uniform(0.12, 0.6)
    for _ in range(n):
        at = (cy + rng.normal(0, 1.3 * radius * (n > 1)), cx + rng.normal(0, 1.3 * radius * (n > 1)))
        size = radius * (log_uniform(rng, 0.3, 1) if n > 1 else 1)
        stretch = log_uniform(rng, 1, 3)
        body = _spot(rng, shape, at, size, stretch, float(ragged))
        dome = cv2.GaussianBlur(body, (0, 0), max(0.7, size * rng.uniform(0.1, 0.5))) * body
        if lumps:
            dome = dome * (1 + np.float32(lumps) * noise(rng, shape, max(1.5, float(size * crumb))))
        if shadow:
            away = np.array([[1, 0, rng.uniform(-1, 1) * size], [0, 1, rng.uniform(-1, 1) * size]], np.float32)
            cast = cv2.warpAffine(body, away, (int(shape[1]), int(shape[0])))
            tone = tone - np.float32(shadow) * cv2.GaussianBlur(cast, (0, 0), max(1.0, 0.4 * size)) * (1 - body)
        tone = tone + body * np.float32(opacity) * (np.float32(own) - tone)
        height = height * (1 - body * np.float32(min(1, opacity))) + np.float32(raised) * dome
    return replace(specimen, height=np.asarray(height, np.float32), tone=np.asarray(tone, np.float32))


def _pit(specimen: Specimen, rng: Rng, strength: float) -> Specimen:
    """A hole, or several: darker, sunk, sometimes with a raised rim."""
    shape = specimen.tone.shape
    radius = _free_radius(shape, rng, 0.005, 0.08)
    centre = _anywhere(shape, rng)
    hole = np.zeros(shape, np.float32)
    n = int(rng.integers(2, 5)) if rng.random() < 0.2 else 1
    for _ in range(n):
        at = (centre[0] + rng.normal(0, 3 * radius * (n > 1)), centre[1] + rng.normal(0, 3 * radius * (n > 1)))
        hole = np.maximum(hole, _spot(rng, shape, at, radius, log_uniform(rng, 1, 2), float(rng.choice((0.0, 0.2)))))
    height = specimen.height - np.float32(strength * log_uniform(rng, 0.1, 2)) * hole
    tone = specimen.tone - np.float32(strength * log_uniform(rng, 0.05, 0.8)) * hole
    if rng.random() < 0.4:
        wide = cv2.GaussianBlur(hole, (0, 0), max(1.0, 0.3 * radius))
        height = height + np.float32(strength * rng.uniform(0.2, 1)) * wide * (1 - hole)
    return replace(specimen, height=np.asarray(height, np.float32), tone=np.asarray(tone, np.float32))


def _scratch(specimen: Specimen, rng: Rng, strength: float) -> Specimen:
    """A long thin groove at any angle, across whatever lies there; sometimes chattering, doubled, or with debris."""
    H, W = specimen.tone.shape
    length = min(H, W) * log_uniform(rng, 0.08, 1.3)
    width = max(1, round(min(H, W) * log_uniform(rng, 0.002, 0.015)))
    t = np.linspace(-0.5, 0.5, 24)
    heading = rng.uniform(0, 2 * np.pi) + rng.normal(0, 0.3) * t
    path = np.cumsum(np.stack((np.cos(heading), np.sin(heading)), axis=1), axis=0) * length / 24
    cy, cx = _anywhere((H, W), rng)
    path = path - path[12] + (cx, cy)
    across = np.array((-np.sin(heading[12]), np.cos(heading[12])))
    canvas = np.zeros((H, W), np.uint8)
    doubled, dashed = rng.random() < 0.2, rng.random() < 0.3
    for k in range(int(rng.integers(2, 5)) if doubled else 1):
        points = np.rint((path + k * rng.uniform(2, 6) * width * across) * 8).astype(np.int32)
        for i in range(len(points) - 1):
            if not (dashed and rng.random() < 0.4):
                cv2.line(canvas, points[i].tolist(), points[i + 1].tolist(), 255, width, cv2.LINE_AA, 3)
    if rng.random() < 0.2:  # a row of dots where the tip only touched, instead of a groove
        canvas = _dots(rng, canvas, path, width)
    elif rng.random() < 0.15:  # ripples: short grooves side by side along the way
        for middle in path[:: int(rng.integers(1, 3))]:
            half = across * width * rng.uniform(2, 5)
            ends = np.rint(np.stack((middle - half, middle + half)) * 8).astype(int)
            cv2.line(canvas, ends[0].tolist(), ends[1].tolist(), 255, width, cv2.LINE_AA, 3)
    groove = canvas.astype(np.float32) / 255
    if rng.random() < 0.25:  # rubble thrown up along the way
        wide = cv2.GaussianBlur(groove, (0, 0), width * rng.uniform(0.6, 2.5))
        groove = (wide > 0.15 * wide.max()) * noise(rng, (H, W), max(1.5, width * rng.uniform(0.5, 1.5)))
    elif rng.random() < 0.4:
        groove = groove * np.clip(0.7 + 0.5 * noise(rng, (H, W), max(2.0, 2.0 * width)), 0, 1)
    height = (
        specimen.height
        + np.float32(strength * log_uniform(rng, 0.15, 1.5) * rng.choice((-1, 1), p=(0.7, 0.3))) * groove
    )
    tone = specimen.tone + np.float32(strength * log_uniform(rng, 0.06, 0.8) * rng.choice((-1, 1))) * groove
    return replace(specimen, height=np.asarray(height, np.float32), tone=np.asarray(tone, np.float32))


def _dots(rng: Rng, canvas: NDArray[np.uint8], path: NDArray[np.floating], width: int) -> NDArray[np.uint8]:
    """Dots of unequal size and depth along a path (n, 2) of x, y, the groove between them faint: (H, W)."""
    faint = (canvas * rng.uniform(0, 0.35)).astype(np.uint8)
    share = rng.uniform(0.2, 0.8)
    for x, y in np.concatenate((path, (path[1:] + path[:-1]) / 2)):
        if rng.random() < share:
            at = (round(x + rng.normal(0, 0.5 * width)), round(y + rng.normal(0, 0.5 * width)))
            cv2.circle(faint, at, round(width * rng.uniform(0.4, 1.2)), float(rng.uniform(100, 255)), cv2.FILLED)
    return faint


def _residue(specimen: Specimen, rng: Rng, strength: float) -> Specimen:
    """A film: a stain of low contrast, flat or a ring, that levels what lies below it."""
    shape = specimen.tone.shape
    radius = _free_radius(shape, rng, 0.012, LARGEST_RADIUS)
    film = _spot(
        rng,
        shape,
        _anywhere(shape, rng),
        radius,
        log_uniform(rng, 1, 3),
        float(rng.choice((0.15, 0.4, 0.7))),
        soft=float(rng.choice((0.05, 0.2))),
    )
    if rng.random() < 0.25:
        film = film * (1 - 0.8 * cv2.GaussianBlur(film, (0, 0), max(1.0, 0.3 * radius)) ** 2)
    change = strength * log_uniform(rng, 0.06, 0.5) * rng.choice((-1, 1), p=(0.6, 0.4))
    if rng.random() < 0.4:
        film = film * np.clip(0.8 + 0.4 * noise(rng, shape, max(2.0, radius / 4)), 0, 1)
    covers = np.float32(rng.choice((0.0, 1.0)) * rng.uniform(0.2, 0.9))
    tone = specimen.tone + film * (np.float32(change) + covers * (specimen.tone.mean() - specimen.tone))
    height = specimen.height * (1 - covers * film) + np.float32(0.3 * strength * rng.random()) * film
    return replace(specimen, height=np.asarray(height, np.float32), tone=np.asarray(tone, np.float32))


def _crack(specimen: Specimen, rng: Rng, strength: float) -> Specimen:
    """A line that wanders and may fork, mostly dark."""
    shape = (specimen.tone.shape[0], specimen.tone.shape[1])
    gap = pseudo_defects.crack(rng, shape)
    tone = specimen.tone - np.float32(strength * log_uniform(rng, 0.1, 0.9) * rng.choice((1, -1), p=(0.8, 0.2))) * gap
    height = specimen.height - np.float32(strength * rng.uniform(0, 0.8)) * gap
    return replace(specimen, height=np.asarray(height, np.float32), tone=np.asarray(tone, np.float32))


def _blur(specimen: Specimen, rng: Rng, strength: float) -> Specimen:
    """A spot where the pattern is smeared, as under a thin film or after the beam stood there."""
    shape = specimen.tone.shape
    radius = _free_radius(shape, rng, 0.03, LARGEST_RADIUS)
    spot = _spot(rng, shape, _anywhere(shape, rng), radius, log_uniform(rng, 1, 2), 0.3, soft=0.3)
    return replace(specimen, blurred=np.asarray(spot * np.float32(min(1, strength * rng.uniform(0.4, 1))), np.float32))


# ---- where, how large, which outline ----


def _radius(drawn: Layout, rng: Rng, low: float, high: float) -> float:
    most = LARGEST_RADIUS * min(drawn.top.shape)
    return float(min(most, log_uniform(rng, max(1.5, low), max(2.0, low + 0.5, high))))


def _bite(drawn: Layout, rng: Rng, low: float, high: float) -> float:
    """Radius of a protrusion or neck, px: between two shares of the width, larger than the edge is rough."""
    most = LARGEST_BITE * min(drawn.top.shape)
    radius = _radius(drawn, rng, min(low * drawn.width_px, most / 2), min(high * drawn.width_px, most))
    return max(radius, ROUGH_TIMES * drawn.rough_px)


def _free_radius(shape: tuple[int, ...], rng: Rng, low: float, high: float) -> float:
    """Draw a radius between two shares of the shorter side, px; at least 1.5."""
    return float(max(1.5, min(shape) * log_uniform(rng, low, high)))


def _anywhere(shape: tuple[int, ...], rng: Rng) -> tuple[float, float]:
    return float(rng.uniform(0.03, 0.97) * shape[0]), float(rng.uniform(0.03, 0.97) * shape[1])


def _place(drawn: Layout, rng: Rng, where: str) -> tuple[int, int]:
    """Choose a pixel (y, x) in a feature, in a space between features, or on an edge; anywhere if there is none."""
    H, W = drawn.top.shape
    y, x = rng.integers(0, H, 400), rng.integers(0, W, 400)
    inside = drawn.top[y, x] > 0.5
    if where == "edge":
        step = max(1, round(0.5 * drawn.width_px))
        beside = drawn.top[np.clip(y + step, 0, H - 1), x] > 0.5
        across = drawn.top[y, np.clip(x + step, 0, W - 1)] > 0.5
        for i in np.flatnonzero((beside != inside) | (across != inside))[:20]:
            down = beside[i] != inside[i]
            for k in range(step):
                at = (min(y[i] + k, H - 1), x[i]) if down else (y[i], min(x[i] + k, W - 1))
                if (drawn.top[at] > 0.5) != inside[i]:
                    return int(at[0]), int(at[1])
        return int(y[0]), int(x[0])
    found = np.flatnonzero(inside == (where == "feature"))
    i = int(found[0]) if len(found) else 0
    return int(y[i]), int(x[i])


def _spot(
    rng: Rng,
    shape: tuple[int, ...],
    centre: tuple[float, float],
    radius: float,
    stretch: float,
    ragged: float,
    *,
    soft: float = 0.0,
) -> Plane:
    """A spot (H, W), range [0, 1]: an ellipse turned at random, its outline displaced by ``ragged`` radii.

    Args:
        rng: of angle and outline.
        shape: of the plane.
        centre: y, x.
        radius: the mean one, px.
        stretch: long axis over short axis.
        ragged: standard deviation of the outline, in radii.
        soft: width of the edge in radii, besides that of one pixel.
    """
    H, W = shape
    root = np.sqrt(stretch)
    reach = radius * root * (1 + 3 * ragged + soft) + 3
    y0, y1 = max(0, int(centre[0] - reach)), min(H, int(centre[0] + reach) + 2)
    x0, x1 = max(0, int(centre[1] - reach)), min(W, int(centre[1] + reach) + 2)
    spot = np.zeros((H, W), np.float32)
    angle = rng.uniform(0, np.pi)
    if y1 - y0 < 1 or x1 - x0 < 1:
        return spot
    y, x = np.mgrid[y0:y1, x0:x1].astype(np.float32)
    along = (x - centre[1]) * np.cos(angle) + (y - centre[0]) * np.sin(angle)
    across = (y - centre[0]) * np.cos(angle) - (x - centre[1]) * np.sin(angle)
    distance = np.hypot(along / (radius * root), across * root / radius)
    if ragged:
        distance = distance + ragged * noise(rng, (y1 - y0, x1 - x0), max(1.5, 0.5 * radius / root ** (stretch > 2)))
    spot[y0:y1, x0:x1] = np.clip(0.5 + (1 - distance) / (soft + root / radius), 0, 1)
    return spot


_PATTERN: dict[str, Callable[[Layout, Rng], Plane]] = {
    "bridge": _bridge,
    "open": _open,
    "protrusion": _protrusion,
    "necking": _necking,
    "missing": _missing,
    "extra": _extra,
    "collapse": _collapse,
    "roughness": _roughness,
}
_SURFACE: dict[str, Callable[[Specimen, Rng, float], Specimen]] = {
    "particle": _particle,
    "pit": _pit,
    "scratch": _scratch,
    "residue": _residue,
    "crack": _crack,
    "blur": _blur,
}
PATTERN, SURFACE = tuple(_PATTERN), tuple(_SURFACE)
NEED_LIKE = ("missing", "extra", "collapse")
DEFECTS = PATTERN + SURFACE
