"""The command line beside a site: ``doctor``, ``status``, ``audit`` and ``quarantine``."""

import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster_files import T0, three
from commands import Command, put, write_recipe
from daemon import SOURCE, Daemon, Site, make_site, png
from factories import make_review
from semwatch.classes.register import ClassRegister
from semwatch.defects import Quality
from semwatch.errors import ConfigError
from semwatch.models import model_repository
from semwatch.service.drift import STATE, DriftWatch
from semwatch.store.audit import AuditLog
from semwatch.store.ledger import Ledger
from semwatch.streams.embedded_redis import EmbeddedRedis, find_executable
from semwatch.streams.handoff import Cycle, Handoff, Wish, wish_message
from semwatch.streams.unknowns import Publisher
from semwatch.system.files import Stamp

NOWHERE = "redis://127.0.0.1:1/0"


@pytest.fixture(scope="module")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    try:
        find_executable()
    except ConfigError as error:
        pytest.skip(str(error))
    with EmbeddedRedis(tmp_path_factory.mktemp("redis")) as server:
        yield server.url


# --- doctor --------------------------------------------------------------------------------------------------------


def doctor(semwatch: Command, site: Site) -> tuple[int, dict[str, dict[str, Any]]]:
    said = semwatch("doctor", "--site", site.file, "--json")
    return said.code, {check["check"]: check for check in said.json}


def test_doctor_is_content_with_a_site_that_can_work(semwatch, tmp_path, tiny_repository, redis_url) -> None:
    site = make_site(tmp_path / "[site]", tiny_repository, redis_url=redis_url)
    code, checks = doctor(semwatch, site)
    assert code == 0
    assert all(check["ok"] for check in checks.values())
    assert checks["models"]["detail"] == "detector 1, encoder 1, head 1"
    gate = (
        "opens above 0, which is the recipe's; the stream proposes no threshold: 0 images so far, a proposal needs 100"
    )
    assert checks[f"gate of {SOURCE}"]["detail"] == gate
    assert checks["Redis"]["detail"] == "answers; unknowns 0, results 0"
    said = semwatch("doctor", "--site", site.file)
    assert said.code == 0
    assert f"ok  drop folder {SOURCE}: {site.drop}\n" in said.out
    assert "FIX" not in said.out


def test_doctor_warns_of_a_site_that_nobody_has_named(semwatch, tmp_path, tiny_repository) -> None:
    site = make_site(tmp_path / "site", tiny_repository)
    code, checks = doctor(semwatch, site)
    assert (code, checks["name"]["ok"]) == (0, True)
    assert "`name` in the site settings" in checks["name"]["advice"]
    assert "!!  name: site, like every site that nobody has named" in semwatch("doctor", "--site", site.file).out
    named = make_site(tmp_path / "named", tiny_repository, name="fab3-ws7")
    assert doctor(semwatch, named)[1]["name"]["advice"] == ""


def test_doctor_leaves_nothing_behind(semwatch, tmp_path, tiny_repository) -> None:
    site = make_site(tmp_path / "site", tiny_repository)
    before = sorted(site.folder.rglob("*"))
    semwatch("doctor", "--site", site.file)
    semwatch("status", "--site", site.file)
    assert sorted(site.folder.rglob("*")) == before


def break_drop_folder(site: Site) -> None:
    site.drop.rmdir()


def put_file_for_drop_folder(site: Site) -> None:
    site.drop.rmdir()
    site.drop.touch()


def put_file_for_results(site: Site) -> None:
    (site.folder / "results").touch()


def put_file_for_state(site: Site) -> None:
    site.state.touch()


def take_models_away(site: Site) -> None:
    change_settings(site, models={"repository": "nothing"})


def name_redis_that_is_down(site: Site) -> None:
    change_settings(site, redis={"url": NOWHERE, "timeout_s": 1})


def ask_for_a_disk_that_no_one_has(site: Site) -> None:
    change_settings(site, limits={"min_free_mb": 10**9})


def misspell_recipe(site: Site) -> None:
    (site.folder / "recipe.yaml").write_text("gate: {treshold: 1}\n")


def promise_too_much(site: Site) -> None:
    write_recipe(site.folder / "recipe.yaml", gate={"false_alarm_rate": 0.001})


def break_ledger(site: Site) -> None:
    put(site.state / "ledger.sqlite", b"no database at all" * 100)


