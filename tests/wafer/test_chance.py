"""The bound of chance: never below the exact value, and near it."""

import pytest
from scipy.stats import poisson

from semwatch.wafer.chance import log10_tail


@pytest.mark.parametrize("expected", [1e-5, 0.01, 0.5, 1.0, 7.0, 300.0])
def test_bound_is_at_least_the_exact_chance_and_at_most_thrice_that(expected: float) -> None:
    for k in (1, 2, 3, 5, 10, 40, 400):
        bound, exact = 10.0 ** float(log10_tail(k, expected)), float(poisson.sf(k - 1, expected))
        assert bound >= exact * (1 - 1e-9)
        if k >= expected + 1 and exact > 1e-290:
            assert bound <= 3 * exact


def test_no_events_and_as_many_as_expected_prove_nothing() -> None:
    assert log10_tail([0, 1, 3], [0.0, 1.0, 3.0]).tolist() == [0.0, 0.0, 0.0]
