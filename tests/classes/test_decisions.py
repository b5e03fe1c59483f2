"""What people can say of a found class, and what is refused."""

import random

import pytest

from cluster_files import CLASSES, SIGNED, T0, T1, T2, found, three
from semwatch.classes.clusters import Clusters, find, label_of, pending
from semwatch.classes.decisions import merged, named, rejected, split
from semwatch.classes.observations import applied, learned, observe
from semwatch.errors import ConfigError


def test_nothing_can_be_said_of_nothing() -> None:
    for say in (
        lambda: named(Clusters(), "novel-1", "void", classes=(), **SIGNED),
        lambda: merged(Clusters(), "novel-1", "bridge", classes=CLASSES, **SIGNED),
        lambda: split(Clusters(), "novel-1", 2, **SIGNED),
        lambda: rejected(Clusters(), "novel-1", **SIGNED),
    ):
        with pytest.raises(ConfigError, match="no cluster 'novel-1'; there are none yet: the next cycle may find some"):
            say()


def test_learned_cluster_gets_its_name_and_code() -> None:
    before = three()
    c = named(before, "novel-1", "void", 12, classes=(*CLASSES, "novel-1"), **SIGNED)
    k = find(c, "novel-1")
    assert (k.state, k.label, k.code) == ("named", "void", 12)
    (decision,) = c.decisions
    assert (decision.revision, decision.kind, decision.cluster) == (1, "name", "novel-1")
    assert (decision.label, decision.code, decision.by, decision.utc) == ("void", 12, "ana", T1)
    assert before == three()  # pure


def test_proposed_cluster_keeps_its_name_until_it_is_learned() -> None:
    c = named(three(), "novel-2", "void", 12, classes=CLASSES, **SIGNED)
    assert (find(c, "novel-2").state, label_of(c, "novel-2")) == ("proposed", "void")
    assert [d.kind for d in pending(c)] == ["name"]
    c = learned(c, ["novel-2"], 3, T2)
    k = find(c, "novel-2")
    assert (k.state, k.label, k.code, k.head_version) == ("named", "void", 12, 3)
    assert pending(c) == ()
    assert c.decisions[0].applied_utc == T2


def test_name_can_be_mended_and_keeps_its_code() -> None:
    c = named(three(), "novel-1", "Viod", 12, classes=CLASSES, **SIGNED)
    in_service = (*CLASSES, "Viod")
    c = named(c, "Viod", "viod", classes=in_service, **SIGNED)
    c = named(c, "viod", "void", classes=in_service, **SIGNED)  # the head still has the first name
    c = named(c, "void", "viod", classes=in_service, **SIGNED)
    assert (find(c, "novel-1").label, find(c, "novel-1").code) == ("viod", 12)
    assert find(named(c, "viod", "void", 13, classes=in_service, **SIGNED), "void").code == 13


@pytest.mark.parametrize(
    ("label", "said"),
    [
        ("bridge", "there is a class 'bridge' already; .* `semwatch clusters merge novel-2 bridge`"),
        ("Bridge", "there is a class 'Bridge' already; .* `semwatch clusters merge novel-2 bridge`"),
        ("odd class", "`semwatch clusters merge novel-2 'odd class'`"),
        ("defect-free", "`semwatch clusters merge novel-2 defect-free`"),
        ("void", "`semwatch clusters merge novel-2 novel-1`"),
        ("novel-2", "begins like the machine's own; choose a word of the fab"),
        ("novel-idea", "begins like the machine's own"),
        ("unknown", "is a verdict, not a class"),
        ("", "must be a class name of 1 to 64 printable characters"),
        (" x", "must be a class name"),
        ("a\nb", "must be a class name"),
        ("x" * 65, "must be a class name"),
    ],
)
def test_unfit_label_is_refused_with_what_to_do(label, said) -> None:
    c = named(three(), "novel-1", "void", classes=CLASSES, **SIGNED)
    with pytest.raises(ConfigError, match=said):
        named(c, "novel-2", label, classes=("bridge", "particle", "odd class"), **SIGNED)


def test_merge_into_a_class_a_cluster_or_the_name_of_one() -> None:
    c = named(three(), "novel-1", "void", classes=CLASSES, **SIGNED)
    assert label_of(merged(c, "novel-2", "bridge", classes=CLASSES, **SIGNED), "novel-2") == "bridge"
    assert label_of(merged(c, "novel-2", "defect-free", classes=(), **SIGNED), "novel-2") == "defect-free"
    assert label_of(merged(c, "novel-2", "novel-3", classes=CLASSES, **SIGNED), "novel-2") == "novel-3"
    by_name = merged(c, "novel-2", "void", classes=(*CLASSES, "void"), **SIGNED)
    assert (find(by_name, "novel-2").state, find(by_name, "novel-2").merged_into) == ("merged", "novel-1")
    renamed = named(by_name, "novel-1", "pit", classes=CLASSES, **SIGNED)
    assert label_of(renamed, "novel-2") == "pit"


