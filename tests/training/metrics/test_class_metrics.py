from itertools import permutations

import numpy as np
import pytest
from sklearn import metrics

from semwatch.errors import ConfigError
from semwatch_training.metrics.class_metrics import (
    KnownNovel,
    accuracy,
    ari,
    k_errors,
    known_novel,
    macro_f1,
    match,
    nmi,
    unknown_auroc,
)

# Six of eight agree after matching 2 -> arc, 7 -> pit, 5 -> void.
TRUTH = ["arc", "arc", "arc", "pit", "pit", "pit", "void", "void"]
CLUSTERS = [2, 2, 7, 7, 7, 5, 5, 5]
FIGURES = [nmi, ari, match, accuracy, macro_f1, lambda t, p: known_novel(t, p, ["arc"])]


@pytest.mark.parametrize("figure", FIGURES)
def test_nothing_uneven_lengths_and_missing_labels_are_refused(figure) -> None:
    with pytest.raises(ConfigError, match="one true and one predicted"):
        figure([], [])
    with pytest.raises(ConfigError, match="one true and one predicted"):
        figure([1, 2], [1])
    with pytest.raises(ConfigError, match="predicted labels are whole numbers or words"):
        figure(["arc", "pit"], ["arc", None])
    with pytest.raises(ConfigError, match="true labels are whole numbers or words"):
        figure([0.0, np.nan], [0, 1])


def test_clusters_are_matched_one_to_one_for_most_agreement() -> None:
    assert match(TRUTH, CLUSTERS) == {2: "arc", 7: "pit", 5: "void"}
    # cluster 0 holds most of both classes; greedy would give it to "a" and be left with nothing for "b"
    assert match(["a"] * 5 + ["b"] * 4, [0, 0, 0, 1, 1, 0, 0, 0, 0]) == {0: "b", 1: "a"}


def test_spare_clusters_are_matched_to_nothing_and_count_as_wrong() -> None:
    truth, clusters = [0, 0, 0, 1, 1, 1], [3, 3, 4, 5, 5, 5]
    assert match(truth, clusters) == {3: 0, 5: 1}
    assert accuracy(truth, clusters) == pytest.approx(5 / 6)


def test_fewer_clusters_than_classes_leave_a_class_without_f1() -> None:
    assert accuracy([0, 0, 1, 1, 2], [9, 9, 8, 8, 8]) == pytest.approx(4 / 5)
    assert macro_f1([0, 0, 1, 1, 2], [9, 9, 8, 8, 8]) == pytest.approx((1 + 0.8 + 0) / 3)


def test_one_class_in_one_cluster_is_right() -> None:
    assert (nmi([1, 1], [0, 0]), ari([1, 1], [0, 0]), accuracy([1, 1], [0, 0]), macro_f1([1, 1], [0, 0])) == (
        1,
        1,
        1,
        1,
    )
    assert nmi([1, 1, 1], [0, 1, 2]) == 0


def test_figures_by_hand() -> None:
    assert accuracy(TRUTH, CLUSTERS) == 6 / 8
    # arc 2*2/(2*2+0+1), pit 2*2/(2*2+1+1), void 2*2/(2*2+1+0)
    assert macro_f1(TRUTH, CLUSTERS) == pytest.approx((0.8 + 2 / 3 + 0.8) / 3)
    # pairs together in both: 1 + 1 + 1; in truth 3 + 3 + 1 = 7, in clusters 1 + 3 + 3 = 7; expected 7 * 7 / 28
    assert ari(TRUTH, CLUSTERS) == pytest.approx((3 - 1.75) / (7 - 1.75))


@pytest.mark.parametrize("seed", range(4))
def test_accuracy_is_the_best_of_all_permutations(seed: int) -> None:
    rng = np.random.default_rng(seed)
    truth, clusters = rng.integers(5, size=40), rng.integers(5, size=40)
    best = max(np.mean(np.array(order)[clusters] == truth) for order in permutations(range(5)))
    assert accuracy(truth, clusters) == pytest.approx(best)


