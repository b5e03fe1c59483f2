"""Signatures that reach over dies: scratches as lines and arcs, rings, and clusters, from places on the wafer alone."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import log10, pi, sqrt
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from semwatch.wafer.arcs import FREE, Run, along, fit_arc, places_on, surest_run
from semwatch.wafer.cells import Cells
from semwatch.wafer.chance import ALPHA, log10_tail

Kind = Literal["line", "arc", "ring", "cluster"]
_ORDER: dict[Kind, int] = {"line": 0, "arc": 0, "ring": 1, "cluster": 2}

WIDTHS_UM = (100.0, 300.0, 1000.0)
"""Half widths of the strips in which defects of one scratch lie; each is tried."""
MAX_SEEDS = 3000
"""Defects from which scratches are looked for; of more a fixed sample."""
MAX_SIGNATURES = 30
_NEIGHBOURS, _TRIED, _BATCH = 96, 24, 16
_SEEN_UM = 300.0
"""Half width of the strips that are looked at around each defect."""
_MAX_CURVATURE_PER_UM = 1 / 25_000.0
_BEST = 150
"""So many candidates are followed along the wafer, and again after every scratch that was found."""
_REFITS = 10
_STRAY_GAPS = 5.0
"""An end of a scratch is cut off behind a gap of so many mean ones."""
_TAKEN = 1.5
"""A scratch that was found takes along what lies within so many half widths: the criterion favours a narrow strip."""
_IS_LINE_RAD = 0.08
"""An arc that turns by less is a line."""
_SECTORS, _RING_SECTORS, _RING_SPREAD = 36, 6, 0.03
"""A ring is seen in so many of the sectors of the wafer, and keeps its distance from the centre to this share of the
wafer's radius (standard deviation)."""
_EXPECTED_NEAR = 0.3
"""Clusters: neighbours are counted within the distance within which chance brings so many."""


@dataclass(frozen=True, eq=False)
class Signature:
    """Defects that lie together more than chance explains.

    Attributes:
        kind: line and arc: a scratch; ring: concentric with the wafer; cluster: anything else that is dense.
        members: rows of its defects.
        path_um: (P, 2) its middle line in the wafer frame; of a cluster, the box around it, closed.
        length_um: along the middle line; of a cluster the diagonal of its box.
        half_width_um: of its strip; 0 for a cluster.
        log10_chance: upper bound of how many like it random defects would make on this wafer, as log10.
    """

    kind: Kind
    members: NDArray[np.int64]
    path_um: NDArray[np.float64]
    length_um: float
    half_width_um: float
    log10_chance: float


def find_signatures(
    on_wafer_um: NDArray[np.float64], *, radius_um: float, alpha: float = ALPHA, seed: int = 0
) -> list[Signature]:
    """Scratches, rings and clusters of a wafer, in this order, the surest of each first.

    A scratch is a strip around a line or an arc in which more defects lie than random ones would, everywhere on the
    wafer and right beside the strip: a dense ring or spot alone makes no scratch. Three defects draw a strip, two of
    them its ends, so a wafer of N has N (N - 1) (N - 2) / 6 of each width; one counts if among so many strips fewer
    than ``alpha`` like it would be met by chance. Then whatever else lies denser than chance is a cluster.
    Source: the criterion is that of a-contrario detection (Desolneux, Moisan, Morel 2000).

    Args:
        on_wafer_um: (N, 2) places in the wafer frame; leave repeaters out, they lie in rows as dies do.
        radius_um: of the wafer.
        seed: of the sample that is taken of more than ``MAX_SEEDS`` defects.
    """
    rng = np.random.default_rng(seed)
    free = np.ones(len(on_wafer_um), np.bool_)
    found: list[Signature] = []
    candidates = _candidates(on_wafer_um, rng)
    n_strips = log10(max(1.0, len(WIDTHS_UM) * len(on_wafer_um) ** 3 / 6))
    while len(found) < MAX_SIGNATURES:
        rows = np.flatnonzero(free)
        place = on_wafer_um[rows]
        density = len(rows) / (pi * radius_um**2)
        runs = [
            run
            for arc_of in _still_free(candidates, free)
            for half_width in WIDTHS_UM
            if (run := _followed(place, on_wafer_um[arc_of], half_width, density)) is not None
        ]
        best = min(runs, key=lambda run: run.log10_p, default=None)
        if best is None or best.log10_p + n_strips >= log10(alpha):
            break
        found.append(_scratch(place, rows, best, radius_um, best.log10_p + n_strips))
        free[found[-1].members] = False
    found += _clusters(on_wafer_um, np.flatnonzero(free), radius_um, alpha)
    return sorted(found, key=lambda one: (_ORDER[one.kind], one.log10_chance))


