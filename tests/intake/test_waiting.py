"""Files that wait: the oldest first, each with its own back-off, at the same cost however many there are."""

import math
import random
import time

import pytest

from semwatch.intake.waiting import Waiting
from semwatch.system.files import Stamp


def put(waiting: Waiting, path: str, mtime: int, *, source: str = "a", due_at: float = 0.0, now: float = 0.0) -> None:
    waiting.put((source, path), Stamp(1, mtime), due_at=due_at, now=now)


def take(waiting: Waiting, now: float, limit: int = 1) -> list[str]:
    return [path for source, path in waiting.next(now, limit) if waiting.take((source, path), now) is not None]


def test_nothing_waits() -> None:
    waiting = Waiting()
    assert waiting.next(0.0, 5) == []
    assert waiting.next_at(0.0) == math.inf
    assert waiting.count(0.0) == (0, 0.0)
    waiting.drop([("a", "x")])


def test_oldest_first_over_all_sources_and_none_twice() -> None:
    waiting = Waiting()
    for i, source in enumerate("abab"):
        put(waiting, f"{i}", 10 - i, source=source)
    assert take(waiting, 1.0, 3) == ["3", "2", "1"]
    assert take(waiting, 1.0, 3) == ["0"]
    assert take(waiting, 1.0, 3) == []
    assert waiting.count(1.0) == (0, 1.0)


def test_file_that_comes_again_waits_alone() -> None:
    waiting = Waiting()
    put(waiting, "slow", 1)
    put(waiting, "good", 2)
    assert take(waiting, 0.0) == ["slow"]
    waiting.reschedule(("a", "slow"), not_before=30.0)
    assert take(waiting, 0.0, 5) == ["good"]
    assert waiting.next_at(0.0) == 30.0
    assert take(waiting, 29.9) == []
    assert take(waiting, 30.0) == ["slow"]


def test_source_that_is_held_holds_up_no_other() -> None:
    waiting = Waiting()
    put(waiting, "away", 1)
    put(waiting, "here", 2, source="b")
    waiting.hold("a", 10.0)
    assert take(waiting, 0.0, 5) == ["here"]
    assert waiting.next_at(0.0) == 10.0
    assert take(waiting, 10.0, 5) == ["away"]


def test_file_that_changes_is_due_later_and_keeps_its_age() -> None:
    waiting = Waiting()
    put(waiting, "x", 1, due_at=5.0)
    put(waiting, "x", 2, due_at=9.0, now=4.0)
    assert take(waiting, 8.9) == []
    assert waiting.count(8.9) == (1, 8.9)
    assert take(waiting, 9.0) == ["x"]
    put(waiting, "x", 3, now=9.0)  # in flight: looked at again when it is released
    assert take(waiting, 9.0) == []


def test_file_that_is_not_taken_after_all_is_offered_again() -> None:
    waiting = Waiting()
    put(waiting, "x", 1)
    [key] = waiting.next(0.0, 1)
    waiting.reschedule(key)
    assert waiting.next(0.0, 1) == [key]
    put(waiting, "x", 2, due_at=7.0)
    assert waiting.take(key, 0.0) is None
    assert take(waiting, 7.0) == ["x"]


@pytest.mark.parametrize("seed", range(20))
def test_any_order_of_calls_gives_what_a_plain_list_gives(seed: int) -> None:
    rng, waiting, now = random.Random(seed), Waiting(), 0.0
    plain: dict[str, list[float]] = {}  # mtime, ready at
    flying: set[str] = set()
    for _ in range(400):
        now += rng.random()
        path, what = f"{rng.randrange(12)}", rng.random()
        if what < 0.5 and path not in flying:
            mtime, due_at = rng.randrange(1000), now + rng.choice([0, 0, 3])
            put(waiting, path, mtime, due_at=due_at, now=now)
            plain[path] = [mtime, due_at]
        elif what < 0.6 and path in flying:
            waiting.reschedule(("a", path), not_before=now + 2)
            flying.discard(path)
            plain[path][1] = max(plain[path][1], now + 2)
        elif what < 0.7:
            waiting.drop([("a", path)], in_flight=True)
            flying.discard(path)
            plain.pop(path, None)
        else:
            ready = {p: mtime for p, (mtime, at) in plain.items() if at <= now and p not in flying}
            taken = take(waiting, now)
            assert [ready[p] for p in taken] == sorted(ready.values())[:1]
            flying.update(taken)
        assert waiting.count(now)[0] == len(plain) - len(flying)


def test_hundred_thousand_files_cost_each_what_one_costs() -> None:
    waiting, n = Waiting(), 100_000
    for i in range(n):
        put(waiting, str(i), i * 7919 % n)
    take(waiting, 0.0)  # moves all that are ready
    began = time.process_time()
    for _ in range(1000):
        [path] = take(waiting, 1.0)
        waiting.reschedule(("a", path), not_before=0.5)
        waiting.count(1.0)
        waiting.next_at(1.0)
    assert (time.process_time() - began) / 1000 < 0.001
