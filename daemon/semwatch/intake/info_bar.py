"""Where a page's field of view ends and the vendor's info bar begins, from the pixels alone.

A bar is a strip of one flat background along the top or bottom edge that carries text and is closed by a full-width
boundary. All of that must be seen, or nothing is cut: a missed bar costs a false defect, a wrong cut loses a real one.
So black text bars below a black field without a frame line, and gray bars, are missed on purpose.
"""

import numpy as np
from numpy.typing import NDArray

from semwatch.defects import Box

_MAX_SHARE = 0.2
"""A strip higher than this share of the page is image."""
_MIN_HEIGHT = 10
"""No legible line of text with its margins is lower, in px."""
_EDGE_ROWS = 3
"""Zeiss draws its bar as a box that leaves a row of image at the page's edge; frame lines are as thin."""
_FLAT_TOLERANCE = 12
"""Gray levels: JPEG ringing around text stays within."""
_INK_CONTRAST = 100
"""Gray levels between background and text."""
_PAGE_FLAT, _PAGE_STROKES = 0.7, 12
"""A page of a bar alone is mostly background, and one scale with its number may be all that is written on it."""
_WORD_STROKES = 5
"""Strokes side by side of the shortest word."""


def find_field(pixels: NDArray[np.uint8]) -> Box:
    """Return the box of a (H, W) page without the info bars at its top and bottom.

    >>> find_field(np.zeros((100, 80), np.uint8))
    (0, 0, 80, 100)
    """
    H, W = pixels.shape
    rows = int(_MAX_SHARE * H)
    top = _bar_height(pixels[:rows])
    bottom = _bar_height(pixels[::-1][:rows])
    return 0, top, W, H - bottom


def is_only_bar(field: NDArray[np.uint8]) -> bool:
    """Say whether a field (H, W) holds nothing but flat background and lines of text: a page of an info bar alone.

    A bar that ``find_field`` missed below a field without any image counts too. Every group of rows that is not flat
    must read as text or as a thin line, so a single particle on a black field is an image.

    >>> is_only_bar(np.zeros((100, 80), np.uint8))
    False
    """
    margin = max(1, field.shape[1] // 100)
    inner = field[:, margin:-margin]
    if inner.size == 0:
        return False
    background = int(np.bincount(inner.ravel(), minlength=256).argmax())
    near = _within(inner, background)
    if 64 < background < 192 or near.mean() < _PAGE_FLAT or not _carries_text(inner, near, background, _PAGE_STROKES):
        return False
    inked = np.flatnonzero(~near.all(axis=1))
    if len(inked) > 0.9 * len(inner):  # text leaves flat rows between its lines
        return False
    groups = np.split(inked, np.flatnonzero(np.diff(inked) > 1) + 1)
    return all(len(rows) <= _EDGE_ROWS or _reads_as_text(~near[rows]) for rows in groups)


def _reads_as_text(marked: NDArray[np.bool_]) -> bool:
    """Say whether rows (h, W) have the strokes of a word: particles and lines have one or two."""
    return int(np.count_nonzero(marked[:, 1:] & ~marked[:, :-1], axis=1).max()) >= _WORD_STROKES


def _bar_height(band: NDArray[np.uint8]) -> int:
    """Count the rows of the bar at the start of a (h, W) band whose row 0 is the page's edge; 0 where there is none."""
    margin = max(1, band.shape[1] // 100)
    inner = band[:, margin:-margin]
    if len(inner) <= _MIN_HEIGHT:
        return 0
    background = int(np.bincount(inner[2 : 2 + _MIN_HEIGHT].ravel(), minlength=256).argmax())
    if 64 < background < 192:
        return 0
    near = _within(inner, background)
    height = _rows_to_boundary(inner, near.mean(axis=1))
    if height < _MIN_HEIGHT or not _carries_text(inner[:height], near[:height], background):
        return 0
    return height + _frame_rows(inner[height : height + _EDGE_ROWS])


def _within(pixels: NDArray[np.uint8], level: int) -> NDArray[np.bool_]:
    low, high = max(0, level - _FLAT_TOLERANCE), min(255, level + _FLAT_TOLERANCE)
    return (pixels >= low) & (pixels <= high)


def _frame_rows(rows: NDArray[np.uint8]) -> int:
    """Count the rows that are of one level from side to side, that of the first row: a line of the bar's frame."""
    if not len(rows):
        return 0
    of_frame = _within(rows, int(rows[0, rows.shape[1] // 2])).mean(axis=1) >= 0.99
    return len(rows) if of_frame.all() else int(np.argmin(of_frame))


def _rows_to_boundary(inner: NDArray[np.uint8], flatness: NDArray[np.float64]) -> int:
    """Count the flat rows up to a frame line or to image; 0 where neither ends them sharply within the band."""
    flat = np.flatnonzero(flatness >= 0.4)
    if not len(flat) or flat[0] > _EDGE_ROWS:
        return 0
    gaps = np.flatnonzero(np.diff(flat) > _EDGE_ROWS + 1)
    height = int(flat[gaps[0]] if len(gaps) else flat[-1]) + 1
    lines = np.flatnonzero(flatness[:height] <= 0.05)
    frames = [y for y in lines if y >= _MIN_HEIGHT and _frame_rows(inner[y : y + 1])]
    if frames:
        return int(frames[0])
    margin = flatness[max(0, height - _EDGE_ROWS) : height]
    beyond = flatness[height : height + 1 + _EDGE_ROWS]
    return height if len(beyond) > _EDGE_ROWS and margin.max() >= 0.95 else 0


def _carries_text(bar: NDArray[np.uint8], near: NDArray[np.bool_], background: int, min_strokes: int = 16) -> bool:
    """Tell text from texture.

    Text is two-toned, a line of it has many strokes at uneven distances (arrays of vias have even ones), the strokes
    change from row to row (ends of metal lines do not), and the lines fill the bar. Limits were set on bars of FEI,
    Zeiss, Hitachi and KLA style, with margin to arrays, line ends and particles on black.
    """
    ink = bar < background - _INK_CONTRAST if background > 127 else bar > background + _INK_CONTRAST
    if not 0.002 <= ink.mean() <= 0.5 or near.mean() + ink.mean() < 0.85:
        return False
    strokes = np.count_nonzero(ink[:, 1:] & ~ink[:, :-1], axis=1)
    lines = np.flatnonzero(strokes >= 8)
    if strokes.max() < min_strokes or len(lines) < 5 or lines[-1] < len(bar) / 3:
        return False
    busiest = ink[np.argmax(strokes)]
    pitch = np.diff(np.flatnonzero(busiest[1:] & ~busiest[:-1]))
    changed = np.count_nonzero(ink[lines] ^ ink[lines - 1], axis=1).sum() / strokes[lines].sum()
    uneven = np.abs(pitch - np.median(pitch)) > 0.15 * np.median(pitch)
    return bool(uneven.mean() >= 0.4 and changed >= 0.5)
