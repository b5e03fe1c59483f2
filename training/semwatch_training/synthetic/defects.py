"""The defects: each one edits the specimen where it strikes, the microscope does the rest.

One type belongs to one stage:

    BEOL  bridge        metal joins two neighbouring lines
          open          a gap cuts a line
          particle      foreign matter lies on top: a bright lump with shadow and a dark charging halo
          void          a hole inside the metal of a line
          missing-via   a via did not open or fill
          scratch       a long thin groove torn through the pattern
    DEP   bubble        the film lifts off in a blister
          pinhole       a small hole through the film
    DPR   residue       dummy poly left in a trench
          necking       a gate narrows to a neck
          collapse      a wall or stack leans over to its neighbour
          pit           a hole etched into the surface
          gate-open     a gate is interrupted
          fin-break     a piece of fin is missing
          over-etch     walls and floor eaten away over an area
"""

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

import cv2
import numpy as np
from numpy.typing import NDArray

from semwatch_training.synthetic.shapes import (
    Chord,
    NoRoom,
    across,
    add,
    anywhere,
    cover,
    cut,
    draw_size,
    filled,
    rough_band,
    turned,
    uneven_ellipse,
    window_around,
)
from semwatch_training.synthetic.specimen import Image, Rng, Specimen, Window, smooth_noise


def strike(specimen: Specimen, label: str, rng: Rng) -> tuple[Specimen, Window]:
    """Put one defect at a random place; return the edited copy and the window that holds every change."""
    edited = specimen.editable()
    return edited, _STRIKES[label](edited, rng)


def _blob(
    specimen: Specimen, rng: Rng, smallest_px: float, largest_share: float, rough: float
) -> tuple[Window, Image, float]:
    """Draw a roundish shape anywhere: window, distance from its centre (1 on its outline), small radius in pixels."""
    radius = draw_size(specimen, rng, smallest_px, largest_share) / 2
    centre = anywhere(specimen, rng, radius + 4)
    radii = radius, radius * rng.uniform(0.7, 1.0)
    window, q = uneven_ellipse(specimen, rng, centre, radii, angle=rng.uniform(0, math.pi), rough=rough)
    return window, q, radii[1]


# ---------------------------------------------------------------- BEOL


def _bridge(specimen: Specimen, rng: Rng) -> Window:
    metal = specimen.layers["metal"].coverage
    lines = cv2.connectedComponents((metal > 0.5).astype(np.uint8))[1].astype(np.int32)
    for _ in range(12):
        chord = across(specimen, 1 - metal, rng)
        if _joins_two_lines(lines, chord):
            break
    half = min(max(draw_size(specimen, rng, 5.0, 0.12) / 2, 2.5), 0.8 * specimen.pitch)
    window, shape = rough_band(specimen, rng, chord, 0.15 * specimen.pitch, half)
    add(metal, window, shape)
    return window


def _joins_two_lines(lines: NDArray[np.int32], chord: Chord) -> bool:
    """Tell whether a chord's ends touch two different lines, of numbered lines (H, W)."""
    touched = []
    for sign in (-1, 1):
        x, y = chord.end(sign, 1.5)
        inside = 0 <= x < lines.shape[1] and 0 <= y < lines.shape[0]
        touched.append(int(lines[int(y), int(x)]) if inside else 0)
    return touched[0] != touched[1] and min(touched) > 0


def _open(specimen: Specimen, rng: Rng) -> Window:
    metal, via = specimen.layers["metal"].coverage, specimen.layers["via"].coverage
    chord = across(specimen, metal, rng)
    half = min(max(draw_size(specimen, rng, 5.0, 0.15) / 2, 2.5), 1.2 * specimen.pitch)
    window, shape = rough_band(specimen, rng, chord, 2.0, half)
    cut(metal, window, shape)
    cut(via, window, shape)
    return window


def _particle(specimen: Specimen, rng: Rng) -> Window:
    window, q, radius = _blob(specimen, rng, 7.0, 0.2, 0.09)
    body = filled(q, radius)
    lumps = smooth_noise(rng, (body.shape[0], body.shape[1]), max(0.4 * radius, 2.0))
    dome = np.sqrt(np.maximum(1 - q * q, 0)) + np.float32(0.07) * lumps
    top = max(layer.height for layer in specimen.layers.values())
    cover(specimen, window, body, top, rng.uniform(0.6, 0.95))
    specimen.relief[window] += np.float32(rng.uniform(0.5, 0.9) * radius) * dome * body
    halo = np.clip(1 - 2.5 * np.maximum(q - 1, 0), 0, 1)
    specimen.stain[window] -= np.float32(0.1) * halo * (1 - body)
    return window


