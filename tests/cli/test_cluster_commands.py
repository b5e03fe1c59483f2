"""``semwatch clusters``, on a real site with a real ledger and a real model repository."""

import json
import os
import pwd
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import redis
from click.testing import Result
from typer.testing import CliRunner

from cluster_files import SIGNED, T0, found, three
from daemon import make_site
from semwatch.classes.clusters import Clusters, find, pending, replaced
from semwatch.classes.decisions import named
from semwatch.classes.observations import learned, observe
from semwatch.classes.register import ClassRegister
from semwatch.cli import clusters as commands
from semwatch.errors import ConfigError, PublishError, ServiceUnavailable
from semwatch.models import choice, model_repository
from semwatch.models.inference import Embedded
from semwatch.models.relabel import relabel
from semwatch.settings.site import Site, load_site
from semwatch.store.ledger import Ledger
from semwatch.streams.embedded_redis import EmbeddedRedis
from semwatch.streams.handoff import Cycle, Handoff
from semwatch.system.login import login_name

Run = Callable[..., str]


@pytest.fixture
def handoff(client: redis.Redis) -> Handoff:
    return Handoff(client)


@pytest.fixture
def register(handoff: Handoff, tmp_path: Path) -> ClassRegister:
    """Learning's side of the found classes."""
    return ClassRegister(handoff, tmp_path / "learning", owner="cycle")


@pytest.fixture
def site(tmp_path: Path, tiny_repository: Path, server: EmbeddedRedis, register: ClassRegister) -> Site:
    """Head 2 serves bridge as novel-1; novel-2 and novel-3 are proposed."""
    repository = shutil.copytree(tiny_repository, tmp_path / "models")
    relabel(repository, {"bridge": "novel-1"}, {}, utc=T0)
    settings = load_site(make_site(tmp_path / "site", repository, redis_url=server.url).file)
    settings.state_dir.mkdir()
    register.change(lambda _: three())
    return settings


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """``semwatch clusters ARGV... --site ...``; an expected error is raised as it is."""

    def call(*argv: object) -> str:
        answer: Result = CliRunner().invoke(
            commands.app, [*map(str, argv), "--site", str(tmp_path / "site" / "site.yaml")]
        )
        if answer.exception is not None:
            raise answer.exception
        return answer.output

    return call


def labels(site: Site) -> tuple[str, ...]:
    repository = site.models.repository
    return model_repository.read_meta(repository, "head", choice.choice(repository, "head")).labels


def audited(site: Site) -> list[dict[str, Any]]:
    if not (site.state_dir / "ledger.sqlite").exists():
        return []
    with Ledger(site.state_dir / "ledger.sqlite", read_only=True) as ledger:
        return [json.loads(line) for _, line in ledger.audit_after(0, 100)]


def in_one(text: str) -> str:
    return " ".join(text.split())


def test_site_without_clusters_says_where_they_come_from(run, site, handoff) -> None:
    handoff._client.flushall()
    assert "no clusters yet: a learning cycle finds them" in run("list")
    assert json.loads(run("list", "--json")) == {"clusters": [], "pending": [], "conflicts": []}
    for command in (("show", "novel-1"), ("name", "novel-1", "void"), ("merge", "novel-1", "particle"),
                    ("split", "novel-1"), ("reject", "novel-1")):  # fmt: skip
        with pytest.raises(ConfigError, match="no cluster 'novel-1'; there are none yet"):
            run(*command)
    assert audited(site) == []


def test_list_fits_a_terminal_of_80_columns(run, site, register) -> None:
    def named_at_length(c: Clusters) -> Clusters:
        c = observe(c, [found(*range(100, 4000), nearest="defect-free")] * 12, utc=T0)
        return named(c, "novel-12", "residue after strip", 4711, classes=(), **SIGNED)

    register.change(named_at_length)
    said = run("list")
    assert max(map(len, said.splitlines())) <= 80
    assert "waits for the next cycle:\n  novel-12 is residue after strip, code 4711 (ana, " in said
    assert "novel-12" in said
    assert "proposed" in said


