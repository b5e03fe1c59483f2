"""Lines and arcs through defects, and the part of one on which the defects lie densest."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from semwatch.wafer.chance import log10_tail

_MAX_ENDS = 160
"""Of more defects in a strip, only so many are tried as its ends."""
FREE = 3
"""So many defects are spent on drawing a strip, and prove nothing."""
_FLANK = (1.5, 4.5)
"""Beside a strip, the density is counted between so many half widths from its middle."""
_ELONGATION = 12.0
"""A strip is at least so many times as long as it is wide."""
_WEAKEST = 6.0
"""A strip proves at most so many times what its weakest third does: a spot that stray defects prolong is none."""


@dataclass(frozen=True)
class Arc:
    """The points with a (x^2 + y^2) + b x + c y + d = 0 and b^2 + c^2 - 4 a d = 1: a circle, or a line where a is 0."""

    a: float
    b: float
    c: float
    d: float

    @property
    def curvature(self) -> float:
        """1 / radius, with the sign of ``a``."""
        return 2 * self.a

    def distance(self, place: NDArray[np.float64]) -> NDArray[np.float64]:
        """(N,) how far points are from it; the sign says on which side."""
        x, y = place.T
        p = self.a * (x * x + y * y) + self.b * x + self.c * y + self.d
        return np.asarray(2 * p / (1 + np.sqrt(np.maximum(1 + 4 * self.a * p, 0))))


@dataclass(frozen=True, eq=False)
class Run:
    """A stretch of an arc that holds more defects than chance explains.

    Attributes:
        members: rows of the defects in it, along it.
        along_um: (2,) where it begins and ends, along the arc.
        log10_p: upper bound of the chance of so many, once its ends and one more are given.
    """

    arc: Arc
    half_width_um: float
    members: NDArray[np.int64]
    along_um: tuple[float, float]
    log10_p: float


def fit_arc(place: NDArray[np.float64]) -> Arc:
    """The arc or line of least squares through (N, 2) points, N of 3 or more.

    Source: Pratt 1987, solved in the singular vectors of the points as Chernov gives it; a line is no special case.
    """
    middle = place.mean(0)
    size = max(float(np.abs(place - middle).max()), 1e-9)
    x, y = ((place - middle) / size).T
    z = x * x + y * y
    points = np.stack([z, x, y, np.ones_like(x)], 1)
    _, singular, vectors = np.linalg.svd(points, full_matrices=False)
    if len(singular) < 4 or singular[3] < 1e-9 * singular[0]:
        a, b, c, d = vectors[-1]
    else:
        root = vectors.T @ np.diag(singular) @ vectors
        inverse = np.array([[0, 0, 0, -0.5], [0, 1, 0, 0], [0, 0, 1, 0], [-0.5, 0, 0, 0]])
        values, found = np.linalg.eigh(root @ inverse @ root)
        a, b, c, d = np.linalg.solve(root, found[:, np.flatnonzero(values > 0)[0]])
    a, b, c = a / size**2, b / size, c / size
    b, c, d = b - 2 * a * middle[0], c - 2 * a * middle[1], d + a * middle @ middle - b * middle[0] - c * middle[1]
    norm = np.sqrt(max(b * b + c * c - 4 * a * d, 1e-300))
    return Arc(float(a / norm), float(b / norm), float(c / norm), float(d / norm))


def along(arc: Arc, place: NDArray[np.float64], start: NDArray[np.float64]) -> NDArray[np.float64]:
    """(N,) where points are along an arc, um from the point of it that is nearest to ``start``."""
    if abs(arc.a) < 1e-12:
        return np.asarray((place - start) @ np.array([-arc.c, arc.b]))
    center = np.array([-arc.b, -arc.c]) / (2 * arc.a)
    zero = np.arctan2(*(start - center)[::-1])
    angle = np.arctan2(*(place - center).T[::-1]) - zero
    return np.asarray((angle + np.pi) % (2 * np.pi) - np.pi) / abs(2 * arc.a)


def places_on(arc: Arc, start: NDArray[np.float64], at_um: NDArray[np.float64]) -> NDArray[np.float64]:
    """(P, 2) the points of an arc at lengths along it, as ``along`` counts them."""
    if abs(arc.a) < 1e-12:
        foot = start - arc.distance(start[None])[0] * np.array([arc.b, arc.c])
        return np.asarray(foot + at_um[:, None] * np.array([-arc.c, arc.b]))
    center = np.array([-arc.b, -arc.c]) / (2 * arc.a)
    angle = np.arctan2(*(start - center)[::-1]) + at_um * abs(2 * arc.a)
    return np.asarray(center + np.stack([np.cos(angle), np.sin(angle)], 1) / abs(2 * arc.a))


def surest_run(
    place: NDArray[np.float64], arc: Arc, start: NDArray[np.float64], half_width_um: float, density: float
) -> Run | None:
    """The stretch of a strip around an arc that chance explains least; None where too few lie in the strip.

    What chance would bring is what the wafer's density says, or what lies right beside the stretch if that is more.

    Args:
        place: (N, 2).
        start: (2,) the point opposite to which an arc is cut open.
        density: defects per um2 on the wafer.
    """
    distance = arc.distance(place)
    inside = np.flatnonzero(np.abs(distance) <= half_width_um)
    if len(inside) <= FREE:
        return None
    at = along(arc, place[inside], start)
    order = np.argsort(at)
    inside, at = inside[order], at[order]
    step = -(-len(at) // _MAX_ENDS)
    first, last = np.meshgrid(np.arange(0, len(at), step), np.arange(len(at) - 1, -1, -step), indexing="ij")
    length = at[last] - at[first]
    is_long = np.flatnonzero((length >= 2 * half_width_um * _ELONGATION) & (last - first + 1 > FREE))
    if not len(is_long):
        return None
    first, last, length = first.ravel()[is_long], last.ravel()[is_long], length.ravel()[is_long]
    cuts = at[first][:, None] + length[:, None] * np.array([-1e-9, 1 / 3, 2 / 3, 1 + 1e-9])
    count = np.diff(np.searchsorted(at, cuts))
    near, far = (limit * half_width_um for limit in _FLANK)
    expected = np.broadcast_to(density * 2 * half_width_um * length[:, None] / 3, count.shape)
    for side in (distance, -distance):
        beside = np.sort(along(arc, place[(side > near) & (side <= far)], start))
        n_beside = np.diff(np.searchsorted(beside, cuts))
        expected = np.maximum(expected, (n_beside + 1 / 3) * 2 * half_width_um / (far - near))
    whole = log10_tail(count.sum(1) - FREE, expected.sum(1))
    weakest = log10_tail(count - 1, expected).max(1)
    log_p = np.maximum(whole, weakest * _WEAKEST)
    best = int(np.argmin(log_p))
    if log_p[best] >= 0:
        return None
    i, j = first[best], last[best]
    return Run(arc, half_width_um, inside[i : j + 1], (float(at[i]), float(at[j])), float(log_p[best]))
