"""People's decisions, applied to the crops of the head in service and to waiting unknowns."""

from collections import Counter
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from cluster_files import SIGNED, T0, T1, found, ids
from semwatch.classes import clusters, decisions, observations
from semwatch.classes.clusters import Clusters
from semwatch.models import head_bank
from semwatch.models.head_bank import Bank
from semwatch.models.model_repository import Meta
from semwatch.settings.recipe import Promotion, Recipe
from semwatch_training.discovery.fit_head import MIN_PER_CLASS
from semwatch_training.learning import crops as banks
from semwatch_training.learning import new_classes
from semwatch_training.learning.base_head import BaseHead
from semwatch_training.learning.candidates import Candidate
from semwatch_training.learning.decisions import (
    DECISIONS,
    FORMER_DECISIONS,
    Group,
    apply_decisions,
    codes,
    groups_by_person,
    ids_grouped_by_person,
    mark_applied,
    renamed_answers,
)
from semwatch_training.learning.promotion import Answers

CLASSES = ("bridge", "particle")
WIDTH = 4


def crops(label: str, numbers: range, *, axis: int = 0, per_image: int = 1) -> Bank:
    """Record i of image i // per_image, with features around 10 on an axis."""
    features = np.random.default_rng(numbers.start).normal(size=(len(numbers), WIDTH)).astype(np.float32)
    features[:, axis] += 10
    return Bank(features, (label,) * len(numbers), tuple(f"image {i // per_image}" for i in numbers), ids(*numbers))


def known(label: str, n: int, axis: int) -> Bank:
    made = crops(label, range(n), axis=axis)
    return Bank(made.features, made.labels, made.images, ("",) * n)


def meta_of(*labels: str, **values: Any) -> Meta:
    return Meta(model="head", created_utc=T0, inputs={}, outputs={}, labels=labels, **values)


def base_of(*learned: Bank, golden: Bank | None = None, **values: Any) -> BaseHead:
    bank = head_bank.joined([known("bridge", 10, 0), known("particle", 10, 1), *learned])
    labels = sorted(set(bank.labels))
    return BaseHead(2, meta_of(*labels, **values), bank, golden or head_bank.empty(WIDTH), WIDTH)


def file_of(*sizes: int, learned: int = 0) -> Clusters:
    """Clusters of so many records, numbered on; the first so many are learned by head 2."""
    starts = np.cumsum((0, *sizes))
    groups = [found(*range(a, b)) for a, b in pairwise(starts)]
    c = observations.observe(Clusters(), groups, utc=T0)
    return observations.learned(c, [f"novel-{i + 1}" for i in range(learned)], 2, T0)


def pending(c: Clusters) -> list[str]:
    return [d.kind for d in clusters.pending(c)]


# --- what the file does not hold yet ---------------------------------------------------------------------------------


def test_file_without_clusters_stays_as_it_is() -> None:
    assert mark_applied(Clusters(), meta_of(*CLASSES), 2, T1) == Clusters()


def test_head_that_knows_a_proposed_cluster_has_learned_it() -> None:
    c = mark_applied(file_of(10, 6), meta_of(*CLASSES, "novel-2"), 5, T1)
    assert [(k.state, k.head_version) for k in c.clusters] == [("proposed", None), ("learned", 5)]
    assert mark_applied(c, meta_of(*CLASSES, "novel-2"), 6, T1) == c


def test_name_that_waited_counts_once_a_head_has_it() -> None:
    c = decisions.named(file_of(10), "novel-1", "pit", 7, classes=CLASSES, **SIGNED)
    assert mark_applied(c, meta_of(*CLASSES), 2, T1) == c
    for label in ("pit", "novel-1"):
        done = mark_applied(c, meta_of(*CLASSES, label), 3, T1)
        assert (done.clusters[0].state, pending(done)) == ("named", [])


