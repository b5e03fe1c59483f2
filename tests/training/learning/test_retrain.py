"""The learning cycle, whole: real Redis, real files, real networks; what it does and what it refuses."""

import fcntl
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import yaml

import commands
from commands import Command, in_process
from cycles import KNOWN, LARGE, SMALL, STRICT, N, add_two, after, assert_learned, republish
from daemon import Daemon
from daemon import Site as DaemonSite
from learning_site import Lab, notes_of
from semwatch.errors import ConfigError, ModelMismatch, PublishError, ServiceUnavailable
from semwatch.line.classification import decide
from semwatch.models import choice, head_bank, model_repository
from semwatch.models.inference import Embedded
from semwatch.settings.recipe import UnknownRule
from semwatch.store import serving
from semwatch_training.__main__ import main
from semwatch_training.discovery.head import load_head
from semwatch_training.learning import cycle_report, retrain
from semwatch_training.learning.archive import ARCHIVE, Archive
from semwatch_training.learning.refit import refit
from semwatch_training.learning.retrain import Outcome, run_cycle

# --- nothing to learn ------------------------------------------------------------------------------------------------


def test_empty_queue_is_one_line_and_nothing_else(lab: Lab) -> None:
    outcome = run_cycle(lab.site)
    assert (outcome.status, outcome.report) == ("too few", None)
    assert outcome.sentence == "0 unknowns wait, 30 are needed: nothing was learned"
    assert lab.versions() == [1]


def test_too_few_unknowns_go_back_untouched_however_often(lab: Lab) -> None:
    lab.add(lab.blob(LARGE, 29))
    for _ in range(3):
        assert run_cycle(lab.site).sentence == "29 unknowns wait, 30 are needed: nothing was learned"
    claimable = lab.claimable()
    assert (len(claimable), set(claimable.values())) == (29, {1})
    assert lab.states() == {"waiting": 29}


def test_unknowns_that_look_like_known_classes_are_nothing_new_and_stay(lab: Lab) -> None:
    lab.add([*lab.blob(0, 20), *lab.blob(1, 20)])
    outcome = run_cycle(lab.site)
    assert outcome.status == "nothing new"
    assert outcome.report is not None
    assert cycle_report.read(outcome.report).outcome == "nothing-new"
    claimable = lab.claimable()
    assert (len(claimable), set(claimable.values())) == (40, {1})
    assert lab.versions() == [1]


def test_class_below_the_recipes_bars_is_proposed_with_the_reason_and_keeps_its_identity(lab: Lab) -> None:
    lab.recipe(promotion={"min_cycles": 3, "max_unknown_rate": 0.3})
    add_two(lab)
    sentences = [run_cycle(lab.site).sentence for _ in range(2)]
    assert "novel-1 recipe test: was seen in 2 cycles; the recipe asks for 3" in sentences[1]
    assert lab.clusters() == {"novel-1": ("proposed", "novel-1"), "novel-2": ("proposed", "novel-2")}
    assert len(lab.claimable()) == N
    assert run_cycle(lab.site).status == "learned"
    assert_learned(lab)


def test_second_cycle_at_the_same_time_says_so_and_leaves_the_first_alone(lab: Lab, monkeypatch) -> None:
    add_two(lab)
    second: list[Outcome] = []
    after(monkeypatch, retrain, "fit_head", lambda: second.append(run_cycle(lab.site)))
    assert run_cycle(lab.site).status == "learned"
    assert [outcome.status for outcome in second] == ["busy"]
    assert_learned(lab)


# --- learned ---------------------------------------------------------------------------------------------------------


