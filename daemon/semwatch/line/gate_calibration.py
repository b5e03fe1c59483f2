"""Which threshold the gate should have, from raw image scores, and what it would cost: false alarms and misses.

Two ways, both pure functions on plain arrays. ``propose`` has no labels: a stream of scores is read as a mixture of
a lower group, taken for normal images, and an upper group, taken for defective ones. ``measure`` has images that a
person has sorted, and counts.

What no statistics of scores can show: a defective image that the detector does not see has the score of a normal one
and lies in the lower group; a normal image that the detector takes for defective lies in the upper one. The false
alarms and misses that ``propose`` expects do not count them. Only labelled images show them.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from semwatch.line.binarization import conformal_threshold

Array = NDArray[np.float64]

FEWEST = 100
"""Scores before a threshold is proposed: with fewer, a group of a tenth is ten images."""
MOST = 1000
"""Scores that one proposal looks at; the last ones of a longer stream."""
SMALLEST_GROUP = 8
"""Fewest images of a group: the spread of fewer is not known."""
EVIDENCE = 10.0
"""Least difference of BIC in favour of two groups: "very strong" (Kass and Raftery 1995)."""
VALLEY = 0.4
"""Largest density between the two modes, as a share of the lower mode's, at which the groups count as apart."""
AGREEMENT = 0.9
"""Share of the resamples that must have a valley too, one of at most ``VALLEY_AGAIN``."""
VALLEY_AGAIN = 0.6
LARGEST_MISS = 0.5
"""A threshold whose expected misses may be above this is not proposed."""
N_RESAMPLES = 80
INTERVAL = (5.0, 95.0)
"""Percentiles of the resamples between which a rate is stated to lie."""
_STARTS = (0.03, 0.06, 0.12, 0.25, 0.4, 0.55, 0.7, 0.82, 0.91, 0.96)
"""Shares of the scores below the first guess of a threshold."""
_STEPS, _STEPS_AGAIN = 80, 20
_LEAST_SPREAD = 0.02
"""Of a side of a group, in units of the spread of all log scores: a group of equal scores has no likelihood."""
_MOST_BINS = 200
"""More scores than these are counted in so many bins, each a quarter as wide as the least spread: it saves time."""
_N_GRID = 64
_NORMAL = NormalDist()


