"""A drawing as a list of shapes, and two ways to write it: SVG, and PNG by OpenCV."""

from collections.abc import Sequence
from typing import Literal, NamedTuple
from xml.sax.saxutils import escape

import cv2
import numpy as np
from numpy.typing import NDArray

Anchor = Literal["start", "middle", "end"]

SCALE = 2
"""Pixels of the PNG for one unit of a drawing."""
_SUPERSAMPLED = 2
_SHIFT = 4
"""OpenCV draws at fractions of a pixel: 1 / 2**4."""
_FONT, _BOLD = cv2.FONT_HERSHEY_SIMPLEX, cv2.FONT_HERSHEY_DUPLEX
_CAP_HEIGHT = 0.72
"""Height of a capital letter in sizes of the font."""


class Path(NamedTuple):
    """A line through points, or an area where it is closed; no fill or no stroke where that is None.

    Attributes:
        points: (P, 2), x to the right and y downwards.
        dash: length of a dash and of the gap after it; 0 for a solid line.
    """

    points: NDArray[np.float64]
    stroke: str | None = None
    fill: str | None = None
    width: float = 1.0
    closed: bool = False
    dash: float = 0.0
    opacity: float = 1.0


class Disc(NamedTuple):
    """A circle."""

    x: float
    y: float
    radius: float
    stroke: str | None = None
    fill: str | None = None
    width: float = 1.0
    dash: float = 0.0
    opacity: float = 1.0


class Words(NamedTuple):
    """A line of text; y is its base line."""

    x: float
    y: float
    text: str
    size: float = 13.0
    colour: str = "#222222"
    bold: bool = False
    anchor: Anchor = "start"


Shape = Path | Disc | Words


class Drawing(NamedTuple):
    """Shapes on a white ground, the first at the bottom."""

    width: int
    height: int
    title: str
    shapes: Sequence[Shape]


# --- SVG -------------------------------------------------------------------------------------------------------------


def svg(drawing: Drawing) -> str:
    """The drawing as an SVG file of its own."""
    body = "\n".join(_svg_of(shape) for shape in drawing.shapes)
    w, h = drawing.width, drawing.height
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{w}" height="{h}" viewBox="0 0 {w} {h}" '
        f'font-family="Helvetica, Arial, sans-serif">\n<title>{_clean(drawing.title)}</title>\n'
        f'<rect width="{w}" height="{h}" fill="#ffffff"/>\n{body}\n</svg>\n'
    )


def _svg_of(shape: Shape) -> str:
    match shape:
        case Words(x, y, text, size, colour, bold, anchor):
            weight = ' font-weight="bold"' if bold else ""
            return (
                f'<text x="{x:.2f}" y="{y:.2f}" font-size="{size:g}" fill="{colour}" text-anchor="{anchor}"{weight}>'
                f"{_clean(text)}</text>"
            )
        case Disc(x, y, radius):
            return f'<circle cx="{x:.2f}" cy="{y:.2f}" r="{radius:.2f}"{_look(shape)}/>'
        case Path(points, closed=closed):
            at = " ".join(f"{x:.2f},{y:.2f}" for x, y in points.tolist())
            return f'<{"polygon" if closed else "polyline"} points="{at}"{_look(shape)}/>'


def _look(shape: Path | Disc) -> str:
    look = f' fill="{shape.fill or "none"}"'
    if shape.stroke:
        look += f' stroke="{shape.stroke}" stroke-width="{shape.width:g}" stroke-linejoin="round"'
    if shape.dash:
        look += f' stroke-dasharray="{shape.dash:g}"'
    return look + (f' opacity="{shape.opacity:g}"' if shape.opacity < 1 else "")


def _clean(text: str) -> str:
    """Text without what XML forbids."""
    return escape("".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text))


# --- PNG -------------------------------------------------------------------------------------------------------------


def png(drawing: Drawing) -> bytes:
    """The drawing as a PNG, ``SCALE`` pixels a unit; letters that OpenCV has no form of become question marks."""
    k = SCALE * _SUPERSAMPLED
    canvas = np.full((drawing.height * k, drawing.width * k, 3), 255, np.uint8)
    for shape in drawing.shapes:
        if isinstance(shape, Words):
            _write(canvas, shape, k)
        elif shape.opacity < 1:
            above = canvas.copy()
            _paint(above, shape, k)
            canvas = cv2.addWeighted(above, shape.opacity, canvas, 1 - shape.opacity, 0).astype(np.uint8)
        else:
            _paint(canvas, shape, k)
    small = cv2.resize(canvas, (drawing.width * SCALE, drawing.height * SCALE), interpolation=cv2.INTER_AREA)
    return cv2.imencode(".png", small)[1].tobytes()


def _paint(canvas: NDArray[np.uint8], shape: Path | Disc, k: int) -> None:
    if isinstance(shape, Disc):
        angle = np.linspace(0, 2 * np.pi, max(16, min(720, int(shape.radius * k))), endpoint=False)
        points = np.array([shape.x, shape.y]) + shape.radius * np.stack([np.cos(angle), np.sin(angle)], 1)
        closed = True
    else:
        points, closed = shape.points, shape.closed
    fixed = _fixed(points, k)
    if shape.fill:
        cv2.fillPoly(canvas, [fixed], _bgr(shape.fill), cv2.LINE_AA, _SHIFT)
    if shape.stroke:
        lines = _dashes(points, closed, shape.dash) if shape.dash else [points]
        is_closed = closed and not shape.dash
        width = max(1, round(shape.width * k))
        cv2.polylines(
            canvas, [_fixed(one, k) for one in lines], is_closed, _bgr(shape.stroke), width, cv2.LINE_AA, _SHIFT
        )


def _fixed(points: NDArray[np.float64], k: int) -> NDArray[np.int32]:
    return np.round((points * k - 0.5) * (1 << _SHIFT)).astype(np.int32)[:, None]


def _dashes(points: NDArray[np.float64], closed: bool, dash: float) -> list[NDArray[np.float64]]:
    around = np.concatenate([points, points[:1]]) if closed else points
    at = np.concatenate([[0.0], np.cumsum(np.hypot(*np.diff(around, axis=0).T))])
    found = []
    for begin in np.arange(0, at[-1], 2 * dash):
        end = min(begin + dash, at[-1])
        s = np.concatenate([[begin], at[(at > begin) & (at < end)], [end]])
        found.append(np.stack([np.interp(s, at, around[:, i]) for i in (0, 1)], 1))
    return found


def _write(canvas: NDArray[np.uint8], words: Words, k: int) -> None:
    text = "".join(c if " " <= c <= "~" else "?" for c in words.text)
    font = _BOLD if words.bold else _FONT
    thick = max(1, round(words.size * k * (0.085 if words.bold else 0.07)))
    (_, unit), _ = cv2.getTextSize("H", font, 1.0, 1)
    scale = words.size * k * _CAP_HEIGHT / unit
    (width, _), _ = cv2.getTextSize(text, font, scale, thick)
    left = {"start": 0.0, "middle": width / 2, "end": width}[words.anchor]
    at = (round(words.x * k - left), round(words.y * k))
    cv2.putText(canvas, text, at, font, scale, _bgr(words.colour), thick, cv2.LINE_AA)


def _bgr(colour: str) -> tuple[int, int, int]:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return blue, green, red
