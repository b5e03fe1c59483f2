"""A user's own layout as geometry: an SVG whose filled paths are metal tracks and whose circles are vias.

Paths may use the straight-line commands M L H V Z, absolute or relative. The file is data only: nothing in it is run,
entities are refused, and one random window of it is drawn.
"""

import math
import re
from functools import lru_cache
from pathlib import Path
from xml.etree import ElementTree

import cv2
import numpy as np
from numpy.typing import NDArray

from semwatch.errors import ConfigError
from semwatch_training.synthetic.specimen import Rng

MAX_BYTES = 64 * 2**20
MAX_COORDINATE = 1e7
_TOKEN = re.compile(r"([A-Za-z])|([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)")

Drawn = NDArray[np.uint8]


def read_layout(path: Path, rng: Rng, size_hw: tuple[int, int]) -> tuple[Drawn, Drawn, float]:
    """Draw a random window of a layout: tracks and vias, each (H, W) of 0 or 255, and the pitch in pixels.

    Raises:
        ConfigError: the file is away, too large, not SVG, or has no track or no via.
    """
    tracks, circles = _parse(path, path.stat().st_mtime_ns if path.is_file() else 0)
    width = _median_width(tracks)
    pitch = max(min(size_hw) / math.exp(rng.uniform(math.log(8), math.log(22))), 8.0)
    scale = 0.5 * pitch / width
    origin = _window_origin(rng, tracks, circles, size_hw, scale)
    return (*_draw(tracks, circles, origin, scale, size_hw), pitch)


@lru_cache(maxsize=8)
def _parse(path: Path, _mtime_ns: int) -> tuple[tuple[NDArray[np.float64], ...], NDArray[np.float64]]:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ConfigError(f"{path}: layout is larger than {MAX_BYTES >> 20} MiB; cut out a part of it")
        text = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the layout: {error.strerror}") from error
    if b"<!ENTITY" in text or b"\0" in text:
        raise ConfigError(f"{path}: layout declares XML entities or is not UTF-8; save it as plain SVG")
    try:
        root = ElementTree.fromstring(text)
        elements = [(element.tag.rpartition("}")[2], element.attrib) for element in root.iter()]
        tracks = tuple(track for tag, have in elements if tag == "path" for track in _polygons(have["d"]))
        rows = [[float(have[key]) for key in ("cx", "cy", "r")] for tag, have in elements if tag == "circle"]
    except (ElementTree.ParseError, LookupError, ValueError) as error:
        raise ConfigError(f"{path}: not a layout in SVG: {error}") from error
    if not tracks or not rows:
        raise ConfigError(f"{path}: a layout needs at least one <path> (track) and one <circle> (via)")
    circles = np.array(rows, np.float64)
    sound = all(np.all(np.abs(part) < MAX_COORDINATE) for part in (*tracks, circles))
    if not sound or circles[:, 2].min() <= 0:
        raise ConfigError(f"{path}: coordinates must be finite and under {MAX_COORDINATE:g}, radii over 0")
    return tracks, circles


def _polygons(data: str) -> list[NDArray[np.float64]]:
    """Read a path's ``d`` attribute as polygons of shape (K, 2)."""
    polygons: list[list[tuple[float, float]]] = []
    command, x, y = "", 0.0, 0.0
    numbers = iter(_TOKEN.findall(data))
    for letter, number in numbers:
        if letter:
            command = letter
            if command not in "MmLlHhVvZz":
                raise ValueError(f"path command {command!r} is not a straight line; flatten the curves first")
            continue
        if not command or command in "Zz":
            raise ValueError("path data starts with a number")
        value, relative = float(number), command.islower()
        if command in "Hh":
            x = value + (x if relative else 0.0)
        elif command in "Vv":
            y = value + (y if relative else 0.0)
        else:
            second = float(next(numbers, ("", ""))[1])
            x, y = (x + value, y + second) if relative else (value, second)
        if command in "Mm":
            polygons.append([])
            command = "l" if relative else "L"
        if not polygons:
            raise ValueError("path data does not start with M")
        polygons[-1].append((x, y))
    return [np.array(polygon, np.float64) for polygon in polygons if len(polygon) >= 3]


def _median_width(tracks: tuple[NDArray[np.float64], ...]) -> float:
    """Estimate the usual track width: twice area over perimeter, the median over tracks."""
    widths = []
    for track in tracks:
        after = np.roll(track, -1, axis=0)
        area = abs(float(np.sum(track[:, 0] * after[:, 1] - after[:, 0] * track[:, 1]))) / 2
        widths.append(2 * area / max(float(np.hypot(*(after - track).T).sum()), 1e-6))
    return max(float(np.median(widths)), 1e-3)


def _window_origin(
    rng: Rng,
    tracks: tuple[NDArray[np.float64], ...],
    circles: NDArray[np.float64],
    size_hw: tuple[int, int],
    scale: float,
) -> NDArray[np.float64]:
    """Choose the window's upper left corner in layout units, so that a via lies well inside."""
    low = np.min([track.min(axis=0) for track in tracks], axis=0)
    high = np.max([track.max(axis=0) for track in tracks], axis=0)
    extent = np.array([size_hw[1], size_hw[0]]) / scale
    via = circles[rng.integers(len(circles)), :2]
    origin = via - extent * rng.uniform(0.25, 0.75, 2)
    return np.asarray(np.clip(origin, low, np.maximum(high - extent, low)), np.float64)


def _draw(
    tracks: tuple[NDArray[np.float64], ...],
    circles: NDArray[np.float64],
    origin: NDArray[np.float64],
    scale: float,
    size_hw: tuple[int, int],
) -> tuple[Drawn, Drawn]:
    metal, vias = np.zeros(size_hw, np.uint8), np.zeros(size_hw, np.uint8)
    size_wh = np.array([size_hw[1], size_hw[0]])
    for track in tracks:
        pixels = np.clip((track - origin) * scale, -1e5, 1e5)  # OpenCV counts in 32 bits, sixteenths of a pixel
        if np.all(pixels.max(axis=0) > 0) and np.all(pixels.min(axis=0) < size_wh):
            cv2.fillPoly(metal, [np.round(pixels * 16).astype(np.int32)], 255, cv2.LINE_AA, 4)
    for x, y, radius in (circles - [*origin, 0.0]) * scale:
        if -radius < x < size_wh[0] + radius and -radius < y < size_wh[1] + radius:
            cv2.circle(vias, (round(x * 16), round(y * 16)), round(radius * 16), 255, -1, cv2.LINE_AA, 4)
    return metal, vias
