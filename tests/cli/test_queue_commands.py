"""``semwatch queue`` and the rights it needs, on a real server; the published schemas of both streams."""

import json
import os
import re
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import redis
import yaml

from factories import make_review, make_verdict, messages, result_summary
from semwatch.errors import ServiceUnavailable
from semwatch.streams import queues, records, unknowns
from semwatch.streams.embedded_redis import EmbeddedRedis
from semwatch.streams.handoff import Handoff
from semwatch.streams.records import RESULTS, UNKNOWNS, Fields, Message, Record, decode, encode, pack
from semwatch.streams.unknowns import Consumer, Publisher, connect

REVIEW = make_review(1, verdicts=[make_verdict("unknown")])
DAY_MS = 24 * 3600 * 1000
RIGHTS = re.findall(r"``(~semwatch:\*[^`]*)``", unknowns.__doc__ or "")


@pytest.fixture
def site(server: EmbeddedRedis, tmp_path: Path) -> Path:
    return write_site(tmp_path, {"url": server.url, "timeout_s": 2})


def write_site(folder: Path, server: dict[str, Any] | None) -> Path:
    (folder / "drop").mkdir()
    watched = {"path": "drop", "source": "sem1", "recipe": "recipe.yaml"}
    settings = {"folders": [watched], "results_dir": "results", "state_dir": "state", "models": {"repository": "m"}}
    path = folder / "site.yaml"
    path.write_text(yaml.safe_dump({**settings, "redis": server}))
    return path


def unknown_fields(i: int = 0) -> Fields:
    return encode(replace(records.records(REVIEW)[0], id=f"{i:032x}"))


def unknown_messages(n: int) -> list[Message]:
    return [(UNKNOWNS, f"{i:032x}", pack(unknown_fields(i))) for i in range(n)]


def learner(client: redis.Redis, name: str = "line-1", **options: Any) -> Consumer[Record]:
    return Consumer(client, UNKNOWNS, decode, name=name, **options)


def add_old(client: redis.Redis, stream: str, days: float, fields: Fields) -> str:
    seconds, _ = client.time()
    return client.xadd(f"semwatch:{stream}", fields, id=f"{int(seconds * 1000 - days * DAY_MS)}-1").decode()


# --- stats -----------------------------------------------------------------------------------------------------------


def test_stats_of_an_empty_server_are_zero_and_make_nothing(semwatch, site, client) -> None:
    empty = {"length": 0, "pending": 0, "dead": 0, "oldest_age_s": None, "memory_bytes": None, "readers": []}
    said = semwatch("queue", "stats", "--site", site, "--json")
    assert (said.code, said.json) == (0, {"unknowns": empty, "results": empty})
    assert "unknowns 0 0 0 - -" in semwatch("queue", "stats", "--site", site).words
    assert client.dbsize() == 0


def test_stats_tell_who_holds_what_how_old_it_is_and_what_it_takes(semwatch, site, client, publisher) -> None:
    add_old(client, UNKNOWNS, 2, unknown_fields(99))
    publisher.publish(unknown_messages(5))
    a, b = learner(client, "line-1"), learner(client, "line-[2]")
    (first,) = a.claim(1, min_idle_s=60)
    assert len(b.claim(2, min_idle_s=60)) == 2
    a.dead_letter(first, "black")
    said = semwatch("queue", "stats", "--site", site, "--json").json["unknowns"]
    assert (said["length"], said["pending"], said["dead"]) == (5, 2, 1)
    assert {r["name"]: (r["group"], r["n_pending"]) for r in said["readers"]} == {
        "line-1": ("learners", 0),
        "line-[2]": ("learners", 2),
    }
    assert all(0 <= reader["idle_s"] < 60 for reader in said["readers"])
    assert 0 <= said["oldest_age_s"] < 60  # the entry of two days ago is the dead letter now
    assert 5 * len(pack(unknown_fields())) / 2 < said["memory_bytes"] < 5e6
    assert "line-[2]" in semwatch("queue", "stats", "--site", site).words


def test_age_of_the_oldest_is_by_its_entry(semwatch, site, client) -> None:
    add_old(client, RESULTS, 2, result_summary(REVIEW))
    said = semwatch("queue", "stats", "--site", site, "--json").json["results"]
    assert abs(said["oldest_age_s"] - 2 * DAY_MS / 1000) < 60
    assert "2 d 0 h" in semwatch("queue", "stats", "--site", site).words


# --- tail ------------------------------------------------------------------------------------------------------------


