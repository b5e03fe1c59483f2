"""What lies on the wafer before a microscope sees it: lines, logic, contacts, fibres, stacks, and mosaics of these.

A layout is one patterned plane that defects may change (``top``) over a ground with its own heights and tones, all at
the image's own scale. Edges are a pixel wide; lithography (rounded corners) and optics come later.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import cv2
import numpy as np
from numpy.typing import NDArray

from semwatch_training.data.pseudo_defects import Plane, Rng, log_uniform, noise

PITCH_PX = (3.0, 60.0)
Floats = NDArray[np.floating]
Size = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Layout:
    """Geometry of one field.

    Attributes:
        top: (H, W) float32, range [0, 1]: where the patterned layer is.
        top_tone: (H, W) float32: gray of that layer, range about [0, 1].
        top_height: (H, W) float32: its height; below that of the ground it is a trench.
        ground_tone: (H, W) float32.
        ground_height: (H, W) float32.
        pitch_px: from one feature to the next, about.
        width_px: of a feature, about.
        regular: whether every feature has its like, so that a missing one can be told.
        patterned: whether there are features that could be bridged or cut.
        printed: whether corners are still to be rounded and edges roughened.
        rough_px: standard deviation of its edges, as drawn.
    """

    top: Plane
    top_tone: Plane
    top_height: Plane
    ground_tone: Plane
    ground_height: Plane
    pitch_px: float
    width_px: float
    regular: bool = True
    patterned: bool = True
    printed: bool = True
    rough_px: float = 0.0


def layout(kind: str, rng: Rng, size_hw: Size) -> Layout:
    """Draw a layout of one of ``LAYOUTS``; some stand upright, some lie, a few are turned by any angle."""
    way = rng.random()
    if kind in ("lines", "segments", "crossed", "vias", "logic") and way > 0.88:
        H, W = size_hw
        side = int(np.ceil(np.hypot(H, W))) + 2
        return _turned(_LAYOUTS[kind](rng, (side, side)), size_hw, float(rng.uniform(-45, 45)))
    if kind in ("bare", "fibres", "stack", "blocks") or way < 0.5:
        return _LAYOUTS[kind](rng, size_hw)
    return _each(_LAYOUTS[kind](rng, (size_hw[1], size_hw[0])), lambda plane: np.ascontiguousarray(plane.T))


def _each(drawn: Layout, change: Callable[[Plane], Plane]) -> Layout:
    return replace(
        drawn,
        top=change(drawn.top),
        top_tone=change(drawn.top_tone),
        top_height=change(drawn.top_height),
        ground_tone=change(drawn.ground_tone),
        ground_height=change(drawn.ground_height),
    )


def _turned(drawn: Layout, size_hw: Size, angle_deg: float) -> Layout:
    H, W = size_hw
    side = drawn.top.shape[0]
    turn = cv2.getRotationMatrix2D((side / 2, side / 2), angle_deg, 1.0)
    turn[:, 2] += (W / 2 - side / 2, H / 2 - side / 2)
    return _each(drawn, lambda plane: np.asarray(cv2.warpAffine(plane, turn, (W, H)), np.float32))


def _layout(
    rng: Rng,
    top: Plane,
    pitch_px: float,
    width_px: float,
    *,
    ground_tone: Plane | None = None,
    ground_height: Plane | None = None,
    regular: bool = True,
    printed: bool = True,
) -> Layout:
    """Give a pattern its material: brighter or darker than its ground, raised or sunk."""
    dark, bright = np.sort(rng.uniform(0, 1, 2))
    bright = min(1.0, max(bright, dark + rng.uniform(0.1, 0.5)))
    tone, ground = (bright, dark) if rng.random() < 0.65 else (dark, bright)
    if ground_tone is not None and abs(tone - float(ground_tone.mean())) < 0.25:
        tone = (float(ground_tone.mean()) + 0.5) % 1.0
    height = 1.0 if rng.random() < 0.75 else -1.0
    return Layout(
        top=top,
        top_tone=np.full(top.shape, tone, np.float32),
        top_height=np.full(top.shape, height, np.float32),
        ground_tone=np.full(top.shape, ground, np.float32) if ground_tone is None else ground_tone,
        ground_height=np.zeros(top.shape, np.float32) if ground_height is None else ground_height,
        pitch_px=pitch_px,
        width_px=width_px,
        regular=regular,
        printed=printed,
    )


def _pitch(rng: Rng, size_hw: Size, least_px: float = PITCH_PX[0]) -> float:
    return log_uniform(rng, least_px, max(least_px + 1, min(PITCH_PX[1], min(size_hw) / 4)))


# ---- lines ----


def bars(rng: Rng, size_hw: Size, left: Floats, width: Floats, *, shift: Floats | None = None, rough: float) -> Plane:
    """Upright bars (H, W) with antialiased, rough edges.

    Args:
        rng: of the roughness.
        size_hw: of the plane, px.
        left: (n,) left edges, px, ascending.
        width: (n,) px.
        shift: (n, H) how far each bar is moved aside at each row; None moves none.
        rough: standard deviation of an edge, px.
    """
    H, W = size_hw
    n = len(left)
    edges = np.stack((left, left + width), axis=1).reshape(2 * n, 1) + np.zeros((1, H))
    if rough > 0 and n:
        scale = log_uniform(rng, 1.5, 25)
        jitter = noise(rng, (H, 2 * n), 1.0) if scale < 2 else _along(rng, H, 2 * n, scale)
        wiggle = np.repeat(_along(rng, H, n, 2.5 * scale), 2, axis=0)
        edges = edges + rough * (jitter.reshape(2 * n, H) + rng.uniform(0, 1) * wiggle)
    if shift is not None:
        edges = edges + np.repeat(shift, 2, axis=0)
    edges[1::2] = np.maximum(edges[1::2], edges[0::2])
    edges = np.clip(edges, 0, W)
    whole = np.floor(edges).astype(np.int64)
    part = edges - whole
    sign = np.where(np.arange(2 * n) % 2 == 0, 1.0, -1.0)[:, None]
    at = (np.arange(H)[None] * (W + 2) + whole).ravel()
    steps = np.bincount(at, (sign * (1 - part)).ravel(), H * (W + 2))
    steps += np.bincount(at + 1, (sign * part).ravel(), H * (W + 2))
    return np.clip(np.cumsum(steps.reshape(H, W + 2), axis=1)[:, :W], 0, 1).astype(np.float32)


def _along(rng: Rng, length: int, n: int, scale: float) -> Floats:
    """Noise (n, length), smooth along its rows only."""
    coarse = rng.standard_normal((n, max(2, round(length / scale) + 1))).astype(np.float32)
    return np.asarray(cv2.resize(coarse, (length, n), interpolation=cv2.INTER_CUBIC), np.float64)


def _plan(rng: Rng, span: int, pitch: float) -> tuple[Floats, Floats, bool]:
    """Left edges and widths of the lines across a span, and whether each has its like."""
    start = -rng.uniform(0, 2 * pitch)
    duty = rng.uniform(0.2, 0.8)
    n = int(span / pitch) + 5
    way = rng.random()
    if way < 0.4:  # one pitch
        return start + pitch * np.arange(n), np.full(n, duty * pitch), True
    if way < 0.7:  # a cell of several lines, repeated
        k = int(rng.integers(2, 6))
        widths = pitch * rng.choice((0.4, 0.5, 0.7, 1.0, 1.8), k) * rng.uniform(0.5, 1.2)
        spaces = pitch * rng.choice((0.3, 0.4, 0.5, 0.8, 1.5), k) * rng.uniform(0.8, 1.2)
        widths, spaces = np.maximum(widths, 1.2), np.maximum(spaces, 1.2)
        turns = int((span - start) / (widths + spaces).sum()) + 2
        width, space = np.tile(widths, turns), np.tile(spaces, turns)
        return start + np.concatenate(([0.0], np.cumsum(width + space)[:-1])), width, turns > 3
    if way < 0.85:  # pitches that change from block to block
        lefts: list[float] = []
        widths_of: list[float] = []
        x = start
        while x < span:
            own, own_duty = pitch * log_uniform(rng, 0.6, 2.5), rng.uniform(0.25, 0.75)
            for _ in range(int(rng.integers(1, 14))):
                lefts.append(x)
                widths_of.append(max(1.2, own * own_duty))
                x += max(2.5, own)
            x += rng.choice((0.0, 1.0)) * rng.uniform(0, 4) * pitch
        return np.array(lefts), np.array(widths_of), False
    left, width = start + pitch * np.arange(n), np.full(n, duty * pitch)
    if way < 0.93:  # some wider lines, each with its spaces
        grown = np.where(rng.random(n) < rng.uniform(0.05, 0.2), pitch * rng.integers(1, 4, n), 0)
        return left + np.concatenate(([0.0], np.cumsum(grown)[:-1])), width + grown, False
    inside = (left > rng.uniform(0, 0.4) * span) & (left < rng.uniform(0.6, 1) * span)
    return left[inside], width[inside], False  # an array that starts and stops within the field


def _rough(rng: Rng, pitch: float) -> float:
    return float(rng.choice((0.0, 1.0), p=(0.25, 0.75)) * pitch * log_uniform(rng, 0.004, 0.06))


def _lines(rng: Rng, size_hw: Size) -> Layout:
    H, W = size_hw
    pitch = _pitch(rng, size_hw)
    left, width, regular = _plan(rng, W, pitch)
    shift = None
    way = rng.random()
    if way < 0.08:  # a jog of all lines, or lines that bend
        y = np.arange(H)
        steps = 1 / (1 + np.exp(-(y - rng.uniform(0.1, 0.9) * H) / rng.uniform(0.1, 1) / pitch))
        shift = np.tile(pitch * rng.uniform(-3, 3) * steps, (len(left), 1))
    elif way < 0.14:
        shift = np.tile(rng.uniform(0.3, 2) * pitch * _along(rng, H, 1, rng.uniform(0.1, 0.5) * H), (len(left), 1))
    rough = _rough(rng, pitch)
    top = bars(rng, size_hw, left, width, shift=shift, rough=rough)
    line = _line_of(left, width, W)
    if rng.random() < 0.22:  # lines end, all at one height or one by one
        end = rng.uniform(0.15, 0.85) * H + np.zeros(len(left))
        if rng.random() < 0.5:
            end = end + pitch * rng.choice((0.0, 2.0, rng.uniform(0, 4)), len(left))
        ended = np.arange(H)[:, None] > end[line][None]
        rest = 0.0
        if rng.random() < 0.25:  # in a pad
            rest = 1.0
        top = np.where(ended, np.float32(rest), top).astype(np.float32)
        regular = False
    drawn = _layout(rng, top, pitch, float(np.median(width)) if len(width) else pitch, regular=regular)
    return replace(drawn, top_tone=drawn.top_tone + _tones(rng, H, len(left), line), rough_px=rough)


def _tones(rng: Rng, height: int, n: int, line: NDArray[np.intp]) -> Plane:
    """What each line's gray adds to that of all (height, columns): in turn, or slowly along each line; mostly nothing.

    Args:
        rng: its state says which.
        height: of the plane, px.
        n: how many lines.
        line: (columns,) which one each column belongs to.
    """
    if n and rng.random() < 0.2:
        in_turn = rng.normal(0, rng.uniform(0.05, 0.3), int(rng.integers(2, 5)))
        return np.zeros((height, 1), np.float32) + in_turn[line % len(in_turn)].astype(np.float32)
    if n and rng.random() < 0.2:
        slow = rng.uniform(0.03, 0.15) * _along(rng, height, n, rng.uniform(0.15, 0.8) * height)
        return np.asarray(slow.T[:, line], np.float32)
    return np.zeros((height, len(line)), np.float32)


def _line_of(left: Floats, width: Floats, span: int) -> NDArray[np.intp]:
    """Which line each column belongs to (span,)."""
    middles = left + width / 2
    found = np.searchsorted((middles[1:] + middles[:-1]) / 2, np.arange(span))
    return np.clip(found, 0, max(0, len(left) - 1))


def _segments(rng: Rng, size_hw: Size) -> Layout:
    """Lines cut into pieces, tip to tip: in rows, staggered like bricks, or of several lengths."""
    H, W = size_hw
    pitch = _pitch(rng, size_hw, 5)
    duty = rng.uniform(0.35, 0.75)
    n = int(W / pitch) + 4
    left = -rng.uniform(0, 2) * pitch + pitch * np.arange(n)
    length = pitch * log_uniform(rng, 1.2, 9)
    gap = np.full(n, max(2.0, pitch * rng.uniform(0.3, 1.2)))
    offset = np.zeros(n)
    way = rng.random()
    if way < 0.35:
        offset = (np.arange(n) % 2) * length / 2
    elif way < 0.5:
        offset = np.arange(n) * length / int(rng.integers(3, 6))
    elif way < 0.7:  # long and short ones in turn, as in a capsule array
        gap = gap + (np.arange(n) % 2) * rng.uniform(0.1, 0.4) * length
    elif way < 0.8:
        offset = rng.uniform(0, length, n)
    gap = np.minimum(gap, 0.7 * length)
    line = _line_of(left, np.full(n, duty * pitch), W)
    y = np.arange(H)[:, None] + offset[None, :] + gap[None, :] / 2
    gate = (np.mod(y, length) > gap[None, :]).astype(np.float32)
    top = bars(rng, size_hw, left, np.full(n, duty * pitch), rough=_rough(rng, pitch)) * gate[:, line]
    return _layout(rng, top, pitch, duty * pitch, regular=not 0.7 <= way < 0.8)


def _crossed(rng: Rng, size_hw: Size) -> Layout:
    """One layer of lines over another."""
    H, W = size_hw
    pitch, below = _pitch(rng, size_hw, 5), _pitch(rng, size_hw, 5)
    left, width, regular = _plan(rng, W, pitch)
    left_below, width_below, regular_below = _plan(rng, H, below)
    under = bars(rng, (W, H), left_below, width_below, rough=_rough(rng, below)).T
    tones = rng.uniform(0, 0.7, 2)
    ground = (tones[0] + (tones[1] - tones[0]) * under).astype(np.float32)
    return _layout(
        rng,
        bars(rng, size_hw, left, width, rough=_rough(rng, pitch)),
        pitch,
        float(np.median(width)) if len(width) else pitch,
        ground_tone=ground,
        ground_height=(rng.uniform(0, 0.8) * under).astype(np.float32),
        regular=regular and regular_below,
    )


# ---- islands, contacts, logic ----


def contacts(
    size_hw: Size,
    period_xy: tuple[float, float],
    at_xy: tuple[float, float],
    *,
    radius_xy: tuple[float, float],
    square: float,
    stagger: float,
    keep: NDArray[np.bool_],
) -> Plane:
    """Contacts on a grid (H, W), antialiased.

    Args:
        size_hw: of the plane, px.
        period_xy: of the grid, px.
        at_xy: of its first contact.
        radius_xy: half widths.
        square: 2 for ellipses; larger for rounded rectangles.
        stagger: how far every other row is moved aside, as a share of the period.
        keep: (rows, columns), repeated: which contacts there are.
    """
    H, W = size_hw
    v = (np.arange(H, dtype=np.float32) - np.float32(at_xy[1])) / np.float32(period_xy[1])
    row = np.floor(v).astype(np.int64)
    dy = np.abs(v - row - 0.5) * np.float32(period_xy[1] / radius_xy[1])
    u = (np.arange(W, dtype=np.float32)[None] - np.float32(at_xy[0])) / np.float32(period_xy[0])
    u = u - (np.float32(stagger) * (row % 2).astype(np.float32))[:, None]
    column = np.floor(u).astype(np.int64)
    dx = np.abs(u - column - 0.5) * np.float32(period_xy[0] / radius_xy[0])
    reach = (dx**square + (dy**square)[:, None]) ** np.float32(1 / square)
    plane = np.clip((1 - reach) * np.float32(min(radius_xy)) + 0.5, 0, 1)
    return np.asarray(plane * keep[row[:, None] % keep.shape[0], column % keep.shape[1]], np.float32)


def _contacts(rng: Rng, size_hw: Size) -> Layout:
    pitch = _pitch(rng, size_hw, 6)
    period = (pitch, pitch * rng.choice((1.0, 1.0, 0.87, rng.uniform(1, 2.5))))
    radius = pitch * rng.uniform(0.2, 0.38)
    aspect = rng.choice((1.0, 1.0, rng.uniform(0.6, 1.0)))
    whole = rng.random() < 0.6
    keep = np.ones((1, 1), bool) if whole else rng.random((37, 41)) < rng.uniform(0.15, 0.7)
    top = contacts(
        size_hw,
        (float(period[0]), float(period[1])),
        (float(rng.uniform(0, pitch)), float(rng.uniform(0, pitch))),
        radius_xy=(max(1.2, radius), max(1.2, float(min(radius * period[1] / pitch * aspect, 0.42 * period[1])))),
        square=float(rng.choice((2.0, 2.0, 4.0, 8.0))),
        stagger=float(rng.choice((0.0, 0.5, 0.25))),
        keep=keep,
    )
    drawn = _layout(rng, top, pitch, 2 * radius, regular=whole)
    if rng.random() < 0.2:  # contacts in one part of the field only
        H, W = size_hw
        edge = rng.uniform(0.25, 0.75)
        part = np.arange(W)[None] < edge * W if rng.random() < 0.5 else np.arange(H)[:, None] < edge * H
        drawn = replace(drawn, top=(drawn.top * part).astype(np.float32), regular=False)
    return drawn


def _vias(rng: Rng, size_hw: Size) -> Layout:
    """Vias on metal lines: bright or dark, at every crossing or at some; or slots in the lines themselves."""
    pitch = _pitch(rng, size_hw, 7)
    duty = rng.uniform(0.4, 0.75)
    n = int(size_hw[1] / pitch) + 4
    start = -rng.uniform(0, 2) * pitch
    metal = bars(rng, size_hw, start + pitch * np.arange(n), np.full(n, duty * pitch), rough=_rough(rng, pitch))
    radius = pitch * duty * rng.uniform(0.25, 0.6)
    whole = rng.random() < 0.3
    via = contacts(
        size_hw,
        (pitch, pitch * float(rng.uniform(1, 3))),
        (start + duty * pitch / 2 - pitch / 2 - pitch, float(rng.uniform(0, pitch))),
        radius_xy=(max(1.2, radius), max(1.2, radius * float(rng.choice((1.0, rng.uniform(0.7, 1.4)))))),
        square=float(rng.choice((2.0, 2.0, 4.0))),
        stagger=0.0,
        keep=np.ones((1, 1), bool) if whole else rng.random((37, 41)) < rng.uniform(0.05, 0.6),
    )
    if rng.random() < 0.3:
        return _layout(rng, (metal * (1 - via)).astype(np.float32), pitch, duty * pitch, regular=whole)
    tones = rng.uniform(0, 0.6, 2)
    ground = (tones[0] + (tones[1] - tones[0]) * metal).astype(np.float32)
    drawn = _layout(
        rng,
        via,
        pitch,
        2 * radius,
        ground_tone=ground,
        regular=whole,
        ground_height=(rng.uniform(0, 1) * metal).astype(np.float32),
    )
    tone = 1.0 if rng.random() < 0.75 else 0.0
    return replace(drawn, top_tone=np.full(size_hw, tone, np.float32))


def _logic(rng: Rng, size_hw: Size) -> Layout:
    """Wires on two sets of tracks: straight ones, Ls, Ts, jogs and islands."""
    H, W = size_hw
    pitch = _pitch(rng, size_hw, 9)
    rows, columns = int(H / pitch) + 3, int(W / pitch) + 3
    width = pitch * rng.uniform(0.35, 0.65)
    taken = np.zeros((rows, columns), bool)
    canvas = np.zeros((2 * H, 2 * W), np.uint8)
    shift = rng.uniform(0, 1, 2) * pitch
    turn_share, upright, fill = rng.uniform(0, 0.4), rng.uniform(0.1, 0.9), rng.uniform(0.2, 1.2)
    longest = int(rng.choice((3, 8, 30)))
    ways = ((1, 0), (-1, 0), (0, 1), (0, -1))
    n = int(fill * rows * columns / longest) + 2
    starts = np.stack((rng.integers(0, rows, n), rng.integers(0, columns, n)), axis=1).tolist()
    lengths, odds = rng.integers(0, longest + 1, n).tolist(), rng.random((n, longest + 2)).tolist()
    for (row0, column0), length, odd in zip(starts, lengths, odds, strict=True):
        row, column = row0, column0
        if taken[row, column]:
            continue
        taken[row, column] = True
        way = ways[(0 if odd[0] < upright else 2) + (odd[1] < 0.5)]
        corners = [(row, column)]
        for step in range(length):
            if odd[step + 2 - (step + 2 > longest)] < turn_share:
                way = (way[1], way[0])
            ahead = (row + way[0], column + way[1])
            if not (0 <= ahead[0] < rows and 0 <= ahead[1] < columns) or taken[ahead]:
                break
            row, column = ahead
            taken[row, column] = True
            corners.append(ahead)
        for (y0, x0), (y1, x1) in zip(corners, corners[1:] or corners, strict=False):
            low = (np.array((min(x0, x1), min(y0, y1))) * pitch - shift - width / 2) * 2
            high = (np.array((max(x0, x1), max(y0, y1))) * pitch - shift + width / 2) * 2
            cv2.rectangle(canvas, np.rint(low).astype(int).tolist(), (np.rint(high).astype(int) - 1).tolist(), 255, -1)
    top = np.asarray(cv2.resize(canvas, (W, H), interpolation=cv2.INTER_AREA) / np.float32(255), np.float32)
    return _layout(rng, top, pitch, width, regular=False)


def _sparse(rng: Rng, size_hw: Size) -> Layout:
    """A few rectangles on empty ground: pads, rows of islands, one wide line, the corner of a large plate."""
    H, W = size_hw
    side = min(H, W)
    canvas = np.zeros((2 * H, 2 * W), np.uint8)
    smallest = 2.0 * side
    for _ in range(int(rng.integers(1, 6))):
        height, width = (side * log_uniform(rng, 0.03, 0.6) for _ in range(2))
        x, y = rng.uniform(-0.2, 1, 2) * (W, H)
        step = rng.uniform(1.4, 3) * np.array((width, height))
        n_x, n_y = (int(n) for n in rng.choice((1, 1, 2, 3, 8), 2))
        smallest = min(smallest, height, width)
        value = 0 if rng.random() < 0.2 else 255
        for j in range(n_y):
            for i in range(n_x):
                low = 2 * (np.array((x, y)) + step * (i, j))
                high = low + 2 * np.array((width, height))
                cv2.rectangle(canvas, np.rint(low).astype(int).tolist(), np.rint(high).astype(int).tolist(), value, -1)
    top = np.asarray(cv2.resize(canvas, (W, H), interpolation=cv2.INTER_AREA) / np.float32(255), np.float32)
    return _layout(rng, top, 2 * smallest, max(3.0, smallest), regular=False)


# ---- what no mask set drew ----


def _bare(rng: Rng, size_hw: Size) -> Layout:
    flat = np.zeros(size_hw, np.float32)
    ground = np.full(size_hw, rng.uniform(0.3, 0.7), np.float32)
    height = flat
    if rng.random() < 0.6:
        grain = noise(rng, size_hw, log_uniform(rng, 1.2, 14))
        if rng.random() < 0.3:
            grain = -np.abs(grain)
        height = (log_uniform(rng, 0.02, 0.5) * grain).astype(np.float32)
        ground = (ground + rng.uniform(0, 0.12) * grain).astype(np.float32)
    return Layout(flat, ground, flat, ground, height, min(size_hw) / 12, min(size_hw) / 24, False, False, False)


def _fibres(rng: Rng, size_hw: Size) -> Layout:
    """Curved fibres lying over one another, deeper ones darker and less sharp."""
    H, W = size_hw
    side = max(H, W)
    width = min(H, W) * log_uniform(rng, 0.006, 0.04)
    n = int(np.clip(rng.uniform(0.8, 3) * side / width, 30, 260))
    canvas = np.zeros((H, W), np.uint8)
    bend = rng.choice((0.1, 0.5, 1.5))
    spread = rng.choice((0.25, np.pi, np.pi))
    main = rng.uniform(0, np.pi)
    t = np.linspace(-1, 1, 13)
    ranks = np.linspace(0.15, 1, n) ** rng.uniform(0.15, 1)
    middles, angles = rng.uniform(0, 1, (n, 2)) * (W, H), main + rng.uniform(-spread, spread, n) / 2
    bends, widths = rng.normal(0, bend, n), np.maximum(1, np.rint(width * np.exp(rng.normal(0, 0.3, n)))).astype(int)
    grays = 255 * np.clip(ranks * rng.uniform(0.75, 1.1, n), 0.05, 1)
    for i in range(n):
        heading = angles[i] + bends[i] * t
        path = np.cumsum(np.stack((np.cos(heading), np.sin(heading)), axis=1), axis=0) * side / 6
        path = path - path[6] + middles[i]
        cv2.polylines(
            canvas, [np.rint(path * 8).astype(np.int32)], False, float(grays[i]), int(widths[i]), cv2.LINE_AA, 3
        )
        if i == n // 3:
            canvas = np.asarray(cv2.GaussianBlur(canvas, (0, 0), rng.uniform(0.6, 3)), np.uint8)
    drawn = np.asarray(canvas.astype(np.float32) / 255, np.float32)
    flat = np.zeros(size_hw, np.float32)
    height = np.asarray(drawn * rng.uniform(0.5, 2), np.float32)
    return Layout(flat, drawn, flat, drawn, height, 4 * width, width, False, False, False)


def _pores(rng: Rng, size_hw: Size) -> Layout:
    """Islands, pores, or a labyrinth of bent stripes: band noise cut at a level; a few large ones, or very many."""
    pitch = _pitch(rng, size_hw, 7) if rng.random() < 0.6 else min(size_hw) * log_uniform(rng, 0.1, 0.8)
    stretch = rng.choice((1.0, 1.0, 2.5))
    white = rng.standard_normal(size_hw).astype(np.float32)
    sigma = pitch / 4.4
    band = cv2.GaussianBlur(white, (0, 0), sigma * stretch, sigmaY=sigma)
    band = band - cv2.GaussianBlur(band, (0, 0), 1.3 * sigma * stretch, sigmaY=1.3 * sigma)
    band = band / (band.std() + 1e-6)
    top = np.clip((band - rng.uniform(-0.8, 1.6)) * sigma + 0.5, 0, 1).astype(np.float32)
    # Among shapes as random as these, a bridge or a cut has no meaning.
    drawn = replace(_layout(rng, top, pitch, pitch / 2, regular=False), patterned=False)
    if rng.random() < 0.4:  # brighter toward the rim of each island
        drawn = replace(drawn, top_tone=(drawn.top_tone - np.float32(0.12) * np.maximum(band, 0)).astype(np.float32))
    return drawn


def _stack(rng: Rng, size_hw: Size) -> Layout:
    """A cross-section: films of several thicknesses and tones, pillars or trenches in one of them."""
    H, W = size_hw
    n = int(rng.integers(2, 14))
    thickness = np.exp(rng.normal(0, 0.8, n))
    if rng.random() < 0.3:
        thickness = np.tile(thickness[:2], n)
    bounds = np.cumsum(thickness)[:-1] / thickness.sum() * H
    tones = rng.uniform(0, 1, len(thickness))
    if rng.random() < 0.3:
        tones = np.tile(tones[:2], n)[: len(thickness)]
    y = np.arange(H, dtype=np.float32)[:, None]
    wave = rng.choice((0.3, 1.0, 4.0)) * _along(rng, W, len(bounds), rng.uniform(8, 80))
    ground = np.full(size_hw, tones[0], np.float32)
    height = np.zeros(size_hw, np.float32)
    steps = rng.uniform(-0.4, 0.4, len(bounds))
    for k in range(len(bounds)):
        below = np.clip(y - (bounds[k] + wave[k][None]).astype(np.float32) + 0.5, 0, 1)
        ground += np.float32(tones[k + 1] - tones[k]) * below
        height += np.float32(steps[k]) * below
    pitch = _pitch(rng, size_hw, 8)
    if rng.random() < 0.5:
        count = int(W / pitch) + 3
        left = -rng.uniform(0, pitch) + pitch * np.arange(count)
        y0 = rng.uniform(0, 0.7) * H
        y1 = y0 + rng.uniform(0.1, 0.6) * H
        taper = np.linspace(0, rng.uniform(0, 0.25) * pitch, H)[None] + np.zeros((count, 1))
        top = bars(rng, size_hw, left, np.full(count, rng.uniform(0.3, 0.7) * pitch), shift=taper, rough=0.0)
        top *= (y > y0) & (y < y1)
        return _layout(rng, top, pitch, pitch / 2, ground_tone=ground, ground_height=height)
    flat = np.zeros(size_hw, np.float32)
    return Layout(flat, ground, flat, ground, height, pitch, pitch / 2, False, False, False)


def _blocks(rng: Rng, size_hw: Size) -> Layout:
    """Two to four textures side by side, with or without a seam."""
    H, W = size_hw
    x, y = (round(rng.uniform(0.2, 0.8) * n) for n in (W, H))
    rooms = [(0, H, 0, x), (0, H, x, W)] if rng.random() < 0.5 else [(0, y, 0, W), (y, H, 0, x), (y, H, x, W)]
    seam = int(rng.choice((0, 0, 2, 6)))
    planes = [np.zeros(size_hw, np.float32) for _ in range(5)]
    planes[3][:] = rng.uniform(0, 1)
    pitch = width = 1e9
    for y0, y1, x0, x1 in rooms:
        kind = str(rng.choice(("lines", "lines", "contacts", "logic", "segments", "bare", "vias", "sparse")))
        if min(y1 - y0, x1 - x0) < 16:
            continue
        part = layout(kind, rng, (y1 - y0, x1 - x0))
        inner = (slice(seam, y1 - y0 - seam), slice(seam, x1 - x0 - seam))
        for whole, own in zip(
            planes, (part.top, part.top_tone, part.top_height, part.ground_tone, part.ground_height), strict=True
        ):
            whole[y0 + seam : y1 - seam, x0 + seam : x1 - seam] = own[inner]
        pitch, width = min(pitch, part.pitch_px), min(width, part.width_px)
    patterned = bool(planes[0].any())
    top, top_tone, top_height, ground_tone, ground_height = planes
    return Layout(
        top, top_tone, top_height, ground_tone, ground_height, min(pitch, 60.0), min(width, 40.0), False, patterned
    )


_LAYOUTS: dict[str, Callable[[Rng, Size], Layout]] = {
    "lines": _lines,
    "segments": _segments,
    "logic": _logic,
    "sparse": _sparse,
    "contacts": _contacts,
    "vias": _vias,
    "crossed": _crossed,
    "bare": _bare,
    "fibres": _fibres,
    "pores": _pores,
    "stack": _stack,
    "blocks": _blocks,
}
LAYOUTS = tuple(_LAYOUTS)
