"""The learning cycle, whole: real Redis, real files, real networks; what it does, refuses, applies and survives."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis
import yaml

import commands
from commands import Command, in_process
from daemon import Daemon
from daemon import Site as DaemonSite
from learning_site import RECIPE, Lab, add_raw, make_lab, notes_of
from semwatch.classes import clusters
from semwatch.classes.register import ClassRegister
from semwatch.errors import ConfigError, ModelMismatch, PublishError, ServiceUnavailable
from semwatch.line.classification import decide
from semwatch.models import choice, head_bank, model_repository
from semwatch.models.inference import Embedded
from semwatch.store import serving
from semwatch.streams.embedded_redis import EmbeddedRedis
from semwatch.streams.handoff import Handoff
from semwatch.streams.records import Fields, encode
from semwatch.streams.unknowns import Consumer, connect
from semwatch_training.__main__ import main
from semwatch_training.discovery.head import load_head
from semwatch_training.learning import cycle_report, intake, new_classes, outcomes, retrain
from semwatch_training.learning.archive import ARCHIVE, Archive
from semwatch_training.learning.refit import refit
from semwatch_training.learning.report_builder import ReportBuilder
from semwatch_training.learning.retrain import Outcome, run_cycle

KNOWN = ("bridge", "defect-free", "particle")
LARGE, SMALL = 5, 6
"""Axes of the two unseen classes; 24 and 20 crops come as novel-1 and novel-2."""
N = 44


class Crash(BaseException):
    """The process dies here, as far as one can without dying."""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw small pictures: they are not what is tested here."""
    monkeypatch.setattr(cycle_report, "MAX_POINTS", 40)
    monkeypatch.setattr(cycle_report, "DPI", 25)


@pytest.fixture
def lab(tmp_path: Path, tiny_repository: Path, client: redis.Redis, server: EmbeddedRedis) -> Lab:
    return make_lab(tmp_path / "site", tiny_repository, client, server.url)


@pytest.fixture(scope="module")
def learned_site(tmp_path_factory: pytest.TempPathFactory, tiny_repository: Path, server: EmbeddedRedis) -> Path:
    """A site whose head 2 has learned novel-1 and novel-2."""
    folder = tmp_path_factory.mktemp("learned") / "site"
    with connect(server.url) as made:
        made.flushall()
        lab = make_lab(folder, tiny_repository, made, server.url)
        add_two(lab)
        assert run_cycle(lab.site).status == "learned"
    return folder


@pytest.fixture
def learned(learned_site: Path, tmp_path: Path, client: redis.Redis) -> Lab:
    return Lab(shutil.copytree(learned_site, tmp_path / "site"), client)


def add_two(lab: Lab) -> None:
    """24 and 20 crops of two classes that the head has never seen."""
    lab.add([*lab.blob(LARGE, 24), *lab.blob(SMALL, 20)])


def after(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, act: Callable[[], object], *, call: int = 1) -> None:
    """Act once, after the given call of a function."""
    real, n = getattr(owner, name), iter(range(1, 1_000_000))

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        answer = real(*args, **kwargs)
        if next(n) == call:
            act()
        return answer

    monkeypatch.setattr(owner, name, wrapped)


def crash() -> None:
    raise Crash


def cycle_dies(lab: Lab, patch: pytest.MonkeyPatch, owner: Any, name: str, *, call: int = 1) -> None:
    """Run a cycle that dies after the given call of a function."""
    with patch.context() as during:
        after(during, owner, name, crash, call=call)
        with pytest.raises(Crash):
            run_cycle(lab.site)


def assert_learned(lab: Lab, n_versions: int = 2) -> None:
    """Everything is as one undisturbed cycle over the two classes leaves it, however often it was interrupted."""
    assert lab.versions() == list(range(1, n_versions + 1))
    assert lab.labels == ("bridge", "defect-free", "novel-1", "novel-2", "particle")
    assert len(lab.learned_ids()) == len(set(lab.learned_ids())) == N
    assert (len(lab.learned_ids("novel-1")), len(lab.learned_ids("novel-2"))) == (24, 20)
    assert lab.n_waiting() == 0
    assert lab.states() == {"learned": N}
    assert lab.clusters() == {"novel-1": ("learned", "novel-1"), "novel-2": ("learned", "novel-2")}
    (line,) = lab.audit_lines()
    assert json.loads(line)["learned"] == "novel-1 (24 crops), novel-2 (20 crops)"


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
        verdicts.append([decide(*row, answer.meta.labels, significance=0.05, decide_confidence=0.8) for row in rows])
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


