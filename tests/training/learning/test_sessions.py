"""Sessions of clumsy naming, merging, splitting, rejecting, taking out and rolling back do no harm."""

import os
from pathlib import Path

import pytest
import redis

import sessions
from learning_site import make_lab
from semwatch.streams.embedded_redis import EmbeddedRedis
from semwatch_training.learning import candidates, cycle_report


@pytest.fixture
def session(tmp_path: Path, tiny_repository: Path, client: redis.Redis, server: EmbeddedRedis, monkeypatch):
    monkeypatch.setattr(cycle_report, "_png", lambda figure: b"")  # nobody looks
    monkeypatch.setattr(candidates, "SPAN", 4)  # there are three kinds to find

    def run(seed: int) -> sessions.Session:
        client.flushall()
        return sessions.run(make_lab(tmp_path / f"site-{seed}", tiny_repository, client, server.url), seed)

    return run


def test_session_does_no_harm(session) -> None:
    for seed in range(
        int(os.environ.get("SEMWATCH_FIRST_SESSION", "0")), int(os.environ.get("SEMWATCH_SESSIONS", "2"))
    ):
        one = session(seed)
        found = sessions.harms(one)
        if os.environ.get("SEMWATCH_SESSION_LOG"):
            print(seed, found, *one.log, sep="\n   ", flush=True)
        assert found == [] or os.environ.get("SEMWATCH_SESSION_LOG"), [seed, *one.log]
