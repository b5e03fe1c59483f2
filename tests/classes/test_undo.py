"""A step of a person is taken back: what comes back, what does not, and what is refused."""

import pytest

from cluster_files import CLASSES, SIGNED, T0, T1, T2, found, ids, three
from semwatch.classes.clusters import Clusters, as_json, find, in_force, label_of, parsed, pending, removed_from
from semwatch.classes.decisions import merged, named, rejected, removed, split, undone
from semwatch.classes.observations import applied, learned, observe, rolled_back
from semwatch.errors import ConfigError

IN_SERVICE = (*CLASSES, "novel-1")


def back(c: Clusters, name: str | None = None, classes: tuple[str, ...] = IN_SERVICE) -> Clusters:
    after = undone(c, name, classes=classes, by="bo", utc=T2)
    assert parsed(as_json(after), "test") == after  # it makes sense, and goes over the wire
    assert after.decisions[:-1] == c.decisions  # nothing is deleted
    assert (after.decisions[-1].kind, after.decisions[-1].by) == ("undo", "bo")
    return after


def test_nothing_decided_is_nothing_to_undo() -> None:
    with pytest.raises(ConfigError, match="nobody has decided anything: nothing to undo"):
        back(three())
    c = named(three(), "novel-1", "void", classes=IN_SERVICE, **SIGNED)
    with pytest.raises(ConfigError, match="nobody has decided anything about novel-2"):
        back(c, "novel-2")


def test_names_go_back_one_by_one_with_their_codes() -> None:
    c = named(three(), "novel-1", "viod", 12, classes=IN_SERVICE, **SIGNED)
    c = named(c, "viod", "void", 13, classes=(*CLASSES, "viod"), **SIGNED)
    c = back(c, "void", (*CLASSES, "void"))
    k = find(c, "novel-1")
    assert (k.state, k.label, k.code) == ("named", "viod", 12)
    c = back(c, "novel-1", (*CLASSES, "viod"))
    k = find(c, "novel-1")
    assert (k.state, k.label, k.code) == ("learned", "novel-1", None)
    assert in_force(c) == ()
    with pytest.raises(ConfigError, match="nothing to undo"):
        back(c)


def test_name_of_a_proposed_cluster_goes_back_at_once_and_nothing_waits() -> None:
    c = back(named(three(), "novel-2", "void", classes=IN_SERVICE, **SIGNED))
    assert (find(c, "novel-2").state, find(c, "novel-2").label) == ("proposed", "novel-2")
    assert pending(c) == ()
    assert find(learned(c, ["novel-2"], 3, T2), "novel-2").state == "learned"


@pytest.mark.parametrize("into", ["novel-1", "bridge"])
@pytest.mark.parametrize("name", ["novel-2", "novel-3"])
def test_merge_that_waits_is_as_if_it_had_never_been(name: str, into: str) -> None:
    c = back(merged(three(), name, into, classes=IN_SERVICE, **SIGNED))
    assert c.clusters == three().clusters
    assert pending(c) == ()
    assert label_of(c, name) == name


def test_merge_that_a_head_has_applied_comes_back_as_a_proposal_and_the_cycle_has_work() -> None:
    c = applied(merged(three(), "novel-1", "bridge", classes=IN_SERVICE, **SIGNED), [1], T1)
    c = back(c, classes=CLASSES)
    k = find(c, "novel-1")
    assert (k.state, k.head_version, k.merged_into) == ("proposed", None, None)
    assert [d.kind for d in pending(c)] == ["undo"]


def test_rejection_goes_back_to_what_the_head_in_service_knows() -> None:
    rejected_1 = rejected(three(), "novel-1", **SIGNED)
    assert back(rejected_1).clusters == three().clusters
    assert find(back(rejected_1, classes=CLASSES), "novel-1").state == "proposed"  # rolled back meanwhile
    assert back(rejected(three(), "novel-2", **SIGNED)).clusters == three().clusters


def test_the_last_step_of_all_goes_first() -> None:
    c = rejected(named(three(), "novel-2", "void", classes=IN_SERVICE, **SIGNED), "novel-3", **SIGNED)
    c = back(back(c))
    assert [d.undoes for d in c.decisions] == [None, None, 2, 1]
    assert c.clusters == three().clusters


