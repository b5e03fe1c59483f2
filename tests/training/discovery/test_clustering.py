import warnings

import numpy as np
import pytest
from sklearn.metrics import adjusted_rand_score

from semwatch.errors import ConfigError
from semwatch_training.discovery.clustering import (
    class_means,
    clusterings,
    plain_kmeans,
    refine,
    seed_centres,
    semi_supervised_kmeans,
    squared_distances,
)


def blobs(sizes, *, width=6, distance=12.0, seed=0):
    """Samples, truth: unit Gaussians around distinct corners."""
    rng = np.random.default_rng(seed)
    truth = np.repeat(np.arange(len(sizes)), sizes)
    return (distance * np.eye(len(sizes), width)[truth] + rng.normal(size=(len(truth), width))).astype(
        np.float32
    ), truth


def test_no_samples_are_refused():
    with pytest.raises(ConfigError, match="non-empty"):
        semi_supervised_kmeans(np.zeros((0, 3), np.float32), np.zeros(0, int), 1, seed=0)


def test_nan_features_are_refused_with_the_row():
    features, truth = blobs([5, 5])
    features[7, 2] = np.nan
    with pytest.raises(ConfigError, match="row 7"):
        semi_supervised_kmeans(features, truth, 2, seed=0)
    with pytest.raises(ConfigError, match="row 7"):
        plain_kmeans(features, 2, seed=0)


def test_labels_of_another_length_are_refused():
    features, truth = blobs([5, 5])
    with pytest.raises(ConfigError, match="one for each sample"):
        semi_supervised_kmeans(features, truth[:-1], 2, seed=0)


@pytest.mark.parametrize("k", [0, 1])
def test_k_below_the_labelled_classes_is_refused(k):
    features, truth = blobs([5, 5])
    with pytest.raises(ConfigError, match="labelled classes"):
        semi_supervised_kmeans(features, truth, k, seed=0)


def test_more_new_clusters_than_unlabelled_samples_are_refused():
    features, truth = blobs([5, 5])
    labels = np.where(np.arange(10) < 8, truth, -1)
    with pytest.raises(ConfigError, match="3 new clusters of 2 unlabelled"):
        semi_supervised_kmeans(features, labels, 5, seed=0)
    with pytest.raises(ConfigError, match="from 1 to the 10"):
        plain_kmeans(features, 11, seed=0)


def test_all_samples_labelled_gives_the_class_means():
    features, truth = blobs([4, 7, 5])
    found = semi_supervised_kmeans(features, truth, 3, seed=0)
    assert (found.assignment == truth).all()
    np.testing.assert_allclose(found.centres, [features[truth == c].mean(axis=0) for c in range(3)], rtol=1e-5)


def test_labelled_samples_stay_pinned_even_beside_another_class():
    features, truth = blobs([30, 30, 30])
    labels = np.where(np.arange(90) % 2 == 0, truth, -1)
    labels[truth == 2] = -1
    labels[0] = 1  # a member of class 0 that someone labelled 1
    found = semi_supervised_kmeans(features, labels, 3, seed=0)
    assert (found.assignment[labels >= 0] == labels[labels >= 0]).all()
    assert (found.assignment[labels < 0] == truth[labels < 0]).all()


def test_clusters_of_labelled_classes_come_first_in_ascending_order():
    features, truth = blobs([20, 20, 20])
    labels = np.where(np.arange(60) % 2 == 0, np.array([70, 5, -1])[truth], -1)
    found = semi_supervised_kmeans(features, labels, 3, seed=0)
    assert set(found.assignment[truth == 0]) == {1}
    assert set(found.assignment[truth == 1]) == {0}
    assert set(found.assignment[truth == 2]) == {2}


def test_centres_move_away_from_the_labelled_means():
    features = np.array([[0.0], [4.0], [4.0], [100.0]], np.float32)
    found = semi_supervised_kmeans(features, np.array([0, -1, -1, 1]), 2, seed=0)
    np.testing.assert_allclose(found.centres.ravel(), [8 / 3, 100.0], rtol=1e-5)
    assert found.inertia == pytest.approx(32 / 3, rel=1e-4)


def test_without_labels_it_is_k_means():
    features, truth = blobs([40, 25, 60, 30])
    ours = semi_supervised_kmeans(features, np.full(len(truth), -1), 4, seed=0)
    theirs = plain_kmeans(features, 4, seed=0)
    assert adjusted_rand_score(truth, ours.assignment) == 1.0
    assert ours.inertia == pytest.approx(theirs.inertia, rel=1e-4)


