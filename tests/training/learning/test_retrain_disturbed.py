"""A whole cycle that dies, loses its Redis, or is given damaged, old and doubled records."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cycles import LARGE, SMALL, N, add_two, after, assert_learned, cycle_dies
from learning_site import Lab, add_raw, notes_of
from semwatch.classes.register import ClassRegister
from semwatch.errors import ServiceUnavailable
from semwatch.models import choice, head_bank
from semwatch.models.inference import Embedded
from semwatch.streams.embedded_redis import EmbeddedRedis
from semwatch.streams.handoff import Handoff
from semwatch.streams.records import Fields, encode
from semwatch.streams.unknowns import Consumer
from semwatch_training.learning import cycle_report, intake, new_classes, outcomes, retrain
from semwatch_training.learning.archive import ARCHIVE, Archive
from semwatch_training.learning.report_builder import ReportBuilder
from semwatch_training.learning.retrain import run_cycle

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
    path = os.pathsep.join(sys.path)
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
