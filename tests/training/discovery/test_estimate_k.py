from typing import get_args

import numpy as np
import pytest
from sklearn.metrics import silhouette_samples

from semwatch.errors import ConfigError
from semwatch_training.discovery import estimate_k
from semwatch_training.discovery.clustering import Clustering
from semwatch_training.discovery.estimate_k import SPAN, Rule, bic, estimate, feasible, silhouettes, unit_length
from semwatch_training.discovery.k_consensus import CRITERIA, grown, posterior
from semwatch_training.discovery.whitening import principal_components, whitened

RULES = get_args(Rule)


def problem(sizes, n_known, *, width=12, distance=9.0, seed=0):
    """Unit Gaussians around corners; half of the first ``n_known`` classes' samples are labelled."""
    rng = np.random.default_rng(seed)
    truth = np.repeat(np.arange(len(sizes)), sizes)
    corners = distance * np.eye(len(sizes), width)[truth]
    labels = np.where((truth < n_known) & (rng.random(len(truth)) < 0.5), truth, -1)
    return (corners + rng.normal(size=corners.shape)).astype(np.float32), labels


def test_no_samples_are_refused():
    with pytest.raises(ConfigError, match="non-empty"):
        estimate(np.zeros((0, 4), np.float32), np.zeros(0, int))


def test_nan_features_are_refused():
    features, labels = problem([20, 20], 1)
    features[3, 0] = np.nan
    with pytest.raises(ConfigError, match="row 3"):
        estimate(features, labels)


def test_an_unknown_rule_is_refused_with_the_known_ones():
    features, labels = problem([20, 20], 1)
    with pytest.raises(ConfigError, match=r"'elbow'.*consensus.*gcd"):
        estimate(features, labels, rule="elbow")


def test_candidates_below_the_labelled_classes_are_refused():
    features, labels = problem([20, 20, 20], 3)
    with pytest.raises(ConfigError, match="no candidate"):
        estimate(features, labels, candidates=[1, 2])


def test_candidates_that_samples_do_not_allow_are_left_out():
    features, labels = problem([5, 5], 1)
    n_unlabelled = int((labels < 0).sum())
    assert feasible(features, labels, range(50)) == tuple(range(1, n_unlabelled + 2))
    assert feasible(features, labels, [4, 2, 2, 99]) == (2, 4)


def test_one_sample_is_one_class():
    found = estimate(np.ones((1, 3), np.float32), np.array([-1]))
    assert (found.k, found.interval) == (1, (1, 1))


@pytest.mark.parametrize("rule", RULES)
def test_where_nothing_is_unlabelled_k_is_the_number_of_labelled_classes(rule):
    features, _ = problem([8, 9, 7], 3)
    found = estimate(features, np.repeat([0, 1, 2], [8, 9, 7]), rule=rule)
    assert (found.k, found.interval) == (3, (3, 3))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("labels", "k"), [(np.full(30, -1), 1), (np.repeat([0, 4, -1], 10), 2)])
def test_identical_samples_are_one_class_or_as_many_as_are_labelled(rule, labels, k):
    assert estimate(np.full((30, 5), 0.25, np.float32), labels, rule=rule).k == k


@pytest.mark.parametrize("seed", range(3))
def test_consensus_finds_well_separated_classes(seed):
    features, labels = problem([40, 60, 30, 50, 45, 70], 3, seed=seed)
    found = estimate(features, labels, seed=seed)
    assert found.k == 6
    assert found.interval[0] <= 6 <= found.interval[1]


def test_consensus_says_so_when_there_are_no_unknowns():
    features, labels = problem([60, 60, 60, 60], 4)
    assert estimate(features, labels).k == 4


def test_variation_that_labelled_classes_share_makes_no_class():
    features, labels = problem([60, 50, 70, 60, 50, 60], 4)
    features[:, -1] += 12.0 * (np.arange(len(features)) % 2)  # two backgrounds, each under half of every class
    assert estimate(features, labels, rule="bic").k > 6
    assert estimate(features, labels).k == 6


def test_labels_need_not_be_consecutive():
    features, labels = problem([40, 60, 30, 50], 2)
    gaps = np.where(labels == 1, 7, labels)
    assert estimate(features, gaps).curves["probability"] == pytest.approx(
        estimate(features, labels).curves["probability"]
    )


def test_one_labelled_sample_a_class_is_enough():
    features, labels = problem([60, 60, 60, 60], 0)
    labels[[0, 60]] = 0, 1
    assert estimate(features, labels).k == 4


def test_one_labelled_class_is_enough():
    features, labels = problem([60, 60, 60], 1)
    assert estimate(features, labels).k == 3


def test_pure_clustering_without_any_label_works():
    features, _ = problem([50, 40, 60, 50], 0)
    found = estimate(features, np.full(200, -1))
    assert found.k == 4
    assert found.candidates[0] == 1