def test_decision_that_leaves_nothing_to_do_is_applied_at_once() -> None:
    c = file_of(10, 6, 6, learned=1)
    c = decisions.rejected(c, "novel-2", **SIGNED)
    c = decisions.merged(c, "novel-3", "novel-1", classes=CLASSES, **SIGNED)
    c = decisions.rejected(c, "novel-1", **SIGNED)
    after = mark_applied(c, meta_of(*CLASSES, "novel-1"), 2, T1)
    assert [d.cluster for d in clusters.pending(after)] == ["novel-1"]
    assert pending(mark_applied(after, meta_of(*CLASSES), 3, T1)) == []


def test_merge_of_unknowns_into_a_class_of_the_head_waits_for_them() -> None:
    c = decisions.merged(file_of(10), "novel-1", "bridge", classes=CLASSES, **SIGNED)
    assert pending(mark_applied(c, meta_of(*CLASSES), 2, T1)) == ["merge"]


def test_code_that_the_head_has_not_keeps_its_name_waiting() -> None:
    c = decisions.named(file_of(10, learned=1), "novel-1", "pit", 7, classes=CLASSES, **SIGNED)
    assert pending(mark_applied(c, meta_of(*CLASSES, "pit"), 3, T1)) == ["name"]
    assert pending(mark_applied(c, meta_of(*CLASSES, "pit", codes={"pit": 7}), 3, T1)) == []


@pytest.mark.parametrize("key", [DECISIONS, FORMER_DECISIONS])
def test_split_is_applied_only_in_a_head_whose_provenance_records_it(key: str) -> None:
    c = decisions.split(file_of(10, learned=1), "novel-1", 2, **SIGNED)
    head = meta_of(*CLASSES, "novel-1")
    assert pending(mark_applied(c, head, 3, T1)) == ["split"]
    revision = c.decisions[0].revision
    recorded = head.model_copy(update={"provenance": {key: f"99, {revision}, nonsense"}})
    assert pending(mark_applied(c, recorded, 3, T1)) == []


# --- applied to bank and golden set ----------------------------------------------------------------------------------


def test_where_nobody_decided_nothing_changes() -> None:
    base = base_of(crops("novel-1", range(10), axis=2))
    decided_crops = apply_decisions(base, file_of(10, learned=1), seed=0)
    assert (decided_crops.is_changed, decided_crops.parts, decided_crops.revisions, dict(decided_crops.rejected)) == (
        False,
        (),
        (),
        {},
    )
    assert decided_crops.bank.labels == base.bank.labels


def test_names_and_merges_change_labels_and_rejections_leave_crops_out() -> None:
    base = base_of(
        crops("novel-1", range(10)),
        crops("novel-2", range(10, 16)),
        crops("novel-3", range(16, 22)),
        golden=head_bank.joined([crops("novel-1", range(30, 32)), crops("novel-3", range(40, 42))]),
    )
    c = decisions.named(file_of(10, 6, 6, learned=3), "novel-1", "pit", classes=CLASSES, **SIGNED)
    c = decisions.merged(c, "novel-2", "bridge", classes=CLASSES, **SIGNED)
    c = decisions.rejected(c, "novel-3", **SIGNED)
    decided_crops = apply_decisions(base, c, seed=0)
    assert decided_crops.is_changed
    assert Counter(decided_crops.bank.labels) == {"bridge": 16, "particle": 10, "pit": 10}
    assert Counter(decided_crops.golden.labels) == {"pit": 2}
    assert dict(decided_crops.rejected) == dict.fromkeys(ids(*range(16, 22), 40, 41), "novel-3")
    assert decided_crops.revisions == (1, 2, 3)


def test_decision_about_what_no_head_knows_changes_no_crop() -> None:
    c = decisions.rejected(file_of(10), "novel-1", **SIGNED)
    assert not apply_decisions(base_of(), c, seed=0).is_changed


