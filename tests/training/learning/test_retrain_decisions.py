"""What people decide about classes, before a cycle, while it runs, and after it."""

import json
from collections.abc import Callable

import pytest

from commands import Command
from cycles import LARGE, SMALL, N, add_two, after, cycle_dies
from learning_site import Lab
from semwatch.classes import clusters
from semwatch.errors import ConfigError
from semwatch.models import choice, head_bank
from semwatch_training.learning import retrain
from semwatch_training.learning.retrain import run_cycle


@pytest.fixture
def say(semwatch: Command) -> Callable[..., None]:
    """What a person says of a cluster, by the command."""

    def say(lab: Lab, *argv: object) -> None:
        result = semwatch("clusters", *argv, "--site", lab.file)
        assert result.code == 0, result.words

    return say


def waiting_decisions(lab: Lab) -> list[str]:
    return [d.kind for d in clusters.pending(lab.found())]


def test_name_given_before_the_class_is_learned_waits_for_it_and_brings_its_code(lab: Lab, say) -> None:
    lab.recipe(promotion={"min_cycles": 2, "max_unknown_rate": 0.3})
    add_two(lab)
    assert run_cycle(lab.site).status == "nothing new"
    say(lab, "name", "novel-1", "pit", "--code", 71)
    assert (lab.version, waiting_decisions(lab)) == (1, ["name"])
    assert run_cycle(lab.site).sentence == "head 2 serves and knows pit (24 crops), novel-2 (20 crops)"
    assert lab.labels == ("bridge", "defect-free", "novel-2", "particle", "pit")
    assert lab.meta.codes == {"pit": 71}
    assert lab.clusters()["novel-1"] == ("named", "pit")
    assert waiting_decisions(lab) == []


def test_name_given_after_the_class_is_learned_stays_through_later_cycles(learned: Lab, say) -> None:
    say(learned, "name", "novel-1", "pit", "--code", 71)
    assert (learned.version, waiting_decisions(learned)) == (3, [])
    assert run_cycle(learned.site).status == "too few"
    assert learned.version == 3
    learned.add(learned.blob(7, 30))
    assert run_cycle(learned.site).head_version == 4
    assert learned.labels == ("bridge", "defect-free", "novel-2", "novel-3", "particle", "pit")
    assert (len(learned.learned_ids("pit")), learned.meta.codes) == (24, {"pit": 71})
    assert len(learned.audit_lines()) == 2  # one for each cycle; the name is no cycle


def test_name_given_while_a_cycle_runs_is_on_the_head_that_it_publishes(learned: Lab, say, monkeypatch) -> None:
    learned.add(learned.blob(7, 30))
    after(monkeypatch, retrain, "fit_head", lambda: say(learned, "name", "novel-2", "scratch"))
    assert run_cycle(learned.site).head_version == 4  # head 3 is head 2 with the name
    assert learned.labels == ("bridge", "defect-free", "novel-1", "novel-3", "particle", "scratch")
    assert len(learned.learned_ids("scratch")) == 20
    assert (waiting_decisions(learned), len(learned.audit_lines())) == ([], 2)


def test_merge_into_a_known_class_is_applied_without_a_single_unknown(learned: Lab, say) -> None:
    say(learned, "merge", "novel-1", "particle")
    assert run_cycle(learned.site).sentence == "head 3 serves and applies what people decided"
    assert learned.labels == ("bridge", "defect-free", "novel-2", "particle")
    assert (len(learned.learned_ids("particle")), waiting_decisions(learned)) == (24, [])
    assert json.loads(learned.audit_lines()[-1])["decisions"] == [learned.found().decisions[0].revision]
    assert run_cycle(learned.site).status == "too few"
    assert learned.versions() == [1, 2, 3]


def test_two_learned_classes_are_merged_and_split_again(learned: Lab, say) -> None:
    say(learned, "merge", "novel-2", "novel-1")
    assert run_cycle(learned.site).status == "learned"
    assert learned.labels == ("bridge", "defect-free", "novel-1", "particle")
    assert len(learned.learned_ids("novel-1")) == N
    proof = {id_ for id_ in learned.bank(head_bank.GOLDEN).ids if id_}
    say(learned, "split", "novel-1", "--parts", 2)
    assert run_cycle(learned.site).status == "learned"
    assert learned.labels == ("bridge", "defect-free", "novel-1", "novel-3", "particle")
    assert sorted(learned.learned_ids("novel-1")) == [r.id for r in learned.blob(LARGE, 24)]
    assert sorted(learned.learned_ids("novel-3")) == [r.id for r in learned.blob(SMALL, 20)]
    assert {id_ for id_ in learned.bank(head_bank.GOLDEN).ids if id_} == proof  # what was proof stays proof
    assert waiting_decisions(learned) == []
    assert run_cycle(learned.site).status == "too few"