def test_tail_of_nothing_says_nothing(semwatch, site, client) -> None:
    for stream in (UNKNOWNS, RESULTS):
        said = semwatch("queue", "tail", "--site", site, "--stream", stream)
        assert (said.code, said.out) == (0, "")


def test_tail_shows_the_newest_of_many_in_their_order_and_claims_none(semwatch, site, client, publisher) -> None:
    publisher.publish(unknown_messages(150))
    for n in (1, 100):  # one page and two
        said = semwatch("queue", "tail", "--site", site, "-n", n, "--json")
        lines = [json.loads(line) for line in said.out.splitlines()]
        assert [int(line["id"], 16) for line in lines] == list(range(150 - n, 150))
        assert all(line["path"] == "lot7/wafer01/a.tif" and line["kind"] == "unknown" for line in lines)
    assert client.xinfo_groups("semwatch:unknowns") == []
    assert len(semwatch("queue", "tail", "--site", site).out.splitlines()) == 10


def test_tail_says_in_a_line_what_a_person_wants_to_know(semwatch, site, client, publisher) -> None:
    publisher.publish([*unknown_messages(1), *messages(make_review(0, path="lot7/[b].tif"))])
    (line,) = semwatch("queue", "tail", "--site", site).out.splitlines()
    assert line.startswith("2025-03-01T12:00:00Z  unknown  tool-a/lot7/wafer01/a.tif page 0 defect 1  peak ")
    assert line.endswith("nearest particle 0.41 (p 0.420), residue 0.59 (p 0.070)")
    (line,) = semwatch("queue", "tail", "--site", site, "--stream", "results").out.splitlines()
    assert re.fullmatch(r"2025-03-01T12:00:00Z  tool-a/lot7/\[b\]\.tif  score 0\.\d{3}  no defects", line)


def test_tail_says_of_what_cannot_be_read_why(semwatch, site, client) -> None:
    client.xadd("semwatch:unknowns", {"what": "is this"})
    client.xadd("semwatch:unknowns", unknown_fields())
    said = semwatch("queue", "tail", "--site", site)
    assert (said.code, "cannot be read: field features is missing" in said.out) == (0, True)
    first, second = semwatch("queue", "tail", "--site", site, "--json").out.splitlines()
    assert json.loads(first)["error"] == "field features is missing"
    assert "error" not in json.loads(second)


def test_followed_tail_shows_what_comes_once_each_and_ends_in_time(semwatch, site, server, publisher) -> None:
    publisher.publish(unknown_messages(2))
    with connect(server.url) as other:
        later = threading.Timer(0.3, lambda: Publisher(other).publish(unknown_messages(100)))
        later.start()
        said = semwatch("queue", "tail", "--site", site, "--json", "--follow", "--for-s", "2")
        later.join()
    assert [int(json.loads(line)["id"], 16) for line in said.out.splitlines()] == list(range(100))


# --- dead letters ----------------------------------------------------------------------------------------------------

POISON = {
    "another schema": ({b"schema": b"2"}, "this reader knows 1: update semwatch here, then requeue"),
    "truncated crop": ({b"crop_png": unknown_fields()[b"crop_png"][:-30]}, "crop_png is damaged"),
}


@pytest.mark.parametrize("poison", POISON)
def test_poison_becomes_a_dead_letter_with_its_error_and_comes_back_by_requeue(
    semwatch, site, client, publisher, poison
) -> None:
    changes, reason = POISON[poison]
    spoiled = {**unknown_fields(1), **changes}
    publisher.publish([*unknown_messages(1), (UNKNOWNS, f"{1:032x}", pack(spoiled))])
    assert [c.record.id for c in learner(client).claim(5, min_idle_s=60)] == [f"{0:032x}"]
    (letter,) = semwatch("queue", "failed", "--site", site, "--json").json
    assert reason in letter["error"]
    assert (letter["stream"], letter["id"], letter["deliveries"]) == (UNKNOWNS, f"{1:032x}", 1)
    assert 0 <= letter["age_s"] < 60
    (line,) = semwatch("queue", "failed", "--site", site).out.splitlines()
    assert line.startswith(f"unknowns  {1:032x}  1 delivery  dead for ")
    assert line.endswith(reason)
    assert semwatch("queue", "requeue", "--site", site, "--json").json == {"unknowns": 1, "results": 0}
    assert semwatch("queue", "failed", "--site", site, "--json").json == []
    ((_, back),) = client.xrevrange("semwatch:unknowns", count=1)
    assert back == spoiled  # nothing of the letter is left in it
    bytes_reader = Consumer(client, UNKNOWNS, dict, name="that-understands-it")
    assert [claimed.record for claimed in bytes_reader.claim(5, min_idle_s=60)] == [spoiled]


