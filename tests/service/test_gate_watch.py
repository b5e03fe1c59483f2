"""The gate's own calibration in service: when it looks, what it keeps, and what makes it begin anew."""

import json
from dataclasses import replace

import numpy as np
import pytest

from daemon import SOURCE, Daemon, Site, make_site, png
from factories import make_review
from semwatch.defects import Review
from semwatch.line.gate_calibration import MOST, propose
from semwatch.operations import doctor
from semwatch.service.gate_watch import DAMAGED, MAX_STREAMS, STATE, UPDATE_EVERY, Change, GateWatch
from semwatch.service.models_in_service import load_models
from semwatch.settings.recipe import Recipe
from semwatch.settings.site import load_site
from semwatch.store import results

WHOLE = make_review(1)
DETECTOR = "d" * 16


def recipe(**gate: object) -> Recipe:
    return Recipe.model_validate({"name": "metal2", "gate": gate})


def reviewed(score: float, detector: str = DETECTOR, *, gate_threshold: float = 0.4) -> Review:
    page = WHOLE.pages[0]
    page = replace(page, score_map=replace(page.score_map, raw_score=score), gate_threshold=gate_threshold)
    return replace(WHOLE, pages=(page,), model_hashes={"detector": detector})


def scores(n: int, seed: int = 0, shift: float = 0.0) -> list[float]:
    """Half normal, half defective, in turn."""
    rng = np.random.default_rng(seed)
    return np.exp(np.where(np.arange(n) % 2, rng.normal(-4, 1, n), rng.normal(2, 0.4, n)) + shift).tolist()


def watch(gates: GateWatch, found: list[float], of: Recipe, detector: str = DETECTOR) -> list[Change]:
    changes = [gates.observe(reviewed(score, detector), of) for score in found]
    return [change for change in changes if change is not None]


def test_nothing_is_proposed_before_enough_images() -> None:
    gates, of = GateWatch(), recipe()
    assert watch(gates, scores(99), of) == []
    assert gates.proposal(of, DETECTOR) is None
    assert gates.sentence(of) == "the stream proposes no threshold: 99 images so far, a proposal needs 100"
    assert gates.sentence(recipe(miss_cost=2.0)).endswith("0 images so far, a proposal needs 100")


def test_proposal_is_the_one_of_the_scores_and_is_said_once() -> None:
    gates, of, found = GateWatch(), recipe(), scores(UPDATE_EVERY)
    first = watch(gates, found, of)
    assert len(first) == 1
    assert gates.proposal(of, DETECTOR) == propose(np.array(found), false_alarm_rate=0.05, present=0.4)
    assert watch(gates, found, of) == []  # the same scores once more: inside of its interval
    assert (first[0].before, first[0].is_used) == (None, False)
    assert "the stream proposes the threshold" in first[0].sentence
    assert "; now 0.4: " in first[0].sentence
    assert ("and misses more" in first[0].sentence) is (first[0].threshold > 0.4)
    higher = watch(GateWatch(), scores(UPDATE_EVERY, shift=3.0), of)
    assert "it opens on fewer images than now, and misses more" in higher[0].sentence
    assert gates.threshold(of, DETECTOR) is None


def test_stream_that_moves_changes_the_proposal() -> None:
    gates, of = GateWatch(), recipe()
    watch(gates, scores(UPDATE_EVERY), of)
    before = gates.proposal(of, DETECTOR).threshold
    changes = watch(gates, scores(MOST, seed=1, shift=3.0), of)
    assert changes
    assert changes[0].before == before
    assert gates.proposal(of, DETECTOR).threshold == pytest.approx(np.exp(3) * before, rel=0.6)


def test_use_opens_the_gate_by_it_unless_the_recipe_has_its_own() -> None:
    for of, is_used in ((recipe(self_calibration="use"), True), (recipe(self_calibration="use", threshold=0.7), False)):
        gates = GateWatch()
        (change,) = watch(gates, scores(UPDATE_EVERY), of)
        assert change.is_used is is_used
        assert ("the gate opens above" in change.sentence) is is_used
        assert gates.threshold(of, DETECTOR) == change.threshold


def test_off_keeps_nothing() -> None:
    gates, of = GateWatch(), recipe(self_calibration="off")
    assert watch(gates, scores(UPDATE_EVERY), of) == []
    assert gates.state()["streams"] == []
    assert gates.sentence(of) == "self-calibration is off"


def test_another_detector_begins_anew_and_gets_no_threshold_of_the_old_one() -> None:
    gates, of = GateWatch(), recipe(self_calibration="use")
    watch(gates, scores(UPDATE_EVERY), of)
    assert gates.threshold(of, "e" * 16) is None
    watch(gates, scores(3), of, "e" * 16)
    assert gates.threshold(of, DETECTOR) is gates.threshold(of, "e" * 16) is None
    assert len(gates.state()["streams"][0]["scores"]) == 3


def test_another_recipe_id_has_a_stream_of_its_own() -> None:
    gates, of, other = GateWatch(), recipe(), recipe(false_alarm_rate=0.1)
    watch(gates, scores(UPDATE_EVERY), of)
    watch(gates, scores(5), other)
    assert gates.proposal(other, DETECTOR) is None
    assert gates.proposal(of, DETECTOR) is not None


def test_what_was_taken_over_stays_while_later_looks_find_nothing() -> None:
    gates, of = GateWatch(), recipe(self_calibration="use")
    first = watch(gates, scores(UPDATE_EVERY), of)
    rng = np.random.default_rng(0)
    changes = first + watch(gates, np.exp(rng.normal(-4, 1, MOST)).tolist(), of)
    assert gates.threshold(of, DETECTOR) == changes[-1].threshold
    assert "the last look gave none: the scores form one group" in gates.sentence(of)


