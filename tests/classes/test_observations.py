"""Identities of found classes over many cycles."""

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from cluster_files import CLASSES, SIGNED, T0, T1, T2, found, ids, three
from semwatch.classes.clusters import Clusters, find, label_of, pending
from semwatch.classes.decisions import merged, named, rejected, split
from semwatch.classes.observations import MAX_MISSED, Observation, applied, learned, matches, observe
from semwatch.errors import ConfigError


def names(c: Clusters) -> list[str]:
    return [k.id for k in c.clusters]


def test_cycle_without_clusters_finds_none() -> None:
    assert observe(Clusters(), [], utc=T0) == Clusters()
    assert matches(Clusters(), []) == ()
    assert matches(Clusters(), [found(1), found(2)]) == (None, None)
    assert matches(three(), []) == ()
    assert matches(three(), [Observation((), 0, 0.0, "bridge", 0.0)]) == (None,)


def test_new_clusters_get_numbers_and_all_that_was_found_of_them() -> None:
    c = observe(Clusters(), [found(1, 2, 3, cohesion=0.25, nearest="particle", distance=3.5), found(4)], utc=T0)
    assert (names(c), c.next_number) == (["novel-1", "novel-2"], 3)
    k = c.clusters[0]
    assert (k.state, k.label, k.code, k.size, k.cohesion) == ("proposed", "novel-1", None, 3, 0.25)
    assert (k.nearest_known, k.nearest_distance, k.members) == ("particle", 3.5, ids(1, 2, 3))
    assert (k.first_seen_utc, k.last_seen_utc, k.cycles, k.missed, k.head_version) == (T0, T0, 1, 0, None)
    assert k.examples == ids(1, 2)


def test_earlier_clusters_keep_their_ids_in_whatever_order_they_come_back() -> None:
    c = observe(Clusters(), [found(*range(10)), found(*range(10, 20)), found(*range(20, 30))], utc=T0)
    again = [found(*range(21, 40)), found(*range(50, 60)), found(*range(2, 10)), found(*range(10, 21))]
    assert matches(c, again) == ("novel-3", None, "novel-1", "novel-2")
    c = observe(c, again, utc=T1)
    assert names(c) == ["novel-1", "novel-2", "novel-3", "novel-4"]
    assert [k.cycles for k in c.clusters] == [2, 2, 2, 1]
    k = find(c, "novel-3")
    assert (k.first_seen_utc, k.last_seen_utc, k.size) == (T0, T1, 19)
    assert k.members == ids(*range(21, 40))


def test_flood_of_new_records_or_a_settled_rest_does_not_hide_who_a_cluster_is() -> None:
    c = observe(Clusters(), [found(*range(12)), found(*range(12, 24))], utc=T0)
    assert matches(c, [found(0, 1, *range(100, 400)), found(12, *range(400, 900))]) == ("novel-1", "novel-2")


def test_cluster_that_fell_apart_leaves_its_name_with_the_largest_piece() -> None:
    c = observe(Clusters(), [found(*range(10))], utc=T0)
    assert matches(c, [found(*range(4)), found(*range(4, 10))]) == (None, "novel-1")


def test_clusters_that_became_one_leave_it_the_name_of_the_larger() -> None:
    c = observe(Clusters(), [found(*range(4)), found(*range(4, 10))], utc=T0)
    assert matches(c, [found(*range(10))]) == ("novel-2",)


def test_faint_overlap_is_a_new_cluster() -> None:
    c = observe(Clusters(), [found(*range(11)), found(*range(11, 40))], utc=T0)
    assert matches(c, [found(0, *range(20, 40)), found(*range(11, 20), *range(1, 11))])[0] == "novel-2"
    assert matches(observe(Clusters(), [found(*range(20))], utc=T0), [found(0), found(*range(1, 20))]) == (
        None,
        "novel-1",
    )


def test_learned_clusters_are_not_looked_for() -> None:
    assert matches(three(), [found(*range(10)), found(*range(10, 16))]) == (None, "novel-2")


@pytest.mark.parametrize("seed", range(20))
def test_matching_is_the_optimal_one_where_clusters_held_together(seed) -> None:
    """Against the Hungarian method, with a third of the records in other clusters than before."""
    rng = np.random.default_rng(seed)
    before = rng.integers(0, 8, 400)
    after = np.where(rng.random(400) < 0.33, rng.integers(0, 8, 400), rng.permutation(8)[before])
    overlap = np.array([[((before == i) & (after == j)).sum() / ((before == i) | (after == j)).sum()
                         for i in range(8)] for j in range(8)])  # fmt: skip
    _, best = linear_sum_assignment(overlap, maximize=True)
    c = observe(Clusters(), [found(*np.flatnonzero(before == i).tolist()) for i in range(8)], utc=T0)
    now = [found(*np.flatnonzero(after == j).tolist()) for j in range(8)]
    assert matches(c, now) == tuple(f"novel-{i + 1}" for i in best)


def test_proposed_cluster_is_dropped_after_three_missed_cycles_and_its_number_stays_its_own() -> None:
    c = three()
    for n in range(1, MAX_MISSED):
        c = observe(c, [found(*range(10, 16))], utc=T1)
        assert find(c, "novel-3").missed == n
    c = observe(c, [found(*range(10, 16))], utc=T1)
    assert names(c) == ["novel-1", "novel-2"]  # the learned one is not waiting for anything
    assert names(observe(c, [found(*range(16, 20))], utc=T2)) == ["novel-1", "novel-2", "novel-4"]


def test_cluster_that_comes_back_in_time_starts_anew_to_be_missed() -> None:
    c = observe(observe(three(), [], utc=T1), [], utc=T1)
    c = observe(c, [found(*range(16, 20))], utc=T2)
    assert (find(c, "novel-3").missed, find(c, "novel-3").cycles) == (0, 2)
    assert names(observe(c, [], utc=T2)) == ["novel-1", "novel-3"]


