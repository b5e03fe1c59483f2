from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from progress import quiet
from semwatch.defects import DEFECT_FREE
from semwatch.errors import ConfigError
from semwatch.settings.recipe import UnknownRule
from semwatch_training.discovery.discovery_heads import HeadSettings
from semwatch_training.discovery.fit_head import HeadFit
from semwatch_training.discovery.labelled_crops import Crops, Searched
from semwatch_training.discovery.novel_classes import Discovery
from semwatch_training.evaluation import evaluate_discovery, evaluate_heads
from semwatch_training.evaluation.evaluate_discovery import (
    discovery_in_turn,
    discovery_of_images,
    labelled_half,
    number_of_classes,
)
from semwatch_training.evaluation.evaluate_heads import classification, unknown_rule
from semwatch_training.evaluation.report import Cell, Table
from semwatch_training.evaluation.searched_crops import Outcome
from semwatch_training.metrics.uncertainty import Rate, Spread

D = 10
RULE = UnknownRule()
FIT = HeadFit(frozen_width=D, components=8, directions=4, folds=4)
QUICK = HeadSettings(n_heads=2, epochs=8)


def crops_of(labels: list[str], features: np.ndarray, image_idx: np.ndarray | None = None) -> Crops:
    numbers = np.arange(len(labels)) if image_idx is None else image_idx
    return Crops(features.astype(np.float32), tuple(labels), numbers, np.full(len(labels), 100), {}, {})