def test_list_shows_what_is_no_more_only_on_demand(run, site) -> None:
    run("reject", "novel-2")
    assert [k["id"] for k in json.loads(run("list", "--json"))["clusters"]] == ["novel-1", "novel-3"]
    assert [k["id"] for k in json.loads(run("list", "--json", "--all"))["clusters"]] == [
        "novel-1", "novel-2", "novel-3"
    ]  # fmt: skip
    assert [d["kind"] for d in json.loads(run("list", "--json"))["pending"]] == ["reject"]


def test_show_tells_all_and_draws_the_examples(run, site, register, handoff) -> None:
    k = find(register.read(), "novel-2")
    pictures = [cv2.imencode(".png", np.full((64, 64), 60 + 100 * i, np.uint8))[1].tobytes() for i in range(2)]
    handoff.put_examples("novel-2", dict(zip(k.examples, pictures, strict=True)))
    run("split", "novel-2")
    said = in_one(run("show", "novel-2"))
    for part in ("proposed", "none yet", "6 crops, 6 records", "0.500 (mean silhouette", "bridge, at distance 2",
                 T0, "1 cycle", "novel-2 is split into 2", "waits split"):  # fmt: skip
        assert part in said
    told = json.loads(run("show", "novel-2", "--json"))
    sheet = cv2.imread(told["sheet"], cv2.IMREAD_GRAYSCALE)
    assert sheet.shape[1] == 440
    assert (int(sheet[110, 110]), int(sheet[110, 330])) == (60, 160)
    assert told["members"] == list(k.members)
    assert [d["parts"] for d in told["decisions"]] == [2]


def test_show_without_examples_says_so(run, site) -> None:
    assert "none kept" in run("show", "novel-2")
    assert json.loads(run("show", "novel-2", "--json"))["sheet"] is None


def test_name_of_a_learned_cluster_is_served_at_once(run, site, register) -> None:
    with Embedded(site.models.repository) as models:
        said = run("name", "novel-1", "void", "--code", "12")
        assert "on record: novel-1 is void, code 12 (" in said
        assert "takes effect now: head 3 serves the name" in said
        swap = models.refresh()
        assert swap is not None
        assert (swap.version, swap.refused) == (3, None)
        assert models.meta("head").labels[0] == "void"
        assert dict(models.meta("head").codes) == {"void": 12}
    after = register.read()
    assert (find(after, "novel-1").state, find(after, "novel-1").code) == ("named", 12)
    assert pending(after) == ()
    (line,) = audited(site)
    assert line["by"] == after.decisions[0].by
    assert {key: line[key] for key in ("event", "kind", "cluster", "label", "code", "revision")} == {
        "event": "cluster", "kind": "name", "cluster": "novel-1", "label": "void", "code": 12, "revision": 2
    }  # fmt: skip


def test_name_is_mended_by_its_present_name_and_given_twice_without_harm(run, site) -> None:
    run("name", "novel-1", "viod", "--code", "12")
    assert json.loads(run("name", "viod", "void", "--json"))["head_version"] == 4
    assert labels(site)[0] == "void"
    assert dict(model_repository.read_meta(site.models.repository, "head", 4).codes) == {"void": 12}
    again = json.loads(run("name", "void", "void", "--json"))
    assert (again["head_version"], again["then"]) == (4, "takes effect now: head 4 serves the name")
    assert model_repository.versions(site.models.repository, "head") == [1, 2, 3, 4]
    assert [line["label"] for line in audited(site)] == ["viod", "void", "void"]


def test_name_of_a_proposed_cluster_is_kept_for_the_cycle_that_learns_it(run, site, register) -> None:
    assert "no head knows it yet: it gets this name in the cycle that learns it" in run("name", "novel-2", "void")
    assert model_repository.versions(site.models.repository, "head") == [1, 2]
    after = register.change(lambda c: learned(c, ["novel-2"], 3, T0))
    assert (find(after, "novel-2").state, find(after, "novel-2").label) == ("named", "void")


