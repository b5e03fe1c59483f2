"""Sessions of clumsy naming, merging, splitting, rejecting, taking out and rolling back do no harm."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import pytest
import redis

import sessions
from learning_site import make_lab
from semwatch.streams.embedded_redis import EmbeddedRedis
from semwatch_training.learning import candidates, cycle_report, decisions, outcomes
from sessions import Session

N_SESSIONS = int(os.environ.get("SEMWATCH_SESSIONS", "12"))
"""Of the slow test: some ten seconds of processor time each. 200 say more."""


class Run(Protocol):
    def __call__(self, seed: int, *, undoes: bool = False) -> Session: ...


@pytest.fixture
def session(
    tmp_path: Path, tiny_repository: Path, client: redis.Redis, server: EmbeddedRedis, monkeypatch: pytest.MonkeyPatch
) -> Run:
    """Runs the session of a seed on a site of its own."""
    monkeypatch.setattr(cycle_report, "_png", lambda figure: b"")  # nobody looks
    monkeypatch.setattr(candidates, "SPAN", 4)  # there are three kinds to find

    def run(seed: int, *, undoes: bool = False) -> Session:
        client.flushall()
        lab = make_lab(tmp_path / f"site-{seed}", tiny_repository, client, server.url)
        return sessions.run(lab, seed, undoes=undoes)

    return run


def test_session_of_merging_and_rolling_back_does_no_harm(session: Run) -> None:
    one = session(14)
    assert sessions.harms(one) == [], one.log
    assert {"roll back (2, 1)", "merge novel-1", "remove novel-2", "reject novel-3"} <= set(one.log), one.log


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_many_sessions_do_no_harm(session: Run) -> None:
    found = []
    for seed in range(N_SESSIONS):
        one = session(seed)
        found += [f"{seed}: {line}" for harm in sessions.harms(one) for line in (harm, *one.log)]
    assert not found, "\n".join(found)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_many_sessions_with_second_thoughts_do_no_harm(session: Run) -> None:
    found, undone = [], 0
    for seed in range(N_SESSIONS):
        one = session(seed, undoes=True)
        undone += sum(line.startswith("undo ") and "refused" not in line for line in one.log)
        found += [f"{seed}: {line}" for harm in sessions.harms(one) for line in (harm, *one.log)]
    assert not found, "\n".join(found)
    assert undone >= N_SESSIONS // 2


def no_crops_come_back(*_: object) -> list[str]:
    return []


def nothing_is_undone(c: Any, *_: object) -> Any:
    return c


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("owner", "name", "mistake", "seed", "harm"),
    [
        (outcomes, "lost", no_crops_come_back, 14, "has not learned them"),
        (decisions, "undo_rolled_back", nothing_is_undone, 14, "counts as applied"),
    ],
)
def test_planted_mistake_is_noticed(
    session: Run,
    monkeypatch: pytest.MonkeyPatch,
    owner: Any,
    name: str,
    mistake: Callable[..., Any],
    seed: int,
    harm: str,
) -> None:
    monkeypatch.setattr(owner, name, mistake)
    one = session(seed)
    assert any(harm in found for found in sessions.harms(one)), [*sessions.harms(one), *one.log]