def blobs(names: str, *, each: int = 40, distance: float = 12.0, seed: int = 0) -> Crops:
    """One blob for each letter, ``distance`` from the middle along an axis of its own; two crops an image."""
    rng = np.random.default_rng(seed)
    labels = [name for name in names for _ in range(each)]
    features = rng.normal(size=(len(labels), D))
    for row, label in zip(features, labels, strict=True):
        row["abcdefghij".index(label)] += distance
    order = rng.permutation(len(labels))
    return crops_of([labels[i] for i in order], features[order], np.arange(len(labels)) // 2)


def row(table: Table, name: str) -> dict[str, Cell]:
    """A row by its first cell, as cells by column."""
    (cells,) = [cells for cells in table.rows if cells[0] == name]
    return dict(zip(table.columns, cells, strict=True))


def mean(cell: Cell) -> float:
    assert isinstance(cell, Spread)
    return cell.mean


RULE = UnknownRule()


def classified(
    crops: Crops, seeds: tuple[int, ...] = (0,), rule: UnknownRule = RULE
) -> tuple[list[Table], dict[str, object]]:
    return classification(crops, FIT, seeds=seeds, rule=rule)


# ---- classification ----


def test_no_crop_and_fewer_images_than_folds_are_refused() -> None:
    for crops, n in ((crops_of([], np.zeros((0, D))), 0), (crops_of(["a"] * 3, np.zeros((3, D))), 3)):
        with pytest.raises(ConfigError, match=f"{n} images cannot be split in 4; give more images or fewer folds"):
            classified(crops)


def test_no_seed_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least one seed"):
        classified(blobs("ab"), seeds=())


def test_one_class_only_is_refused() -> None:
    with pytest.raises(ConfigError, match="a head needs two classes or more"):
        classified(blobs("a"))


def test_nan_features_are_refused() -> None:
    crops = blobs("ab")
    crops.features[3, 2] = np.nan
    with pytest.raises(ConfigError, match="NaN"):
        classified(crops)
    with pytest.raises(ConfigError, match="NaN"):
        discovery_in_turn(crops.features, crops.labels, seeds=(0,), settings=QUICK, progress=quiet)


def test_blobs_far_apart_are_all_named_right_and_counted() -> None:
    (summary, by_class), figures = classified(blobs("abc"), seeds=(0, 1))
    total = row(summary, "all classes")
    for name in ("accuracy of the logits", "matched macro-F1", "purity"):
        assert (mean(total[name]), total[name].n) == (1.0, 2)
    assert mean(total["accuracy"]) == mean(total["contribution"]) > 0.85  # all that is decided is right
    assert np.isnan(mean(total["escapes"]))  # no nuisance class among these crops: nothing can escape into it
    assert total["minority"].n == 0  # no class is rare
    assert [cells[:3] for cells in by_class.rows] == [(name, 40, 0) for name in "abc"]
    assert len(figures) == 3
    assert "120 crops of 60 images, 4-fold" in summary.note


def test_a_crop_is_never_named_by_a_head_that_knows_its_image() -> None:
    """Features tell images apart and nothing else: only a leak could name the held-out crops."""
    rng = np.random.default_rng(0)
    looks, names = rng.normal(size=(60, D)), rng.choice(["a", "b"], 60)
    image_idx = np.repeat(np.arange(60), 4)
    features = looks[image_idx] + 0.01 * rng.normal(size=(240, D))
    (summary, _), _ = classified(crops_of(names[image_idx].tolist(), features, image_idx))
    assert mean(row(summary, "all classes")["accuracy of the logits"]) < 0.7


def test_a_defect_called_defect_free_is_an_escape() -> None:
    """Half of the class b look defect-free."""
    crops = blobs("ab", each=60)
    labels = [{"a": DEFECT_FREE, "b": "b"}[label] for label in crops.labels]
    b = np.flatnonzero(np.array(labels) == "b")
    crops.features[b[:30]] = np.random.default_rng(1).normal(size=(30, D)) + 12 * np.eye(D)[0]
    crops = replace(crops, labels=tuple(labels))
    (summary, by_class), _ = classified(crops, rule=UnknownRule(dismiss_probability=0.5))
    assert 0 < mean(row(by_class, "b")["escapes"]) <= 0.5
    assert row(by_class, DEFECT_FREE)["escapes"].n == 0
    assert mean(row(summary, "all classes")["escapes"]) == mean(row(by_class, "b")["escapes"])
    (_, strict), _ = classified(crops)
    assert mean(row(strict, "b")["escapes"]) == 0  # the head is not sure enough to dismiss anything


def searched_for(crops: Crops, judged: np.ndarray, *missed: str) -> tuple[list[Table], dict[str, object]]:
    outcome = Outcome(judged, missed, Rate.of(1, 20))
    return classification(crops, FIT, seeds=(0, 1), rule=UnknownRule(), outcome=outcome)


def test_defects_that_the_search_missed_are_escapes() -> None:
    crops = blobs("abc")
    judged = np.ones(120, bool)
    judged[np.flatnonzero(np.array(crops.labels) == "b")[:10]] = False  # missed: heads learn from them all the same
    (summary, by_class), figures = searched_for(crops, judged, *["b"] * 10)
    assert [cells[:3] for cells in by_class.rows] == [("a", 40, 0), ("b", 40, 10), ("c", 40, 0), (DEFECT_FREE, 0, 0)]
    assert [mean(cells[-1]) for cells in by_class.rows[:3]] == [0.0, 0.25, 0.0]
    assert mean(row(by_class, "b")["accuracy"]) <= 0.75
    total = row(summary, "all classes")
    assert mean(total["escapes"]) == pytest.approx(10 / 120)
    assert mean(total["accuracy of the logits"]) == 1.0  # of what was found
    assert "120 true defects, 10 of them missed by the search and so escapes, and 0 false regions" in summary.note
    assert f"The gate opened on {Rate.of(1, 20)} of normal images" in summary.note
    assert len(figures) == 3


def test_false_regions_are_judged_and_are_no_defects() -> None:
    crops = blobs("abc")
    labels = tuple(DEFECT_FREE if label == "c" else label for label in crops.labels)
    (summary, by_class), _ = searched_for(replace(crops, labels=labels), np.ones(120, bool))
    assert "80 true defects, 0 of them missed by the search and so escapes, and 40 false regions" in summary.note
    assert mean(row(summary, "all classes")["escapes"]) == 0.0
    assert row(by_class, DEFECT_FREE)["judged"] == 40
    assert row(by_class, DEFECT_FREE)["escapes"].n == 0


def test_a_search_that_shows_nothing_cannot_be_judged() -> None:
    with pytest.raises(ConfigError, match="the gate stayed shut; raise its false alarm rate"):
        searched_for(blobs("ab"), np.zeros(80, bool), *["a"] * 80)


def test_a_rare_class_is_in_every_fold() -> None:
    """Seven images of a class: five or six are left to learn from, whatever the seed."""
    labels = ["a"] * 7 + ["b"] * 60
    crops = crops_of(labels, np.random.default_rng(0).normal(size=(67, D)))
    for seed in range(5):
        folds = evaluate_heads._folds(crops, 4, seed)
        assert sorted(np.bincount(folds[:7]).tolist()) == [1, 2, 2, 2]
        assert np.ptp(np.bincount(folds)) <= 1


# ---- the unknown rule ----


def test_an_unknown_rule_without_a_stranger_beside_two_known_classes_is_refused() -> None:
    for names in ("", "a", "ab"):
        crops = blobs(names) if names else crops_of([], np.zeros((0, D)))
        with pytest.raises(ConfigError, match="needs two known classes and a stranger"):
            unknown_rule(crops, FIT, seeds=(0,), significance=0.05)


def test_strangers_far_away_are_all_told_from_known_crops() -> None:
    crops = blobs("abcd")
    (table, _), _ = unknown_rule(crops, FIT, seeds=(0, 1), significance=0.05)
    assert [cells[:2] for cells in table.rows] == [("a", 40), ("b", 40), ("c", 40), ("d", 40), ("all", 160)]
    for cells in table.rows:
        assert cells[2].mean > 0.999
    assert table.rows[-1][2].n == 8
    assert f"strangers called unknown: {Rate.of(320, 320)}" in table.note
    false_unknown = table.note.split("known crops called unknown: ")[1]
    assert float(false_unknown.split(" %")[0]) < 15


def test_scores_stand_side_by_side_at_one_rate_and_a_useless_one_is_seen() -> None:
    crops = blobs("abcd")
    noise = np.random.default_rng(1).normal(size=(160, 6))
    wider = replace(crops, features=np.hstack((noise, crops.features)).astype(np.float32))
    fit = replace(FIT, frozen_width=D + 6)
    (_, table), _ = unknown_rule(wider, fit, seeds=(0, 1), significance=0.05, crop_width=6)
    found = {str(cells[0]): (mean(cells[1]), mean(cells[2])) for cells in table.rows}
    assert found["p-value (ours)"] > (0.9, 0.99)
    assert found["relative Mahalanobis"] > (0.9, 0.99)
    assert found["p-value and relative Mahalanobis"] > (0.9, 0.99)
    assert found["p-value (ours), crop alone"] < (0.3, 0.7), "the first six features are noise"
    assert [mean(cells[1]) for cells in table.rows] == sorted((one[0] for one in found.values()), reverse=True)


def test_strangers_of_the_same_look_are_not_told_apart() -> None:
    (table, _), _ = unknown_rule(blobs("abcd", distance=0.0), FIT, seeds=(0, 1), significance=0.05)
    assert 0.4 < table.rows[-1][2].mean < 0.6


def test_defect_free_crops_are_never_the_strangers() -> None:
    crops = blobs("abc", each=60)
    labels = tuple(DEFECT_FREE if label == "c" else label for label in crops.labels)
    (table, _), _ = unknown_rule(replace(crops, labels=labels), FIT, seeds=(0,), significance=0.05)
    assert [cells[0] for cells in table.rows] == ["a", "b", "all"]


def test_nan_features_of_a_stranger_are_refused_rather_than_called_known() -> None:
    crops = blobs("abc", each=60)
    crops.features[crops.labels.index("a"), 0] = np.inf
    with pytest.raises(ConfigError, match=r"1 of 117 rows of features hold NaN or infinity"):
        unknown_rule(crops, FIT, seeds=(0,), significance=0.05)


def test_crops_of_one_image_cannot_be_halved() -> None:
    crops = blobs("abc")
    with pytest.raises(ConfigError, match="got 0 samples"):
        unknown_rule(replace(crops, image_idx=np.zeros(120, int)), FIT, seeds=(0,), significance=0.05)


def test_identical_crops_are_at_chance() -> None:
    crops = blobs("abc", each=60)
    alike = replace(crops, features=np.ones_like(crops.features))
    (table, _), _ = unknown_rule(alike, FIT, seeds=(0,), significance=0.05)
    assert table.rows[-1][2].mean == 0.5


# ---- which samples discovery is given ----


def test_half_of_each_known_class_is_labelled_and_the_novel_one_never() -> None:
    truth = np.array(list("aaaaaabbbbbccn") + ["n"] * 6)
    given = labelled_half(truth, ["a", "b", "c"], seed=0)
    assert {name: int((given[truth == name] >= 0).sum()) for name in "abcn"} == {"a": 3, "b": 2, "c": 1, "n": 0}
    assert [set(given[truth == name].tolist()) for name in "abcn"] == [{0, -1}, {1, -1}, {2, -1}, {-1}]
    assert np.array_equal(given, labelled_half(truth, ["a", "b", "c"], seed=0))
    assert any(not np.array_equal(given, labelled_half(truth, ["a", "b", "c"], seed=s)) for s in range(1, 5))


def test_a_known_class_of_one_sample_is_labelled() -> None:
    assert labelled_half(np.array(["a", "n"]), ["a"], seed=0).tolist() == [0, -1]


def test_discovery_without_a_known_class_is_refused() -> None:
    for labels in ([], ["a"] * 5):
        with pytest.raises(ConfigError, match="needs a known and an unknown class"):
            discovery_in_turn(np.zeros((len(labels), D), np.float32), labels, seeds=(0,), progress=quiet)


def test_each_class_is_novel_once_a_seed_and_figures_are_those_of_the_unlabelled(monkeypatch) -> None:
    truth = np.array(["a"] * 4 + ["b"] * 4 + ["c"] * 2)
    problems: list[tuple[frozenset[str], int, int]] = []

    def noted(features: np.ndarray, given: np.ndarray, k: int, settings: HeadSettings) -> dict[str, np.ndarray]:
        problems.append((frozenset(truth[given >= 0].tolist()), k, settings.seed))
        right = np.array(["abc".index(name) for name in truth])
        wrong_where_labelled = np.where(given >= 0, (right + 1) % 3, right)
        return {"right": right, "one cluster": np.zeros(10, int), "wrong where labelled": wrong_where_labelled}

    monkeypatch.setattr(evaluate_discovery, "compare", noted)
    told: list[tuple[int, int]] = []
    features = np.random.default_rng(0).normal(size=(10, D)).astype(np.float32)
    (table, by_group), _ = discovery_in_turn(
        features, truth.tolist(), seeds=(3, 4), progress=lambda _, done, total: told.append((done, total))
    )
    assert problems == [(frozenset("abc") - {name}, 3, seed) for name in "abc" for seed in (3, 4)]
    assert told == [(done, 6) for done in range(1, 7)]
    for name in ("right", "wrong where labelled"):
        assert [cell.mean for cell in table.rows[[r[0] for r in table.rows].index(name)][1:]] == [1.0] * 6
    # All in one cluster: the largest hidden class is right. a novel: 4 of 4 + 2 + 1; b likewise; c: 2 of 2 + 2 + 2.
    assert mean(row(table, "one cluster")["accuracy"]) == pytest.approx((4 / 7 + 4 / 7 + 2 / 6) / 3)
    assert mean(row(table, "one cluster")["NMI"]) == 0.0
    assert by_group.columns == ("unknown class", "novel classes", "right", "one cluster", "wrong where labelled")
    for cells in by_group.rows:
        assert cells[1] == 1
        assert [(cell.mean, cell.n) for cell in cells[2:]] == [(1.0, 2), (0.0, 2), (1.0, 2)]


def test_groups_of_classes_are_novel_at_once(monkeypatch) -> None:
    truth = np.repeat(list("abcd"), 4)
    known: list[str] = []

    def noted(features: np.ndarray, given: np.ndarray, k: int, settings: HeadSettings) -> dict[str, np.ndarray]:
        assert k == 4
        known.append("".join(sorted(set(truth[given >= 0].tolist()))))
        return {"k-means": np.zeros(16, int)}

    monkeypatch.setattr(evaluate_discovery, "compare", noted)
    features = np.random.default_rng(0).normal(size=(16, D)).astype(np.float32)
    groups = {"DEP": ("a", "b", "c"), "DPR": ("d",)}
    (table, by_group), _ = discovery_in_turn(
        features, truth.tolist(), seeds=(0, 1), groups=groups, of="stage", progress=quiet
    )
    assert known == ["d", "d", "abc", "abc"]
    assert table.title == "Discovery, one stage unknown in turn"
    assert [cells[:2] for cells in by_group.rows] == [("DEP", 3), ("DPR", 1)]


def test_a_group_of_all_classes_or_of_none_is_refused() -> None:
    features = np.zeros((4, D), np.float32)
    for group in (("a", "b"), (), ("z",)):
        with pytest.raises(ConfigError, match="with stage 'DEP' unknown there is no known or no novel class"):
            discovery_in_turn(features, list("aabb"), seeds=(0,), groups={"DEP": group}, of="stage", progress=quiet)


def test_blobs_far_apart_are_discovered_by_every_method_with_a_sound_start() -> None:
    crops = blobs("abc", each=20)
    (table, _), figures = discovery_in_turn(crops.features, crops.labels, seeds=(0,), settings=QUICK, progress=quiet)
    assert {"k-means", "GCD", "GCD, whitened", "SimGCD", "unified", "gated", "literal"} == {r[0] for r in table.rows}
    for method in ("k-means", "GCD", "gated"):
        assert mean(row(table, method)["ARI"]) == 1.0
        assert mean(row(table, method)["novel"]) == 1.0
    assert list(figures) == ["Features in two dimensions"]


@pytest.mark.filterwarnings("ignore:Number of distinct clusters")
def test_identical_samples_are_discovered_at_chance_and_not_as_nan() -> None:
    labels = ["a"] * 6 + ["b"] * 6
    (table, _), _ = discovery_in_turn(np.ones((12, D), np.float32), labels, seeds=(0,), settings=QUICK, progress=quiet)
    for cells in table.rows:
        assert 0 <= mean(row(table, cells[0])["accuracy"]) <= 1
        assert -0.5 <= mean(row(table, cells[0])["ARI"]) <= 1


# ---- discovery from score maps ----


def searched(labels: list[str], crops: Crops) -> Searched:
    """Images with labels; those that no crop names had their gate shut."""
    return Searched(crops, tuple(labels), np.zeros(len(labels), np.float32), 0.5)


def test_perfect_crops_name_every_image_and_shut_gates_are_a_class_of_their_own() -> None:
    base, new = blobs("ab", each=20), blobs("cd", each=15, seed=1)
    labels = [*new.labels, *[DEFECT_FREE] * 10]
    found = searched(labels, replace(new, image_idx=np.arange(30)))
    told: list[tuple[int, int]] = []
    (table,), _ = discovery_of_images(
        base,
        found,
        frozen_width=D,
        seeds=(0, 1),
        settings=QUICK,
        progress=lambda _, done, total: told.append((done, total)),
    )
    for method in ("k-means", "GCD", "gated", "unified, soft votes"):
        assert [mean(row(table, method)[score]) for score in ("NMI", "ARI", "accuracy", "macro-F1")] == [1.0] * 4
        assert row(table, method)["known"].n == 0  # all classes of the images are novel
    assert table.note.startswith("40 images, gate open on 30, 30 crops; labelled base: a, b (40 crops); ")
    assert "2 classes to find, k = 4 given" in table.note  # no defect-free crop: no such class among the crops
    assert told == [(1, 2), (2, 2)]


def hand_made(assignment: list[int], k: int) -> tuple[Callable[..., object], Callable[..., object]]:
    """Stand in for ``compare`` and ``discover``: the crops' classes are given."""

    def compared(features: np.ndarray, given: np.ndarray, n: int, settings: HeadSettings, **_: object) -> object:
        assert n == k
        return {"given": np.concatenate((given[given >= 0], assignment))}

    def discovered(features: np.ndarray, given: np.ndarray, n: int, settings: HeadSettings, *, gated: np.ndarray):
        assert np.array_equal(gated, given < 0)
        probabilities = np.vstack((np.eye(k)[given[given >= 0]], np.eye(k)[assignment])).astype(np.float32)
        return Discovery(None, given, probabilities, np.ones(k), (0.0,))

    return compared, discovered


def test_the_larger_crop_names_its_image(monkeypatch) -> None:
    base = crops_of(["a", "a"], np.zeros((2, D)))
    crops = Crops(np.zeros((5, D), np.float32), ("x", "x", "y", "y", "x"), np.array([0, 0, 1, 1, 2]),
                  np.array([10_000, 100, 100, 10_000, 50]), {}, {})  # fmt: skip
    compared, discovered = hand_made([1, 2, 1, 2, 1], k=3)
    monkeypatch.setattr(evaluate_discovery, "compare", compared)
    monkeypatch.setattr(evaluate_discovery, "discover", discovered)
    found = searched(["x", "y", "x"], crops)
    (table,), _ = discovery_of_images(base, found, frozen_width=D, seeds=(0,), progress=quiet)
    assert mean(row(table, "given")["accuracy"]) == 1.0
    equal = searched(["x", "y", "x"], replace(crops, area_px=np.array([100, 10_000, 100, 10_000, 50])))
    (table,), _ = discovery_of_images(base, equal, frozen_width=D, seeds=(0,), progress=quiet)
    assert mean(row(table, "given")["accuracy"]) == pytest.approx(2 / 3)  # images 0 and 1 are one cluster now


def test_false_alarms_are_a_class_to_find_and_shut_gates_another_cluster(monkeypatch) -> None:
    """Two normal images opened the gate, one did not: no match can name all three defect-free."""
    base = crops_of(["a"], np.zeros((1, D)))
    crops = crops_of(["x", "x", DEFECT_FREE, DEFECT_FREE], np.zeros((4, D)))
    compared, discovered = hand_made([1, 1, 2, 2], k=3)
    monkeypatch.setattr(evaluate_discovery, "compare", compared)
    monkeypatch.setattr(evaluate_discovery, "discover", discovered)
    found = searched(["x", "x", *[DEFECT_FREE] * 3], crops)
    (table,), _ = discovery_of_images(base, found, frozen_width=D, seeds=(0,), progress=quiet)
    assert mean(row(table, "unified, soft votes")["accuracy"]) == pytest.approx(4 / 5)


def test_a_base_without_a_defect_and_a_search_without_crops_are_refused() -> None:
    crops = crops_of(["x", "y", "z"], np.eye(3, D))
    found = searched(["x", "y", "z"], crops)
    for base in (crops_of([DEFECT_FREE] * 3, np.zeros((3, D))), crops_of([], np.zeros((0, D)))):
        with pytest.raises(ConfigError, match="the labelled base holds no defect"):
            discovery_of_images(base, found, frozen_width=D, seeds=(0,), settings=QUICK, progress=quiet)
    with pytest.raises(ConfigError, match="every sample has a label"):
        discovery_of_images(
            crops_of(["a", "b"], np.eye(2, D)),
            searched(["x"], crops_of([], np.zeros((0, D)))),
            frozen_width=D,
            seeds=(0,),
            settings=QUICK,
            progress=quiet,
        )


# ---- the number of classes ----


def numbers(crops: Crops, n_problems: int, rules: tuple[str, ...], seed: int = 0) -> tuple[Table, dict[str, object]]:
    (table,), figures = number_of_classes(
        crops.features, crops.labels, n_problems=n_problems, seed=seed, rules=rules, progress=quiet
    )
    return table, figures


def test_problems_of_fewer_than_three_classes_no_problem_and_nan_are_refused() -> None:
    with pytest.raises(ConfigError, match="need three classes; there are 2"):
        numbers(blobs("ab"), 2, ("consensus",))
    with pytest.raises(ConfigError, match="one problem or more, not 0"):
        numbers(blobs("abc"), 0, ("consensus",))
    broken = blobs("abc")
    broken.features[:] = np.nan
    with pytest.raises(ConfigError, match="NaN"):
        numbers(broken, 1, ("consensus",))


def test_drawn_problems_are_of_known_and_novel_classes_with_half_of_the_known_labelled() -> None:
    names = np.array(list("abcde"))
    truth = np.repeat(names, [200, 40, 31, 160, 10])
    rng, shapes = np.random.default_rng(0), set()
    for _ in range(100):
        chosen, given = evaluate_discovery._drawn_problem(truth, names, rng)
        assert len(set(chosen.tolist())) == len(chosen) == len(given)
        drawn = truth[chosen]
        known = sorted(set(given[given >= 0].tolist()))
        assert known == list(range(len(known)))
        assert len(known) >= 2
        novel = set(drawn.tolist()) - set(drawn[given >= 0].tolist())
        assert len(novel) >= 1
        assert len(set(drawn.tolist())) == len(known) + len(novel)
        for name in set(drawn.tolist()):
            n = int((drawn == name).sum())
            assert min(30, int((truth == name).sum())) <= n <= 150
            labelled = given[(drawn == name) & (given >= 0)]
            assert len(labelled) == (0 if name in novel else n // 2)
            assert len(set(labelled.tolist())) <= 1
        shapes.add((len(known), len(novel)))
    assert shapes == {(2, 1), (2, 2), (2, 3), (3, 1), (3, 2), (4, 1)}


def test_blobs_far_apart_are_counted_right_and_drawn() -> None:
    table, figures = numbers(blobs("abcd", distance=25.0), 3, ("consensus", "silhouette"))
    assert [cells[0] for cells in table.rows] == ["consensus", "silhouette"]
    for cells in table.rows:
        assert cells[1] <= 0.34
        assert isinstance(cells[3], Rate)
        assert cells[3].n == cells[4].n == 3
    assert list(figures) == ["Probability of each k in the last problem"]


def test_rules_without_the_consensus_have_a_table_and_no_picture() -> None:
    table, figures = numbers(blobs("abc"), 1, ("silhouette",))
    assert [cells[0] for cells in table.rows] == ["silhouette"]
    assert figures == {}