def change_settings(site: Site, **changes: object) -> None:
    site.file.write_text(yaml.safe_dump({**yaml.safe_load(site.file.read_text()), **changes}))


@pytest.mark.parametrize(
    ("damage", "check", "remedy"),
    [
        (break_drop_folder, f"drop folder {SOURCE}", "create it, or mount the share"),
        (put_file_for_drop_folder, f"drop folder {SOURCE}", "give the folder's path"),
        (put_file_for_results, "results folder", "move it away"),
        (put_file_for_state, "state folder", "move it away"),
        (ask_for_a_disk_that_no_one_has, "disk", "free some space"),
        (break_ledger, "ledger", "move the file"),
        (misspell_recipe, f"recipe of {SOURCE}", "threshold"),
        (take_models_away, "models", "semwatch-train build"),
        (promise_too_much, f"gate of {SOURCE}", "semwatch recipe calibrate"),
        (name_redis_that_is_down, "Redis", "start it, or correct redis.url"),
    ],
)
def test_doctor_names_the_one_thing_that_is_wrong_and_its_remedy(
    semwatch, tmp_path, tiny_repository, damage, check, remedy
) -> None:
    site = make_site(tmp_path / "site", tiny_repository)
    damage(site)
    code, checks = doctor(semwatch, site)
    assert code == 1
    assert [name for name, found in checks.items() if not found["ok"]] == [check]
    assert remedy in checks[check]["remedy"]


def test_doctor_prints_each_fault_with_its_remedy_below(semwatch, tmp_path) -> None:
    site = make_site(tmp_path / "site", tmp_path / "nothing", redis_url=NOWHERE)
    site.drop.rmdir()
    said = semwatch("doctor", "--site", site.file)
    lines = said.out.splitlines()
    assert said.code == 1
    faults = [at for at, line in enumerate(lines) if line.startswith("FIX ")]
    assert [lines[at].split(":")[0] for at in faults] == [f"FIX drop folder {SOURCE}", "FIX models", "FIX Redis"]
    assert all(lines[at + 1].startswith("    ") for at in faults)


# --- doctor and status on learning -----------------------------------------------------------------------------------


def publish_head(repository: Path, *, weights: bytes | None = None) -> int:
    """The newest head once more, or other weights under its name."""
    newest = repository / "head" / str(model_repository.latest(repository, "head"))
    meta = model_repository.read_meta(repository, "head", int(newest.name))
    file = newest / "model.onnx" if weights is None else put(repository.parent / "other.onnx", weights)
    return model_repository.publish(repository, meta, file, beside={"probe.npz": newest / "probe.npz"})


def test_doctor_of_a_site_that_has_never_learned_says_nothing_of_learning(
    semwatch, tmp_path, tiny_repository, server, client
) -> None:
    for name, url in (("without", None), ("with", server.url)):
        site = make_site(tmp_path / name, tiny_repository, redis_url=url)
        code, checks = doctor(semwatch, site)
        assert code == 0
        assert not {"unknowns", "clusters", "last cycle", "in service", "learning"} & checks.keys()


def test_doctor_and_status_show_unknowns_clusters_last_cycle_and_wishes(
    semwatch, tmp_path, tiny_repository, server, client
) -> None:
    site = make_site(tmp_path / "site", tiny_repository, redis_url=server.url)
    handoff = Handoff(client)
    counts = {"waiting": 3, "learned": 2, "explained": 0}
    handoff.add_cycle(Cycle(utc=T0, outcome="published", version=2, unknowns=counts))
    reasons = ("bridge loses 12 points",)
    handoff.add_cycle(Cycle(utc="2026-01-02T00:00:00Z", outcome="refused", reasons=reasons, unknowns=counts))
    ClassRegister(handoff, site.state, owner="cycle").change(lambda _: three())
    wish = Wish(site="site", source="sem-1", utc="2026-01-03T00:00:00Z", sentence="unknown rate rose")
    Publisher(client).publish([wish_message(wish)])
    code, checks = doctor(semwatch, site)
    assert code == 0
    assert checks["unknowns"]["detail"] == "3 waiting, 2 learned, 0 explained"
    assert checks["clusters"]["detail"] == "3 found so far"
    assert checks["last cycle"]["detail"] == "refused, 2026-01-02T00:00:00Z; bridge loses 12 points"
    state = status(semwatch, site)
    assert (state["unknowns"]["waiting"], state["unknowns"]["learned"]) == (3, 2)
    assert (state["last_cycle"]["outcome"], state["last_cycle"]["reasons"]) == ("refused", ["bridge loses 12 points"])
    assert state["wishes"] == ["unknown rate rose"]
    assert "unknown rate rose" in semwatch("status", "--site", site.file).words