# --- scratches -------------------------------------------------------------------------------------------------------


def _candidates(place: NDArray[np.float64], rng: np.random.Generator) -> list[NDArray[np.int64]]:
    """Rows of defects on one strip near a defect, for each defect the likeliest such strip; the likeliest first."""
    n = len(place)
    n_near = min(_NEIGHBOURS, n - 1)
    if n_near <= FREE:
        return []
    seeds = np.arange(n) if n <= MAX_SEEDS else np.sort(rng.choice(n, MAX_SEEDS, replace=False))
    found: list[tuple[float, NDArray[np.int64]]] = []
    for some in np.array_split(seeds, -(-len(seeds) // _BATCH)):
        squares = np.sum((place[some, None] - place[None]) ** 2, 2)
        near = np.argpartition(squares, n_near, 1)[:, : n_near + 1]
        offsets = (place[near] - place[some, None]).astype(np.float32)
        shuffled = rng.permuted(np.tile(np.arange(n_near + 1), (len(some), 1)), axis=1)
        ends, thirds = shuffled[:, :_TRIED], rng.permuted(shuffled, axis=1)[:, :_TRIED]
        scores, masks = _likeliest(offsets, ends, thirds)
        found += [(score, rows[mask]) for score, rows, mask in zip(scores.tolist(), near, masks, strict=True)]
    return [rows for _, rows in sorted(found, key=lambda one: one[0])]


def _likeliest(
    offsets: NDArray[np.float32], ends: NDArray[np.int64], thirds: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Of the strips through the origin, an end and a third point: the one with most points beyond those beside it.

    Args:
        offsets: (S, K, 2) neighbours of each of S defects, from that defect.
        ends, thirds: (S, J) and (S, M) which of them are tried.

    Returns:
        (S,) log10 of the chance of the best strip, (S, K) which neighbours lie in it.
    """
    end = np.take_along_axis(offsets, ends[..., None], 1)
    far = np.maximum(np.hypot(end[..., 0], end[..., 1]), 1.0)
    ux, uy = end[..., 0] / far, end[..., 1] / far
    x, y = offsets[:, None, :, 0], offsets[:, None, :, 1]
    a, b = x * ux[..., None] + y * uy[..., None], y * ux[..., None] - x * uy[..., None]  # (S, J, K): along, across
    bow = a * (a - far[..., None]) / 2  # across = curvature x bow: an arc through origin and end is nearly a parabola
    at = np.broadcast_to(thirds[:, None], (*ends.shape, thirds.shape[1]))
    steep = np.take_along_axis(bow, at, 2)
    curvature = np.take_along_axis(b, at, 2) / np.where(np.abs(steep) < 1.0, 1.0, steep)
    curvature = np.where(np.abs(curvature) <= _MAX_CURVATURE_PER_UM, curvature, 0)
    across = np.abs(b[:, :, None] - curvature[..., None] * bow[:, :, None])  # (S, J, M, K)
    inside = np.count_nonzero(across <= _SEEN_UM, axis=3)
    around = np.count_nonzero(across <= 4 * _SEEN_UM, axis=3) - inside
    log_p = log10_tail(np.maximum(inside - FREE, 0), (around + 1) / 3)
    log_p[far < _SEEN_UM] = 0  # the two points give no direction
    flat = log_p.reshape(len(offsets), -1)
    best = flat.argmin(1)
    rows = np.arange(len(offsets))
    return flat[rows, best], across.reshape(len(offsets), flat.shape[1], -1)[rows, best] <= _SEEN_UM


def _still_free(candidates: list[NDArray[np.int64]], free: NDArray[np.bool_]) -> Iterator[NDArray[np.int64]]:
    """Of the likeliest candidates, the defects that no scratch has taken yet."""
    n = 0
    for rows in candidates:
        left = rows[free[rows]]
        if len(left) > FREE and 2 * len(left) > len(rows):
            yield left
            n += 1
        if n == _BEST:
            return


def _followed(
    place: NDArray[np.float64], first: NDArray[np.float64], half_width_um: float, density: float
) -> Run | None:
    """The surest stretch of the strip that begins with some defects, drawn anew through what lies in it."""
    best: Run | None = None
    through = first
    for _ in range(_REFITS):
        arc = fit_arc(through)
        if abs(arc.curvature) > _MAX_CURVATURE_PER_UM:
            break
        run = surest_run(place, arc, through.mean(0), half_width_um, density)
        if run is None or (best is not None and run.log10_p >= best.log10_p):
            break
        best, through = run, place[run.members]
    return best


def _scratch(
    place: NDArray[np.float64], rows: NDArray[np.int64], run: Run, radius_um: float, log_chance: float
) -> Signature:
    start = place[run.members[len(run.members) // 2]]
    at = along(run.arc, place, start)
    low, high = _without_strays(np.sort(at[run.members]))
    length = high - low
    is_near = np.abs(run.arc.distance(place)) <= _TAKEN * run.half_width_um
    members = np.flatnonzero(is_near & (at >= low) & (at <= high))
    kind: Kind = "line" if length * abs(run.arc.curvature) < _IS_LINE_RAD else "arc"
    path = places_on(run.arc, start, np.linspace(low, high, 2 if kind == "line" else 64))
    if kind == "arc" and _is_ring(path, radius_um):
        kind = "ring"
    return Signature(kind, rows[members], path, length, run.half_width_um, log_chance)


def _without_strays(at: NDArray[np.float64]) -> tuple[float, float]:
    """Ends of a run without one or two stray defects far beyond either end, which cost chance little."""
    wide = np.diff(at) > _STRAY_GAPS * (at[-1] - at[0]) / (len(at) - 1)
    first = max((n for n in (1, 2) if wide[n - 1]), default=0)
    last = max((n for n in (1, 2) if wide[-n]), default=0)
    return float(at[first]), float(at[len(at) - 1 - last])


def _is_ring(place: NDArray[np.float64], radius_um: float) -> bool:
    """Whether points keep their distance from the centre of the wafer, at one side of it or around."""
    distance, angle = np.hypot(*place.T), np.arctan2(*place.T[::-1])
    sectors = len(np.unique(np.floor(angle / (2 * pi / _SECTORS))))
    return bool(sectors >= _RING_SECTORS and distance.std() < _RING_SPREAD * radius_um < distance.mean())


# --- clusters --------------------------------------------------------------------------------------------------------


def _clusters(place: NDArray[np.float64], rows: NDArray[np.int64], radius_um: float, alpha: float) -> list[Signature]:
    """Connected defects each of which has more neighbours than chance explains, and the neighbours."""
    n = len(rows)
    if n <= FREE:
        return []
    reach = sqrt(_EXPECTED_NEAR * radius_um**2 / n)
    cells = Cells(place[rows], reach)
    near = [found[distance <= reach] for found, distance in map(cells.near, place[rows])]
    expected = max(_EXPECTED_NEAR, 1e-9)
    log_p = log10_tail(np.array([len(one) - 1 for one in near]), np.full(n, expected)) + log10(n)
    is_core = log_p < log10(alpha)
    group = np.full(n, -1)
    found: list[Signature] = []
    for first in np.flatnonzero(is_core):
        if group[first] >= 0:
            continue
        waiting = [int(first)]
        group[first] = len(found)
        while waiting:
            at = waiting.pop()
            for other in near[at][group[near[at]] < 0].tolist():
                group[other] = len(found)
                if is_core[other]:
                    waiting.append(other)
        members = np.flatnonzero(group == len(found))
        found.append(_cluster(place[rows[members]], rows[members], radius_um, float(log_p[members].min())))
    return found


def _cluster(place: NDArray[np.float64], members: NDArray[np.int64], radius_um: float, log_chance: float) -> Signature:
    low, high = place.min(0), place.max(0)
    path = np.array([low, (high[0], low[1]), high, (low[0], high[1]), low])
    length = float(np.hypot(*(high - low)))
    return Signature("ring" if _is_ring(place, radius_um) else "cluster", members, path, length, 0.0, log_chance)