def republish(lab: Lab, **changes: Any) -> int:
    """The head in service once more under the next number, with another description."""
    folder = lab.repository / "head" / str(lab.version)
    beside = {name: folder / name for name in (model_repository.PROBE, head_bank.BANK, head_bank.GOLDEN)}
    return model_repository.publish(
        lab.repository, lab.meta.model_copy(update=changes), folder / "model.onnx", beside=beside
    )


# --- refused ---------------------------------------------------------------------------------------------------------

STRICT = {**RECIPE, "unknown": {"significance": 0.4}, "promotion": {"max_unknown_rate": 0.05}}


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


# --- it dies ---------------------------------------------------------------------------------------------------------

BEFORE_PUBLISHING = {
    "claim": (intake, "sort_out", 1),
    "identify": (new_classes, "identify", 1),
    "fit": (retrain, "fit_head", 1),
    "judge": (retrain, "_judge", 1),
}
AFTER_PUBLISHING = {
    "publish": (retrain, "publish_head", 1),
    "swap": (retrain, "_serves", 1),
    "state of the classes": (ClassRegister, "write", 2),
    "marking of the classes": (outcomes, "record_promotion", 2),
    "answered wishes": (Handoff, "answer", 1),
    "archive": (intake, "settle", 3),
    "retention": (choice, "prune", 1),
    "report": (ReportBuilder, "write", 1),
    "first acknowledged": (Consumer, "ack", 1),
    "all acknowledged": (intake.Claims, "acknowledge", 3),
}


@pytest.mark.parametrize("step", BEFORE_PUBLISHING)
def test_crash_before_publishing_leaves_the_old_head_and_the_next_cycle_learns(lab: Lab, monkeypatch, step) -> None:
    add_two(lab)
    owner, name, call = BEFORE_PUBLISHING[step]
    cycle_dies(lab, monkeypatch, owner, name, call=call)
    assert (lab.version, lab.n_waiting(), lab.audit_lines()) == (1, N, [])
    assert run_cycle(lab.site).status == "learned"
    assert_learned(lab)


@pytest.mark.parametrize("step", AFTER_PUBLISHING)
def test_crash_after_publishing_leaves_the_new_head_and_the_next_cycle_writes_the_rest(
    lab: Lab, monkeypatch, step
) -> None:
    add_two(lab)
    owner, name, call = AFTER_PUBLISHING[step]
    monkeypatch.setattr(intake, "CLAIM", 15)
    cycle_dies(lab, monkeypatch, owner, name, call=call)
    assert lab.version == 2
    assert run_cycle(lab.site).sentence == "0 unknowns wait, 30 are needed: nothing was learned"
    assert_learned(lab)


def test_crash_loses_no_unknown_that_came_meanwhile(lab: Lab, monkeypatch) -> None:
    add_two(lab)
    cycle_dies(lab, monkeypatch, retrain, "publish_head")
    lab.add(lab.blob(7, 30))
    assert run_cycle(lab.site).sentence == "head 3 serves and knows novel-3 (30 crops)"
    assert len(lab.learned_ids()) == len(set(lab.learned_ids())) == N + 30
    assert (lab.n_waiting(), len(lab.audit_lines())) == (0, 2)


KILLED = """
import os, signal, sys
from pathlib import Path
from semwatch.settings.site import load_site
from semwatch_training.learning import retrain
from tiny_models import exporting_once
owner, name = {"publish": (retrain, "publish_head"), "settle": (retrain.intake, "settle")}[sys.argv[3]]
real, calls = getattr(owner, name), []
def killed(*args, **kwargs):
    answer = real(*args, **kwargs)
    calls.append(name)
    if len(calls) == int(sys.argv[4]):
        os.kill(os.getpid(), signal.SIGKILL)
    return answer
setattr(owner, name, killed)
with exporting_once(Path(sys.argv[2])):
    retrain.run_cycle(load_site(Path(sys.argv[1])))
"""


