"""What the layout draws, stage by stage: metal, blanket films, gate arrays."""

import itertools
import math
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from semwatch_training.synthetic.layout import read_layout
from semwatch_training.synthetic.specimen import Image, Layer, Rng, Specimen, print_pattern, smooth_noise

Drawn = NDArray[np.uint8]
Rect = tuple[float, float, float, float]
"""``(x0, y0, x1, y1)`` in the layout frame: pixels, origin in the middle of the image, before rotation."""

SUBPIXEL_BITS = 4


def build(stage: str, rng: Rng, size_hw: tuple[int, int], layout_svg: Path | None) -> Specimen:
    """Lay out one defect-free field of a process stage."""
    if stage == "BEOL":
        return _metal(rng, size_hw, layout_svg)
    if stage == "DEP":
        return _film(rng, size_hw)
    return _gates(rng, size_hw)


# ---------------------------------------------------------------- drawing


def _placement(rng: Rng, size_hw: tuple[int, int], *, quarter_turn: bool) -> NDArray[np.float64]:
    """Draw the (2, 3) transform from the layout frame to pixels: a small rotation, perhaps a quarter turn."""
    angle = math.radians(rng.normal(0.0, 0.5)) + (math.pi / 2 if quarter_turn else 0.0)
    cos, sin = math.cos(angle), math.sin(angle)
    return np.array([[cos, -sin, size_hw[1] / 2], [sin, cos, size_hw[0] / 2]])


def _draw_rects(size_hw: tuple[int, int], rects: Sequence[Rect], placement: NDArray[np.float64]) -> Drawn:
    drawn = np.zeros(size_hw, np.uint8)
    if not rects:
        return drawn
    x0, y0, x1, y1 = np.array(rects, np.float64).T
    corners = np.stack([np.stack([x0, y0], 1), np.stack([x1, y0], 1), np.stack([x1, y1], 1), np.stack([x0, y1], 1)], 1)
    pixels = corners @ placement[:, :2].T + placement[:, 2]
    for polygon in np.round(pixels * 2**SUBPIXEL_BITS).astype(np.int32):
        cv2.fillConvexPoly(drawn, polygon, 255, cv2.LINE_AA, SUBPIXEL_BITS)
    return drawn


def _draw_discs(
    size_hw: tuple[int, int], centres: Sequence[tuple[float, float]], radius: float, placement: NDArray[np.float64]
) -> Drawn:
    drawn = np.zeros(size_hw, np.uint8)
    if not centres:
        return drawn
    pixels = np.array(centres, np.float64) @ placement[:, :2].T + placement[:, 2]
    scale = 2**SUBPIXEL_BITS
    for x, y in np.round(pixels * scale).astype(int):
        cv2.circle(drawn, (int(x), int(y)), round(radius * scale), 255, -1, cv2.LINE_AA, SUBPIXEL_BITS)
    return drawn


def _edges(rng: Rng, size_hw: tuple[int, int], pitch: float) -> Image:
    """Draw the edge displacement in pixels: long waves of the line plus short ones of the resist."""
    amplitude = rng.uniform(0.005, 0.018) * pitch
    waves = smooth_noise(rng, size_hw, 0.5 * pitch)
    waves += np.float32(0.5) * smooth_noise(rng, size_hw, max(0.12 * pitch, 2.0))
    return waves * np.float32(amplitude)


def _pitch(rng: Rng, size_hw: tuple[int, int], few: float, many: float) -> float:
    """Draw a period so that between ``few`` and ``many`` of them fill the short side; never under 8 px."""
    periods = math.exp(rng.uniform(math.log(few), math.log(many)))
    return max(min(size_hw) / periods, 8.0)


# ---------------------------------------------------------------- BEOL