def test_cluster_that_a_person_named_waits_for_ever() -> None:
    c = named(three(), "novel-3", "void", classes=CLASSES, **SIGNED)
    for _ in range(10):
        c = observe(c, [], utc=T1)
    assert names(c) == ["novel-1", "novel-3"]


def test_what_a_person_rejected_is_not_proposed_again() -> None:
    c = rejected(three(), "novel-2", **SIGNED)
    c = observe(c, [found(*range(10, 16), *range(60, 70))], utc=T1)
    assert names(c) == ["novel-1", "novel-2", "novel-3"]
    assert (find(c, "novel-2").state, label_of(c, "novel-2")) == ("rejected", None)
    assert find(c, "novel-2").members == ids(*range(10, 16), *range(60, 70))


def test_what_a_person_merged_comes_back_as_one() -> None:
    c = merged(three(), "novel-3", "novel-2", classes=CLASSES, **SIGNED)
    parts = [found(*range(16, 20), cohesion=0.8, nearest="particle", distance=1.0), found(*range(10, 16), cohesion=0.3)]
    k = find(observe(c, parts, utc=T1), "novel-2")
    assert (k.size, k.cohesion, k.cycles) == (10, pytest.approx(0.5), 2)
    assert set(k.members) == set(ids(*range(10, 20)))
    assert (k.nearest_known, k.nearest_distance) == ("particle", 1.0)
    assert len(k.examples) == 4
    as_one = observe(c, [found(*range(10, 20))], utc=T1)
    assert names(as_one) == ["novel-1", "novel-2", "novel-3"]
    assert find(as_one, "novel-2").size == 10


def test_pieces_of_a_learned_cluster_that_is_to_be_split_find_their_ids() -> None:
    c = split(three(), "novel-1", 2, **SIGNED)
    pieces = [found(*range(3)), found(*range(3, 10))]
    assert matches(c, pieces) == (None, "novel-1")
    c = applied(observe(c, pieces, utc=T1), [1], T1)
    assert (find(c, "novel-1").state, find(c, "novel-1").size) == ("learned", 7)
    assert (find(c, "novel-4").state, find(c, "novel-4").size) == ("proposed", 3)
    assert matches(c, pieces) == ("novel-4", None)  # split, and so no more looked for


def test_learned_by_a_head_with_or_without_a_name() -> None:
    c = named(three(), "novel-3", "void", classes=CLASSES, **SIGNED)
    c = learned(c, ["novel-1", "novel-2", "novel-3"], 5, T2)
    assert [(k.state, k.head_version) for k in c.clusters] == [("learned", 2), ("learned", 5), ("named", 5)]
    assert pending(c) == ()
    assert learned(c, [], 6, T2) == c
    assert Clusters.model_validate(c.model_dump()) == c
    with pytest.raises(ConfigError, match="no cluster 'novel-9'"):
        learned(c, ["novel-9"], 5, T2)


def test_rejection_during_the_cycle_that_learned_it_waits_for_the_next() -> None:
    c = learned(rejected(three(), "novel-2", **SIGNED), ["novel-2"], 5, T2)
    assert (find(c, "novel-2").state, find(c, "novel-2").head_version) == ("rejected", 5)
    assert [d.kind for d in pending(c)] == ["reject"]
    assert Clusters.model_validate(c.model_dump()) == c


def test_applied_decisions_are_marked_once() -> None:
    c = rejected(merged(three(), "novel-2", "bridge", classes=CLASSES, **SIGNED), "novel-3", **SIGNED)
    c = applied(c, [1], T1)
    assert [d.applied_utc for d in c.decisions] == [T1, None]
    assert [d.kind for d in pending(c)] == ["reject"]
    c = applied(c, [1, 2], T2)
    assert [d.applied_utc for d in c.decisions] == [T1, T2]
    assert applied(c, [], T2) == c
    with pytest.raises(ConfigError, match="no decision has the revision 9"):
        applied(c, [2, 9], T2)


def test_identities_last_over_twenty_cycles_of_drift() -> None:
    """Ten classes; every cycle a quarter of their records is settled, as many come, and 15 % are clustered wrongly."""
    rng = np.random.default_rng(0)
    truth = {n: n % 10 for n in range(400)}
    c, first, n_right, n_all = Clusters(), {}, 0, 0
    for cycle in range(20):
        newest = 400 + 100 * cycle
        truth |= {n: n % 10 for n in range(newest, newest + 100)}
        truth = {n: kind for n, kind in truth.items() if n >= newest - 300}
        said = {n: kind if rng.random() > 0.15 else int(rng.integers(10)) for n, kind in truth.items()}
        now = [found(*(n for n in said if said[n] == kind)) for kind in rng.permutation(10).tolist()]
        c = observe(c, now, utc=T1)
        for k in c.clusters:
            members = {n for n in truth if ids(n)[0] in k.members}
            kind = max(range(10), key=lambda kind: sum(truth[n] == kind for n in members))
            n_all += 1
            n_right += first.setdefault(k.id, kind) == kind
    assert len(c.clusters) == 10
    assert n_right == n_all == 200


def test_crops_merged_into_a_learned_class_do_not_replace_its_own() -> None:
    c = merged(three(), "novel-2", "novel-1", classes=CLASSES, **SIGNED)
    after = observe(c, [found(*range(10, 17))], utc=T1)
    assert find(after, "novel-1") == find(c, "novel-1")
    assert (find(after, "novel-2").size, label_of(after, "novel-2")) == (7, "novel-1")
    assert after.next_number == c.next_number
