"""Repeaters: defects at the same place of several dies, as a flaw of the mask or of a tool leaves them."""

from dataclasses import dataclass
from math import log10, pi

import numpy as np
from numpy.typing import NDArray

from semwatch.wafer.cells import Cells
from semwatch.wafer.chance import ALPHA, log10_tail

MIN_DIES = 3
"""Fewer are never called."""
_AROUND = 8
"""The density of defects near a place is counted within so many tolerances."""


@dataclass(frozen=True, eq=False)
class Repeater:
    """One place of the die on which several dies have a defect.

    Attributes:
        in_die_um: the place, from the origin of the die.
        members: rows of its defects.
        n_dies: on how many dies.
        log10_chance: upper bound of how many such places random defects would make on all these dies, as log10.
    """

    in_die_um: tuple[float, float]
    members: NDArray[np.int64]
    n_dies: int
    log10_chance: float


def find_repeaters(
    in_die_um: NDArray[np.float64],
    dies: NDArray[np.int64],
    *,
    die_area_um2: float,
    tolerance_um: float = 2.0,
    alpha: float = ALPHA,
) -> list[Repeater]:
    """Places of the die on which more dies have a defect than chance would bring, the surest first.

    Around each of N defects the dies are counted that have one within the tolerance. If the defects of the other dies
    lay at random, a die with n of them would with n a / A: a is the area of the tolerance's circle, A that of a die, or
    what the density right around the place says, if that is higher. A place counts if N such places would be met less
    than ``alpha`` times by chance.

    Args:
        in_die_um: (N, 2) places, from the origin of each die.
        dies: (N,) which die each lies on; dies of several wafers have different numbers.
        tolerance_um: how far a defect may lie from the place.
    """
    n = len(in_die_um)
    if n < MIN_DIES:
        return []
    cells = Cells(in_die_um, tolerance_um * _AROUND)
    by_die = np.bincount(np.unique(dies, return_inverse=True)[1])
    by_chance = float(np.sum(1 - np.exp(-by_die * pi * tolerance_um**2 / die_area_um2)))
    free = np.ones(n, np.bool_)
    tested = [_tested(cells, dies, i, tolerance_um, by_chance, free) for i in range(n)]
    found: list[Repeater] = []
    for i in sorted(range(n), key=lambda i: tested[i][1]):
        n_dies, log_p = tested[i] if not found else _tested(cells, dies, i, tolerance_um, by_chance, free)
        log_chance = log_p + log10(n)
        if not free[i] or n_dies < MIN_DIES or log_chance >= log10(alpha):
            continue
        rows, distance = cells.near(in_die_um[i])
        middle = in_die_um[rows[(distance <= tolerance_um) & free[rows]]].mean(0)
        rows, distance = cells.near(middle)
        members = np.union1d(rows[(distance <= tolerance_um) & free[rows]], [i])
        free[members] = False
        x, y = middle.tolist()
        found.append(Repeater((x, y), members, len(np.unique(dies[members])), log_chance))
    return found


def _tested(
    cells: Cells,
    dies: NDArray[np.int64],
    i: int,
    tolerance_um: float,
    by_chance: float,
    free: NDArray[np.bool_],
) -> tuple[int, float]:
    """On how many dies something lies near defect ``i``, and log10 of the chance of that; of too few 0."""
    rows, distance = cells.near(cells.points[i])
    inside = rows[(distance <= tolerance_um) & free[rows]]
    if len(inside) < MIN_DIES:
        return len(inside), 0.0
    n_dies = len(np.unique(dies[inside]))
    n_around = np.count_nonzero((distance > tolerance_um) & (distance <= _AROUND * tolerance_um) & free[rows])
    expected = max(by_chance, n_around / (_AROUND**2 - 1))
    return n_dies, float(log10_tail(n_dies - 1, expected))
