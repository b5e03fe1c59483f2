from dataclasses import replace

import numpy as np
import pytest
from sklearn.metrics import adjusted_rand_score

from semwatch.errors import ConfigError
from semwatch_training.discovery.discovery_heads import HeadSettings
from semwatch_training.discovery.novel_classes import compare, discover, merge_crops, predict

QUICK = HeadSettings(rule="gated", n_heads=3, epochs=25, components=16)
K, KNOWN = 5, 3


def problem(
    n: int = 250, seed: int = 0, views: int = 2, shift: float = 6.0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Blobs of 5 classes, half of the first three labelled; a nuisance direction louder than the classes."""
    rng = np.random.default_rng(seed)
    truth = np.arange(n) % K
    features = rng.normal(size=(n, 24))
    features[np.arange(n), truth] += shift
    features[:, 10] *= 20
    labels = np.where((truth < KNOWN) & (rng.random(n) < 0.5), truth, -1)
    bank = features + 0.1 * rng.normal(size=(views, n, 24))
    return bank.astype(np.float32), labels, truth


def test_no_sample_is_refused() -> None:
    with pytest.raises(ConfigError, match="not empty"):
        discover(np.zeros((0, 4), np.float32), np.zeros(0, np.int64), 2)


@pytest.mark.parametrize("rule", ["gated", "unified"])
@pytest.mark.parametrize("views", [1, 2])
def test_known_and_novel_classes_are_found(rule: str, views: int) -> None:
    features, labels, truth = problem(views=views)
    found = discover(features, labels, K, replace(QUICK, rule=rule))
    unlabelled = labels < 0
    assert adjusted_rand_score(truth[unlabelled], found.assignment[unlabelled]) > 0.9
    known = unlabelled & (truth < KNOWN)
    assert np.mean(found.assignment[known] == truth[known]) > 0.95  # by number, not up to a permutation
    assert found.probabilities.sum(axis=1) == pytest.approx(np.ones(len(truth)), abs=1e-5)


def test_labelled_samples_keep_their_label() -> None:
    features, labels, _ = problem()
    found = discover(features, labels, K, QUICK)
    assert np.array_equal(found.assignment[labels >= 0], labels[labels >= 0])


def test_single_view_may_come_without_a_view_axis() -> None:
    features, labels, _ = problem(views=1)
    assert np.array_equal(
        discover(features, labels, K, QUICK).assignment, discover(features[0], labels, K, QUICK).assignment
    )


def test_linear_labelled_head_and_random_start_work_too() -> None:
    features, labels, truth = problem()
    found = discover(features, labels, K, replace(QUICK, labelled_head="linear", start="random", n_heads=8, epochs=60))
    assert adjusted_rand_score(truth, found.assignment) > 0.5
    length = np.linalg.norm(found.prototypes, axis=1)
    assert length[KNOWN:] == pytest.approx(np.ones(2), abs=1e-5)
    assert np.abs(length[:KNOWN] - 1).max() > 1e-3
    assert np.abs(found.heads.bias[:KNOWN]).max() > 0
    assert not found.heads.bias[KNOWN:].any()


def test_whitening_by_known_classes_silences_a_loud_nuisance() -> None:
    features, labels, truth = problem(shift=4.0)
    scores = {
        whiten: adjusted_rand_score(truth, discover(features, labels, K, replace(QUICK, whiten=whiten)).assignment)
        for whiten in (True, False)
    }
    assert scores[True] > scores[False] + 0.2


def test_estimated_prior_finds_long_tails_and_uniform_does_not() -> None:
    rng = np.random.default_rng(1)
    truth = np.repeat([0, 1, 2], [160, 160, 40])
    features = rng.normal(size=(360, 12)).astype(np.float32)
    features[np.arange(360), truth] += 4
    labels = np.where((truth == 0) & (np.arange(360) % 2 == 0), 0, -1)
    estimated, uniform = (discover(features, labels, 3, replace(QUICK, prior=p)) for p in ("estimated", "uniform"))
    shares = np.bincount(truth[labels < 0], minlength=3) / (labels < 0).sum()
    assert np.sort(estimated.prior) == pytest.approx(np.sort(shares), abs=0.05)
    assert uniform.prior == pytest.approx(np.full(3, 1 / 3))
    unlabelled = labels < 0
    ari = [adjusted_rand_score(truth[unlabelled], d.assignment[unlabelled]) for d in (estimated, uniform)]
    assert ari[0] > 0.95
    assert ari[0] > ari[1] + 0.1


def test_gate_decides_who_may_be_of_a_known_class() -> None:
    features, labels, truth = problem()
    rejected = truth >= KNOWN
    rejected[np.flatnonzero((truth == 0) & (labels < 0))[0]] = True  # the gate may err
    found = discover(features, labels, K, QUICK, gated=rejected)
    masked = rejected & (labels < 0)
    assert not found.probabilities[masked, :KNOWN].any()
    assert (found.assignment[masked] >= KNOWN).all()
    free = ~rejected & (labels < 0)
    assert np.mean(found.assignment[free] == truth[free]) > 0.95


def test_gate_is_ignored_on_labelled_samples_and_by_the_unified_head() -> None:
    features, labels, _ = problem()
    everyone = np.ones(len(labels), np.bool_)
    found = discover(features, labels, K, QUICK, gated=everyone)
    assert np.array_equal(found.assignment[labels >= 0], labels[labels >= 0])
    assert found.probabilities[labels >= 0, :KNOWN].any()
    unified = replace(QUICK, rule="unified")
    with_gate, without = (discover(features, labels, K, unified, gated=g).assignment for g in (everyone, None))
    assert np.array_equal(with_gate, without)


def test_literal_rule_names_no_unlabelled_sample_known() -> None:
    features, labels, _ = problem()
    found = discover(features, labels, K, replace(QUICK, rule="literal"))
    assert (found.assignment[labels < 0] >= KNOWN).all()
    assert (predict(found, features).argmax(axis=1) >= KNOWN).all()


def test_head_with_the_lowest_loss_is_kept() -> None:
    features, labels, _ = problem()
    settings = replace(QUICK, start="random", n_heads=6)
    found = discover(features, labels, K, settings)
    assert len(found.losses) == 6
    assert found.loss == min(found.losses) < max(found.losses)
    assert np.linalg.norm(found.prototypes, axis=1) == pytest.approx(np.ones(K), abs=1e-5)


def test_single_images_are_named_as_in_a_batch_and_as_in_the_fit() -> None:
    features, labels, _ = problem()
    found = discover(features, labels, K, QUICK)
    together = predict(found, features)
    assert together == pytest.approx(found.probabilities, abs=1e-5)
    alone = np.concatenate([predict(found, features[:, [i]]) for i in range(20)])
    assert alone == pytest.approx(together[:20], abs=1e-4)


def test_fresh_samples_are_named_right() -> None:
    features, labels, truth = problem()
    found = discover(features, labels, K, QUICK)
    fresh, _, fresh_truth = problem(seed=9, views=1)
    named = predict(found, fresh).argmax(axis=1)
    assert adjusted_rand_score(np.r_[truth, fresh_truth], np.r_[found.assignment, named]) > 0.9
    rejected = predict(found, fresh, gated=np.ones(len(fresh_truth), np.bool_)).argmax(axis=1)
    assert (rejected >= KNOWN).all()


def test_same_seed_same_answer_another_seed_another_start() -> None:
    features, labels, _ = problem()
    random = replace(QUICK, start="random")
    first, second, other = (discover(features, labels, K, replace(random, seed=s)) for s in (3, 3, 4))
    assert np.array_equal(first.probabilities, second.probabilities)
    assert first.losses == second.losses != other.losses


def test_progress_is_told_every_epoch() -> None:
    told: list[tuple[str, int, int]] = []
    features, labels, _ = problem()
    discover(features, labels, K, QUICK, progress=lambda *args: told.append(args))
    assert told == [("heads", epoch + 1, QUICK.epochs) for epoch in range(QUICK.epochs)]


def test_one_class_and_nothing_novel_names_everyone_that_class() -> None:
    features, labels, _ = problem()
    found = discover(features, np.where(labels == 0, 0, -1), 1, QUICK)
    assert not found.assignment.any()
    assert found.probabilities == pytest.approx(np.ones((250, 1)))


def test_defect_free_as_the_only_labelled_class_is_enough() -> None:
    features, labels, truth = problem()
    found = discover(features, np.where(labels == 0, 0, -1), K, QUICK)
    assert np.mean(found.assignment[truth == 0] == 0) > 0.9


def test_without_any_label_the_heads_cluster() -> None:
    features, _, truth = problem()
    found = discover(np.delete(features, 10, axis=2), np.full(250, -1), K, QUICK)
    assert adjusted_rand_score(truth, found.assignment) > 0.9
    assert found.heads.n_known == 0


def test_identical_samples_share_one_class() -> None:
    labels = np.full(40, -1)
    labels[:4] = [0, 0, 1, 1]
    found = discover(np.ones((2, 40, 6), np.float32), labels, 3, QUICK)
    assert np.isfinite(found.probabilities).all()
    assert len(np.unique(found.assignment[4:])) == 1


def test_as_many_classes_as_samples_is_allowed() -> None:
    features, _, _ = problem(n=6)
    assert np.isfinite(discover(features, np.full(6, -1), 6, QUICK).probabilities).all()


@pytest.mark.parametrize(
    ("change", "k", "message"),
    [
        (lambda y: np.where(y < 0, 0, y), K, "nothing to discover"),
        (np.zeros_like, K, "nothing to discover"),  # all defect-free
        (lambda y: np.where(y == 1, -1, y), K, "without gaps"),
        (lambda y: np.where(y == 2, -2, y), K, "without gaps"),
        (lambda y: y, 2, "at most k = 2"),
        (lambda y: y[:-1], K, "250 samples need 250 labels"),
        (lambda y: y, 251, "cannot make 251 classes"),
        (lambda y: y, 0, "cannot make 0 classes"),
    ],
)
def test_labels_that_make_no_problem_are_refused(change, k, message) -> None:
    features, labels, _ = problem()
    with pytest.raises(ConfigError, match=message):
        discover(features, change(labels), k, QUICK)


def test_nan_features_are_refused_with_the_first_sample_named() -> None:
    features, labels, _ = problem()
    found = discover(features, labels, K, QUICK)
    features[1, 7, 3] = np.nan
    with pytest.raises(ConfigError, match=r"1 samples.*first is sample 7"):
        discover(features, labels, K, QUICK)
    with pytest.raises(ConfigError, match=r"1 samples.*first is sample 7"):
        predict(found, features)


def test_other_width_and_wrong_gate_are_refused() -> None:
    features, labels, _ = problem()
    found = discover(features, labels, K, QUICK)
    with pytest.raises(ConfigError, match="fitted on 24 features"):
        predict(found, features[..., :20])
    with pytest.raises(ConfigError, match="gate answers"):
        discover(features, labels, K, QUICK, gated=np.ones(3, np.bool_))


def test_rejected_samples_need_a_novel_class() -> None:
    features, labels, _ = problem()
    with pytest.raises(ConfigError, match="leaves no class beside the known"):
        discover(features, labels, KNOWN, QUICK, gated=np.ones(250, np.bool_))


def test_crops_of_an_image_merge_by_area() -> None:
    probabilities = np.array([[1, 0], [0, 1], [0.2, 0.8]], np.float32)
    images, merged = merge_crops(probabilities, np.array([400.0**2, 10.0**2, 5.0]), np.array([4, 4, 2]))
    assert images.tolist() == [2, 4]
    assert merged[0] == pytest.approx([0.2, 0.8])
    weight = 1 / (1 + np.exp((10 - 400) / 50))
    assert merged[1] == pytest.approx([weight, 1 - weight], abs=1e-6)


def test_no_crops_merge_into_no_images() -> None:
    images, merged = merge_crops(np.zeros((0, 3), np.float32), np.zeros(0), np.zeros(0, np.int64))
    assert len(images) == 0
    assert merged.shape == (0, 3)


def test_comparison_scores_every_method_on_the_same_samples() -> None:
    features, labels, truth = problem(shift=4.0)
    found = compare(features, labels, K, QUICK)
    assert set(found) == {"k-means", "GCD", "GCD, whitened", "SimGCD", "unified", "gated", "literal"}
    ari = {name: adjusted_rand_score(truth[labels < 0], a[labels < 0]) for name, a in found.items()}
    assert ari["gated"] > max(ari["k-means"], ari["GCD"])
    assert ari["literal"] < ari["gated"]
