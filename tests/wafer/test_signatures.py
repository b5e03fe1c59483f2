"""Scratches, rings and clusters: planted ones are found, random defects are none, spots and rings are no scratches."""

import numpy as np
import pytest

from planted_wafers import RADIUS_UM, Score, planted_wafer, planted_wafers, repeaters_of, scratches_of
from semwatch.wafer.arcs import along, fit_arc, places_on
from semwatch.wafer.signatures import find_signatures


def random_places(n: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    angle, distance = rng.uniform(0, 2 * np.pi, n), 147_000 * np.sqrt(rng.random(n))
    return np.stack([distance * np.cos(angle), distance * np.sin(angle)], 1)


@pytest.mark.parametrize("n", [0, 1, 2, 3, 4, 5, 30])
def test_few_defects_make_nothing(n: int) -> None:
    assert find_signatures(random_places(n), radius_um=RADIUS_UM) == []


def test_all_defects_at_one_place_or_on_one_line_are_no_error() -> None:
    assert find_signatures(np.zeros((40, 2)), radius_um=RADIUS_UM)[0].kind == "cluster"
    row = np.stack([np.linspace(-90_000, 90_000, 40), np.zeros(40)], 1)
    (found,) = find_signatures(row, radius_um=RADIUS_UM)
    assert (found.kind, len(found.members)) == ("line", 40)
    assert found.length_um == pytest.approx(180_000)


@pytest.mark.parametrize("radius", [60_000.0, 250_000.0])
def test_arc_is_found_with_its_length_and_its_path_lies_on_it(radius: float) -> None:
    at = np.linspace(-50_000, 50_000, 40)
    rng = np.random.default_rng(1)
    arc = radius * np.stack([np.sin(at / radius), 1 - np.cos(at / radius)], 1) + rng.normal(0, 60, (40, 2))
    place = np.concatenate([random_places(500), arc - arc.mean(0)])
    (found,) = find_signatures(place, radius_um=RADIUS_UM)
    assert found.kind == "arc"
    assert len(set(range(500, 540)) - set(found.members.tolist())) <= 1
    assert len(found.members) < 44
    assert found.length_um == pytest.approx(100_000, rel=0.05)
    center = np.array([0, radius]) - arc.mean(0)
    assert np.allclose(np.hypot(*(found.path_um - center).T), radius, atol=700)


def test_ring_at_the_edge_is_a_ring_and_a_spot_is_a_cluster() -> None:
    rng = np.random.default_rng(2)
    angle, distance = rng.uniform(0, 2 * np.pi, 250), rng.normal(143_000, 800, 250)
    ring = np.stack([distance * np.cos(angle), distance * np.sin(angle)], 1)
    spot = np.array([30_000, 20_000]) + rng.normal(0, 1500, (40, 2))
    found = find_signatures(np.concatenate([random_places(250), ring, spot]), radius_um=RADIUS_UM)
    assert {one.kind for one in found} <= {"ring", "cluster"}
    assert any(one.kind == "cluster" and np.count_nonzero(one.members >= 500) >= 36 for one in found)


def test_random_wafers_have_hardly_any_signature() -> None:
    found = [one for seed in range(8) for one in find_signatures(random_places(200, seed), radius_um=RADIUS_UM)]
    assert len(found) <= 1  # the criterion allows 0.16, for scratches and for clusters


def test_same_wafer_gives_the_same_answer() -> None:
    wafer = planted_wafer(3, n_random=60, n_repeaters=0, n_scratches=2)
    first, again = (find_signatures(wafer.on_wafer_um, radius_um=RADIUS_UM) for _ in range(2))
    assert [one.members.tolist() for one in first] == [one.members.tolist() for one in again]


@pytest.mark.slow
def test_planted_scratches_are_found_and_rings_and_spots_are_none() -> None:
    score = Score()
    for wafer in planted_wafers(8, (100, 800), first_seed=2000):
        score.add(wafer, "scratch", scratches_of(wafer, repeaters_of(wafer)))
    assert score.planted >= 6
    assert score.found == score.planted
    assert score.false == 0


def test_circle_and_line_are_fitted_exactly_and_measured_along() -> None:
    at = np.linspace(0, 1.2, 9)
    arc = fit_arc(np.stack([5000 + 80_000 * np.cos(at), 80_000 * np.sin(at) - 300], 1))
    assert abs(arc.curvature) == pytest.approx(1 / 80_000, rel=1e-6)
    line = fit_arc(np.stack([np.linspace(0, 9000, 4), 2 * np.linspace(0, 9000, 4) + 50], 1))
    assert abs(line.curvature) < 1e-12
    assert np.abs(line.distance(np.array([[0.0, 50 + 5**0.5]]))) == pytest.approx(1.0)
    for one, start in ((arc, np.array([85_000.0, -300.0])), (line, np.array([0.0, 50.0]))):
        there = places_on(one, start, np.array([0.0, 2500.0, -2500.0]))
        assert np.abs(one.distance(there)).max() < 1e-3
        assert along(one, there, start) == pytest.approx([0, 2500, -2500], abs=1e-3)
