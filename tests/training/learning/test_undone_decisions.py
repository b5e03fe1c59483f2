"""Steps that are taken back before a head has applied them, and after; through rollbacks and crashes."""

import pytest

from cycles import LARGE, N, add_two, cycle_dies
from learning_site import Lab
from semwatch.classes import clusters
from semwatch.models import choice
from semwatch.operations import decide
from semwatch_training.learning import retrain
from semwatch_training.learning.retrain import run_cycle


def kinds_that_wait(lab: Lab) -> list[str]:
    return [d.kind for d in clusters.pending(lab.found())]


def test_name_goes_from_the_head_in_service_at_once(learned: Lab) -> None:
    decide.name(learned.site, "novel-1", "pit", 71)
    assert (learned.version, learned.meta.codes) == (3, {"pit": 71})
    done = decide.undo(learned.site)
    assert (done.head_version, learned.labels, learned.meta.codes) == (
        4, ("bridge", "defect-free", "novel-1", "novel-2", "particle"), {}
    )  # fmt: skip
    assert (learned.clusters()["novel-1"], kinds_that_wait(learned)) == (("learned", "novel-1"), [])
    assert len(learned.learned_ids("novel-1")) == 24


def test_merge_of_two_classes_that_a_head_has_applied_is_two_classes_again(learned: Lab) -> None:
    before = sorted(learned.learned_ids("novel-1"))
    decide.merge(learned.site, "novel-1", "particle")
    assert run_cycle(learned.site).status == "learned"
    assert "novel-1" not in learned.labels
    decide.undo(learned.site, "novel-1")
    assert run_cycle(learned.site).status == "learned"  # they leave the wrong class
    assert learned.learned_ids("particle") == []
    assert run_cycle(learned.site).status == "learned"  # and are one of their own again
    assert sorted(learned.learned_ids("novel-1")) == before
    assert (learned.clusters()["novel-1"], kinds_that_wait(learned)) == (("learned", "novel-1"), [])
    assert learned.states() == {"learned": N}
    assert run_cycle(learned.site).status == "too few"


def test_rejection_that_a_head_has_applied_brings_the_class_back_with_the_next_cycle(learned: Lab) -> None:
    decide.reject(learned.site, "novel-1")
    assert run_cycle(learned.site).status == "learned"
    learned.add([*learned.blob(LARGE, 20, first=70_000), *learned.blob(7, 30)])
    run_cycle(learned.site)
    assert learned.states() == {"learned": 50, "rejected": 44}  # what looks like it went along
    decide.undo(learned.site, "novel-1")
    assert run_cycle(learned.site).status == "learned"
    assert len(learned.learned_ids("novel-1")) >= 24
    assert (learned.clusters()["novel-1"], kinds_that_wait(learned)) == (("learned", "novel-1"), [])
    assert learned.states().get("rejected", 0) == 0


def test_rejected_proposal_is_a_proposal_again(lab: Lab) -> None:
    lab.recipe(promotion={"min_cycles": 9, "max_unknown_rate": 0.3})
    add_two(lab)
    run_cycle(lab.site)
    decide.reject(lab.site, "novel-1")
    run_cycle(lab.site)
    assert lab.states()["rejected"] == 24
    decide.undo(lab.site)
    run_cycle(lab.site)
    assert (lab.states(), lab.clusters()["novel-1"][0]) == ({"waiting": N}, "proposed")
    assert sorted(clusters.find(lab.found(), "novel-1").members) == [r.id for r in lab.blob(LARGE, 24)]


def test_steps_that_no_cycle_has_seen_leave_no_trace(learned: Lab) -> None:
    for step in (
        lambda: decide.merge(learned.site, "novel-1", "particle"),
        lambda: decide.reject(learned.site, "novel-2"),
        lambda: decide.split(learned.site, "novel-1", 2),
    ):
        step()
        decide.undo(learned.site)
        assert kinds_that_wait(learned) == []
    assert run_cycle(learned.site).status == "too few"
    assert (learned.version, {state for state, _ in learned.clusters().values()}) == (2, {"learned"})


def test_undone_merge_whose_head_is_rolled_back_stays_undone(learned: Lab) -> None:
    decide.merge(learned.site, "novel-1", "particle")
    assert run_cycle(learned.site).status == "learned"
    decide.undo(learned.site)
    choice.roll_back(learned.repository, "head", "a test")  # the head before the merge serves again
    run_cycle(learned.site)
    assert learned.clusters()["novel-1"] == ("learned", "novel-1")
    assert (len(learned.learned_ids("novel-1")), learned.learned_ids("particle")) == (24, [])
    assert learned.states() == {"learned": N}


def test_undo_whose_head_is_rolled_back_is_made_again(learned: Lab) -> None:
    decide.merge(learned.site, "novel-1", "particle")
    assert run_cycle(learned.site).status == "learned"
    decide.undo(learned.site)
    assert run_cycle(learned.site).status == "learned"
    choice.roll_back(learned.repository, "head", "a test")  # the head with the merge serves again
    for _ in range(2):
        run_cycle(learned.site)
    assert learned.learned_ids("particle") == []
    assert learned.clusters()["novel-1"] == ("learned", "novel-1")
    assert learned.states() == {"learned": N}


@pytest.mark.parametrize("step", ["publish_head", "_serves"])
def test_cycle_that_dies_over_an_undone_merge_loses_and_doubles_nothing(learned: Lab, monkeypatch, step: str) -> None:
    decide.merge(learned.site, "novel-1", "particle")
    assert run_cycle(learned.site).status == "learned"
    decide.undo(learned.site)
    cycle_dies(learned, monkeypatch, retrain, step)
    for _ in range(3):
        run_cycle(learned.site)
    assert (len(learned.learned_ids("novel-1")), learned.learned_ids("particle")) == (24, [])
    assert learned.states() == {"learned": N}
    assert kinds_that_wait(learned) == []
