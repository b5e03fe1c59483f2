"""A figure with its uncertainty: a mean over seeds with its spread, and a rate with its exact interval."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

import numpy as np
from scipy import special

from semwatch.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Spread:
    """Mean and sample standard deviation (ddof = 1) over n seeds; the deviation of one value is NaN.

    >>> print(Spread.of([0.908, 0.912, 0.916]))
    0.912 ± 0.004 (3)
    """

    mean: float
    std: float
    n: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Self:
        """Average the seeds. NaN is a figure that was undefined for a seed: left out, and n says so.

        Raises:
            ConfigError: there is no value at all, or one is infinite.
        """
        array = np.array(list(values), dtype=np.float64)
        if not array.size or np.isinf(array).any():
            raise ConfigError(f"a spread needs finite values of one seed at least, not {array.tolist()}")
        array = array[~np.isnan(array)]
        mean = float(array.mean()) if array.size else math.nan
        std = float(array.std(ddof=1)) if array.size > 1 else math.nan
        return cls(mean, std, array.size)

    def __format__(self, spec: str) -> str:
        if self.n == 0:
            return "–"
        spec = spec or ".3f"
        spread = f" ± {self.std:{spec}}" if self.n > 1 else ""
        return f"{self.mean:{spec}}{spread} ({self.n})"

    def __str__(self) -> str:
        return format(self, "")


@dataclass(frozen=True, slots=True)
class Rate:
    """A share of n independent cases with its exact two-sided interval; shares are 0 to 1, printed in per cent.

    Source: Clopper and Pearson, Biometrika 26 (1934). Exact means never too narrow; with few cases it is wide.

    >>> print(Rate.of(3, 200))
    1.5 % [0.3, 4.3] (200)
    """

    rate: float
    low: float
    high: float
    n: int
    confidence: float = 0.95

    @classmethod
    def of(cls, hits: int, n: int, *, confidence: float = 0.95) -> Self:
        """Count ``hits`` among n cases.

        Raises:
            ConfigError: n is 0, hits are not between 0 and n, or the confidence is not between 0 and 1.
        """
        if not 0 <= hits <= n or n == 0:
            raise ConfigError(f"a rate needs at least one case and 0 to n hits, not {hits} of {n}")
        if not 0 < confidence < 1:
            raise ConfigError(f"confidence {confidence} is not between 0 and 1")
        tail = (1 - confidence) / 2
        low = float(special.betaincinv(hits, n - hits + 1, tail)) if hits else 0.0
        high = float(special.betaincinv(hits + 1, n - hits, 1 - tail)) if hits < n else 1.0
        return cls(hits / n, low, high, n, confidence)

    def __str__(self) -> str:
        return f"{100 * self.rate:.1f} % [{100 * self.low:.1f}, {100 * self.high:.1f}] ({self.n})"