def two_blobs() -> tuple[Bank, Bank]:
    """24 crops of novel-1 that are really two kinds, and 6 more for the golden set."""
    learned = head_bank.joined([crops("novel-1", range(14), axis=2), crops("novel-1", range(14, 24), axis=3)])
    proof = head_bank.joined([crops("novel-1", range(24, 28), axis=2), crops("novel-1", range(28, 30), axis=3)])
    return learned, proof


def test_split_class_leaves_bank_and_golden_set_and_comes_back_in_parts_the_largest_first() -> None:
    learned, proof = two_blobs()
    c = decisions.split(file_of(30, learned=1), "novel-1", 2, **SIGNED)
    decided_crops = apply_decisions(base_of(learned, golden=proof), c, seed=0)
    assert (decided_crops.is_changed, decided_crops.revisions, decided_crops.names["novel-1"]) == (True, (1,), None)
    assert "novel-1" not in (*decided_crops.bank.labels, *decided_crops.golden.labels)
    assert [set(part.ids) for part in decided_crops.parts] == [
        {*ids(*range(14)), *ids(*range(24, 28))},
        {*ids(*range(14, 24)), *ids(28, 29)},
    ]
    assert all(part.by_person and set(part.crops.labels) == {""} for part in decided_crops.parts)
    assert not decided_crops.rejected


@pytest.mark.parametrize("parts", [3, 5, 6])
def test_split_into_parts_that_are_too_small_is_put_off_and_said(caplog, parts: int) -> None:
    learned = head_bank.joined([crops("novel-1", range(21), axis=2), crops("novel-1", range(21, 24), axis=3)])
    c = decisions.split(file_of(24, learned=1), "novel-1", parts, **SIGNED)
    decided_crops = apply_decisions(base_of(learned), c, seed=0)
    smallest = min((len(part.ids) for part in decided_crops.parts), default=0)
    assert (decided_crops.is_changed, decided_crops.revisions, smallest) == (False, (), 0)
    assert decided_crops.bank.labels.count("novel-1") == 24
    assert "novel-1 stays whole for now, though it is to be split" in caplog.text


def test_what_was_proof_does_not_make_a_part_large_enough(caplog) -> None:
    learned = head_bank.joined([crops("novel-1", range(14), axis=2), crops("novel-1", range(14, 18), axis=3)])
    proof = crops("novel-1", range(24, 30), axis=3)
    c = decisions.split(file_of(30, learned=1), "novel-1", 2, **SIGNED)
    assert apply_decisions(base_of(learned, golden=proof), c, seed=0).parts == ()
    assert f"one part would have 4 crops, and a class needs {MIN_PER_CLASS}" in caplog.text


def test_class_that_was_named_and_split_keeps_its_name_on_the_largest_part() -> None:
    learned, proof = two_blobs()
    c = decisions.named(file_of(30, learned=1), "novel-1", "pit", classes=CLASSES, **SIGNED)
    c = decisions.split(c, "pit", 2, **SIGNED)
    decided_crops = apply_decisions(base_of(learned, golden=proof), c, seed=0)
    assert (len(decided_crops.parts), "pit" in decided_crops.bank.labels, decided_crops.names["novel-1"]) == (
        2,
        False,
        None,
    )


# --- applied to waiting unknowns -------------------------------------------------------------------------------------


def grouped(c: Clusters, waiting: Bank) -> tuple[list[Group], list[bool], list[int]]:
    groups, is_left, revisions = groups_by_person(c, waiting, CLASSES, frozen_width=WIDTH, seed=0)
    return groups, is_left.tolist(), revisions


def test_no_unknowns_and_no_decisions_make_no_groups() -> None:
    assert grouped(Clusters(), head_bank.empty(WIDTH)) == ([], [], [])
    assert ids_grouped_by_person(file_of(10), CLASSES) == set()