def test_doctor_and_status_show_alarms_that_stand(semwatch, tmp_path, tiny_repository) -> None:
    site = make_site(tmp_path / "site", tiny_repository)
    assert status(semwatch, site)["alarms"] == []
    ordinary = make_review(0, source=SOURCE)
    blank = replace(ordinary.pages[0], score_map=None, quality=Quality(is_image=False))
    watch = DriftWatch()
    watch.observe(replace(ordinary, pages=(blank,) * 5))
    site.state.mkdir()
    watch.save(site.state / STATE)
    (alarm,) = status(semwatch, site)["alarms"]
    assert "5 of the last 5 pages hold no image" in alarm
    code, checks = doctor(semwatch, site)
    assert code == 0
    assert checks[f"images of {SOURCE}"]["detail"] == alarm
    assert "night.md" in checks[f"images of {SOURCE}"]["advice"]


@pytest.mark.parametrize(
    ("key", "fields"),
    [("semwatch:classes", {"revision": "1", "state": '{"clusters": 3}'}), ("semwatch:cycles", {"meta": "went well"})],
)
def test_doctor_names_what_is_wrong_with_learning(
    semwatch, tmp_path, tiny_repository, server, client, key, fields
) -> None:
    site = make_site(tmp_path / "site", tiny_repository, redis_url=server.url)
    client.xadd(key, fields)
    code, checks = doctor(semwatch, site)
    assert code == 1
    assert [name for name, found in checks.items() if not found["ok"]] == ["learning"]
    assert checks["learning"]["remedy"]
    assert semwatch("status", "--site", site.file, "--json").code == 0  # a glance is always there


def test_doctor_compares_what_serves_with_what_is_chosen_and_names_a_refused_head(
    semwatch, tmp_path, tiny_repository
) -> None:
    repository = shutil.copytree(tiny_repository, tmp_path / "models")
    site = make_site(tmp_path / "site", repository)
    with Daemon(site) as daemon:
        daemon.wait_ready()
        assert publish_head(repository) == 2
        daemon.wait_for(lambda: status(semwatch, site)["in_service"] == {"detector": 1, "encoder": 1, "head": 2})
        _, checks = doctor(semwatch, site)
        assert (checks["in service"]["ok"], checks["models"]["detail"]) == (True, "detector 1, encoder 1, head 2")

        assert publish_head(repository, weights=b"no network") == 3
        daemon.wait_for(lambda: "3" in status(semwatch, site)["refused_heads"])
        state = status(semwatch, site)
        assert (state["models"]["head"], state["in_service"]["head"]) == (3, 2)
        assert "does not load" in state["refused_heads"]["3"]
        code, checks = doctor(semwatch, site)
        assert code == 1
        assert [name for name, found in checks.items() if not found["ok"]] == ["head 3"]
        assert "semwatch models rollback" in checks["head 3"]["remedy"]
        assert semwatch("models", "rollback", "--site", site.file).code == 0
        assert doctor(semwatch, site)[0] == 0

        meta = model_repository.read_meta(repository, "encoder", 1)
        model_repository.publish(repository, meta, repository / "encoder/1/model.onnx")
        code, checks = doctor(semwatch, site)
        assert (code, checks["in service"]["ok"]) == (1, False)
        assert checks["in service"]["detail"] == "the daemon serves encoder 1 instead of 2"
        assert "restart the daemon" in checks["in service"]["remedy"]
    assert status(semwatch, site)["in_service"] is None
    assert doctor(semwatch, site)[0] == 0


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read and write everything")
def test_doctor_tells_folders_without_rights(semwatch, tmp_path, tiny_repository) -> None:
    site = make_site(tmp_path / "site", tiny_repository)
    site.drop.chmod(0o300)
    (site.folder / "results").mkdir(0o500)
    _, checks = doctor(semwatch, site)
    assert not checks[f"drop folder {SOURCE}"]["ok"]
    assert not checks["results folder"]["ok"]


# --- status --------------------------------------------------------------------------------------------------------


