"""What daemon and learning exchange, on a real Redis: nothing of it is lost, doubled or taken from another."""

import threading
import time

import pytest
import redis

from semwatch.errors import ServiceUnavailable
from semwatch.streams import handoff as handoff_module
from semwatch.streams.embedded_redis import EmbeddedRedis
from semwatch.streams.handoff import Cycle, Handoff, Serving, Wish, wish_message
from semwatch.streams.unknowns import Publisher, connect

UTC = "2026-03-01T08:00:00Z"
SERVING = Serving(site="fab-1", utc=UTC, versions={"head": 3}, refused_heads={2: "its probe differs"})
WISH = Wish(site="fab-1", source="sem-1", utc=UTC, sentence="unknown rate rose")


@pytest.fixture
def handoff(client: redis.Redis) -> Handoff:
    return Handoff(client)


def test_nothing_was_exchanged_yet(handoff: Handoff) -> None:
    assert handoff.serving("fab-1") is None
    assert handoff.wishes() == {}
    assert handoff.last_cycle() is None
    assert handoff.classes() is None
    assert handoff.examples("novel-1") == {}
    handoff.answer([])


# --- what serves -----------------------------------------------------------------------------------------------------


def test_what_serves_is_known_until_the_daemon_ends_or_dies(handoff: Handoff, client: redis.Redis) -> None:
    handoff.announce(SERVING)
    assert handoff.serving("fab-1") == SERVING
    assert handoff.serving("fab-2") is None
    assert 0 < client.ttl("semwatch:serving:fab-1") <= handoff_module.SERVING_TTL_S
    handoff.end_service("fab-1")
    time.sleep(0.05)
    assert handoff.serving("fab-1") is None


def test_foreign_content_is_a_service_away_that_says_what_to_do(handoff: Handoff, client: redis.Redis) -> None:
    client.set("semwatch:serving:fab-1", "[1, 2")
    with pytest.raises(ServiceUnavailable, match="prefix of its own"):
        handoff.serving("fab-1")
    client.set("semwatch:wishes", "no stream")
    with pytest.raises(ServiceUnavailable, match="choose another"):
        handoff.wishes()


# --- wishes ----------------------------------------------------------------------------------------------------------


def test_wish_through_the_outbox_stands_once_until_it_is_answered(handoff: Handoff, client: redis.Redis) -> None:
    message, later = wish_message(WISH), wish_message(WISH.model_copy(update={"sentence": "scores drifted"}))
    publisher = Publisher(client)
    publisher.publish([message])
    publisher.publish([message, later])
    found = handoff.wishes()
    assert [wish.sentence for wish in found.values()] == ["unknown rate rose", "scores drifted"]
    handoff.answer(list(found)[:1])
    assert [wish.sentence for wish in handoff.wishes().values()] == ["scores drifted"]


# --- cycles and examples ---------------------------------------------------------------------------------------------


def test_last_cycle_is_the_newest_and_old_ones_leave(handoff: Handoff, client: redis.Redis) -> None:
    for number in range(handoff_module.MAX_CYCLES + 3):
        handoff.add_cycle(Cycle(utc=UTC, outcome="published", version=number + 1, unknowns={"waiting": number}))
    assert handoff.last_cycle() == Cycle(utc=UTC, outcome="published", version=103, unknowns={"waiting": 102})
    assert client.xlen("semwatch:cycles") == handoff_module.MAX_CYCLES


def test_examples_are_the_last_ones_that_were_given(handoff: Handoff) -> None:
    handoff.put_examples("novel-1", {"a" * 32: b"png a", "b" * 32: b"png b"})
    handoff.put_examples("novel-2", {"d" * 32: b"png d"})
    handoff.put_examples("novel-1", {"c" * 32: b"png c"})
    assert handoff.examples("novel-1") == {"c" * 32: b"png c"}
    handoff.put_examples("novel-1", {})
    assert handoff.examples("novel-1") == {}
    assert handoff.examples("novel-2") == {"d" * 32: b"png d"}


# --- the state of the found classes ----------------------------------------------------------------------------------


