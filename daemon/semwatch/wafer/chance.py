"""How unlikely it is that randomly scattered defects make what was found."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

ALPHA = 0.01
"""Findings that chance alone may bring on a wafer, on average: a hundred clean wafers bring one false call at most."""


def log10_tail(k: ArrayLike, expected: ArrayLike) -> NDArray[np.float64]:
    """Upper bound of the chance of ``k`` or more events where ``expected`` are, as log10; 0 unless k is 1 above that.

    Source: P(X >= k) <= P(X = k) (k + 1) / (k + 1 - m) of a Poisson variable with mean m (Klar 2000), with Stirling's
    bound of the factorial. For k >= m + 1 it holds for a sum of independent rare events with that mean, too (Hoeffding
    1956).

    >>> log10_tail([2, 3, 10], [3, 0.1, 1]).round(2).tolist()  # exactly 0.9 of 1, 1.5e-4 and 1.1e-7
    [0.0, -3.8, -6.95]
    """
    n = np.asarray(k, np.float64)
    m = np.maximum(np.asarray(expected, np.float64), 1e-300)
    is_above = (n >= m + 1) & (n >= 1)
    safe = np.where(is_above, n, np.ceil(m) + 2)
    term = safe * np.log(m / safe) + safe - m - 0.5 * np.log(2 * np.pi * safe)
    bound = (term + np.log((safe + 1) / (safe + 1 - m))) / np.log(10.0)
    return np.where(is_above, np.minimum(bound, 0.0), 0.0)