def status(semwatch: Command, site: Site) -> dict[str, Any]:
    said = semwatch("status", "--site", site.file, "--json")
    assert said.code == 0
    return said.json  # type: ignore[no-any-return]


def test_status_before_the_daemon_ever_ran_counts_what_waits(semwatch, tmp_path, tiny_repository) -> None:
    site = make_site(tmp_path / "site", tiny_repository)
    state = status(semwatch, site)
    assert (state["daemon_running"], state["waiting_files"], state["oldest_waiting_s"]) == (False, 0, 0)
    assert state["done"] is None
    site.put("lot/a.png", png(1))
    os.utime(site.put("b.png", png(2)), (0, 0))  # an old picture that has just been copied
    state = status(semwatch, site)
    assert state["waiting_files"] == 2
    assert state["oldest_waiting_s"] < 60
    assert state["models"] == {"detector": 1, "encoder": 1, "head": 1}
    assert state["disk_free_mb"] > 0
    assert "daemon running no" in semwatch("status", "--site", site.file).words


def test_status_while_the_daemon_runs_and_after_it(semwatch, tmp_path, tiny_repository) -> None:
    site = make_site(tmp_path / "site", tiny_repository, limits={"min_free_mb": 10**9})  # so that the line pauses
    site.put("a.png", png(1))
    before = status(semwatch, site)
    with Daemon(site) as daemon:
        daemon.wait_ready()
        during = status(semwatch, site)
        daemon.kill()
    after = status(semwatch, site)
    assert [state["daemon_running"] for state in (before, during, after)] == [False, True, False]
    assert [state["waiting_files"] for state in (before, during, after)] == [1, 1, 1]
    assert [state["done"] for state in (before, during, after)] == [None, 0, 0]
    assert before.keys() == during.keys() == after.keys()


def test_status_with_redis_tells_its_depths_and_without_an_answer_none(
    semwatch, tmp_path, tiny_repository, redis_url
) -> None:
    assert status(semwatch, make_site(tmp_path / "a", tiny_repository))["redis"] == "not configured"
    site = make_site(tmp_path / "b", tiny_repository, redis_url=redis_url)
    assert status(semwatch, site)["redis"] == {"unknowns": 0, "results": 0}
    assert "redis unknowns 0, results 0" in semwatch("status", "--site", site.file).words
    assert status(semwatch, make_site(tmp_path / "c", tiny_repository, redis_url=NOWHERE))["redis"].startswith("away: ")


def test_status_tells_folders_and_models_that_are_away(semwatch, tmp_path) -> None:
    site = make_site(tmp_path / "site", tmp_path / "nothing")
    site.drop.rmdir()
    state = status(semwatch, site)
    assert state["folders_away"] == [SOURCE]
    assert state["models"] == {"detector": None, "encoder": None, "head": None}


def test_status_of_a_broken_ledger_is_one_message_with_the_remedy(semwatch, tmp_path, tiny_repository) -> None:
    site = make_site(tmp_path / "site", tiny_repository)
    break_ledger(site)
    said = semwatch("status", "--site", site.file, "--json")
    assert (said.code, said.json["error"], said.json["exit_code"]) == (2, "ConfigError", 2)
    assert "move the file" in said.err
    assert "move the file" in said.json["message"]


# --- audit ---------------------------------------------------------------------------------------------------------


def write_log(folder: Path, n: int) -> Path:
    with AuditLog(folder / "audit.jsonl") as log:
        log.append([(seq, {"event": "reviewed", "path": f"{seq}.png"}) for seq in range(1, n + 1)])
    return folder / "audit.jsonl"


def test_audit_verify_of_an_absent_log_says_so(semwatch, tmp_path) -> None:
    for path in (tmp_path / "audit.jsonl", tmp_path):
        said = semwatch("audit", "verify", path)
        assert (said.code, said.out) == (2, "")
        assert f"no audit log at {path}; the daemon keeps audit.jsonl in the state_dir" in said.err


def test_audit_verify_of_an_intact_log_gives_the_hash_to_note_on_one_line(semwatch, tmp_path) -> None:
    log = write_log(tmp_path, 3)
    said = semwatch("audit", "verify", log)
    assert said.code == 0
    assert re.fullmatch(r"intact: 3 lines; note elsewhere: [0-9a-f]{64}\n", said.out)
    report = semwatch("audit", "verify", log, "--json").json
    assert (report["ok"], report["n_lines"], report["problems"]) == (True, 3, [])


