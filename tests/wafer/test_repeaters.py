"""Repeaters: called where several dies have a defect at one place, and not where chance would do it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planted_wafers import Score, planted_wafer, repeaters_of
from semwatch.wafer.repeaters import find_repeaters

AREA = 1e8
"""A die of 10 mm x 10 mm."""


def random_dies(n: int, n_dies: int = 500, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.uniform(0, 1e4, (n, 2)), rng.integers(0, n_dies, n)


def test_no_defect_one_defect_two_dies_make_no_repeater() -> None:
    for n in (0, 1, 2):
        assert find_repeaters(np.full((n, 2), 5.0), np.arange(n), die_area_um2=AREA) == []


def test_three_dies_at_one_place_are_a_repeater_with_its_place_and_members() -> None:
    place, dies = random_dies(400)
    place[:3] = [[1000, 2000], [1001, 2000], [1000, 2001]]
    dies[:3] = [7, 8, 9]
    (found,) = find_repeaters(place, dies, die_area_um2=AREA)
    assert found.members.tolist() == [0, 1, 2]
    assert found.n_dies == 3
    assert found.in_die_um == pytest.approx((1000.333, 2000.333), abs=1e-2)
    assert found.log10_chance < -2


def test_defects_of_one_die_at_one_place_are_no_repeater() -> None:
    place, dies = random_dies(400)
    place[:10] = [1000, 2000]
    dies[:10] = 7
    assert find_repeaters(place, dies, die_area_um2=AREA) == []


def test_same_three_dies_are_not_called_where_chance_would_bring_them() -> None:
    place, dies = random_dies(25_000)
    place[:3] = [[1000, 2000], [1001, 2000], [1000, 2001]]
    dies[:3] = [7, 8, 9]
    assert not [one for one in find_repeaters(place, dies, die_area_um2=AREA) if 0 in one.members]


def test_dense_part_of_the_die_is_no_repeater() -> None:
    place, dies = random_dies(400)
    place[:300] = np.random.default_rng(1).uniform(3000, 3060, (300, 2))  # an array of cells where all defects are
    assert find_repeaters(place, dies, die_area_um2=AREA) == []


def test_farther_than_the_tolerance_is_not_the_same_place() -> None:
    place, dies = random_dies(400)
    place[:3] = [[1000, 2000], [1010, 2000], [1000, 2010]]
    dies[:3] = [7, 8, 9]
    assert find_repeaters(place, dies, die_area_um2=AREA) == []
    assert find_repeaters(place, dies, die_area_um2=AREA, tolerance_um=15)


def test_random_wafers_have_hardly_any_repeater() -> None:
    n_false = sum(
        len(find_repeaters(*random_dies(n, seed=seed), die_area_um2=AREA)) for n in (100, 1000) for seed in range(15)
    )
    assert n_false <= 1  # the criterion allows 0.3


def test_planted_repeaters_are_found_on_random_ground() -> None:
    score = Score()
    for seed in range(12):
        wafer = planted_wafer(900 + seed, n_random=(200, 1000)[seed % 2], n_repeaters=2, n_scratches=0)
        score.add(wafer, "repeater", repeaters_of(wafer))
    assert score.planted == 24
    assert score.found >= 23
    assert score.false == 0


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(-5, 5), st.integers(-5, 5), st.integers(0, 9)), max_size=60))
def test_no_defect_belongs_to_two_repeaters(rows: list[tuple[int, int, int]]) -> None:
    data = np.array(rows, np.float64).reshape(-1, 3)
    found = find_repeaters(data[:, :2], data[:, 2].astype(np.int64), die_area_um2=AREA, tolerance_um=1.0)
    members = np.concatenate([np.zeros(0, np.int64), *(one.members for one in found)])
    assert len(members) == len(set(members.tolist()))