def test_two_classes_are_learned_and_everybody_is_told(lab: Lab) -> None:
    add_two(lab)
    outcome = run_cycle(lab.site)
    assert outcome.status == "learned"
    assert outcome.head_version == 2
    assert outcome.sentence == "head 2 serves and knows novel-1 (24 crops), novel-2 (20 crops)"
    assert_learned(lab)
    golden = lab.bank(head_bank.GOLDEN)
    assert [golden.labels.count(f"novel-{i}") for i in (1, 2)] == [24 // 5, 20 // 5]
    assert not set(golden.ids) & set(lab.bank().ids) - {""}
    assert outcome.report is not None
    report = cycle_report.read(outcome.report)
    assert (report.outcome, report.version, report.n_claimed, report.n_learned) == ("published", 2, N, N)
    assert {path.name for path in outcome.report.iterdir()} >= {"report.md", "novel-1.png", "novel-2.png"}
    for cluster in lab.found().clusters:
        assert (cluster.head_version, len(cluster.examples)) == (2, 12)
        examples = lab.handoff().examples(cluster.id)
        assert set(examples) == set(cluster.examples)
        assert all(png.startswith(b"\x89PNG") for png in examples.values())
    ended = lab.handoff().last_cycle()
    assert ended is not None
    assert (ended.outcome, ended.version, ended.reasons) == ("published", 2, ())
    assert ended.unknowns["learned"] == N
    with Archive(lab.learning / ARCHIVE, read_only=True) as archive:
        assert set(notes_of(archive, lab.learned_ids("novel-2")).values()) == {"novel-2, head 2"}


def test_new_head_names_what_the_old_one_called_unknown(learned: Lab) -> None:
    shown = np.stack([record.features for record in learned.blob(SMALL, 20, first=99_000)])
    verdicts = []
    for version in (1, 2):
        with Embedded(learned.repository, pins={"head": version}, models=("encoder", "head")) as models:
            answer = models.infer("head", {"features": shown})
        rows = zip(answer.outputs["logits"], answer.outputs["p_values"], strict=True)
        verdicts.append([decide(*row, answer.meta.labels, UnknownRule()) for row in rows])
    assert sum(verdict.kind == "unknown" for verdict in verdicts[0]) >= 18
    assert sum(verdict.label == "novel-2" for verdict in verdicts[1]) >= 15


def test_later_cycle_adds_to_what_an_earlier_one_learned(learned: Lab) -> None:
    learned.add(learned.blob(7, 30))
    assert run_cycle(learned.site).sentence == "head 3 serves and knows novel-3 (30 crops)"
    assert learned.labels == ("bridge", "defect-free", "novel-1", "novel-2", "novel-3", "particle")
    assert len(set(learned.learned_ids())) == len(learned.learned_ids()) == N + 30
    assert learned.meta.provenance["parent"] == 2
    assert len(learned.audit_lines()) == 2


def test_wish_of_the_drift_watch_lets_ten_unknowns_suffice(lab: Lab) -> None:
    lab.wish("the unknown rate rose")
    lab.recipe(promotion={"min_cluster_size": 5, "max_unknown_rate": 0.3})
    lab.add(lab.blob(LARGE, 9))
    assert run_cycle(lab.site).sentence == "9 unknowns wait, 10 are needed: nothing was learned"
    assert lab.wishes()
    lab.add(lab.blob(LARGE, 1, first=9_000))
    assert run_cycle(lab.site).status == "learned"
    assert not lab.wishes()


def test_wish_that_comes_while_a_cycle_runs_stays_for_the_next(lab: Lab, monkeypatch) -> None:
    add_two(lab)
    lab.wish("the unknown rate rose")
    after(monkeypatch, retrain, "fit_head", lambda: lab.wish("the class mix changed"))
    assert run_cycle(lab.site).status == "learned"
    assert lab.wishes() == ["the class mix changed"]


def test_old_versions_go_by_the_sites_rule(lab: Lab) -> None:
    lab.change(learning={"keep_versions": 2})
    for _ in range(3):
        republish(lab)
    add_two(lab)
    assert run_cycle(lab.site).head_version == 5
    assert lab.versions() == [4, 5]


# --- refused ---------------------------------------------------------------------------------------------------------


def assert_untouched(lab: Lab, n_versions: int = 1) -> None:
    """The old head serves, and all unknowns wait as if nothing had been."""
    assert lab.version == 1
    assert lab.versions() == list(range(1, n_versions + 1))
    assert lab.labels == KNOWN
    claimable = lab.claimable()
    assert (len(claimable), set(claimable.values())) == (N, {1})
    assert lab.states() == {"waiting": N}
    assert {state for state, _ in lab.clusters().values()} == {"proposed"}
    assert lab.audit_lines() == []


def test_candidate_that_the_golden_set_refuses_is_kept_with_report_and_reason(lab: Lab) -> None:
    lab.recipe(**STRICT)
    add_two(lab)
    outcome = run_cycle(lab.site)
    assert outcome.status == "refused"
    assert "would be called unknown" in outcome.sentence
    assert_untouched(lab)
    assert outcome.report is not None
    report = cycle_report.read(outcome.report)
    assert (report.outcome, report.version, report.old_version) == ("refused", None, 1)
    assert any("would be called unknown" in reason for reason in report.reasons)
    candidate, form, _ = load_head(outcome.report / retrain.CANDIDATE)
    assert (set(candidate.labels) > set(KNOWN), form) == (True, f"encoder {lab.meta.encoder_sha256}")
    lab.recipe()
    assert run_cycle(lab.site).status == "learned"
    assert_learned(lab)


def test_one_of_two_recipes_is_enough_to_refuse_even_under_the_same_name(lab: Lab) -> None:
    (lab.folder / "drop2").mkdir()
    (lab.folder / "strict.yaml").write_text(yaml.safe_dump(STRICT))
    folders = yaml.safe_load(lab.file.read_text())["folders"]
    strict = {**folders[0], "path": "drop2", "source": "sem-2", "recipe": "strict.yaml"}
    for order in ([*folders, strict], [strict, *folders]):
        lab.change(folders=order)
        if not lab.n_waiting():
            add_two(lab)
        outcome = run_cycle(lab.site)
        assert outcome.status == "refused"
        assert outcome.report is not None
        assert len(cycle_report.read(outcome.report).judgements) == 2
        assert_untouched(lab)


def test_candidate_below_the_best_of_its_lineage_is_refused(lab: Lab) -> None:
    add_two(lab)
    recipe = retrain.load_recipe(lab.folder / "recipe.yaml")
    best = retrain.promotion.provenance_of(retrain.promotion.Mark(1.5, 1000), recipe)
    republish(lab, provenance=best)
    outcome = run_cycle(lab.site)
    assert outcome.status == "refused"
    assert "of the classes that the first head knew" in outcome.sentence
    assert lab.version == 2


def test_best_of_the_lineage_travels_with_every_head(learned: Lab) -> None:
    recipe = retrain.load_recipe(learned.folder / "recipe.yaml")
    first = retrain.promotion.best_of(learned.meta.provenance, recipe)
    assert first is not None
    assert 0.9 < first.accuracy <= 1
    learned.add(learned.blob(7, 30))
    assert run_cycle(learned.site).status == "learned"
    second = retrain.promotion.best_of(learned.meta.provenance, recipe)
    assert second is not None
    assert second.accuracy >= first.accuracy


def damage_newest(lab: Lab) -> None:
    """Let the newest head answer its probe otherwise than the network that it was made from."""
    version = lab.versions()[-1]
    probe = model_repository.read_probe(lab.repository, "head", version)
    assert probe is not None
    inputs, outputs = probe
    wrong = {name: values + 1 for name, values in outputs.items()}
    model_repository.write_probe(lab.repository / "head" / str(version) / model_repository.PROBE, inputs, wrong)


def test_head_that_fails_its_probe_is_withdrawn_and_the_old_one_serves(lab: Lab, monkeypatch) -> None:
    add_two(lab)
    after(monkeypatch, retrain, "publish_head", lambda: damage_newest(lab))
    outcome = run_cycle(lab.site)
    assert outcome.status == "refused"
    assert "answers its probe with another" in outcome.sentence
    assert_untouched(lab, n_versions=2)
    assert "probe" in (choice.why_withdrawn(lab.repository, "head", 2) or "")
    assert outcome.report is not None
    assert (outcome.report / retrain.CANDIDATE).is_file()
    assert run_cycle(lab.site).head_version == 3
    assert_learned(lab, n_versions=3)


def test_running_daemon_swaps_or_refuses_and_one_that_hangs_is_not_waited_for_longer(lab: Lab, monkeypatch) -> None:
    def announced() -> dict[str, int]:
        return serving.announced(lab.folder / "state")[0]

    with Daemon(DaemonSite(lab.folder)) as daemon:
        daemon.wait_ready()
        assert announced()["head"] == 1
        daemon.wait_for(lambda: lab.handoff().serving("site") is not None)
        add_two(lab)
        with monkeypatch.context() as patch:
            after(patch, retrain, "publish_head", lambda: damage_newest(lab))
            outcome = run_cycle(lab.site)
        assert outcome.status == "refused"
        assert "the daemon refused head 2: head 2 answers its probe with another" in outcome.sentence
        assert_untouched(lab, n_versions=2)
        assert announced()["head"] == 1
        lab.change(learning={"swap_timeout_s": 0.5})
        daemon.process.send_signal(signal.SIGSTOP)
        try:
            outcome = run_cycle(lab.site)
        finally:
            daemon.process.send_signal(signal.SIGCONT)
        assert (outcome.status, "did not serve head 3 within 0 s" in outcome.sentence) == ("refused", True)
        assert_untouched(lab, n_versions=3)
        lab.change(learning={"swap_timeout_s": 20})
        assert run_cycle(lab.site).head_version == 4
        assert announced()["head"] == 4
        daemon.wait_for(lambda: any("head published" in line for line in audit_log(lab)), 20)
        assert daemon.stop() == 0
    assert len(lab.learned_ids()) == N
    assert sum("head published" in line for line in audit_log(lab)) == 1


def audit_log(lab: Lab) -> list[str]:
    path = lab.folder / "state" / "audit.jsonl"
    return path.read_text().splitlines() if path.exists() else []


def test_head_that_a_person_withdraws_while_the_cycle_runs_has_no_successor(learned: Lab, monkeypatch) -> None:
    learned.add(learned.blob(7, 30))
    repository = learned.repository
    after(monkeypatch, retrain, "fit_head", lambda: choice.roll_back(repository, "head", "calls pits bridges"))
    with pytest.raises(PublishError, match=r"head 2 was withdrawn while the cycle ran \(calls pits bridges\)"):
        run_cycle(learned.site)
    assert (learned.version, learned.versions()) == (1, [1, 2])
    assert set(learned.claimable().values()) == {1}


# --- sites that cannot learn -----------------------------------------------------------------------------------------


def test_site_without_redis_says_what_to_add(lab: Lab) -> None:
    lab.change(redis=None)
    with pytest.raises(ConfigError, match="the site has no redis section"):
        run_cycle(lab.site)


def test_site_whose_recipes_all_pin_their_head_says_what_to_change(lab: Lab) -> None:
    lab.recipe(pins={"head": 1})
    with pytest.raises(ConfigError, match=r"every recipe pins its head.*pins\.head to null"):
        run_cycle(lab.site)


def test_pinned_head_says_how_to_release_it_before_anything_is_claimed(lab: Lab) -> None:
    add_two(lab)
    choice.pin(lab.repository, "head", 1)
    with pytest.raises(ConfigError, match="models pin head --release"):
        run_cycle(lab.site)
    assert lab.versions() == [1]


def test_head_without_a_bank_says_what_to_do(lab: Lab) -> None:
    (lab.repository / "head" / "1" / head_bank.BANK).unlink()
    with pytest.raises(ModelMismatch, match="cannot be trained further; fit one with `semwatch-train head`"):
        run_cycle(lab.site)


def test_redis_that_is_away_is_said(lab: Lab) -> None:
    lab.change(redis={"url": "redis://127.0.0.1:1/0", "timeout_s": 1})
    with pytest.raises(ServiceUnavailable, match="Redis is away"):
        run_cycle(lab.site)


# --- the commands ----------------------------------------------------------------------------------------------------


@pytest.fixture
def train(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    monkeypatch.setattr(commands, "main", main)
    return in_process(capsys, monkeypatch)


def test_command_says_one_line_or_json_and_its_exit_code(lab: Lab, train: Command) -> None:
    result = train("retrain", "--site", lab.file)
    assert result.code == 0
    assert result.words.strip() == "too few: 0 unknowns wait, 30 are needed: nothing was learned"
    add_two(lab)
    lab.recipe(**STRICT)
    result = train("retrain", "--site", lab.file, "--json")
    assert (result.code, result.json["status"], result.json["head_version"]) == (10, "refused", None)
    lab.recipe()
    result = train("retrain", "--site", lab.file, "--json")
    assert (result.code, result.json["status"], result.json["head_version"]) == (0, "learned", 2)
    assert Path(result.json["report"], "report.md").is_file()
    fd = os.open(lab.learning / retrain.LOCK, os.O_RDWR)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        result = train("retrain", "--site", lab.file)
    finally:
        os.close(fd)
    assert (result.code, result.words.strip()) == (0, "busy: another cycle is running: this one leaves it alone")


def test_help_teaches_and_errors_are_one_line(lab: Lab, train: Command) -> None:
    result = train("retrain", "--help")
    for word in ("timer", "exit code is 1", "--site", "--json"):
        assert word in result.words
    lab.change(redis=None)
    result = train("retrain", "--site", lab.file)
    assert result.code == 2
    assert "ConfigError: the site has no redis section" in result.words


def test_refit_leaves_a_class_out_of_head_bank_and_golden_set(learned: Lab, train: Command) -> None:
    result = train("refit", "--repository", learned.repository, "--without", "novel-1", "--without", "bridge")
    assert (result.code, "head 3 knows nothing of novel-1, bridge" in result.words) == (0, True)
    assert learned.labels == ("defect-free", "novel-2", "particle")
    for name in (head_bank.BANK, head_bank.GOLDEN):
        assert set(learned.bank(name).labels) == {"defect-free", "novel-2", "particle"}
    assert (learned.meta.provenance["parent"], learned.meta.provenance["without"]) == (2, "novel-1, bridge")
    assert not [key for key in learned.meta.provenance if key.startswith(retrain.promotion.BEST)]


def test_refit_refuses_a_class_that_the_head_does_not_know_and_leaving_too_little(lab: Lab) -> None:
    with pytest.raises(ConfigError, match=r"does not know pit; it knows bridge, defect-free, particle"):
        refit(lab.repository, without=["pit"])
    with pytest.raises(ConfigError, match="two classes or more"):
        refit(lab.repository, without=["bridge", "particle"])
    assert lab.versions() == [1]