@dataclass(frozen=True, slots=True)
class Rate:
    """A share in [0, 1], and the interval in which it lies with a probability of 90 %."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        """In percent."""
        return f"{self.value:.1%} ({self.low:.1%} to {self.high:.1%})"


@dataclass(frozen=True, slots=True)
class Expected:
    """What a threshold is expected to do."""

    threshold: float
    false_alarms: Rate
    """Share of the lower group above the threshold."""
    misses: Rate
    """Share of the upper group at or below the threshold. Both intervals go as far as a symmetric lower group would
    bring them, see ``_expected``; defects that look normal altogether are in neither."""


@dataclass(frozen=True, slots=True)
class Proposal:
    """A threshold for a stream of scores."""

    expected: Expected
    """Of the threshold that is proposed."""
    low: float
    """The threshold lies between ``low`` and ``high`` with a probability of 90 %, over streams like this one."""
    high: float
    n: int
    """Scores it was made from."""
    normal_share: Rate
    """Share of the images in the lower group."""
    present: Expected | None = None
    """Of the threshold that the gate has now, where it was given."""

    @property
    def threshold(self) -> float:
        """Raw image score above which the gate should open."""
        return self.expected.threshold


@dataclass(frozen=True, slots=True)
class NoProposal:
    """Why no threshold is proposed."""

    n: int
    reason: str


# --- from a stream without labels ------------------------------------------------------------------------------------


def propose(
    scores: NDArray[np.floating],
    *,
    false_alarm_rate: float,
    miss_cost: float | None = None,
    present: float | None = None,
    seed: int = 0,
) -> Proposal | NoProposal:
    """Propose a threshold from the raw image scores of a stream, whose share of normal images is not known.

    The logarithms of the scores are modelled as two groups. Each is a normal distribution with two spreads, one on each
    side of its mode, because both have long tails. They count as two if BIC prefers them to one such group, if the
    density has a valley between their modes, and if resamples of the stream have one too. Otherwise there is no
    proposal: a stream of normal images alone and one of defective images alone look alike.

    Args:
        scores: (n,) raw scores, of one detector and one recipe, in the order in which they came.
        false_alarm_rate: the share of the lower group that may lie above the threshold.
        miss_cost: what a miss costs, in false alarms. Where it is given, the threshold is the cheapest one for the mix
            of this stream instead of the one of ``false_alarm_rate``.
        present: the threshold that the gate has now, to be held against the proposal.
        seed: of the resamples; the same scores and seed give the same answer.

    Multiplying all scores by a number multiplies the threshold by it; raising them to a power raises the threshold.

    Raises: ValueError for scores that are not finite, a rate outside (0, 1), or a cost that is not positive.
    Source: two-piece normal distribution and its maximum likelihood, John 1982; mixture by EM, Dempster et al. 1977;
    nonparametric bootstrap, Efron 1979.
    """
    given = np.asarray(scores, np.float64).ravel()
    if not np.isfinite(given).all():
        raise ValueError("scores holds NaN or infinity: leave out the images whose detection failed")
    if not 0.0 < false_alarm_rate < 1.0:
        raise ValueError(f"false_alarm_rate must lie between 0 and 1, not {false_alarm_rate}")
    if miss_cost is not None and not 0.0 < miss_cost < math.inf:
        raise ValueError(f"miss_cost must be positive, not {miss_cost}")
    given = given[-MOST:]
    n = len(given)
    if n < FEWEST:
        return NoProposal(n, f"{n} images so far, a proposal needs {FEWEST}")
    logs = _logs(given)
    if isinstance(logs, str):
        return NoProposal(n, logs)
    floor = _LEAST_SPREAD * (logs[-1] - logs[0])
    logs, counts = _binned(logs)
    guesses = _guesses(counts)
    fits = _fit(logs, np.repeat(counts[np.newaxis], len(guesses), axis=0), guesses, floor=floor, steps=_STEPS)
    best = int(fits.log_likelihood.argmax())
    fit = fits.only(best)
    if reason := _why_not(fit, logs, counts, floor):
        return NoProposal(n, reason)
    resampled = np.random.default_rng(seed).multinomial(n, counts / n, N_RESAMPLES).astype(np.float64)
    start = np.repeat(fit.is_upper, N_RESAMPLES, axis=0)
    again = _fit(logs, resampled, start, floor=floor, steps=_STEPS_AGAIN)
    if (_valley(again) <= VALLEY_AGAIN).mean() < AGREEMENT:
        return NoProposal(n, "the scores form two groups that overlap too much for a threshold between them")
    at, thresholds = (_thresholds(one, false_alarm_rate, miss_cost) for one in (fit, again))
    missed = float(np.percentile(1 - _above(float(at[0]), again.upper), INTERVAL[1]))
    if missed > LARGEST_MISS:
        why = f"at a false alarm rate of {false_alarm_rate:g} up to {missed:.0%} of the upper group would"
        return NoProposal(n, f"{why} be missed; a higher gate.false_alarm_rate may do")
    low, high = np.exp(np.percentile(thresholds, INTERVAL))
    return Proposal(
        expected=_expected(float(at[0]), fit, again),
        low=float(low),
        high=float(high),
        n=n,
        normal_share=_rate(1 - fit.upper_share, 1 - again.upper_share, 1 - again.upper_share),
        present=None if present is None else _expected(math.log(max(present, 1e-300)), fit, again),
    )


class _Group(NamedTuple):
    """Two-piece normal distributions of log scores, one a row: (B, 1) each."""

    mode: Array
    left: Array
    """Spread below the mode."""
    right: Array


@dataclass(frozen=True, slots=True, eq=False)
class _Fit:
    """B mixtures of two groups; in each the lower group is the one with the lower mode."""

    log_likelihood: Array
    """(B,)"""
    upper_share: Array
    """(B, 1)"""
    lower: _Group
    upper: _Group
    is_upper: Array
    """(B, k) probability of each value to be of the upper group."""

    def only(self, row: int) -> "_Fit":
        """One of the mixtures."""
        at = slice(row, row + 1)
        lower, upper = (_Group(*(part[at] for part in group)) for group in (self.lower, self.upper))
        return _Fit(self.log_likelihood[at], self.upper_share[at], lower, upper, self.is_upper[at])


def _logs(scores: Array) -> Array | str:
    """Sorted logarithms, outliers drawn in; or why there are none.

    What lies further out than a quarter of the spread beyond the outer 2 % on either side is drawn in: a blank image
    must not widen a group.
    """
    if scores.min() < 0:
        return "some scores are below 0: the detector's scores have no logarithm"
    positive = scores[scores > 0]
    if len(positive) < len(scores) / 2:
        return "more than half of the scores are 0"
    logs = np.log(np.sort(np.maximum(scores, positive.min())))
    low, high = np.percentile(logs, (2, 98))
    if high - low < 1e-9:
        return "the scores are all alike"
    margin = (high - low) / 4
    drawn_in: Array = np.clip(logs, low - margin, high + margin)
    return drawn_in


def _binned(logs: Array) -> tuple[Array, Array]:
    """Values (k,) of n sorted log scores, and how many have each (k,): of many, the middles of the bins they lie in."""
    if len(logs) <= _MOST_BINS:
        return logs, np.ones(len(logs))
    counts, edges = np.histogram(logs, _MOST_BINS)
    is_filled = counts > 0
    return ((edges[1:] + edges[:-1]) / 2)[is_filled], counts[is_filled].astype(np.float64)


def _guesses(counts: Array) -> Array:
    """(B, k) first guesses: all scores above one of their quantiles are of the upper group."""
    share_below = np.cumsum(counts) / counts.sum()
    return np.where(share_below[np.newaxis] > np.array(_STARTS)[:, np.newaxis], 0.95, 0.05)


def _log_density(x: Array, group: _Group) -> Array:
    spread = np.where(x < group.mode, group.left, group.right)
    norm = np.log((group.left + group.right) * math.sqrt(math.pi / 2))
    return np.asarray(-0.5 * ((x - group.mode) / spread) ** 2 - norm)


def _fit_group(x: Array, weights: Array, floor: float) -> _Group:
    """Maximum likelihood of one group for sorted x (k,) under B weightings (B, k).

    The likelihood is highest where the sum of the cube roots of the two one-sided sums of squares is least (John 1982);
    that is looked for among the x themselves, and running sums give it for all of them at once.
    """
    sums = [np.cumsum(weights * power, axis=1) for power in (np.ones_like(x), x, x * x)]
    rest = [one[:, -1:] - one for one in sums]
    below, above = (np.cbrt(np.maximum(s2 - 2 * x * s1 + x * x * s0, 0)) for s0, s1, s2 in (sums, rest))
    at = (below + above).argmin(axis=1)[:, np.newaxis]
    a, b = np.take_along_axis(below, at, axis=1), np.take_along_axis(above, at, axis=1)
    scale = np.sqrt((a + b) / np.maximum(sums[0][:, -1:], 1e-9))
    return _Group(x[at], np.maximum(a * scale, floor), np.maximum(b * scale, floor))


def _fit(x: Array, weights: Array, is_upper: Array, *, floor: float, steps: int) -> _Fit:
    """Fit B mixtures to sorted x (k,) under B weightings (B, k), each from its own first guess (B, k)."""
    total = weights.sum(axis=1, keepdims=True)
    least = 0.5 / total
    for _ in range(steps):
        share = np.clip((weights * is_upper).sum(axis=1, keepdims=True) / total, least, 1 - least)
        lower = _fit_group(x, weights * (1 - is_upper), floor)
        upper = _fit_group(x, weights * is_upper, floor)
        of_upper = np.log(share) + _log_density(x, upper)
        density = np.logaddexp(np.log1p(-share) + _log_density(x, lower), of_upper)
        is_upper = np.exp(of_upper - density)
    is_swapped = lower.mode > upper.mode
    lower, upper = (
        _Group(*(np.where(is_swapped, b, a) for a, b in zip(one, other, strict=True)))
        for one, other in ((lower, upper), (upper, lower))
    )
    return _Fit(
        (weights * density).sum(axis=1),
        np.where(is_swapped, 1 - share, share),
        lower,
        upper,
        np.where(is_swapped, 1 - is_upper, is_upper),
    )


def _why_not(fit: _Fit, logs: Array, counts: Array, floor: float) -> str:
    """Why a mixture gives no threshold; empty where it does."""
    n, single = counts.sum(), _fit_group(logs, counts[np.newaxis], floor)
    one = float((counts * _log_density(logs, single)).sum())
    evidence = 2 * (float(fit.log_likelihood[0]) - one) - 4 * math.log(n)  # 7 parameters instead of 3
    if evidence < EVIDENCE:
        return "the scores form one group: whether it is of normal or of defective images, scores cannot say"
    if (smaller := n * min(float(fit.upper_share[0, 0]), 1 - float(fit.upper_share[0, 0]))) < SMALLEST_GROUP:
        return f"the smaller group has about {smaller:.0f} of {n:.0f} images, it takes {SMALLEST_GROUP}"
    if float(_valley(fit)[0]) > VALLEY:
        return "the scores form two groups that overlap too much for a threshold between them"
    return ""


def _valley(fit: _Fit) -> Array:
    """(B,) least density between the modes over the density at the lower of the two; 1 where there is no valley."""
    steps = np.linspace(0, 1, _N_GRID)
    x = fit.lower.mode + (fit.upper.mode - fit.lower.mode) * steps
    density = (1 - fit.upper_share) * np.exp(_log_density(x, fit.lower)) + fit.upper_share * np.exp(
        _log_density(x, fit.upper)
    )
    return np.asarray(density.min(axis=1) / np.minimum(density[:, 0], density[:, -1]))


def _above(x: float | Array, group: _Group) -> Array:
    """(B, k) share of each group above x, a number or (B, k)."""
    weight = 2 / (group.left + group.right)
    tail = _tail(np.abs(x - group.mode) / np.where(x < group.mode, group.left, group.right))
    return np.asarray(np.where(x < group.mode, 1 - weight * group.left * tail, weight * group.right * tail))


_erfc = np.frompyfunc(math.erfc, 1, 1)


def _tail(z: Array) -> Array:
    return np.asarray(0.5 * _erfc(z / math.sqrt(2)), np.float64)


def _thresholds(fit: _Fit, false_alarm_rate: float, miss_cost: float | None) -> Array:
    """(B,) log thresholds."""
    if miss_cost is not None:
        x = fit.lower.mode + (fit.upper.mode - fit.lower.mode) * np.linspace(0, 1, 4 * _N_GRID)
        false_alarms = (1 - fit.upper_share) * _above(x, fit.lower)
        cost = false_alarms + miss_cost * fit.upper_share * (1 - _above(x, fit.upper))
        return np.asarray(np.take_along_axis(x, cost.argmin(axis=1)[:, np.newaxis], axis=1)[:, 0])
    rows = zip(*(part[:, 0].tolist() for part in fit.lower), strict=True)
    return np.array([_quantile(1 - false_alarm_rate, *row) for row in rows])


def _quantile(p: float, mode: float, left: float, right: float) -> float:
    below = left / (left + right)
    if p <= below:
        return mode + left * _NORMAL.inv_cdf(p / (2 * below))
    return mode - right * _NORMAL.inv_cdf((1 - p) / (2 * (1 - below)))


def _expected(log_threshold: float, fit: _Fit, again: _Fit) -> Expected:
    """Rates of the two groups, with intervals that also hold what they would be if the lower group were symmetric.

    By how much its right side is the heavier one may be normal images, as the fit has it, or defective ones of middling
    scores: the scores cannot say. In the second case fewer normal images pass and more defective ones are missed.
    """
    x = log_threshold
    alarms, misses = _above(x, again.lower), 1 - _above(x, again.upper)
    fewest, most = np.minimum(alarms, _tail_of_symmetric(x, again.lower)), _misses_with_excess(x, again)
    return Expected(
        math.exp(x),
        _rate(_above(x, fit.lower), fewest, alarms),
        _rate(1 - _above(x, fit.upper), misses, np.maximum(misses, most)),
    )


def _tail_of_symmetric(x: float, group: _Group) -> Array:
    """(B, 1) share above x of a group whose right side mirrors its left."""
    tail = _tail(np.abs(x - group.mode) / group.left)
    return np.where(x < group.mode, 1 - tail, tail)


def _misses_with_excess(x: float, fit: _Fit) -> Array:
    """(B, 1) share of the defective images at or below x, where what the lower group has beyond symmetry is of them."""
    lower, of_lower = fit.lower, (1 - fit.upper_share) * 2 / (fit.lower.left + fit.lower.right)
    right, mirrored = (
        spread * (0.5 - _tail(np.maximum(x - lower.mode, 0) / spread)) for spread in (lower.right, lower.left)
    )
    excess = of_lower * np.maximum(lower.right - lower.left, 0) / 2
    below = np.clip(of_lower * (right - mirrored), 0, excess)
    missed = fit.upper_share * (1 - _above(x, fit.upper))
    return np.asarray((missed + below) / (fit.upper_share + excess))


def _rate(value: Array, lows: Array, highs: Array) -> Rate:
    """A share of one fit, and its interval from what it is at least and at most in the resamples."""
    point = float(value.ravel()[0])
    low, high = float(np.percentile(lows, INTERVAL[0])), float(np.percentile(highs, INTERVAL[1]))
    return Rate(point, min(low, point), max(high, point))


# --- from images that a person has sorted ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Counted:
    """How often something happened, with its exact binomial interval."""

    count: int
    n: int

    @property
    def rate(self) -> Rate:
        """Share, and the interval of 90 % (Clopper and Pearson 1934: never too narrow)."""
        return binomial(self.count, self.n)

    def __str__(self) -> str:
        return f"{self.count} of {self.n}" + (f", {self.rate}" if self.n else "")


@dataclass(frozen=True, slots=True)
class Measured:
    """What a threshold does to images that a person has sorted."""

    threshold: float
    false_alarms: Counted
    misses: Counted | None
    """None where no defective images were given."""


@dataclass(frozen=True, slots=True)
class Alternative:
    """A threshold at some false alarm rate."""

    false_alarm_rate: float
    """The rate that was asked for."""
    measured: Measured | None
    """False alarms by leaving one normal image out in turn; None where the normals are too few for the rate."""


RATES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3)
"""False alarm rates that alternatives are given for."""


def measure(threshold: float, normals: NDArray[np.floating], defective: NDArray[np.floating] | None) -> Measured:
    """Count what a threshold lets pass of normal scores (n,), and what it keeps back of defective scores (m,)."""
    misses = None if defective is None else Counted(int((defective <= threshold).sum()), len(defective))
    return Measured(threshold, Counted(int((normals > threshold).sum()), len(normals)), misses)


def reachable_rate(n_normals: int, asked: float) -> float:
    """The least false alarm rate that so many normal images can promise, or the one that was asked for.

    >>> reachable_rate(19, 0.05), reachable_rate(4, 0.05)
    (0.05, 0.2)
    """
    return max(asked, 1 / (n_normals + 1))


def alternatives(
    normals: NDArray[np.floating], defective: NDArray[np.floating] | None, *, rates: Sequence[float] = RATES
) -> list[Alternative]:
    """Thresholds at several false alarm rates, each with what it would do.

    Args:
        normals: (n,) raw scores of normal images.
        defective: (m,) raw scores of defective images, None where there are none.
        rates: false alarm rates to look at.
    """
    rows = []
    for rate in sorted(rates):
        threshold = conformal_threshold(normals, false_alarm_rate=rate)
        if not math.isfinite(threshold):
            rows.append(Alternative(rate, None))
            continue
        found = measure(threshold, normals, defective)
        rows.append(Alternative(rate, Measured(threshold, left_out_alarms(normals, rate), found.misses)))
    return rows


def left_out_alarms(normals: NDArray[np.floating], rate: float) -> Counted:
    """How many normal images lie above the threshold that the others give.

    The others may be one too few for the rate; their highest score is the threshold then.
    """
    alarms = 0
    for at in range(len(normals)):
        others = np.delete(normals, at)
        threshold = min(conformal_threshold(others, false_alarm_rate=rate), float(others.max(initial=0.0)))
        alarms += bool(normals[at] > threshold)
    return Counted(alarms, len(normals))


def binomial(count: int, n: int, *, level: float = 0.9) -> Rate:
    """Share ``count`` of ``n`` with its exact interval, of 90 % or another level; all is possible where n is 0.

    >>> binomial(0, 5)
    Rate(value=0.0, low=0.0, high=0.4507)

    Source: Clopper and Pearson, Biometrika 26 (1934), by bisection of the binomial distribution.
    """
    if n == 0:
        return Rate(0.0, 0.0, 1.0)
    beyond = (1 - level) / 2
    low = 0.0 if count == 0 else _root(lambda p: 1 - _at_most(count - 1, n, p) - beyond)
    high = 1.0 if count == n else _root(lambda p: beyond - _at_most(count, n, p))
    return Rate(count / n, round(low, 4), round(high, 4))


def _at_most(count: int, n: int, p: float) -> float:
    """Probability of at most ``count`` among n at rate p, 0 < p < 1."""
    logs = [
        math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) + k * math.log(p) + (n - k) * math.log1p(-p)
        for k in range(count + 1)
    ]
    return math.fsum(map(math.exp, logs))


def _root(rising: Callable[[float], float]) -> float:
    """Where a rising function of a rate crosses 0."""
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < 0 else (low, middle)
    return (low + high) / 2