def test_no_dead_letters_are_no_error(semwatch, site, client) -> None:
    assert semwatch("queue", "failed", "--site", site, "--json").json == []
    said = semwatch("queue", "requeue", "--site", site)
    assert (said.code, said.out) == (0, "queued again: 0 of unknowns\nqueued again: 0 of results\n")


def test_requeue_of_one_stream_leaves_the_other(semwatch, site, client) -> None:
    for stream in (UNKNOWNS, RESULTS):
        for _ in range(3):
            client.xadd(f"semwatch:{stream}:dead", {"id": "1", "dead_error": "[bad]", "dead_deliveries": "5"})
    assert semwatch("queue", "requeue", "--site", site, "--stream", "results", "--json").json == {"results": 3}
    left = semwatch("queue", "failed", "--site", site, "--json").json
    assert [(letter["stream"], letter["error"]) for letter in left] == [(UNKNOWNS, "[bad]")] * 3
    said = semwatch("queue", "failed", "--site", site, "-n", "2")
    assert "[bad]" in said.out
    assert "1 more; -n shows" in said.out


# --- purge -----------------------------------------------------------------------------------------------------------


def lengths(client: redis.Redis) -> dict[str, int]:
    return {name: client.xlen(f"semwatch:{name}") for name in ("unknowns", "results", "unknowns:dead", "results:dead")}


@pytest.fixture
def full(client: redis.Redis) -> dict[str, int]:
    """Entries of ten days ago and of now in all four streams; 70 results are more than a page."""
    for i in range(70):
        client.xadd("semwatch:results", {"id": "1"}, id=f"1000-{i}")
    for name in ("unknowns", "unknowns:dead", "results:dead"):
        add_old(client, name, 10, {b"id": b"1"})
    for name in lengths(client):
        client.xadd(f"semwatch:{name}", {"id": "2"})
    return lengths(client)


@pytest.mark.parametrize(
    ("argv", "gone"),
    [
        (["--dead"], {"unknowns:dead": 2, "results:dead": 2}),
        (["--dead", "--older-than-days", "5"], {"unknowns:dead": 1, "results:dead": 1}),
        (["--dead", "--older-than-days", "50"], {"unknowns:dead": 0, "results:dead": 0}),
        (["--results", "--older-than-days", "5"], {"results": 70}),
        (["--results", "--older-than-days", "0"], {"results": 71}),
        (["--unknowns", "--older-than-days", "5"], {"unknowns": 1}),
        (["--unknowns", "--dead"], {"unknowns": 2, "unknowns:dead": 2, "results:dead": 2}),
    ],
)
def test_purge_deletes_what_was_named_and_nothing_else(semwatch, site, client, full, argv, gone) -> None:
    said = semwatch("queue", "purge", *argv, "--site", site, "--yes", "--json")
    assert (said.code, said.json) == (0, gone)
    assert lengths(client) == {name: n - gone.get(name, 0) for name, n in full.items()}
    again = semwatch("queue", "purge", *argv, "--site", site, "--json")  # nothing left: nothing to ask
    assert (again.code, set(again.json.values())) == (0, {0})


@pytest.mark.parametrize("argv", [["--dead"], ["--results", "--older-than-days", "5"], ["--unknowns"]])
def test_purge_without_yes_says_how_many_and_deletes_nothing(semwatch, site, client, full, argv) -> None:
    said = semwatch("queue", "purge", *argv, "--site", site)
    assert said.code == 2
    assert re.search(r"would delete \d+ of \w+.* for good: add --yes", said.err)
    assert lengths(client) == full


@pytest.mark.parametrize(("answer", "code"), [("y", 0), ("n", 1)])
def test_person_at_a_terminal_is_asked(semwatch, site, client, full, monkeypatch, answer, code) -> None:
    ours, theirs = os.openpty()
    with os.fdopen(ours, "wb", buffering=0) as keyboard, os.fdopen(theirs) as terminal:
        monkeypatch.setattr(sys, "stdin", terminal)
        keyboard.write(f"{answer}\n".encode())
        said = semwatch("queue", "purge", "--unknowns", "--site", site)
    assert (said.code, "Delete 2 of unknowns for good?" in said.err) == (code, True)
    assert lengths(client)["unknowns"] == (0 if answer == "y" else full["unknowns"])


