"""Points by the square of a grid that they lie in: those near a place without looking at all."""

import numpy as np
from numpy.typing import NDArray


class Cells:
    """(N, 2) points, for questions of what lies within ``size`` of a place."""

    def __init__(self, points: NDArray[np.float64], size: float) -> None:
        self.points = points
        self.size = size
        self._rows: dict[tuple[int, int], list[int]] = {}
        for row, (x, y) in enumerate(np.floor(points / size).astype(np.int64).tolist()):
            self._rows.setdefault((x, y), []).append(row)

    def near(self, place: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Rows of the points within ``size`` of a place, and of some farther ones; and how far each is."""
        x, y = np.floor(place / self.size).astype(np.int64).tolist()
        rows = [row for i in (-1, 0, 1) for j in (-1, 0, 1) for row in self._rows.get((x + i, y + j), ())]
        found = np.array(rows, np.int64)
        return found, np.hypot(*(self.points[found] - place).T)