def test_inertia_matches_its_definition():
    features, truth = blobs([20, 20], distance=2.0)
    found = semi_supervised_kmeans(features, np.where(np.arange(40) % 3 == 0, truth, -1), 4, seed=3)
    expected = np.square(features - found.centres[found.assignment]).sum()
    assert found.inertia == pytest.approx(expected, rel=1e-3)


def test_one_cluster_of_one_class_holds_everything():
    features, _ = blobs([10, 10])
    labels = np.where(np.arange(20) < 3, 8, -1)
    found = semi_supervised_kmeans(features, labels, 1, seed=0)
    assert (found.assignment == 0).all()
    np.testing.assert_allclose(found.centres[0], features.mean(axis=0), rtol=1e-4, atol=1e-4)


def test_identical_samples_give_finite_centres_without_a_warning():
    features = np.full((12, 4), 0.3, np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = semi_supervised_kmeans(features, np.full(12, -1), 5, seed=0)
    assert np.isfinite(found.centres).all()
    assert found.inertia == pytest.approx(0.0, abs=1e-4)


def test_an_empty_cluster_moves_to_the_sample_that_is_served_worst():
    features = np.array([[0.0], [0.1], [0.2], [50.0]], np.float32)
    start = np.array([[0.1], [1000.0]], np.float32)
    found = refine(features, np.full(4, -1), start)
    assert found.assignment.tolist() == [0, 0, 0, 1]
    np.testing.assert_allclose(found.centres.ravel(), [0.1, 50.0], atol=1e-5)


def test_equal_seeds_give_equal_results_and_other_seeds_may_differ():
    features, _ = blobs([30, 30, 30], distance=1.0)
    labels = np.full(90, -1)
    first, again, other = (semi_supervised_kmeans(features, labels, 7, seed=s, n_init=1) for s in (1, 1, 2))
    assert (first.assignment == again.assignment).all()
    assert (first.centres == again.centres).all()
    assert (first.assignment != other.assignment).any()


def test_more_starts_never_make_it_worse():
    features, _ = blobs([20] * 6, distance=3.0)
    labels = np.full(120, -1)
    one, many = (semi_supervised_kmeans(features, labels, 6, seed=0, n_init=n).inertia for n in (1, 8))
    assert many <= one


def test_a_seeding_for_many_clusters_begins_with_the_one_for_fewer():
    features, truth = blobs([20] * 4)
    labels = np.where(truth < 2, truth, -1)
    centres = seed_centres(features, labels, 9, np.random.default_rng(0))
    assert centres.shape == (9, 6)
    np.testing.assert_allclose(centres[:2], class_means(features, labels))
    own = squared_distances(centres[2:], features[labels < 0]).min(axis=1)
    np.testing.assert_allclose(own, 0.0, atol=1e-3)


def test_distances_match_a_direct_computation():
    rng = np.random.default_rng(0)
    features, centres = rng.normal(size=(50, 7)).astype(np.float32), rng.normal(size=(6, 7)).astype(np.float32)
    direct = np.square(features[:, None] - centres[None]).sum(axis=2)
    np.testing.assert_allclose(squared_distances(features, centres), direct, rtol=1e-4, atol=1e-4)


def test_inertia_never_rises_with_k():
    features, truth = blobs([40, 60, 30, 20], distance=2.0)
    labels = np.where((truth < 2) & (np.arange(150) % 2 == 0), truth, -1)
    found = clusterings(features, labels, range(2, 14), np.random.default_rng(0))
    inertia = np.array([run.inertia for run in found])
    assert (np.diff(inertia) <= 1e-3 * inertia[:-1]).all()
    assert [len(run.centres) for run in found] == list(range(2, 14))
    assert all((run.assignment[labels >= 0] == labels[labels >= 0]).all() for run in found)


def test_neighbouring_candidates_help_each_other():
    features, _ = blobs([25] * 12, width=12, distance=4.0)
    labels = np.full(300, -1)
    shared = clusterings(features, labels, range(8, 15), np.random.default_rng(0), n_starts=1)[4].inertia
    alone = semi_supervised_kmeans(features, labels, 12, seed=0, n_init=1).inertia
    assert shared < alone


def test_candidates_with_gaps_are_clustered_all_the_same():
    features, _ = blobs([20, 20, 20])
    found = clusterings(features, np.full(60, -1), [1, 3, 7], np.random.default_rng(0))
    assert [len(run.centres) for run in found] == [1, 3, 7]
    assert len(set(found[1].assignment)) == 3