def test_scores_that_are_not_finite_are_left_out() -> None:
    gates, of = GateWatch(), recipe()
    assert len(watch(gates, [*scores(UPDATE_EVERY - 1), float("nan"), 0.01], of)) == 1


def test_memory_is_bounded() -> None:
    gates = GateWatch()
    for i in range(MAX_STREAMS + 3):
        gates.observe(reviewed(1.0), Recipe.model_validate({"version": i}))
    assert len(gates.state()["streams"]) == MAX_STREAMS
    watch(gates, [1.0] * (MOST + 5), recipe())
    assert len(gates.state()["streams"][-1]["scores"]) == MOST


def test_restart_goes_on_where_it_ended(tmp_path) -> None:
    gates, of = GateWatch(), recipe(self_calibration="use")
    watch(gates, scores(UPDATE_EVERY + 40), of)
    gates.save(tmp_path / STATE)
    again = GateWatch.load(tmp_path / STATE)
    assert again.state() == gates.state()
    assert again.threshold(of, DETECTOR) == gates.threshold(of, DETECTOR)
    assert again.sentence(of) == gates.sentence(of)


def test_damaged_file_is_set_aside_by_its_owner_alone(tmp_path, caplog) -> None:
    (tmp_path / STATE).write_text('{"streams": [{}]}')
    assert GateWatch.load(tmp_path / STATE, is_owner=False).state()["streams"] == []
    assert (tmp_path / STATE).exists()
    assert caplog.records == []
    assert GateWatch.load(tmp_path / STATE).state()["streams"] == []
    assert (tmp_path / (STATE + DAMAGED)).exists()
    assert "begins anew" in caplog.text
    assert GateWatch.load(tmp_path / "absent.json").state()["streams"] == []


def test_disk_that_refuses_is_a_warning(tmp_path, caplog) -> None:
    GateWatch().save(tmp_path / "absent" / STATE)
    assert "cannot save" in caplog.text


# --- in the daemon ---------------------------------------------------------------------------------------------------


def prepared(site: Site, gate: dict[str, object]) -> float:
    """Leave the state of a daemon that has seen 100 images; return the threshold that they propose."""
    of = Recipe.model_validate({"name": "test", "gate": gate})
    models = load_models(load_site(site.file).models, [of])[of.pins]
    gates = GateWatch()
    (change,) = watch(gates, scores(UPDATE_EVERY), of, models.hashes()["detector"])
    models.close()
    site.state.mkdir(exist_ok=True)
    gates.save(site.state / STATE)
    return change.threshold


def test_daemon_opens_by_the_streams_threshold_and_results_say_so(tmp_path, tiny_repository) -> None:
    gate: dict[str, object] = {"self_calibration": "use"}
    site = make_site(tmp_path / "site", tiny_repository, recipe={"name": "test", "gate": gate})
    threshold = prepared(site, gate)
    site.put("a.png", png(1))
    with Daemon(site) as daemon:
        daemon.wait_ready()
        daemon.wait_for(lambda: bool(site.reviews()))
        assert daemon.stop() == 0
    page = results.read(site.reviews()[0]).pages[0]
    assert page.gate is not None
    assert (page.gate.source, page.gate.threshold) == ("stream", pytest.approx(threshold, rel=1e-5))
    assert page.gate_threshold == page.gate.threshold
    (stream,) = json.loads((site.state / STATE).read_text())["streams"]
    assert len(stream["scores"]) == UPDATE_EVERY + 1


def test_recipes_own_threshold_wins_over_the_streams(tmp_path, tiny_repository) -> None:
    gate: dict[str, object] = {"self_calibration": "use", "threshold": 0.25}
    site = make_site(tmp_path / "site", tiny_repository, recipe={"name": "test", "gate": gate})
    prepared(site, gate)
    site.put("a.png", png(1))
    with Daemon(site) as daemon:
        daemon.wait_ready()
        daemon.wait_for(lambda: bool(site.reviews()))
        assert daemon.stop() == 0
    gate_record = results.read(site.reviews()[0]).pages[0].gate
    assert gate_record is not None
    assert (gate_record.source, gate_record.threshold) == ("recipe", 0.25)


def test_results_of_older_releases_have_no_gate_and_are_read(tmp_path) -> None:
    written = results.write(WHOLE, results_dir=tmp_path)
    old = json.loads(written.json.read_text())
    for page in old["pages"]:
        del page["gate"]
    written.json.write_text(json.dumps(old))
    assert results.read(written.json).pages[0].gate is None


def test_status_and_doctor_say_what_the_stream_proposes(tmp_path, tiny_repository) -> None:
    gate: dict[str, object] = {}
    site = make_site(tmp_path / "site", tiny_repository, recipe={"name": "test", "gate": gate})
    settings = load_site(site.file)
    sentence = doctor.status(settings)["gates"][SOURCE]
    assert sentence == "the stream proposes no threshold: 0 images so far, a proposal needs 100"
    threshold = prepared(site, gate)
    sentence = doctor.status(settings)["gates"][SOURCE]
    assert sentence.startswith(f"the stream proposes the threshold {threshold:.4g} (")
    (check,) = (check for check in doctor.examine(settings) if check.name == f"gate of {SOURCE}")
    assert check.ok
    assert check.detail == "opens above 0.057, which is the detector's"
    assert f"set gate.threshold: {threshold:.6g} in the recipe" in check.advice