def test_split_is_not_repeated_after_a_crash(learned: Lab, say, monkeypatch) -> None:
    say(learned, "split", "novel-1", "--parts", 2)
    cycle_dies(learned, monkeypatch, retrain, "publish_head")
    labels = learned.labels
    assert len(labels) == 6
    assert run_cycle(learned.site).status == "too few"
    assert (learned.version, learned.labels, waiting_decisions(learned)) == (3, labels, [])
    assert len(learned.learned_ids()) == len(set(learned.learned_ids())) == N
    assert {state for state, _ in learned.clusters().values()} == {"learned"}
    assert len(learned.audit_lines()) == 2


def test_split_that_cannot_be_made_stops_nothing_and_waits(learned: Lab, say, caplog) -> None:
    say(learned, "split", "novel-2", "--parts", 10)
    assert run_cycle(learned.site).status == "too few"
    assert "novel-2 stays whole for now" in caplog.text
    assert "too few for 10 parts" in caplog.text
    learned.add(learned.blob(7, 30))
    assert run_cycle(learned.site).status == "learned"
    assert (len(learned.learned_ids("novel-2")), waiting_decisions(learned)) == (20, ["split"])


def test_rejected_class_is_forgotten_and_what_looks_like_it_is_not_proposed_again(learned: Lab, say) -> None:
    say(learned, "reject", "novel-1")
    assert run_cycle(learned.site).status == "learned"
    assert learned.labels == ("bridge", "defect-free", "novel-2", "particle")
    assert (waiting_decisions(learned), learned.states()) == ([], {"learned": 20, "rejected": 24})
    learned.add([*learned.blob(LARGE, 20, first=70_000), *learned.blob(7, 30)])
    assert run_cycle(learned.site).sentence == "head 4 serves and knows novel-3 (30 crops)"
    assert learned.states() == {"learned": 50, "rejected": 44}
    assert learned.n_waiting() == 0
    assert learned.clusters()["novel-1"] == ("rejected", "novel-1")


def test_rejected_proposal_leaves_the_queue_and_what_looks_like_it_is_not_proposed_again(lab: Lab, say) -> None:
    lab.recipe(promotion={"min_cycles": 9, "max_unknown_rate": 0.3})
    add_two(lab)
    assert run_cycle(lab.site).status == "nothing new"
    say(lab, "reject", "novel-1")
    assert run_cycle(lab.site).sentence == "20 unknowns wait, 30 are needed: nothing was learned"
    assert (waiting_decisions(lab), lab.states(), lab.n_waiting()) == ([], {"rejected": 24, "waiting": 20}, 20)
    lab.add(lab.blob(LARGE, 20, first=70_000))
    assert run_cycle(lab.site).status == "nothing new"
    assert (lab.states(), lab.n_waiting()) == ({"rejected": 44, "waiting": 20}, 20)
    assert lab.clusters() == {"novel-1": ("rejected", "novel-1"), "novel-2": ("proposed", "novel-2")}


@pytest.mark.parametrize("into", ["particle", "novel-1"])
def test_proposal_that_a_person_merges_is_learned_though_too_few_wait(learned: Lab, say, into: str) -> None:
    learned.recipe(promotion={"min_cycles": 9, "max_unknown_rate": 0.3})
    learned.add([*learned.blob(7, 20), *learned.blob(1, 10)])
    assert run_cycle(learned.site).status == "nothing new"
    n_before = len(learned.learned_ids(into))
    say(learned, "merge", "novel-3", into)
    learned.change(learning={"min_unknowns": 500})
    assert run_cycle(learned.site).sentence == f"head 3 serves and knows {into} (20 crops)"
    assert len(learned.learned_ids(into)) == n_before + 20
    assert (learned.n_waiting(), waiting_decisions(learned)) == (10, [])
    assert run_cycle(learned.site).status == "too few"


def test_proposal_that_a_person_splits_is_learned_in_parts(lab: Lab, say) -> None:
    lab.recipe(promotion={"min_cycles": 9, "max_unknown_rate": 0.3})
    add_two(lab)
    assert run_cycle(lab.site).status == "nothing new"
    say(lab, "split", "novel-1", "--parts", 2)
    assert run_cycle(lab.site).status == "learned"
    states = lab.clusters()
    assert [states[id_][0] for id_ in ("novel-1", "novel-2", "novel-3")] == ["learned", "proposed", "learned"]
    assert len(lab.learned_ids("novel-1")) + len(lab.learned_ids("novel-3")) == 24
    assert (waiting_decisions(lab), lab.n_waiting()) == ([], 20)


def test_two_proposals_that_a_person_merges_meet_the_bars_together(lab: Lab, say) -> None:
    lab.recipe(promotion={"min_cluster_size": 30, "max_unknown_rate": 0.3})
    add_two(lab)
    assert run_cycle(lab.site).status == "nothing new"
    say(lab, "merge", "novel-2", "novel-1")
    assert run_cycle(lab.site).sentence == "head 2 serves and knows novel-1 (44 crops)"
    assert (len(lab.learned_ids("novel-1")), waiting_decisions(lab)) == (N, [])