def _void(specimen: Specimen, rng: Rng) -> Window:
    metal = specimen.layers["metal"].coverage
    chord = across(specimen, metal, rng)
    short = max(0.38 * min(chord.length_px, specimen.pitch), 2.0)
    long = min(max(draw_size(specimen, rng, 6.0, 0.1) / 2, short), 3 * short)
    along = chord.angle_rad + math.pi / 2
    window, q = uneven_ellipse(specimen, rng, chord.middle, (long, short), angle=along, rough=0.08)
    hole = filled(q, short) * metal[window]
    specimen.relief[window] -= np.float32(0.3 * specimen.pitch) * hole
    specimen.stain[window] -= np.float32(0.22) * hole
    return window


def _missing_via(specimen: Specimen, rng: Rng) -> Window:
    via = specimen.layers["via"].coverage
    n, labels, stats, centres = cv2.connectedComponentsWithStats((via > 0.4).astype(np.uint8))
    if n < 2:
        raise NoRoom("no via in the field to leave out; use another seed or a larger size_hw")
    side = np.array(specimen.size_hw[::-1])
    inner = [i for i in range(1, n) if np.all(np.abs(centres[i] / side - 0.5) < 0.42)] or list(range(1, n))
    chosen = int(rng.choice(inner))
    x, y, width, height = (int(v) for v in stats[chosen, :4])
    window = window_around(specimen, (x + width / 2, y + height / 2), max(width, height) / 2 + 4)
    grown = cv2.dilate((labels[window] == chosen).astype(np.uint8), np.ones((5, 5), np.uint8))
    cut(via, window, grown.astype(np.float32))
    return window


def _scratch(specimen: Specimen, rng: Rng) -> Window:
    length = max(draw_size(specimen, rng, 40.0, 0.6), 16.0)
    width = max(rng.uniform(0.003, 0.007) * min(specimen.size_hw), 1.2)
    centre, angle = anywhere(specimen, rng, 0.5 * length), rng.uniform(0, math.pi)
    window = window_around(specimen, centre, 0.6 * length)
    on, off = turned(window, centre, angle)
    ragged = smooth_noise(rng, (on.shape[0], on.shape[1]), 3 * width)
    off = off - np.float32(rng.normal(0, 0.12) / length) * on**2 + np.float32(0.45 * width) * ragged
    fade = np.clip(3 - 6 * np.abs(on) / np.float32(length), 0, 1) * np.clip(1 + np.float32(0.35) * ragged, 0, 1.3)
    groove = np.exp(-((off / np.float32(width)) ** 2)) * fade
    burr = np.exp(-(((np.abs(off) - np.float32(1.9 * width)) / np.float32(0.7 * width)) ** 2)) * fade
    specimen.relief[window] += np.float32(1.4 * width) * burr - np.float32(3.0 * width) * groove
    specimen.stain[window] -= np.float32(0.12) * groove
    cut(specimen.layers["metal"].coverage, window, np.float32(0.7) * groove)
    return window


# ---------------------------------------------------------------- DEP


def _bubble(specimen: Specimen, rng: Rng) -> Window:
    window, q, radius = _blob(specimen, rng, 10.0, 0.2, 0.03)
    dome = np.clip(1 - q * q, 0, 1) ** np.float32(0.8)
    specimen.relief[window] += np.float32(rng.uniform(0.25, 0.5) * radius) * dome
    specimen.stain[window] += np.float32(rng.uniform(-0.04, 0.08)) * filled(q, radius)
    return window


def _pinhole(specimen: Specimen, rng: Rng) -> Window:
    window, q, radius = _blob(specimen, rng, 6.0, 0.06, 0.06)
    hole = filled(q, radius)
    specimen.relief[window] -= np.float32(1.5 * radius) * hole
    specimen.stain[window] -= np.float32(0.15) * hole
    return window


# ---------------------------------------------------------------- DPR


def _trenches(specimen: Specimen) -> Image:
    """Coverage of what lies open between walls or stacks."""
    gate = specimen.layers["gate"]
    return gate.coverage if gate.negative else 1 - gate.coverage


def _residue(specimen: Specimen, rng: Rng) -> Window:
    trenches = _trenches(specimen)
    chord = across(specimen, trenches, rng)
    short = min(chord.length_px, specimen.pitch) * rng.uniform(0.3, 0.6)
    long = max(draw_size(specimen, rng, 8.0) / 2, short)
    along = chord.angle_rad + math.pi / 2
    window, q = uneven_ellipse(specimen, rng, chord.middle, (long, short), angle=along, rough=0.18)
    lump = filled(q, short) * trenches[window]
    cover(specimen, window, lump, specimen.floor * rng.uniform(0.2, 0.5), rng.uniform(0.42, 0.6))
    crumbs = smooth_noise(rng, (lump.shape[0], lump.shape[1]), max(0.08 * specimen.pitch, 2.0))
    specimen.relief[window] += np.float32(0.03 * specimen.pitch) * crumbs * lump
    return window