def test_name_that_a_head_cannot_take_now_is_kept(run, site, register) -> None:
    repository = site.models.repository
    choice.pin(repository, "head", 2)
    assert "head 2 is pinned and goes on as it is" in run("name", "novel-1", "void")
    choice.pin(repository, "head", None)
    choice.roll_back(repository, "head", "a test")
    assert "head 1 does not know this class; the next head that does has the name" in run("name", "void", "void")
    assert model_repository.versions(repository, "head") == [1, 2]
    assert [d.label for d in pending(register.read())] == ["void", "void"]


def test_recipe_that_pins_another_head_is_told(run, site) -> None:
    recipe = site.folders[0].recipe
    recipe.write_text(recipe.read_text() + "pins: {head: 2}\n")
    said = run("name", "novel-1", "void")
    assert "takes effect now: head 3 serves the name; but recipe.yaml pins head 2: change pins.head there" in said


def test_disk_that_refuses_the_head_keeps_the_name_and_the_same_command_mends_it(
    run, site, monkeypatch, register
) -> None:
    with monkeypatch.context() as full:
        full.setattr(tempfile, "tempdir", str(site.state_dir / "nowhere"))  # as with a TMPDIR that is gone
        with pytest.raises(PublishError, match="the name is kept: mend this and give it again"):
            run("name", "novel-1", "void")
    after = register.read()
    assert (find(after, "novel-1").label, labels(site)[0]) == ("void", "novel-1")
    assert [d.kind for d in pending(after)] == ["name"]
    assert "takes effect now: head 3 serves the name" in run("name", "novel-1", "void")
    assert labels(site)[0] == "void"
    assert pending(register.read()) == ()


@pytest.mark.parametrize(
    ("argv", "kind", "words", "then"),
    [
        (("merge", "novel-2", "particle"), "merge", "novel-2 is merged into particle", "learns the crops of both"),
        (("merge", "novel-3", "novel-2"), "merge", "novel-3 is merged into novel-2", "learns the crops of both"),
        (("split", "novel-1", "--parts", 3), "split", "novel-1 is split into 3", "makes the parts"),
        (("reject", "novel-1"), "reject", "novel-1 is rejected", "leaves its crops out"),
    ],
)
def test_other_decisions_wait_for_the_next_cycle(run, site, argv, kind, words, then, register) -> None:
    said = run(*argv)
    assert words in said
    assert then in said
    assert "run `semwatch-train retrain --site " in said
    assert [d.kind for d in pending(register.read())] == [kind]
    assert [line["kind"] for line in audited(site)] == [kind]
    assert model_repository.versions(site.models.repository, "head") == [1, 2]


def test_answers_for_machines(run, site) -> None:
    told = json.loads(run("merge", "novel-2", "particle", "--json"))
    assert (told["kind"], told["cluster"], told["into"], told["revision"]) == ("merge", "novel-2", "particle", 2)
    assert told["then"] == "the next cycle learns the crops of both as one class"
    assert json.loads(run("split", "novel-1", "--json"))["parts"] == 2
    assert json.loads(run("reject", "novel-3", "--json"))["kind"] == "reject"


def test_refused_decision_leaves_no_trace(run, site, handoff) -> None:
    before = handoff.classes()
    for argv in (("name", "novel-1", "particle"), ("merge", "novel-2", "brigde"), ("split", "novel-1", "--parts", "1")):
        with pytest.raises(ConfigError):
            run(*argv)
    assert handoff.classes() == before
    assert audited(site) == []


def test_no_audit_line_no_decision(run, site, handoff) -> None:
    before = handoff.classes()
    (site.state_dir / "ledger.sqlite").write_bytes(b"not a ledger, and long enough to be looked at" * 40)
    with pytest.raises(ConfigError, match="ledger"):
        run("reject", "novel-1")
    assert handoff.classes() == before