def test_the_literal_rule_of_the_paper_cannot_see_novel_classes():
    features, labels = problem([40, 60, 30, 50], 2)
    found = estimate(features, labels, rule="paper")
    assert found.k == 2
    assert (found.curves["anchored accuracy"] == 1.0).all()


@pytest.mark.parametrize("rule", ["gcd", "dtc", "max", "accuracy", "ari", "silhouette", "bic"])
def test_named_rules_answer_one_of_the_candidates(rule):
    features, labels = problem([40, 60, 30, 50], 2)
    found = estimate(features, labels, rule=rule)
    assert found.k in range(2, 2 + SPAN + 1)
    assert found.rule == rule


def test_bic_and_silhouette_alone_find_round_classes():
    features, labels = problem([40, 60, 30, 50], 2)
    assert [estimate(features, labels, rule=rule).k for rule in ("bic", "silhouette", "max")] == [4, 4, 4]


def test_curves_cover_every_candidate_and_probabilities_sum_to_one():
    features, labels = problem([40, 60, 30], 2)
    found = estimate(features, labels, candidates=range(2, 9))
    assert set(found.curves) == {*CRITERIA, "anchored accuracy", "probability"}
    assert {len(curve) for curve in found.curves.values()} == {7}
    assert found.curves["probability"].sum() == pytest.approx(1.0)
    assert all(np.isfinite(curve).all() for curve in found.curves.values())


def test_equal_seeds_give_equal_estimates():
    features, labels = problem([40, 60, 30, 20], 2, distance=2.5)
    first, again = (estimate(features, labels, seed=4) for _ in range(2))
    assert (first.k, first.interval) == (again.k, again.interval)
    for name, curve in first.curves.items():
        np.testing.assert_array_equal(curve, again.curves[name])


def test_many_samples_are_thinned_and_every_labelled_class_stays(monkeypatch):
    monkeypatch.setattr(estimate_k, "MAX_SAMPLES", 120)
    features, labels = problem([200, 300, 200, 250], 2)
    labels[labels == 1] = -1
    labels[250] = 1  # a class with a single label
    measured = estimate_k.measure(features, labels, range(2, 8), seed=0)
    assert 120 <= len(measured.labels) <= 122
    assert set(measured.labels) == {-1, 0, 1}
    assert estimate_k.decide(measured, "bic").k == 4


def test_flat_criteria_leave_every_candidate_equally_likely():
    flat = {name: np.full(4, 0.3) for name in CRITERIA}
    np.testing.assert_allclose(posterior(flat), 0.25)


@pytest.mark.parametrize(
    ("middle", "mass", "expected"), [(1, 0.0, (1, 1)), (1, 0.7, (1, 2)), (3, 0.2, (2, 3)), (0, 1.0, (0, 3))]
)
def test_intervals_grow_on_the_likelier_side_until_they_hold_the_mass(middle, mass, expected):
    assert grown(np.array([0.1, 0.5, 0.3, 0.1]), middle, mass) == expected


def test_silhouettes_match_scikit_learn():
    rng = np.random.default_rng(0)
    points, assignment = rng.normal(size=(60, 3)), rng.integers(0, 4, 60)
    assignment[0] = 9  # a cluster of one
    distances = np.linalg.norm(points[:, None] - points[None], axis=2).astype(np.float32)
    np.testing.assert_allclose(silhouettes(distances, assignment), silhouette_samples(points, assignment), atol=1e-5)


def test_rows_of_zeros_have_no_direction_and_stay():
    np.testing.assert_allclose(unit_length(np.array([[0, 0], [3, 4]], np.float32)), [[0, 0], [0.6, 0.8]], rtol=1e-6)


def test_a_single_cluster_has_silhouette_zero():
    assert (silhouettes(np.ones((3, 3), np.float32), np.zeros(3, np.int64)) == 0).all()


def test_bic_matches_a_hand_computed_case():
    found = Clustering(np.array([0, 0, 1, 1]), np.zeros((2, 1), np.float32), 4.0)
    expected = (4 * np.log(0.5) - 0.5 * np.log(4) * 2 * 2) / 4
    assert bic(found, (4, 1)) == pytest.approx(expected)


@pytest.mark.parametrize("shape", [(40, 9), (9, 40)])
def test_principal_components_keep_distances(shape):
    features = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    projected = principal_components(features)
    for a, b in ((0, 1), (3, 8)):
        expected = np.linalg.norm(features[a] - features[b])
        assert np.linalg.norm(projected[a] - projected[b]) == pytest.approx(expected, rel=1e-3)


def test_whitening_shrinks_the_axis_along_which_labelled_classes_vary():
    rng = np.random.default_rng(0)
    features = (rng.normal(size=(400, 2)) * [10.0, 1.0]).astype(np.float32)
    ratio = np.divide(*whitened(features, np.zeros(400, np.int64)).std(axis=0)[np.argsort(features.std(axis=0))[::-1]])
    assert ratio < 10.0 / 2
    assert (whitened(features, np.full(400, -1)) == features).all()