def _metal(rng: Rng, size_hw: tuple[int, int], layout_svg: Path | None) -> Specimen:
    if layout_svg is not None:
        metal, vias, pitch = read_layout(layout_svg, rng, size_hw)
    else:
        pitch = _pitch(rng, size_hw, 6.0, 20.0)
        reach = 0.75 * max(size_hw) + pitch
        placement = _placement(rng, size_hw, quarter_turn=bool(rng.random() < 0.5))
        family = rng.choice(["grating", "vias", "routing"], p=[0.35, 0.2, 0.45])
        make = {"grating": _grating, "vias": _via_array, "routing": _routing}[str(family)]
        rects, centres, radius = make(rng, pitch, reach)
        metal = _draw_rects(size_hw, rects, placement)
        vias = _draw_discs(size_hw, centres, radius, placement)
    return _metal_stack(rng, metal, vias, pitch)


def _grating(rng: Rng, pitch: float, reach: float) -> tuple[list[Rect], list[tuple[float, float]], float]:
    """Lines and spaces with some line ends, and vias in step on some lines; every line end carries one too.

    Vias follow a rule, so that one that is missing can be told from the image alone.
    """
    half = pitch * rng.uniform(0.42, 0.58) / 2
    gap, p_cut = pitch * rng.uniform(0.5, 0.9), rng.choice([0.0, 0.25, 0.6])
    rects, centres = [], []
    for x in np.arange(-reach, reach, pitch):
        cuts = rng.uniform(-reach, reach, 2) if rng.random() < p_cut else np.array([])
        ends = [-reach, *np.sort(cuts).tolist(), reach]
        rects += [(x - half, y0 + gap / 2, x + half, y1 - gap / 2) for y0, y1 in itertools.pairwise(ends)]
        landings = np.concatenate((cuts - gap / 2 - 1.2 * half, cuts + gap / 2 + 1.2 * half))
        slots = np.arange(-reach, reach, 4 * pitch) + pitch * rng.uniform(0, 2) if rng.random() < 0.4 else np.array([])
        free = [y for y in slots if np.all(np.abs(cuts - y) > 2.5 * pitch)]
        centres += [(float(x), float(y)) for y in (*free, *landings)]
    return rects, centres, 0.7 * half


def _via_array(rng: Rng, pitch: float, reach: float) -> tuple[list[Rect], list[tuple[float, float]], float]:
    """A full field of vias, straight or staggered, over wide lines of the metal below."""
    pitch *= 1.3
    stagger = 0.5 if rng.random() < 0.5 else 0.0
    aspect, half = rng.uniform(0.9, 1.5), pitch * rng.uniform(0.3, 0.4)
    columns = np.arange(-reach, reach, pitch)
    rects = [(x - half, -reach, x + half, reach) for x in columns]
    centres = [
        (float(x), float(y + stagger * (i % 2) * pitch * aspect))
        for i, x in enumerate(columns)
        for y in np.arange(-reach, reach, pitch * aspect)
    ]
    return rects, centres, pitch * rng.uniform(0.2, 0.28)


def _routing(rng: Rng, pitch: float, reach: float) -> tuple[list[Rect], list[tuple[float, float]], float]:
    """Manhattan logic: segments on tracks, jogs between neighbours, a via near every line end, power rails."""
    half = pitch * rng.uniform(0.2, 0.27)
    rail_every = int(rng.integers(7, 12))
    rects: list[Rect] = []
    centres: list[tuple[float, float]] = []
    for i, x in enumerate(np.arange(-reach, reach, pitch)):
        if i % rail_every == 0:
            rects.append((x - 1.5 * half, -reach, x + 1.5 * half, reach))
            continue
        y = -reach - rng.uniform(0, 6) * pitch
        while y < reach:
            end = y + pitch * rng.uniform(1.5, 14)
            if rng.random() < 0.86:
                rects.append((x - half, y, x + half, end))
                centres += [(float(x), float(at)) for at in (y + 1.2 * half, end - 1.2 * half)]
                if rng.random() < 0.3 and (i + 1) % rail_every:
                    at = rng.uniform(y + half, end - half)
                    rects.append((x, at - half, x + pitch, at + half))
            y = end + pitch * rng.uniform(0.7, 1.4)
    return rects, centres, 0.72 * half