def _necking(specimen: Specimen, rng: Rng) -> Window:
    gate = specimen.layers["gate"].coverage
    chord = across(specimen, gate, rng)
    bite = max(0.36 * chord.length_px * rng.uniform(0.8, 1.1), 1.5)
    along = max(draw_size(specimen, rng, 8.0, 0.12) / 2, 0.3 * chord.length_px)
    for sign in (1, -1):
        window, q = uneven_ellipse(
            specimen, rng, chord.end(sign), (along, bite), angle=chord.angle_rad + math.pi / 2, rough=0.03
        )
        cut(gate, window, filled(q, bite))
    return window_around(specimen, chord.middle, 2 * max(along, bite) + chord.length_px + 6)


def _collapse(specimen: Specimen, rng: Rng) -> Window:
    gate = specimen.layers["gate"]
    lines = 1 - _trenches(specimen)
    chord = across(specimen, lines, rng)
    along = max(draw_size(specimen, rng, 12.0, 0.12), 0.8 * specimen.pitch)
    lean = (specimen.pitch - min(chord.length_px, 0.8 * specimen.pitch)) * rng.uniform(0.75, 1.05)
    lean *= 1 if rng.random() < 0.5 else -1
    window = window_around(specimen, chord.middle, 2 * along + specimen.pitch)
    off, on = turned(window, chord.middle, chord.angle_rad)
    shift = lean * np.exp(-((on / along) ** 2)) * np.exp(-(((off - lean / 2) / (0.55 * specimen.pitch)) ** 4))
    y, x = np.mgrid[: on.shape[0], : on.shape[1]]
    map_x = (x - shift * math.cos(chord.angle_rad)).astype(np.float32)
    map_y = (y - shift * math.sin(chord.angle_rad)).astype(np.float32)
    moved = cv2.remap(lines[window], map_x, map_y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)
    gate.coverage[window] = 1 - moved if gate.negative else moved
    return window


def _pit(specimen: Specimen, rng: Rng) -> Window:
    window, q, radius = _blob(specimen, rng, 7.0, 0.1, 0.1)
    hole = filled(q, radius, 2.5)
    specimen.relief[window] -= np.float32(1.5 * radius) * hole
    specimen.stain[window] -= np.float32(0.18) * hole
    return window


def _gate_open(specimen: Specimen, rng: Rng) -> Window:
    gate = specimen.layers["gate"].coverage
    half = min(max(draw_size(specimen, rng, 6.0, 0.15) / 2, 3.0), 1.5 * specimen.pitch)
    window, shape = rough_band(specimen, rng, across(specimen, gate, rng), 2.0, half)
    cut(gate, window, shape)
    return window


def _fin_break(specimen: Specimen, rng: Rng) -> Window:
    fin = specimen.layers["fin"].coverage
    half = max(draw_size(specimen, rng, 6.0, 0.15) / 2, 0.25 * specimen.pitch)
    window, shape = rough_band(specimen, rng, across(specimen, fin * _trenches(specimen), rng), 3.0, half)
    cut(fin, window, shape)
    return window


def _over_etch(specimen: Specimen, rng: Rng) -> Window:
    gate = specimen.layers["gate"]
    radius = max(draw_size(specimen, rng, 20.0) / 2, 0.9 * specimen.pitch)
    centre = anywhere(specimen, rng, 0.7 * radius)
    radii = radius, radius * rng.uniform(0.7, 1.0)
    window, q = uneven_ellipse(specimen, rng, centre, radii, angle=rng.uniform(0, math.pi), rough=0.06)
    area = np.clip((1 - q) * 3, 0, 1)
    side = 2 * max(round(0.09 * specimen.pitch), 1) + 1
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side, side))
    eaten = (cv2.dilate if gate.negative else cv2.erode)(gate.coverage[window], kernel)
    gate.coverage[window] += area * (eaten - gate.coverage[window])
    specimen.relief[window] += np.float32(0.5 * specimen.floor) * area
    specimen.stain[window] -= np.float32(0.07) * area
    return window


_BY_STAGE: dict[str, dict[str, Callable[[Specimen, Rng], Window]]] = {
    "BEOL": {
        "bridge": _bridge,
        "open": _open,
        "particle": _particle,
        "void": _void,
        "missing-via": _missing_via,
        "scratch": _scratch,
    },
    "DEP": {"bubble": _bubble, "pinhole": _pinhole},
    "DPR": {
        "residue": _residue,
        "necking": _necking,
        "collapse": _collapse,
        "pit": _pit,
        "gate-open": _gate_open,
        "fin-break": _fin_break,
        "over-etch": _over_etch,
    },
}
_STRIKES = {label: make for makes in _BY_STAGE.values() for label, make in makes.items()}

STAGES: tuple[str, ...] = tuple(_BY_STAGE)
"""Process stages: metal and vias, blanket deposition, dummy-poly removal."""
DEFECT_TYPES: Mapping[str, tuple[str, ...]] = MappingProxyType({stage: tuple(m) for stage, m in _BY_STAGE.items()})
"""Defect labels by stage."""