@pytest.mark.parametrize("argv", [[], ["--yes"], ["--older-than-days", "5", "--yes"], ["--results", "--yes"]])
def test_purge_of_nothing_named_or_of_all_results_by_omission_is_refused(semwatch, site, client, full, argv) -> None:
    said = semwatch("queue", "purge", *argv, "--site", site)
    assert (said.code, "--older-than-days" in said.words) == (2, True)
    assert lengths(client) == full


def test_purged_entries_are_pending_nowhere(semwatch, site, client, publisher) -> None:
    publisher.publish(unknown_messages(4))
    held = learner(client).claim(3, min_idle_s=60)
    learner(client, group="others").claim(2, min_idle_s=60)
    assert semwatch("queue", "purge", "--unknowns", "--site", site, "--yes").out == "deleted: 4 of unknowns\n"
    stats = queues.stats(client, UNKNOWNS)
    assert (stats.length, stats.pending) == (0, 0)
    assert learner(client).ack(held) == 0


def test_full_server_can_be_purged(semwatch, site, client, full) -> None:
    client.config_set("maxmemory", 1)
    try:
        assert semwatch("queue", "purge", "--results", "--older-than-days", "5", "--site", site, "--yes").code == 0
        assert lengths(client)["results"] == 1
    finally:
        client.config_set("maxmemory", 0)


# --- servers and settings that are not as they should be -------------------------------------------------------------

COMMANDS = [
    ["stats"],
    ["tail"],
    ["tail", "--follow", "--for-s", "0.1"],
    ["failed"],
    ["requeue"],
    ["purge", "--dead", "--yes"],
]


@pytest.mark.parametrize("argv", COMMANDS, ids=" ".join)
def test_server_that_is_away_is_exit_code_four(semwatch, tmp_path, argv) -> None:
    site = write_site(tmp_path, {"url": "redis://127.0.0.1:1/0", "timeout_s": 1})
    said = semwatch("queue", *argv, "--site", site)
    assert (said.code, said.out) == (4, "")
    assert "Redis is away" in said.err


@pytest.mark.parametrize("argv", COMMANDS, ids=" ".join)
def test_site_without_redis_is_exit_code_two(semwatch, tmp_path, argv) -> None:
    said = semwatch("queue", *argv, "--site", write_site(tmp_path, None))
    assert (said.code, "names no Redis server" in said.err) == (2, True)


def test_prefix_of_the_site_is_kept_to(semwatch, server, client, tmp_path) -> None:
    site = write_site(tmp_path, {"url": server.url, "prefix": "fab2"})
    Publisher(client).publish(unknown_messages(1))
    Publisher(client, prefix="fab2").publish(unknown_messages(2))
    assert semwatch("queue", "stats", "--site", site, "--json").json["unknowns"]["length"] == 2
    assert semwatch("queue", "purge", "--unknowns", "--site", site, "--yes", "--json").json == {"unknowns": 2}
    assert client.xlen("semwatch:unknowns") == 1


# --- rights ----------------------------------------------------------------------------------------------------------


def make_user(client: redis.Redis, folder: Path, rules: list[str]) -> dict[str, Any]:
    client.execute_command("ACL", "SETUSER", "limited", "reset", "on", ">pw", *rules)
    (folder / "pw").write_text("pw")
    return {"username": "limited", "password_file": folder / "pw"}


def learn(client: redis.Redis) -> None:
    """Everything that a learner does, on at least five records."""
    mine, other = learner(client, "mine"), learner(client, "other")
    held = mine.claim(4, min_idle_s=60)
    assert len(held) == 4
    taken = other.claim(4, min_idle_s=0)
    assert {item.n_deliveries for item in taken} == {1}, "a delivery soon after the one before does not count"
    assert other.give_back(taken[:1]) == 1
    assert other.dead_letter(taken[1], "why")
    assert other.ack(taken[2:]) == 2
    assert len(other.dead()) == 1
    assert other.requeue_dead() == 1
    assert len(mine.claim(9, min_idle_s=60, block_s=0.05)) == 1  # what was given back
    handoff = Handoff(client)
    with handoff.locked("cycle", wait_s=0, hold_s=1):
        assert handoff.append_classes(1, b"{}")
    assert handoff.serving("site") is None