@pytest.mark.parametrize(("step", "call"), [("publish", 1), pytest.param("settle", 3, marks=pytest.mark.slow)])
def test_killed_process_leaves_nothing_that_the_next_cycle_does_not_mend(lab: Lab, exports: Path, step, call) -> None:
    add_two(lab)
    path = os.pathsep.join([*sys.path, str(Path(__file__).parent)])
    argv = [sys.executable, "-c", KILLED, str(lab.file), str(exports), step, str(call)]
    done = subprocess.run(argv, env={**os.environ, "PYTHONPATH": path}, capture_output=True, timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert (lab.version, lab.n_waiting()) == (2, N)
    assert not lab.claimable()  # the dead process has them still
    assert run_cycle(lab.site).status == "too few"
    assert_learned(lab)


# --- Redis dies ------------------------------------------------------------------------------------------------------


def kill(server: EmbeddedRedis) -> None:
    assert server.pid is not None
    os.kill(server.pid, signal.SIGKILL)
    deadline = time.monotonic() + 5
    while server.pid is not None and time.monotonic() < deadline:
        time.sleep(0.01)


def test_redis_killed_during_claim_loses_nothing(lab: Lab, server: EmbeddedRedis, monkeypatch) -> None:
    add_two(lab)
    with monkeypatch.context() as patch:
        patch.setattr(intake, "CLAIM", 15)
        after(patch, Consumer, "claim", lambda: kill(server), call=2)
        with pytest.raises(ServiceUnavailable, match="Redis is away"):
            run_cycle(lab.site)
    server.start()
    assert lab.n_waiting() == N
    assert run_cycle(lab.site).status == "learned"
    assert_learned(lab)


def test_redis_killed_and_restarted_while_the_head_is_published_is_not_even_noticed(
    lab: Lab, server: EmbeddedRedis, monkeypatch
) -> None:
    add_two(lab)

    def restart() -> None:
        kill(server)
        server.start()

    after(monkeypatch, retrain, "publish_head", restart)
    assert run_cycle(lab.site).status == "learned"
    assert_learned(lab)


def test_redis_that_comes_back_during_the_acknowledgement_is_waited_for(
    lab: Lab, server: EmbeddedRedis, monkeypatch
) -> None:
    add_two(lab)
    after(monkeypatch, ReportBuilder, "write", lambda: kill(server))
    monkeypatch.setattr(intake, "ACK_PAUSE_S", 0.01)
    after(monkeypatch, intake.time, "sleep", server.start, call=2)
    assert run_cycle(lab.site).status == "learned"
    assert_learned(lab)


def test_redis_that_stays_away_is_acknowledged_by_the_next_cycle(lab: Lab, server: EmbeddedRedis, monkeypatch) -> None:
    add_two(lab)
    with monkeypatch.context() as patch:
        patch.setattr(intake, "ACK_PAUSE_S", 0.01)
        after(patch, retrain, "publish_head", lambda: kill(server))
        with pytest.raises(ServiceUnavailable, match="Redis is away"):
            run_cycle(lab.site)
    server.start()
    assert (lab.version, lab.n_waiting()) == (2, N)
    assert run_cycle(lab.site).status == "too few"
    assert_learned(lab)


# --- people decide ---------------------------------------------------------------------------------------------------


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


# --- records of every kind -------------------------------------------------------------------------------------------


def test_damaged_records_become_dead_letters_and_the_cycle_goes_on(lab: Lab) -> None:
    add_two(lab)
    raw: dict[str, Fields] = {}
    for i, name in enumerate(("schema", "crop", "features", "page", "path", "foreign")):
        record = lab.blob(9, 1, first=50_000 + i)[0]
        if name == "foreign":
            record = replace(record, model_versions={"encoder": 7}, field_short_px=None)
        raw[name] = encode(record)
    raw["schema"][b"schema"] = b"9"
    raw["crop"][b"crop_png"] = raw["crop"][b"crop_png"][:200]
    raw["features"][b"features"] = np.full(lab.width, np.nan, "<f4").tobytes()
    for name, value in (("page", 10**30), ("path", "\ud800")):
        raw[name][b"meta"] = json.dumps({**json.loads(raw[name][b"meta"]), name: value}).encode()
    for fields in raw.values():
        add_raw(lab.client, fields)
    assert run_cycle(lab.site).status == "learned"
    reasons = lab.dead_reasons()
    by_name = {name: reasons[fields[b"id"].decode()] for name, fields in raw.items()}
    assert "schema is b'9'" in by_name["schema"]
    assert "crop_png is damaged" in by_name["crop"]
    assert "not finite" in by_name["features"]
    assert "out of all bounds" in by_name["page"]
    assert "not Unicode" in by_name["path"]
    assert "no features of encoder 1, and it does not hold the size of its field" in by_name["foreign"]
    assert (len(reasons), lab.n_waiting(), len(lab.learned_ids())) == (6, 0, N)


def test_record_of_another_encoder_is_embedded_again_from_its_crop(lab: Lab) -> None:
    own = lab.blob(LARGE, 24)
    foreign = [replace(r, model_versions={"encoder": 7}, features=np.ones(3, np.float32)) for r in lab.blob(SMALL, 20)]
    lab.add([*own, *foreign])
    with Embedded(lab.repository, models=("encoder",)) as models:
        expected = models.infer(
            "encoder",
            {
                "crop": np.stack([r.crop for r in foreign]),
                "soft_mask": np.stack([r.soft_mask for r in foreign]),
                "size": np.stack([np.log2(np.array([56, 300**0.5]) / 200).astype(np.float32) for _ in foreign]),
            },
        ).outputs["features"]
    assert run_cycle(lab.site).status == "learned"
    crops = head_bank.joined([lab.bank(), lab.bank(head_bank.GOLDEN)])
    rows = {id_: row for row, id_ in enumerate(crops.ids) if id_}
    found = [(crops.features[rows[r.id]], e) for r, e in zip(foreign, expected, strict=True) if r.id in rows]
    assert len(found) >= 12
    for is_now, should_be in found:
        np.testing.assert_allclose(is_now, should_be, rtol=2e-3, atol=2e-3)


def test_repeated_old_and_doubled_records_are_settled_once_and_learned_once(lab: Lab) -> None:
    add_two(lab)
    first = lab.blob(LARGE, 1)[0]
    add_raw(lab.client, encode(first))  # the same record in a second entry
    lab.add([replace(first, id="a" * 32), replace(lab.blob(7, 1)[0], crop=first.crop, soft_mask=first.soft_mask)])
    lab.add(lab.blob(8, 1, created_utc="2001-01-01T00:00:00Z"))
    outcome = run_cycle(lab.site)
    assert outcome.status == "learned"
    assert lab.states() == {"learned": N, "duplicate": 2, "forgotten": 1}
    assert (lab.n_waiting(), len(lab.learned_ids())) == (0, N)
    assert outcome.report is not None
    assert cycle_report.read(outcome.report).n_duplicates == 2


def test_what_needs_no_learning_leaves_the_queue_though_nothing_is_learned(learned: Lab) -> None:
    learned.add([*learned.blob(7, 10), *learned.blob(8, 5, created_utc="2001-01-01T00:00:00Z")])
    add_raw(learned.client, encode(learned.blob(LARGE, 1)[0]))  # learned long ago, delivered once more
    assert run_cycle(learned.site).status == "too few"
    assert (learned.n_waiting(), len(learned.claimable())) == (10, 10)
    with Archive(learned.learning / ARCHIVE, read_only=True) as archive:
        (learned_id,) = (r.id for r in learned.blob(LARGE, 1))
        assert notes_of(archive, [learned_id]) == {learned_id: "novel-1, head 2"}  # not forgotten how


def test_unknown_that_the_line_could_not_decide_and_clustering_explains_is_done(lab: Lab) -> None:
    add_two(lab)
    lab.add(lab.blob(0, 5, kind="non-decidable"))
    assert run_cycle(lab.site).status == "learned"
    assert lab.states() == {"learned": N, "explained": 5}
    assert lab.n_waiting() == 0


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
    assert (result.code, result.json["status"], result.json["head_version"]) == (1, "refused", None)
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