def test_only_the_next_revision_is_taken(handoff: Handoff, client: redis.Redis) -> None:
    assert handoff.append_classes(1, b"one")
    assert not handoff.append_classes(1, b"another one")
    assert not handoff.append_classes(3, b"three")
    assert handoff.append_classes(2, b"two")
    assert handoff.classes() == b"two"
    assert not handoff.append_classes(2, b"jumped", jumps=True)
    assert handoff.append_classes(9, b"nine", jumps=True)
    assert handoff.classes() == b"nine"
    for revision in range(10, 10 + handoff_module.MAX_STATES):
        assert handoff.append_classes(revision, b"%d" % revision)
    assert client.xlen("semwatch:classes") == handoff_module.MAX_STATES


def test_of_many_writers_of_one_revision_one_wins(server: EmbeddedRedis, client: redis.Redis) -> None:
    won: list[int] = []

    def write(number: int) -> None:
        with Handoff(connect(server.url)) as mine:
            if mine.append_classes(1, b"%d" % number):
                won.append(number)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(won) == 1
    assert Handoff(client).classes() == b"%d" % won[0]


# --- the lock --------------------------------------------------------------------------------------------------------


def test_lock_keeps_others_out_and_is_free_afterwards(handoff: Handoff) -> None:
    with (
        handoff.locked("cycle", wait_s=0, hold_s=10),
        pytest.raises(ServiceUnavailable, match="another process is changing"),
        handoff.locked("person", wait_s=0.1, hold_s=10),
    ):
        pass
    time.sleep(0.05)
    with handoff.locked("person", wait_s=0, hold_s=10):
        pass


def test_lock_of_a_dead_owner_is_taken_over_by_its_next_life_and_free_in_time(handoff: Handoff) -> None:
    dead = handoff.locked("cycle", wait_s=0, hold_s=0.4)
    dead.__enter__()  # and never leaves
    with handoff.locked("cycle", wait_s=0, hold_s=0.4):
        pass
    dead = handoff.locked("cycle", wait_s=0, hold_s=0.4)
    dead.__enter__()
    start = time.monotonic()
    with handoff.locked("person", wait_s=5, hold_s=1):
        assert time.monotonic() - start > 0.2


def test_owner_whose_time_ran_out_does_not_free_the_lock_of_another(handoff: Handoff) -> None:
    with handoff.locked("slow", wait_s=0, hold_s=0.1):
        time.sleep(0.2)
        held = handoff.locked("person", wait_s=1, hold_s=10)
        held.__enter__()
    with pytest.raises(ServiceUnavailable), handoff.locked("third", wait_s=0.1, hold_s=1):
        pass


# --- rights, and a server that is away -------------------------------------------------------------------------------


def test_rights_of_a_learner_suffice(server: EmbeddedRedis, client: redis.Redis) -> None:
    client.execute_command(
        "ACL", "SETUSER", "learner", "reset", "on", ">pw", "~semwatch:*", "+@stream", "+@connection", "+eval", "+set",
        "+get",
    )  # fmt: skip
    url = server.url.replace("redis://", "redis://learner:pw@")
    mine = Handoff(redis.Redis.from_url(url, protocol=2))
    mine.announce(SERVING)
    mine.end_service("fab-1")
    mine.add_cycle(Cycle(utc=UTC, outcome="refused", reasons=("purity",)))
    mine.put_examples("novel-1", {"a" * 32: b"png"})
    with mine.locked("cycle", wait_s=0, hold_s=1):
        assert mine.append_classes(1, b"one")
    assert (mine.wishes(), mine.classes(), list(mine.examples("novel-1"))) == ({}, b"one", ["a" * 32])
    mine.answer(["1-1"])
    mine.close()


def test_server_that_is_away_is_a_service_away() -> None:
    nowhere = Handoff(connect("redis://127.0.0.1:1/0", timeout_s=1))
    for call in (nowhere.wishes, nowhere.classes, nowhere.last_cycle, lambda: nowhere.announce(SERVING)):
        with pytest.raises(ServiceUnavailable):
            call()