def test_unknowns_that_a_person_put_into_a_known_class_are_one_group_of_those_that_wait() -> None:
    c = decisions.merged(file_of(10, 6), "novel-2", "bridge", classes=CLASSES, **SIGNED)
    groups, is_left, revisions = grouped(c, crops("", range(8, 14)))
    assert ([group.ids for group in groups], revisions) == ([ids(*range(10, 14))], [])
    assert is_left == [True, True, *[False] * 4]
    assert groups[0].by_person
    assert ids_grouped_by_person(c, CLASSES) == set(ids(*range(10, 16)))
    assert ids_grouped_by_person(c, ["particle"]) == set()  # the head does not know that class


def test_chain_of_merges_is_followed_to_its_end() -> None:
    c = decisions.merged(file_of(10, 6), "novel-2", "novel-1", classes=CLASSES, **SIGNED)
    assert grouped(c, crops("", range(16)))[0] == []
    c = decisions.merged(c, "novel-1", "particle", classes=CLASSES, **SIGNED)
    assert [len(group.ids) for group in grouped(c, crops("", range(16)))[0]] == [10, 6]


def test_unknowns_that_a_person_split_become_groups() -> None:
    waiting = head_bank.joined([crops("", range(14), axis=2), crops("", range(14, 24), axis=3)])
    c = decisions.split(file_of(24), "novel-1", 2, **SIGNED)
    groups, is_left, revisions = grouped(c, waiting)
    assert [group.ids for group in groups] == [ids(*range(14)), ids(*range(14, 24))]
    assert (any(is_left), revisions) == (False, [1])


def test_unknowns_too_few_to_split_are_left_to_clustering(caplog) -> None:
    c = decisions.split(file_of(24), "novel-1", 2, **SIGNED)
    groups, is_left, revisions = grouped(c, crops("", range(7)))
    assert (groups, all(is_left), revisions) == ([], True, [])
    assert "too few for 2 parts" in caplog.text


# --- labels ----------------------------------------------------------------------------------------------------------


def test_answers_of_classes_that_became_one_are_added_up() -> None:
    logits = np.log(np.array([[0.5, 0.3, 0.2]], np.float32))
    p_values = np.array([[0.1, 0.7, 0.4]], np.float32)
    answers = Answers(("bridge", "novel-1", "novel-2"), logits, p_values)
    now = renamed_answers(answers, {"novel-1": "bridge", "novel-2": None})
    assert now.labels == ("bridge", "novel-2")
    np.testing.assert_allclose(np.exp(now.logits), [[0.8, 0.2]], rtol=1e-6)
    np.testing.assert_allclose(now.p_values, [[0.7, 0.4]])


def test_codes_follow_their_classes() -> None:
    base = base_of(crops("novel-1", range(10)), crops("novel-2", range(10, 16)), codes={"novel-1": 1, "novel-2": 2})
    c = decisions.named(file_of(10, 6, learned=2), "novel-1", "pit", 71, classes=CLASSES, **SIGNED)
    c = decisions.rejected(c, "novel-2", **SIGNED)
    assert codes(base, apply_decisions(base, c, seed=0), c) == {"pit": 71}


# --- what is learned, and what proves it -----------------------------------------------------------------------------


def split_of(bank: Bank, **values: Any) -> tuple[int, int]:
    learned, proof = banks.held_out(bank, share=5, at_least=5, **values)
    assert sorted((*learned.ids, *proof.ids)) == sorted(bank.ids)
    assert not set(learned.images) & set(proof.images)
    return len(learned), len(proof)


@pytest.mark.parametrize(
    ("n", "expected"), [(0, (0, 0)), (1, (1, 0)), (5, (5, 0)), (6, (5, 1)), (9, (8, 1)), (10, (8, 2)), (100, (80, 20))]
)
def test_one_crop_of_five_is_proof_as_long_as_enough_are_left(n: int, expected: tuple[int, int]) -> None:
    assert split_of(crops("", range(n))) == expected


