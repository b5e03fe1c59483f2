import math

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.metrics import adjusted_rand_score, silhouette_samples

from semwatch.errors import ConfigError
from semwatch.models import head_bank
from semwatch.models.head_bank import Bank
from semwatch_training.discovery.estimate_k import KEstimate
from semwatch_training.learning import candidates
from semwatch_training.learning.candidates import Candidates, find, split

WIDTH, TRAINED = 24, 6
KNOWN = ("bridge", "open", "pit")


def crops(kinds: list[int], seed: int, spread: float = 1.0) -> NDArray[np.float32]:
    """Gaussian classes, a long way apart in the frozen features; the trained ones after them are noise."""
    rng = np.random.default_rng(seed)
    features = spread * rng.normal(size=(len(kinds), WIDTH + TRAINED))
    features[np.arange(len(kinds)), kinds] += 9.0
    features[:, WIDTH:] = 100 * rng.normal(size=(len(kinds), TRAINED))
    return features.astype(np.float32)


def bank_of(n: int, seed: int = 1) -> Bank:
    """n crops of each known class."""
    kinds = [kind for kind in range(len(KNOWN)) for _ in range(n)]
    return Bank(crops(kinds, seed), tuple(KNOWN[kind] for kind in kinds), ("",) * len(kinds), ("",) * len(kinds))


def found_in(bank: Bank, features: NDArray[np.float32], seed: int = 0) -> Candidates:
    return find(bank, features, frozen_width=WIDTH, seed=seed)


def test_no_unknowns_make_no_class() -> None:
    found = found_in(bank_of(20), np.zeros((0, WIDTH + TRAINED), np.float32))
    assert (found.classes, found.known, len(found.silhouette)) == ((), (), 0)
    assert (found.k.k, found.k.interval) == (3, (3, 3))


@pytest.mark.parametrize("m", [1, 4])
def test_too_few_unknowns_for_a_class_join_known_ones(m: int) -> None:
    found = found_in(bank_of(20), crops([5] * m, seed=2))
    assert found.classes == ()
    assert len(found.known) == m
    assert set(found.known) <= set(KNOWN)
    assert found.k.k == 3


@pytest.mark.parametrize("m", [0, 1, 4])
def test_too_few_unknowns_and_nothing_known_make_no_class(m: int) -> None:
    found = found_in(head_bank.empty(WIDTH + TRAINED), crops([0] * m, seed=2))
    assert (found.classes, found.known, found.k.k) == ((), (None,) * m, 0)


def test_unknowns_of_known_classes_make_no_class() -> None:
    truth = [0] * 20 + [2] * 20
    found = found_in(bank_of(30), crops(truth, seed=3))
    assert found.classes == ()
    assert found.k.k == len(KNOWN)
    assert list(found.known) == [KNOWN[kind] for kind in truth]


def test_two_new_classes_are_found_beside_a_known_one() -> None:
    truth = np.array([5] * 30 + [7] * 20 + [1] * 12)[np.random.default_rng(0).permutation(62)]
    found = found_in(bank_of(40), crops(truth.tolist(), seed=4))
    assert [set(truth[one.members].tolist()) for one in found.classes] == [{5}, {7}]
    assert [one.size for one in found.classes] == [30, 20]
    assert [name for name, kind in zip(found.known, truth, strict=True) if kind == 1] == ["open"] * 12
    assert [name for name, kind in zip(found.known, truth, strict=True) if kind != 1] == [None] * 50
    assert found.k.k == 5
    assert found.k.interval[0] <= 5 <= found.k.interval[1]
    assert "probability" in found.k.curves
    assert all(one.cohesion > 0.3 for one in found.classes)


def test_members_come_with_the_most_typical_first_and_cohesion_is_their_mean_silhouette() -> None:
    found = found_in(bank_of(40), crops([5] * 30 + [7] * 20, seed=4))
    for one in found.classes:
        widths = found.silhouette[one.members]
        assert (np.diff(widths) <= 0).all()
        assert one.cohesion == pytest.approx(float(widths.mean()))


def test_silhouettes_are_those_of_scikit_learn_among_all_classes_known_ones_included() -> None:
    rng = np.random.default_rng(0)
    space = rng.normal(size=(60, 3)).astype(np.float32)
    assignment = np.arange(60) % 3  # two known classes and a new one, all mixed up
    labels = np.where((np.arange(60) < 40) & (assignment < 2), assignment, -1)
    k = KEstimate(3, (3, 3), (3,), {}, "consensus")
    found = candidates._described(space, assignment, labels, ["bridge", "open"], k, 3)
    theirs = silhouette_samples(space, assignment)
    assert found.silhouette == pytest.approx(theirs[labels < 0], abs=1e-5)
    (one,) = found.classes
    assert one.cohesion == pytest.approx(theirs[assignment == 2].mean(), abs=1e-5)


def test_the_nearest_known_class_is_the_one_that_looks_alike() -> None:
    new = crops([1] * 30, seed=5)
    new[:, 9] += 9.0  # between "open" and a direction of its own
    (one,) = found_in(bank_of(40), new).classes
    assert one.nearest_known == "open"
    assert 0 < one.nearest_distance < 2


def test_without_a_bank_every_class_is_new_and_none_is_nearest() -> None:
    truth = np.array([0] * 35 + [3] * 30)
    found = found_in(head_bank.empty(WIDTH + TRAINED), crops(truth.tolist(), seed=6))
    assert [set(truth[one.members].tolist()) for one in found.classes] == [{0}, {3}]
    assert all(one.nearest_known is None and math.isnan(one.nearest_distance) for one in found.classes)