def test_audit_verify_of_a_tampered_log_names_the_line(semwatch, tmp_path) -> None:
    log = write_log(tmp_path, 3)
    log.write_text(log.read_text().replace("2.png", "x.png"))
    said = semwatch("audit", "verify", log)
    assert said.code == 1
    assert "broken: line 2: was edited" in said.out
    said = semwatch("audit", "verify", log, "--json")
    assert (said.code, said.json["ok"]) == (1, False)


def test_audit_verify_notices_lines_cut_off_at_the_end_where_the_ledger_lies_beside(semwatch, tmp_path) -> None:
    log = write_log(tmp_path, 2)
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        for seq in (1, 2, 3):  # the third still waits to be appended, which is no fault
            sha256 = str(seq) * 64
            claim = ledger.claim("s", f"{seq}", sha256=sha256, stamp=Stamp(1, 1), now_utc="2026-01-01T00:00:00Z")
            ledger.finish(claim, outbox=[], audit={"event": "reviewed"}, now_utc="2026-01-01T00:00:00Z")
        ledger.forget_audit(2)
    assert semwatch("audit", "verify", log).code == 0
    log.write_text(log.read_text().splitlines(keepends=True)[0])
    said = semwatch("audit", "verify", log)
    assert said.code == 1
    assert "ends with seq 1: the ledger beside it has handed over 2" in said.out


# --- quarantine ----------------------------------------------------------------------------------------------------


def test_quarantine_before_the_daemon_ever_ran_is_one_message(semwatch, tmp_path, tiny_repository) -> None:
    site = make_site(tmp_path / "site", tiny_repository)
    for argv in (["list", "--site", site.file], ["requeue", "--site", site.file, "ab"]):
        said = semwatch("quarantine", *argv)
        assert said.code == 2
        assert "the daemon has not run yet" in said.err


def test_quarantined_file_is_listed_requeued_and_tried_again_by_the_running_daemon(
    semwatch, tmp_path, tiny_repository
) -> None:
    site = make_site(tmp_path / "site", tiny_repository, reconcile_s=0.5)
    chosen = ("--site", site.file)
    with Daemon(site) as daemon:
        daemon.wait_ready()
        assert semwatch("quarantine", "list", *chosen, "--json").json == []
        site.put("lot/[b]broken.png", b"no image")
        daemon.wait_for(lambda: status(semwatch, site)["quarantined"] == 1)
        (work,) = semwatch("quarantine", "list", *chosen, "--json").json
        assert work["path"] == "lot/[b]broken.png"
        assert "neither TIFF" in work["reason"]

        shown = work["sha256"][:16]
        listed = semwatch("quarantine", "list", *chosen).words
        assert shown in listed
        assert "[b]broken.png" in listed
        for wrong in ("", "zz"):
            said = semwatch("quarantine", "requeue", *chosen, shown, wrong)
            assert said.code == 2
            assert f"nothing in quarantine fits '{wrong}'" in said.err

        said = semwatch("quarantine", "requeue", *chosen, shown[:8].upper())
        assert (said.code, said.out) == (0, f"queued again: {SOURCE}/lot/[b]broken.png\n")
        daemon.wait_for(lambda: daemon.log().count("broken.png quarantined") == 2)

        site.put("lot/[b]broken.png", png(1))
        daemon.wait_for(lambda: status(semwatch, site)["done"] == 1)
        assert daemon.stop() == 0
    state = status(semwatch, site)
    assert (state["done"], state["quarantined"], state["waiting_files"]) == (1, 1, 0)
    assert semwatch("audit", "verify", site.state / "audit.jsonl").code == 0


def test_requeued_file_that_has_gone_is_asked_for(semwatch, tmp_path, tiny_repository) -> None:
    site = make_site(tmp_path / "site", tiny_repository)
    with Ledger(site.state / "ledger.sqlite") as ledger:
        now_utc = "2026-01-01T00:00:00Z"
        claim = ledger.claim(SOURCE, "gone.png", sha256="ab" * 32, stamp=Stamp(1, 1), now_utc=now_utc)
        ledger.quarantine(claim, "broken", audit={"event": "quarantined"}, now_utc=now_utc)
    said = semwatch("quarantine", "requeue", "--site", site.file, "ab")
    assert said.code == 0
    assert said.out == f"queued again: {SOURCE}/gone.png (is not in the drop folder now: drop it again)\n"
