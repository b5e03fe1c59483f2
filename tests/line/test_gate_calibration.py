"""A threshold from scores alone: found where there are two groups, refused where there are not, the same each time."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import beta

from semwatch.line import gate_calibration
from semwatch.line.binarization import conformal_threshold
from semwatch.line.gate_calibration import (
    FEWEST,
    MOST,
    SMALLEST_GROUP,
    Counted,
    NoProposal,
    Proposal,
    alternatives,
    binomial,
    measure,
    propose,
    reachable_rate,
)

NORMAL, DEFECTIVE = (-5.0, 1.2), (1.5, 0.5)
"""Mean and deviation of the logarithms of well separated scores."""


def stream(n: int = 300, normal_share: float = 0.5, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    k = round(n * normal_share)
    return rng.permutation(np.exp(np.r_[rng.normal(*NORMAL, k), rng.normal(*DEFECTIVE, n - k)]))


def proposed(scores: np.ndarray, **asked: float) -> Proposal:
    found = propose(scores, **{"false_alarm_rate": 0.05, **asked})
    assert isinstance(found, Proposal), found
    return found


def refused(scores: np.ndarray, **asked: float) -> str:
    found = propose(scores, **{"false_alarm_rate": 0.05, **asked})
    assert isinstance(found, NoProposal), found
    assert found.n == min(len(scores), MOST)
    return found.reason


# --- propose ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [0, 1, FEWEST - 1])
def test_few_images_give_no_proposal_and_say_how_many_it_takes(n) -> None:
    assert refused(stream(n)) == f"{n} images so far, a proposal needs {FEWEST}"


@pytest.mark.parametrize("normal_share", [0.2, 0.5, 0.8])
def test_two_groups_of_any_mix_give_the_threshold_of_the_normal_ones(normal_share) -> None:
    found = proposed(stream(600, normal_share))
    truth = math.exp(NORMAL[0] + 1.645 * NORMAL[1])
    assert 0.5 < found.threshold / truth < 2
    assert found.low <= found.threshold <= found.high
    assert found.expected.false_alarms.value == pytest.approx(0.05, abs=1e-6)
    assert found.expected.misses.value < 0.01
    assert found.normal_share.low <= normal_share <= found.normal_share.high
    assert found.n == 600


@pytest.mark.parametrize("group", [NORMAL, DEFECTIVE])
@pytest.mark.parametrize("seed", range(5))
def test_normal_images_alone_and_defective_ones_alone_are_not_told_apart(group, seed) -> None:
    scores = np.exp(np.random.default_rng(seed).normal(*group, 400))
    assert "one group" in refused(scores) or "overlap" in refused(scores)


def test_one_skewed_group_is_not_cut_in_two() -> None:
    rng = np.random.default_rng(3)
    logs = np.where(rng.random(500) < 0.3, -abs(rng.normal(0, 0.5, 500)), abs(rng.normal(0, 1.5, 500)))
    assert "one group" in refused(np.exp(logs))


def test_groups_that_overlap_are_refused() -> None:
    rng = np.random.default_rng(4)
    scores = np.exp(np.r_[rng.normal(0, 1, 250), rng.normal(1.5, 1, 250)])
    assert "one group" in refused(scores) or "overlap" in refused(scores)


def test_a_handful_of_defective_images_is_too_small_a_group() -> None:
    n = 150  # of more images so few are outliers, and drawn in
    few = SMALLEST_GROUP - 3
    assert "smaller group" in refused(stream(n, 1 - few / n))


@pytest.mark.parametrize("scores", [np.zeros(200), np.full(200, 0.3)])
def test_scores_that_are_all_alike_are_refused(scores) -> None:
    assert "alike" in refused(scores) or "are 0" in refused(scores)


def test_scores_below_0_are_refused_in_words() -> None:
    assert "below 0" in refused(stream() - 1)


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_nan_and_infinity_are_an_error(wrong) -> None:
    with pytest.raises(ValueError, match="NaN or infinity"):
        propose(np.r_[stream(), wrong], false_alarm_rate=0.05)


@pytest.mark.parametrize("asked", [{"false_alarm_rate": 0.0}, {"false_alarm_rate": 1.0}, {"miss_cost": 0.0}])
def test_senseless_wishes_are_an_error(asked) -> None:
    with pytest.raises(ValueError, match=next(iter(asked))):
        propose(stream(), **{"false_alarm_rate": 0.05, **asked})


@settings(max_examples=8, deadline=None)
@given(scale=st.floats(1e-3, 1e3), power=st.floats(0.5, 2))
def test_threshold_follows_the_scores_under_scale_and_power(scale, power) -> None:
    scores = stream(200)
    found, moved = proposed(scores), proposed(scale * scores**power)
    assert moved.threshold == pytest.approx(scale * found.threshold**power, rel=1e-4)
    assert moved.expected.misses.value == pytest.approx(found.expected.misses.value, abs=1e-4)


def test_same_scores_give_the_same_answer_in_any_order() -> None:
    scores = stream()
    assert proposed(scores) == proposed(scores) == proposed(scores[::-1])


def test_blank_images_do_not_move_the_threshold_far() -> None:
    scores = stream(300)
    spoilt = np.r_[scores, np.full(3, 1e6), np.full(3, 1e-30)]
    assert abs(math.log(proposed(spoilt).threshold / proposed(scores).threshold)) < 0.5


def test_zeros_are_taken_for_the_least_score() -> None:
    scores = stream(300)
    scores[scores.argsort()[:10]] = 0.0
    assert isinstance(propose(scores, false_alarm_rate=0.05), Proposal)


def test_only_the_last_scores_of_a_long_stream_count() -> None:
    assert proposed(np.r_[np.full(500, 77.0), stream(MOST)]) == proposed(stream(MOST))


def test_higher_rate_gives_a_lower_threshold() -> None:
    thresholds = [proposed(stream(), false_alarm_rate=rate).threshold for rate in (0.01, 0.05, 0.2)]
    assert thresholds == sorted(thresholds, reverse=True)


def test_dearer_misses_give_a_lower_threshold() -> None:
    thresholds = [proposed(stream(), miss_cost=cost).threshold for cost in (0.1, 1, 1000)]
    assert thresholds == sorted(thresholds, reverse=True)
    assert thresholds[0] > thresholds[-1]


def test_present_threshold_is_held_against_the_proposal() -> None:
    scores = stream(400)
    found = proposed(scores, present=1e-3)
    assert found.present is not None
    assert found.present.threshold == pytest.approx(1e-3)
    assert found.present.false_alarms.value > 0.5
    assert proposed(scores, present=0.0).present.false_alarms.value == pytest.approx(1.0)
    assert proposed(scores, present=50.0).present.misses.value > 0.99


def test_rate_that_would_miss_half_is_refused() -> None:
    rng = np.random.default_rng(5)
    scores = np.exp(np.r_[rng.normal(-2, 2, 700), rng.normal(1, 0.1, 300)])
    assert "missed" in refused(scores, false_alarm_rate=0.01) or "overlap" in refused(scores, false_alarm_rate=0.01)


# --- from sorted images ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "n"), [(0, 5), (5, 5), (3, 60), (18, 40), (200, 900)])
def test_binomial_interval_is_the_exact_one(count, n) -> None:
    found = binomial(count, n)
    assert found.low == pytest.approx(beta.ppf(0.05, count, n - count + 1) if count else 0, abs=1e-4)
    assert found.high == pytest.approx(beta.ppf(0.95, count + 1, n - count) if count < n else 1, abs=1e-4)


def test_of_no_image_nothing_is_known() -> None:
    assert (binomial(0, 0).low, binomial(0, 0).high) == (0, 1)
    assert str(Counted(0, 0)) == "0 of 0"


def test_measure_counts_a_score_at_the_threshold_as_kept_back() -> None:
    found = measure(2.0, np.array([1.0, 2.0, 3.0]), np.array([2.0, 2.5]))
    assert (found.false_alarms, found.misses) == (Counted(1, 3), Counted(1, 2))
    assert measure(2.0, np.array([1.0]), None).misses is None


def test_alternatives_trade_false_alarms_for_misses_and_say_which_rates_are_out_of_reach() -> None:
    normals, defective = np.arange(1.0, 31.0), np.arange(20.0, 60.0)
    rows = {row.false_alarm_rate: row.measured for row in alternatives(normals, defective)}
    assert rows[0.01] is rows[0.02] is None  # 30 normals promise 1 in 31
    assert rows[0.05].threshold == conformal_threshold(normals, false_alarm_rate=0.05)
    misses = [rows[rate].misses.count for rate in (0.05, 0.1, 0.2, 0.3)]
    assert misses == sorted(misses, reverse=True)
    assert rows[0.1].false_alarms == Counted(3, 30)


def test_left_out_normals_alarm_at_about_the_rate() -> None:
    rng = np.random.default_rng(0)
    (row,) = alternatives(rng.normal(size=400), None, rates=(0.1,))
    assert row.measured is not None
    assert row.measured.false_alarms.count == pytest.approx(40, abs=2)
    assert row.measured.misses is None


def test_few_normals_reach_a_higher_rate_only() -> None:
    assert reachable_rate(5, 0.05) == 1 / 6
    assert math.isfinite(conformal_threshold(np.arange(5.0), false_alarm_rate=reachable_rate(5, 0.05)))
    assert reachable_rate(99, 0.01) == 0.01


def test_shares_above_a_point_are_those_of_the_distribution() -> None:
    """The tail of a group against a numerical integral of its density."""
    group = gate_calibration._Group(*(np.array([[value]]) for value in (1.0, 2.0, 0.5)))
    x = np.linspace(-30, 10, 400_001)
    density = np.exp(gate_calibration._log_density(x, group))[0]
    for at in (-2.0, 1.0, 1.7):
        share = float(np.trapezoid(density[x >= at], x[x >= at]))
        assert float(gate_calibration._above(at, group)[0, 0]) == pytest.approx(share, abs=1e-4)
        assert gate_calibration._quantile(1 - share, 1.0, 2.0, 0.5) == pytest.approx(at, abs=1e-3)