@pytest.mark.parametrize("seed", range(4))
def test_figures_are_scikit_learns_and_names_of_clusters_do_not_matter(seed: int) -> None:
    rng = np.random.default_rng(seed)
    truth = rng.integers(4, size=60)
    clusters = np.where(rng.random(60) < 0.7, truth, rng.integers(6, size=60))
    words = np.array(["f", "e", "d", "c", "b", "a"])[clusters]
    assert nmi(truth, words) == pytest.approx(metrics.normalized_mutual_info_score(truth, clusters))
    assert ari(truth, words) == pytest.approx(metrics.adjusted_rand_score(truth, clusters))
    named = [match(truth, words).get(w, -1) for w in words.tolist()]
    assert accuracy(truth, words) == pytest.approx(metrics.accuracy_score(truth, named))
    expected = metrics.f1_score(truth, named, labels=range(4), average="macro")
    assert macro_f1(truth, words) == pytest.approx(expected)


def test_a_part_is_judged_by_the_match_over_all() -> None:
    # Over all, cluster 0 is class 0; matched on the novel samples alone it would be class 1 and score 1.
    truth, clusters = np.array([0, 0, 0, 1, 1]), np.array([0, 0, 0, 0, 0])
    novel = truth == 1
    assert accuracy(truth, clusters, where=novel) == 0
    assert accuracy(truth[novel], clusters[novel]) == 1
    assert accuracy(truth, clusters, where=~novel) == 1
    assert macro_f1(truth, clusters, where=novel) == 0
    assert known_novel(truth, clusters, {0}) == KnownNovel(total=0.6, known=1, novel=0, n_known=3, n_novel=2)


def test_a_part_of_nothing_or_of_another_length_is_refused() -> None:
    for where in (np.zeros(8, bool), np.ones(7, bool), np.ones(8, int)):
        with pytest.raises(ConfigError, match="`where` marks"):
            accuracy(TRUTH, CLUSTERS, where=where)
        with pytest.raises(ConfigError, match="`where` marks"):
            macro_f1(TRUTH, CLUSTERS, where=where)


def test_without_novel_or_known_samples_that_part_is_undefined() -> None:
    all_known = known_novel(TRUTH, CLUSTERS, set(TRUTH))
    assert (all_known.total, all_known.known, all_known.n_novel) == (0.75, 0.75, 0)
    assert np.isnan(all_known.novel)
    all_novel = known_novel(TRUTH, CLUSTERS, [])
    assert (all_novel.novel, all_novel.n_known) == (0.75, 0)
    assert np.isnan(all_novel.known)


def test_errors_of_k_by_hand() -> None:
    found = k_errors([5, 7, 6, 3], [5, 6, 8, 3], [(4, 6), (6, 8), (5, 7), (3, 3)])
    assert (found.mean_abs, found.bias, found.n) == (0.75, -0.25, 4)
    assert found.exact.rate == 0.5
    assert found.coverage is not None
    assert found.coverage.rate == 0.75
    assert k_errors([5], [5]).coverage is None


def test_k_below_the_truth_does_not_wrap_around_in_unsigned_numbers() -> None:
    assert k_errors(np.array([3], np.uint8), np.array([5], np.uint8)).bias == -2


def test_errors_of_no_k_or_of_uneven_lengths_are_refused() -> None:
    with pytest.raises(ConfigError, match="one estimate and one true k"):
        k_errors([], [])
    with pytest.raises(ConfigError, match="one estimate and one true k"):
        k_errors([3, 4], [3])
    with pytest.raises(ConfigError, match="an interval"):
        k_errors([3], [3], [(2, 4), (2, 4)])


def test_unknown_auroc_ranks_unknown_over_known() -> None:
    assert unknown_auroc(np.array([0.1, 0.4]), np.array([0.3, 0.9])) == 0.75
    with pytest.raises(ConfigError, match="needs both kinds"):
        unknown_auroc(np.array([0.1]), np.zeros(0))
    with pytest.raises(ConfigError, match="not finite"):
        unknown_auroc(np.array([0.1]), np.array([np.nan]))