def test_typical_and_odd_crops_are_proof_alike() -> None:
    _, proof = banks.held_out(crops("", range(20)), share=5, at_least=5)
    assert proof.ids == ids(4, 9, 14, 19)


def test_crops_of_one_image_stay_together() -> None:
    assert split_of(crops("", range(30), per_image=3)) == (24, 6)
    assert split_of(crops("", range(12), per_image=12)) == (12, 0)
    assert split_of(crops("", range(8), per_image=4)) == (8, 0)


def test_what_was_proof_stays_proof_and_no_more_is_drawn() -> None:
    made = crops("", range(20))
    learned, proof = banks.held_out(made, share=5, at_least=5, was_proof=ids(0, 7))
    assert (proof.ids, len(learned)) == (ids(0, 7), 18)


def test_cap_thins_only_classes_that_are_too_large_and_the_same_way_each_time() -> None:
    bank = head_bank.joined([known("bridge", 30, 0), known("pit", 4, 1), crops("void", range(12))])
    kept = banks.capped(bank, 10, seed=3)
    assert Counter(kept.labels) == {"bridge": 10, "pit": 4, "void": 10}
    np.testing.assert_array_equal(banks.capped(bank, 10, seed=3).features, kept.features)
    assert banks.capped(bank, 30, seed=3).ids == bank.ids
    assert len(banks.capped(head_bank.empty(WIDTH), 10, seed=0)) == 0


def test_images_get_numbers_by_name() -> None:
    assert banks.images_as_numbers([]) == []
    assert banks.images_as_numbers(["b", "a", "b"]) == [0, 1, 0]


# --- which groups become classes -------------------------------------------------------------------------------------


def group(numbers: range, cohesion: float = 0.5, *, by_person: bool = False) -> Group:
    made = crops("", numbers)
    return Group(made, Candidate(np.arange(len(made)), cohesion, "bridge", 1.0), by_person)


def chosen(c: Clusters, groups: list[Group], cluster_ids: list[str], *recipes: Recipe) -> tuple[Any, Any]:
    return new_classes.choose(c, cluster_ids, groups, CLASSES, recipes or (Recipe(),))


def of_size(n: int, wanted: int) -> str:
    return f"has {n} crops; the recipe asks for {wanted}: wait for more, merge it, or lower promotion.min_cluster_size"


def test_each_recipe_says_why_a_group_is_not_learned() -> None:
    strict = Recipe(name="strict", promotion=Promotion(min_cluster_size=20))
    accepted, refusals = chosen(file_of(12), [group(range(12))], ["novel-1"], Recipe(name="easy"), strict)
    assert (accepted, refusals) == ({}, {0: ["recipe strict: " + of_size(12, 20)]})
    assert chosen(file_of(12), [group(range(12))], ["novel-1"])[0] == {0: "novel-1"}


def test_person_is_asked_for_no_size_and_what_a_person_rejected_is_never_learned() -> None:
    c = decisions.rejected(file_of(6, 6, 12), "novel-3", **SIGNED)
    groups = [group(range(6), by_person=True), group(range(6, 12)), group(range(12, 24))]
    accepted, refusals = chosen(c, groups, ["novel-1", "novel-2", "novel-3"])
    assert (accepted, refusals[2]) == ({0: "novel-1"}, ["a person rejected it"])
    assert refusals[1] == ["recipe default: " + of_size(6, 12)]


def test_groups_that_a_person_merged_meet_the_bars_together() -> None:
    c = decisions.merged(file_of(8, 6), "novel-2", "novel-1", classes=CLASSES, **SIGNED)
    groups = [group(range(8)), group(range(8, 14))]
    assert chosen(c, groups, ["novel-1", "novel-2"])[0] == {}  # as they were seen before the merge
    c = observations.observe(c, [found(*range(8)), found(*range(8, 14))], utc=T1)
    assert chosen(c, groups, ["novel-1", "novel-2"])[0] == {0: "novel-1", 1: "novel-1"}