def _metal_stack(rng: Rng, metal: Drawn, vias: Drawn, pitch: float) -> Specimen:
    """Give drawn metal a process look: polished copper, etched lines, or trenches before the fill."""
    size_hw = metal.shape[0], metal.shape[1]
    look = str(rng.choice(["polished", "etched", "trench"], p=[0.45, 0.35, 0.2]))
    corner, edge = max(0.09 * pitch, 1.0), max(0.05 * pitch, 1.2)
    roughness = _edges(rng, size_hw, pitch)
    lines = print_pattern(metal, roughness, corner_px=corner, edge_px=edge)
    holes = print_pattern(vias, 0.6 * roughness, corner_px=max(0.06 * pitch, 0.8), edge_px=edge)
    height = {"polished": rng.uniform(-0.03, 0.05), "etched": rng.uniform(0.12, 0.25), "trench": -0.4}[look] * pitch
    gray = {"polished": rng.uniform(0.55, 0.68), "etched": rng.uniform(0.45, 0.6), "trench": 0.2}[look]
    base = {"polished": rng.uniform(0.25, 0.36), "etched": rng.uniform(0.22, 0.32), "trench": rng.uniform(0.4, 0.5)}
    layers = {
        "metal": Layer(lines, height, gray),
        "via": Layer(
            holes, height + 0.1 * pitch * (1 if look != "trench" else -1.5), gray + (0.2, -0.12)[look == "trench"]
        ),
    }
    texture = smooth_noise(rng, size_hw, max(0.08 * pitch, 1.5)) * lines
    relief = np.float32(0.003 * pitch) * texture
    stain = np.float32(0.01) * texture + np.float32(0.008) * smooth_noise(rng, size_hw, 1.5 * pitch)
    return Specimen(layers, relief, stain, pitch, floor_gray=base[look])


# ---------------------------------------------------------------- DEP


def _film(rng: Rng, size_hw: tuple[int, int]) -> Specimen:
    """A blanket film: fine grains, smooth with a little roughness, or columnar domes."""
    grain = _pitch(rng, size_hw, 22.0, 70.0) * 0.7
    look = str(rng.choice(["grains", "smooth", "columnar"], p=[0.4, 0.3, 0.3]))
    relief = np.zeros(size_hw, np.float32)
    stain = np.float32(0.003) * smooth_noise(rng, size_hw, 0.25 * min(size_hw))
    if look == "smooth":
        relief += np.float32(rng.uniform(0.05, 0.2)) * smooth_noise(rng, size_hw, 2.5)
        relief += np.float32(rng.uniform(0.1, 0.5)) * smooth_noise(rng, size_hw, grain)
    else:
        labels, distance = _voronoi(rng, size_hw, grain)
        n = int(labels.max()) + 1
        domes = np.clip(1 - distance / np.float32(0.75 * grain), 0, 1)
        rise = rng.uniform(0.25, 0.45) if look == "columnar" else rng.uniform(0.05, 0.15)
        relief += np.float32(rise * grain) * np.sqrt(domes)
        relief += (rng.standard_normal(n, dtype=np.float32) * np.float32(0.05 * grain))[labels]
        relief += np.float32(0.12) * smooth_noise(rng, size_hw, 2.0)
        stain += (rng.standard_normal(n, dtype=np.float32) * np.float32(rng.uniform(0.01, 0.04)))[labels]
        relief = np.asarray(cv2.GaussianBlur(relief, (0, 0), 0.8), np.float32)
    return Specimen({}, relief, stain, grain, floor_gray=rng.uniform(0.35, 0.5))