def test_documented_rights_of_a_learner_are_enough_and_each_is_needed(server, client, tmp_path) -> None:
    _, rules, _ = (line.split() for line in RIGHTS)
    url = server.url.removesuffix("0") + "1"  # a database that has to be selected
    # Of +@connection a learner's driver only says CLIENT SETINFO, and goes on where it may not.
    spared = {"+@connection"}
    if int(client.info("server")["redis_version"].split(".")[0]) >= 7:
        spared.add("+select")  # in +@connection since
    for missing in (None, *sorted(set(rules) - spared)):
        client.flushall()
        user = make_user(client, tmp_path, [rule for rule in rules if rule != missing])
        with connect(url) as other:
            Publisher(other).publish(unknown_messages(5))
        with connect(url, **user) as mine:
            if missing is None:
                learn(mine)
            else:
                with pytest.raises(ServiceUnavailable, match="ACL"):
                    learn(mine)


def test_documented_rights_of_an_operator_are_enough_for_every_command(
    semwatch, server, client, publisher, tmp_path
) -> None:
    _, _, rules = (line.split() for line in RIGHTS)
    make_user(client, tmp_path, rules)
    site = write_site(tmp_path, {"url": server.url, "username": "limited", "password_file": "pw"})
    publisher.publish([*unknown_messages(3), *messages(REVIEW)])
    consumer = learner(client)
    consumer.dead_letter(consumer.claim(1, min_idle_s=60)[0], "why")
    stats = semwatch("queue", "stats", "--site", site, "--json").json
    assert stats["unknowns"]["memory_bytes"] > 0
    assert len(stats["unknowns"]["readers"]) == 1
    for argv in (*COMMANDS, ["purge", "--unknowns", "--results", "--older-than-days", "0", "--yes"]):
        assert semwatch("queue", *argv, "--site", site).code == 0, argv
    assert lengths(client) == {"unknowns": 0, "results": 0, "unknowns:dead": 0, "results:dead": 0}


def test_operator_without_the_right_to_memory_sees_all_the_rest(semwatch, server, client, publisher, tmp_path) -> None:
    _, _, rules = (line.split() for line in RIGHTS)
    make_user(client, tmp_path, [rule for rule in rules if rule != "+memory|usage"])
    site = write_site(tmp_path, {"url": server.url, "username": "limited", "password_file": "pw"})
    publisher.publish(unknown_messages(3))
    said = semwatch("queue", "stats", "--site", site, "--json").json["unknowns"]
    assert (said["length"], said["memory_bytes"]) == (3, None)


def test_operator_without_rights_is_told_so(semwatch, server, client, tmp_path) -> None:
    make_user(client, tmp_path, ["~semwatch:*", "+@connection"])
    site = write_site(tmp_path, {"url": server.url, "username": "limited", "password_file": "pw"})
    for argv in COMMANDS:
        said = semwatch("queue", *argv, "--site", site)
        assert (said.code, "the user's ACL" in said.err) == (4, True), argv


# --- what is published: schemas ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [UNKNOWNS, RESULTS, records.CORRECTIONS])
def test_published_record_schemas_are_the_dataclasses_own(stream: str) -> None:
    assert records.SCHEMA_PATHS[stream].read_text() == records.schema_text(stream), records.schema_text.__doc__


def test_written_records_satisfy_the_published_schemas() -> None:
    for stream, fields in ((UNKNOWNS, unknown_fields()), (RESULTS, result_summary(REVIEW))):
        schema = json.loads(records.SCHEMA_PATHS[stream].read_text())
        jsonschema.Draft202012Validator.check_schema(schema)
        meta = json.loads(fields[b"meta"])
        jsonschema.validate(meta, schema)
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({key: value for key, value in meta.items() if key != "sha256"}, schema)


def test_short_side_of_the_field_is_without_info_bar_and_records_of_before_still_decode() -> None:
    (record,) = records.records(make_review(1, verdicts=[make_verdict("unknown")], size_hw=(300, 280), info_bar_px=40))
    assert record.field_short_px == 260
    fields = encode(record)
    assert decode(fields).field_short_px == 260
    meta = json.loads(fields[b"meta"])
    del meta["field_short_px"]
    jsonschema.validate(meta, json.loads(records.SCHEMA_PATHS[UNKNOWNS].read_text()))
    assert decode({**fields, b"meta": json.dumps(meta).encode()}).field_short_px is None
    with pytest.raises(ValueError, match="field_short_px"):
        decode({**fields, b"meta": json.dumps({**meta, "field_short_px": 0}).encode()})
