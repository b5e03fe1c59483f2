import math

import numpy as np
import pytest
from scipy import stats

from semwatch.errors import ConfigError
from semwatch_training.metrics.uncertainty import Rate, Spread


def test_spread_of_no_seed_or_of_an_infinite_value_is_refused() -> None:
    with pytest.raises(ConfigError, match="one seed at least"):
        Spread.of([])
    with pytest.raises(ConfigError, match="finite"):
        Spread.of([0.5, math.inf])


def test_spread_is_mean_and_sample_deviation() -> None:
    spread = Spread.of([0.908, 0.912, 0.916])
    assert spread.mean == pytest.approx(0.912)
    assert spread.std == pytest.approx(0.004)
    assert str(spread) == "0.912 ± 0.004 (3)"
    assert f"{spread:.1f}" == "0.9 ± 0.0 (3)"


def test_one_seed_has_no_deviation() -> None:
    spread = Spread.of([0.5])
    assert math.isnan(spread.std)
    assert str(spread) == "0.500 (1)"


def test_seeds_without_a_figure_are_left_out_and_counted_out() -> None:
    assert str(Spread.of([0.5, math.nan, 0.7])) == "0.600 ± 0.141 (2)"
    assert str(Spread.of([math.nan])) == "–"


@pytest.mark.parametrize(("hits", "n"), [(0, 0), (-1, 5), (6, 5)])
def test_a_rate_of_nothing_or_of_impossible_counts_is_refused(hits: int, n: int) -> None:
    with pytest.raises(ConfigError, match="0 to n hits"):
        Rate.of(hits, n)


@pytest.mark.parametrize("confidence", [0.0, 1.0, math.nan])
def test_a_confidence_outside_0_to_1_is_refused(confidence: float) -> None:
    with pytest.raises(ConfigError, match="confidence"):
        Rate.of(1, 2, confidence=confidence)


@pytest.mark.parametrize(("hits", "n"), [(0, 20), (1, 191), (7, 12), (20, 20)])
@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_interval_is_scipys_exact_one(hits: int, n: int, confidence: float) -> None:
    expected = stats.binomtest(hits, n).proportion_ci(confidence, method="exact")
    rate = Rate.of(hits, n, confidence=confidence)
    assert (rate.rate, rate.n, rate.confidence) == (hits / n, n, confidence)
    assert (rate.low, rate.high) == pytest.approx((expected.low, expected.high))


def covers(rate: Rate, stated: float) -> bool:
    return rate.low <= stated <= rate.high


def test_interval_covers_the_true_rate_at_least_as_often_as_it_says() -> None:
    hits = np.random.default_rng(0).binomial(191, 0.01, size=2000)
    assert np.mean([covers(Rate.of(int(h), 191), 0.01) for h in hits]) >= 0.95


def test_a_stated_rate_that_is_far_off_is_not_covered() -> None:
    assert covers(Rate.of(2, 191), 0.01)
    assert not covers(Rate.of(12, 191), 0.01)
    assert not covers(Rate.of(0, 1000), 0.01)
    assert str(Rate.of(3, 200)) == "1.5 % [0.3, 4.3] (200)"