def _voronoi(rng: Rng, size_hw: tuple[int, int], grain: float) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Tile the field with jittered grains: (H, W) grain number and distance to the grain's nucleus in pixels."""
    rows, columns = np.meshgrid(
        np.arange(-grain, size_hw[0] + grain, grain), np.arange(-grain, size_hw[1] + grain, grain), indexing="ij"
    )
    rows = np.clip(rows + rng.uniform(-0.6, 0.6, rows.shape) * grain, 0, size_hw[0] - 1).astype(int)
    columns = np.clip(columns + rng.uniform(-0.6, 0.6, columns.shape) * grain, 0, size_hw[1] - 1).astype(int)
    nuclei = np.full(size_hw, 255, np.uint8)
    nuclei[rows, columns] = 0
    distance, labels = cv2.distanceTransformWithLabels(nuclei, cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL)
    return np.asarray(labels, np.int32), np.asarray(distance, np.float32)


# ---------------------------------------------------------------- DPR


def _gates(rng: Rng, size_hw: tuple[int, int]) -> Specimen:
    """A gate array after dummy-poly removal: trenches between walls, or the stacks still standing; fins across."""
    pitch = _pitch(rng, size_hw, 6.0, 16.0)
    reach = 0.75 * max(size_hw) + pitch
    placement = _placement(rng, size_hw, quarter_turn=bool(rng.random() < 0.25))
    gates, cuts, fins = _gate_rects(rng, pitch, reach)
    drawn = _draw_rects(size_hw, gates, placement)
    drawn[_draw_rects(size_hw, cuts, placement) > 127] = 0
    roughness = _edges(rng, size_hw, pitch)
    corner, edge = max(0.07 * pitch, 1.0), max(0.06 * pitch, 1.3)
    gate = print_pattern(drawn, roughness, corner_px=corner, edge_px=edge)
    fin = print_pattern(_draw_rects(size_hw, fins, placement), -roughness, corner_px=corner, edge_px=edge)
    texture = smooth_noise(rng, size_hw, max(0.08 * pitch, 1.5))
    relief, stain = np.float32(0.004 * pitch) * texture, np.float32(0.01) * texture
    open_trench = bool(rng.random() < 0.65)
    depth = pitch * rng.uniform(0.22, 0.35)
    wall = (
        Layer(gate, 0.0, rng.uniform(0.45, 0.58), negative=True)
        if open_trench
        else Layer(gate, 0.0, rng.uniform(0.5, 0.65))
    )
    layers = {"fin": Layer(fin, -depth * 0.6, rng.uniform(0.42, 0.5)), "gate": wall}
    return Specimen(layers, relief, stain, pitch, floor=-depth, floor_gray=rng.uniform(0.22, 0.3))


def _gate_rects(rng: Rng, pitch: float, reach: float) -> tuple[list[Rect], list[Rect], list[Rect]]:
    """Gates, the cut regions that interrupt several of them, and fins across in groups."""
    half = pitch * rng.uniform(0.2, 0.3)
    columns = np.arange(-reach, reach, pitch)
    gates = [(x - half, -reach, x + half, reach) for x in columns]
    fin_pitch, per_group = pitch * rng.uniform(0.45, 0.7), int(rng.integers(2, 5))
    fin_half, spacing = fin_pitch * rng.uniform(0.2, 0.3), pitch * rng.uniform(0.8, 1.6)
    fins, cuts, y = [], [], -reach
    while y < reach:
        fins += [(-reach, y + i * fin_pitch - fin_half, reach, y + i * fin_pitch + fin_half) for i in range(per_group)]
        y += (per_group - 1) * fin_pitch + spacing
        if rng.random() < 0.7:
            start, cut_half = rng.choice(columns), pitch * rng.uniform(0.15, 0.25)
            stop = start + pitch * rng.integers(1, 12)
            cuts.append(
                (start - 0.5 * pitch, y - spacing / 2 - cut_half, stop - 0.5 * pitch, y - spacing / 2 + cut_half)
            )
    return gates, cuts, fins