def test_decision_beside_a_running_daemon_is_taken(run, site) -> None:
    with Ledger(site.state_dir / "ledger.sqlite"):
        run("reject", "novel-1")
    assert [line["kind"] for line in audited(site)] == ["reject"]


def test_classes_that_a_cycle_holds_are_waited_for(run, site, register) -> None:
    holds, seconds = threading.Event(), 0.4

    def cycle() -> None:
        with register.locked():
            holds.set()
            time.sleep(seconds)

    thread = threading.Thread(target=cycle)
    thread.start()
    assert holds.wait(10)
    start = time.monotonic()
    run("reject", "novel-2")
    assert time.monotonic() - start > seconds / 2
    thread.join(10)
    assert find(register.read(), "novel-2").state == "rejected"


def test_who_decided_is_a_login_name(monkeypatch) -> None:
    monkeypatch.setattr(os, "getlogin", lambda: "ana")
    assert login_name() == "ana"

    def no_terminal() -> str:
        raise OSError

    monkeypatch.setattr(os, "getlogin", no_terminal)
    assert login_name() == pwd.getpwuid(os.getuid()).pw_name
    monkeypatch.setattr(os, "getuid", lambda: 4_000_000_000)
    assert login_name() == "uid 4000000000"


def test_site_without_redis_says_what_to_add(tmp_path, tiny_repository, run) -> None:
    make_site(tmp_path / "site", tiny_repository)
    for command in (("list",), ("show", "novel-1"), ("reject", "novel-1")):
        with pytest.raises(ConfigError, match="no redis section"):
            run(*command)


def test_server_that_is_away_is_a_service_away(tmp_path, tiny_repository, run) -> None:
    make_site(tmp_path / "site", tiny_repository, redis_url="redis://127.0.0.1:1/0")
    with pytest.raises(ServiceUnavailable):
        run("list")


def test_crops_are_taken_out_by_number_or_id_and_wait_for_the_next_cycle(run, site, register) -> None:
    before = find(register.read(), "novel-1")
    other = before.members[5]
    said = run("remove", "novel-1", "2", other[:12])
    assert f"2 crops taken out of novel-1 ({login_name()}" in said
    after = register.read()
    k = find(after, "novel-1")
    assert set(before.members) - set(k.members) == {before.examples[1], other}
    assert (k.size, [d.kind for d in pending(after)]) == (before.size - 2, ["remove"])
    for crops, why in (
        (["nonsense"], "'nonsense' is no crop of novel-1: give a number from 1 to 1"),
        (list(k.members[:6]), "would be left with 2 crops, and a class needs 5: reject it whole"),
    ):
        with pytest.raises(ConfigError, match=why):
            run("remove", "novel-1", *crops)
    assert register.read() == after


def test_cluster_of_two_looks_or_on_hold_is_marked_before_it_is_named(run, site, register) -> None:
    def odd(c: Clusters) -> Clusters:
        two = find(c, "novel-2").model_copy(update={"looks": 2})
        held = find(c, "novel-3").model_copy(update={"on_hold": True})
        return replaced(c, [two, held])

    register.change(odd)
    listed = run("list")
    assert "2?" in listed
    assert "novel-2: its crops look like 2 kinds of defect: look before you name it" in listed
    assert "novel-3: the head that knew it was rolled back" in listed
    assert "but its crops look like 2 kinds of defect" in run("name", "novel-2", "pit")
    run("name", "novel-3", "void")
    assert not find(register.read(), "novel-3").on_hold


def test_corrections_that_contradict_each_other_are_listed(run, site, handoff) -> None:
    handoff.add_cycle(Cycle(utc=T0, outcome="nothing-new", conflicts=("lot/1.png: 'pit' by ana, 'void' by ben",)))
    assert "lot/1.png: 'pit' by ana, 'void' by ben" in run("list")