@pytest.mark.parametrize("known", [True, False])
def test_identical_unknowns_make_one_class_at_most(known: bool) -> None:
    bank = bank_of(20) if known else head_bank.empty(WIDTH + TRAINED)
    found = found_in(bank, np.repeat(crops([5], seed=7), 25, axis=0))
    assert [one.size for one in found.classes] in ([], [25])
    assert all(np.isfinite(one.cohesion) for one in found.classes)
    assert len(set(found.known)) == 1


def test_no_more_classes_are_looked_for_than_unknowns_can_fill() -> None:
    found = found_in(bank_of(20), crops([5, 6, 7, 8, 9, 10, 11], seed=8))  # seven types, one crop each
    assert found.k.candidates == (3, 4)
    assert len(found.classes) <= 1


def test_no_more_than_the_span_of_new_classes_is_looked_for() -> None:
    truth = [kind for kind in range(4, 23) for _ in range(6)]
    found = found_in(bank_of(10), crops(truth, seed=9))
    assert found.k.candidates[-1] == 3 + 15
    assert 8 <= len(found.classes) <= 15


def test_only_the_frozen_features_are_read() -> None:
    bank, features = bank_of(20), crops([5] * 20, seed=10)
    other = features.copy()
    other[:, WIDTH:] = 0
    one, two = found_in(bank, features), found_in(bank, other)
    assert one.known == two.known
    assert np.array_equal(one.silhouette, two.silhouette)


def test_equal_seeds_give_equal_results() -> None:
    bank, features = bank_of(20), crops([5] * 20 + [6] * 20, seed=11)
    one, two = found_in(bank, features, seed=3), found_in(bank, features, seed=3)
    assert [found.members.tolist() for found in one.classes] == [found.members.tolist() for found in two.classes]
    assert np.array_equal(one.silhouette, two.silhouette)


def test_a_large_bank_is_thinned_at_its_largest_classes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(candidates, "MAX_BANK", 100)
    labels = np.repeat([0, 1, 2], [500, 60, 7])
    kept = candidates._thinned(labels, 100, seed=0)
    counts = np.bincount(labels[kept])
    assert counts.tolist() == [46, 46, 7]
    assert np.array_equal(kept, np.unique(kept))
    found = found_in(bank_of(200), crops([5] * 30, seed=12))
    assert [one.size for one in found.classes] == [30]


def test_small_bank_is_kept_whole_and_an_empty_one_stays_empty() -> None:
    assert candidates._thinned(np.array([0, 1, 1]), 3, seed=0).tolist() == [0, 1, 2]
    assert candidates._thinned(np.zeros(0, np.int64), 3, seed=0).tolist() == []


@pytest.mark.parametrize("whose", ["unknowns", "crops of the bank"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_features_that_are_not_finite_are_refused(whose: str, value: float) -> None:
    bank, features = bank_of(10), crops([5] * 10, seed=13)
    (features if whose == "unknowns" else bank.features)[4, 2] = value
    with pytest.raises(ConfigError, match=f"1 {whose} hold NaN or infinity, the first at row 4"):
        found_in(bank, features)


def test_features_of_another_encoder_are_refused() -> None:
    with pytest.raises(ConfigError, match="the bank's have 30 a crop"):
        found_in(bank_of(10), np.zeros((9, 31), np.float32))


def test_progress_names_the_steps() -> None:
    steps: list[tuple[str, int, int]] = []
    find(bank_of(10), crops([5] * 10, seed=14), frozen_width=WIDTH, seed=0, progress=lambda *step: steps.append(step))
    assert steps[0] == ("number of classes", 0, 1)
    assert steps[-1] == ("heads", 60, 60)


# ---- a person asks for a split ----


def test_two_looks_in_one_class_come_apart_and_the_larger_is_part_0() -> None:
    truth = np.array([5] * 12 + [7] * 20)
    parts = split(crops(truth.tolist(), seed=15)[:, :WIDTH], 2, seed=0)
    assert adjusted_rand_score(truth, parts) == 1
    assert np.bincount(parts).tolist() == [20, 12]


@pytest.mark.parametrize("parts", [-1, 0, 1])
def test_fewer_than_two_parts_are_refused(parts: int) -> None:
    with pytest.raises(ConfigError, match="2 parts or more"):
        split(crops([5] * 20, seed=16), parts, seed=0)


@pytest.mark.parametrize("n", [0, 9])
def test_too_few_members_are_refused(n: int) -> None:
    with pytest.raises(ConfigError, match=f"{n} members are too few for 2 parts"):
        split(crops([5] * n, seed=16), 2, seed=0)


def test_members_that_are_all_alike_are_refused() -> None:
    with pytest.raises(ConfigError, match="only 1 different looks"):
        split(np.ones((20, 4), np.float32), 2, seed=0)


def test_members_with_nan_are_refused() -> None:
    features = crops([5] * 20, seed=16)
    features[3] = np.nan
    with pytest.raises(ConfigError, match="1 members hold NaN"):
        split(features, 2, seed=0)


def test_group_of_two_kinds_has_two_looks_and_one_of_a_single_kind_has_one() -> None:
    rng = np.random.default_rng(0)
    known = rng.normal(size=(80, 16)).astype(np.float32)
    labels = np.repeat(np.arange(2), 40)
    known[labels == 1, 0] += 8
    one, other = rng.normal(size=(2, 15, 16)).astype(np.float32)
    other[:, 1] += 8
    assert candidates.looks_of(one, known, labels) == 1
    assert candidates.looks_of(np.concatenate((one, other)), known, labels) == 2
    assert candidates.looks_of(np.concatenate((one, other[:2])), known, labels) == 1, "two odd crops are no kind"
    assert candidates.looks_of(one[:9], known, labels) == 1, "too few to cut in two"
    assert candidates.looks_of(one, known[:0], labels[:0]) == 1, "nothing is known to measure by"