@pytest.mark.parametrize(
    ("cluster", "into", "said"),
    [
        ("novel-1", "novel-1", "novel-1 cannot be merged into itself"),
        ("novel-2", "brigde", "no cluster or class 'brigde' to merge into; nearest: bridge"),
        ("novel-2", "novel-9", "no cluster or class 'novel-9' to merge into; nearest: novel-"),
        ("novel-1", "novel-2", "novel-1 is learned and novel-2 is not; .* `semwatch clusters merge novel-2 novel-1`"),
    ],
)
def test_merge_that_makes_no_sense_is_refused(cluster, into, said) -> None:
    with pytest.raises(ConfigError, match=said):
        merged(three(), cluster, into, classes=(*CLASSES, "novel-1", "novel-9"), **SIGNED)


def test_learned_name_is_not_lost_in_a_nameless_cluster() -> None:
    c = named(learned(three(), ["novel-2"], 3, T0), "novel-1", "void", classes=CLASSES, **SIGNED)
    with pytest.raises(
        ConfigError, match=r"novel-1 has the name 'void' and novel-2 has none; .* merge novel-2 novel-1"
    ):
        merged(c, "void", "novel-2", classes=CLASSES, **SIGNED)


@pytest.mark.parametrize("how", ["rejected", "merged"])
def test_what_is_no_more_takes_no_decision(how) -> None:
    c = three()
    c = (
        rejected(c, "novel-2", **SIGNED)
        if how == "rejected"
        else merged(c, "novel-2", "bridge", classes=CLASSES, **SIGNED)
    )
    said = "novel-2 was rejected; nearest: novel-1, novel-3" if how == "rejected" else "was merged into bridge; decide"
    for say in (
        lambda: named(c, "novel-2", "void", classes=(), **SIGNED),
        lambda: merged(c, "novel-2", "novel-1", classes=(), **SIGNED),
        lambda: merged(c, "novel-3", "novel-2", classes=(), **SIGNED),
        lambda: split(c, "novel-2", 2, **SIGNED),
        lambda: rejected(c, "novel-2", **SIGNED),
    ):
        with pytest.raises(ConfigError, match=said):
            say()


@pytest.mark.parametrize("parts", [-1, 0, 1, 5])
def test_split_needs_two_parts_and_a_crop_each(parts) -> None:
    with pytest.raises(ConfigError, match=f"novel-3 cannot be split into {parts} parts: give 2 to 4"):
        split(three(), "novel-3", parts, **SIGNED)


def test_split_waits_once() -> None:
    c = split(three(), "novel-3", 4, **SIGNED)
    assert [(d.kind, d.parts) for d in pending(c)] == [("split", 4)]
    with pytest.raises(ConfigError, match="novel-3 is to be split already"):
        split(c, "novel-3", 2, **SIGNED)
    assert len(split(applied(c, [1], T2), "novel-3", 2, **SIGNED).decisions) == 2


def test_names_and_splits_of_what_is_no_more_are_void() -> None:
    c = split(named(three(), "novel-2", "void", classes=(), **SIGNED), "novel-2", 2, **SIGNED)
    c = rejected(c, "novel-2", **SIGNED)
    assert [d.kind for d in pending(c)] == ["reject"]
    assert pending(applied(c, [3], T2)) == ()


def _one_step(dice: random.Random, c: Clusters, step: int) -> Clusters:
    """Anything that may happen next, to one of the newest dozen clusters."""
    name, other = (f"novel-{max(1, c.next_number - dice.randrange(1, 13))}" for _ in range(2))
    into = dice.choice([other, "bridge", "name 3"])
    some = [found(*(step // 4 + 4 * group + i for i in range(4))) for group in dice.sample(range(12), 3)]
    happens = dice.choice(
        [
            lambda: named(c, name, f"name {dice.randrange(9)}", classes=CLASSES, **SIGNED),
            lambda: merged(c, name, into, classes=CLASSES, **SIGNED),
            lambda: split(c, name, dice.randrange(1, 4), **SIGNED),
            lambda: rejected(c, name, **SIGNED),
            lambda: applied(c, [d.revision for d in pending(c)][:2], T2),
            lambda: learned(c, [name], 1 + step, T2),
            lambda: observe(c, some, utc=T2),
        ]
    )
    return happens()


def test_any_story_of_cycles_and_decisions_leaves_a_file_that_holds_together() -> None:
    """1,000 random steps: what is accepted is valid, what is refused is a ConfigError, and no number comes twice."""
    dice, c, n_refused, numbers = random.Random(0), Clusters(), 0, set[str]()
    for step in range(1000):
        before = {k.id for k in c.clusters}
        try:
            c = _one_step(dice, c, step)
        except ConfigError:
            n_refused += 1
        born = {k.id for k in c.clusters} - before
        assert not born & numbers
        numbers |= born
        assert Clusters.model_validate(c.model_dump()) == c
    assert n_refused > 100
    assert len(c.decisions) > 100
    assert {k.state for k in c.clusters} == {"proposed", "learned", "named", "rejected", "merged"}