def test_merge_into_what_was_rejected_or_split_since_is_refused_with_the_way() -> None:
    c = merged(three(), "novel-3", "novel-2", classes=IN_SERVICE, **SIGNED)
    for later, word in ((rejected(c, "novel-2", **SIGNED), "rejected"), (split(c, "novel-2", 2, **SIGNED), "split")):
        with pytest.raises(
            ConfigError, match=rf"novel-2 was {word} since \(revision 2\).*clusters undo novel-2` first"
        ):
            back(later, "novel-3")
        assert find(back(back(later, "novel-2"), "novel-3"), "novel-3") == find(three(), "novel-3")


def test_name_that_another_class_has_meanwhile_is_refused() -> None:
    c = named(three(), "novel-2", "void", classes=IN_SERVICE, **SIGNED)
    c = applied(rejected(c, "novel-2", **SIGNED), [2], T1)
    c = named(c, "novel-3", "Void", classes=IN_SERVICE, **SIGNED)
    with pytest.raises(ConfigError, match="novel-2 was called 'void', which is novel-3 now"):
        back(c, "novel-2")


def test_split_goes_back_while_it_waits_and_is_refused_afterwards() -> None:
    c = split(three(), "novel-1", 2, **SIGNED)
    assert pending(back(c)) == ()
    with pytest.raises(ConfigError, match="the parts of novel-1 are classes already"):
        back(applied(c, [1], T1))


def test_crops_that_were_taken_out_may_come_back() -> None:
    c = removed(three(), "novel-1", [ids(0)[0], ids(1)[0]], **SIGNED)
    assert removed_from(c, "novel-1") == set(ids(0, 1))
    c = back(c)
    assert removed_from(c, "novel-1") == set()
    assert (set(find(c, "novel-1").members), find(c, "novel-1").size) == (set(ids(*range(10))), 10)


def test_cluster_on_hold_is_on_hold_again() -> None:
    """Whoever rolled its head back did not want it: a step that was taken back is no word for it."""
    c = rolled_back(three(), ["novel-1"], [])
    assert find(c, "novel-1").on_hold
    for step in (
        lambda c: named(c, "novel-1", "void", classes=CLASSES, **SIGNED),
        lambda c: merged(c, "novel-1", "bridge", classes=CLASSES, **SIGNED),
        lambda c: merged(c, "novel-2", "novel-1", classes=CLASSES, **SIGNED),
        lambda c: split(c, "novel-1", 2, **SIGNED),
    ):
        assert not find(step(c), "novel-1").on_hold
        assert find(back(step(c), classes=CLASSES), "novel-1").on_hold


def test_crops_that_came_to_a_proposal_by_a_merge_leave_it() -> None:
    c = merged(three(), "novel-3", "novel-2", classes=IN_SERVICE, **SIGNED)
    c = observe(c, [found(*range(10, 16)), found(*range(16, 20))], utc=T1)
    assert len(find(c, "novel-2").members) == 10
    c = back(c)
    assert (set(find(c, "novel-2").members), find(c, "novel-2").size) == (set(ids(*range(10, 16))), 6)
    assert set(find(c, "novel-3").members) == set(ids(*range(16, 20)))


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"undoes": 7}, "undoes 7, which is no earlier decision about novel-2"),
        ({"undoes": 2}, "undoes 2, which is no earlier decision"),
        ({"cluster": "novel-3"}, "undoes 1, which is no earlier decision about novel-3"),
        ({"undoes": None}, "is a undo with nothing"),
    ],
)
def test_state_edited_by_hand_into_nonsense_is_refused(change: dict[str, object], fault: str) -> None:
    c = back(rejected(three(), "novel-2", **SIGNED))
    decision = c.decisions[-1].model_copy(update=change)
    with pytest.raises(ConfigError, match=fault):
        as_json(c.model_copy(update={"decisions": (*c.decisions[:-1], decision)}))


def test_state_of_an_older_release_is_read() -> None:
    text = as_json(rejected(three(), "novel-2", **SIGNED)).decode()
    old = text.replace(',\n   "undoes": null,\n   "held": [],\n   "was": "proposed"', "")
    assert old != text
    assert find(back(parsed(old.encode(), "old")), "novel-2").state == "proposed"


def test_time_of_a_state_is_kept() -> None:
    assert find(back(rejected(three(), "novel-2", **SIGNED)), "novel-2").first_seen_utc == T0