def test_name_and_merge_of_the_same_minute_as_a_cycle_are_both_applied_in_the_end(
    learned: Lab, say, monkeypatch
) -> None:
    learned.add(learned.blob(7, 30))

    def speak() -> None:
        say(learned, "name", "novel-1", "pit")
        say(learned, "merge", "novel-2", "particle")

    with monkeypatch.context() as patch:
        after(patch, retrain, "fit_head", speak)
        assert run_cycle(learned.site).head_version == 4
    assert learned.labels == ("bridge", "defect-free", "novel-2", "novel-3", "particle", "pit")
    assert waiting_decisions(learned) == ["merge"]
    assert run_cycle(learned.site).head_version == 5
    assert learned.labels == ("bridge", "defect-free", "novel-3", "particle", "pit")
    assert waiting_decisions(learned) == []


def test_class_that_is_merged_while_it_is_learned_is_merged_by_the_next_cycle(lab: Lab, say, monkeypatch) -> None:
    add_two(lab)
    with monkeypatch.context() as patch:
        after(patch, retrain, "fit_head", lambda: say(lab, "merge", "novel-1", "bridge"))
        assert run_cycle(lab.site).status == "learned"
    assert (lab.clusters()["novel-1"][0], waiting_decisions(lab)) == ("merged", ["merge"])
    assert run_cycle(lab.site).status == "learned"
    assert (lab.labels, waiting_decisions(lab)) == (("bridge", "defect-free", "novel-2", "particle"), [])
    assert len(lab.learned_ids("bridge")) == 24


def test_damaged_state_stops_the_cycle_with_its_fault_where_redis_has_none(learned: Lab) -> None:
    assert learned.found().revision == 2  # Redis has it again
    path = learned.learning / clusters.FILE
    damaged = path.read_text().replace('"learned"', '"loved"', 1)
    path.write_text(damaged)
    assert run_cycle(learned.site).status == "too few"  # Redis has it
    path.write_text(damaged)
    learned.client.delete("semwatch:classes")
    learned.add(learned.blob(7, 30))
    with pytest.raises(ConfigError, match=r"clusters\.json: clusters\[0\]\.state"):
        run_cycle(learned.site)
    assert len(learned.claimable()) == 30


def test_merge_after_a_rollback_is_learned(learned: Lab, say) -> None:
    """88 crops stayed `learned` for ever: no head knew them, and none learned them."""
    choice.roll_back(learned.repository, "head", "calls pits bridges")
    say(learned, "merge", "novel-1", "particle")
    assert run_cycle(learned.site).sentence == "head 3 serves and knows particle (24 crops)"
    assert sorted(learned.learned_ids("particle")) == sorted(r.id for r in learned.blob(LARGE, 24))
    assert waiting_decisions(learned) == []
    assert learned.states() == {"learned": 24, "waiting": 20}
    assert learned.n_waiting() == 20


def test_class_that_was_rolled_back_is_learned_again_once_a_person_has_decided(learned: Lab, say) -> None:
    choice.roll_back(learned.repository, "head", "calls pits bridges")
    learned.change(learning={"forget_days": 0.5})  # they wait for a person, however old they are
    first = run_cycle(learned.site)
    assert first.status == "nothing new"
    assert "the head that knew it was rolled back, and nobody has decided about it since" in first.sentence
    assert learned.states() == {"waiting": N}
    assert learned.clusters() == {"novel-1": ("proposed", "novel-1"), "novel-2": ("proposed", "novel-2")}
    say(learned, "name", "novel-1", "pit")
    assert run_cycle(learned.site).sentence == "head 3 serves and knows pit (24 crops)"
    assert learned.clusters() == {"novel-1": ("named", "pit"), "novel-2": ("proposed", "novel-2")}
    assert run_cycle(learned.site).status == "too few"
    assert learned.states() == {"learned": 24, "waiting": 20}


def test_crops_that_are_taken_out_leave_the_class_and_wait_for_another(learned: Lab, say, monkeypatch) -> None:
    gone = learned.learned_ids("novel-1")[:9]
    say(learned, "remove", "novel-1", *(id_[-6:].rjust(32, "0") for id_ in gone))
    cycle_dies(learned, monkeypatch, retrain, "publish_head")  # before the crops wait again
    assert run_cycle(learned.site).status == "too few"
    assert (learned.version, len(learned.learned_ids("novel-1")), waiting_decisions(learned)) == (3, 15, [])
    assert (learned.states(), learned.n_waiting()) == ({"learned": 35, "waiting": 9}, 9)
    learned.add(learned.blob(LARGE, 30, first=80_000))
    assert run_cycle(learned.site).status == "nothing new"  # all look like novel-1, and these are none of its crops
    assert set(gone).isdisjoint(learned.learned_ids())
