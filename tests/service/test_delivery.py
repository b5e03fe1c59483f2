"""What leaves the ledger; the ends it leaves for are in test_unknowns and test_audit, the whole way in test_service."""

import json
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest

from daemon import make_site
from semwatch.service import delivery
from semwatch.service.delivery import Backoff, deliver_audit
from semwatch.service.loop import Service
from semwatch.settings.site import load_site
from semwatch.store.audit import AuditLog, verify
from semwatch.store.ledger import Ledger
from semwatch.streams.embedded_redis import EmbeddedRedis


def test_service_is_left_alone_longer_after_each_failure_up_to_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(delivery.time, "monotonic", lambda: now)
    away = Backoff()
    assert not away.is_waiting()
    waits = []
    said = -delivery.SAY_AGAIN_S
    for _ in range(12):
        is_due = now >= said + delivery.SAY_AGAIN_S
        assert away.failed() is is_due, "said at first, and once a minute after it"
        start = now
        said = now if is_due else said
        while away.is_waiting():
            now += 0.25
        waits.append(now - start)
    assert waits == [0.5, 1, 2, 4, 8, 16, *[delivery.MAX_BACKOFF_S] * 6]
    away.worked()
    assert away.failed() is True


def test_redis_that_stays_away_is_logged_once_a_minute_and_again_the_next_time(
    tmp_path: Path,
    tiny_repository: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    now = 100.0
    monkeypatch.setattr(delivery, "time", SimpleNamespace(monotonic=lambda: now))
    caplog.set_level(logging.INFO)
    server = EmbeddedRedis(tmp_path / "redis", port=None)
    server.start()
    site = make_site(tmp_path / "site", tiny_repository, redis_url=server.url)

    def deliver(service: Service, seconds: float) -> list[str]:
        nonlocal now
        caplog.clear()
        for _ in range(int(seconds / 0.5)):
            service._presence._next = 0.0  # so that every delivery has something to say
            service._deliver()
            now += 0.5
        return [record.message for record in caplog.records if record.levelname in ("WARNING", "ERROR")]

    service = Service(load_site(site.file))
    try:
        assert deliver(service, 2) == []
        server.stop()
        away = deliver(service, 600)
        assert 9 <= len(away) <= 10
        assert all("records wait in the outbox" in message for message in away)
        server.start()
        assert deliver(service, delivery.MAX_BACKOFF_S + 1) == []
        assert "Redis takes records again" in [record.message for record in caplog.records]
        server.stop()
        assert len(deliver(service, 5)) == 1
    finally:
        server.stop()
        service._open.close()


def test_audit_lines_are_appended_once_however_often_they_are_handed_over(tmp_path: Path) -> None:
    n = delivery.BATCH + 5
    with Ledger(tmp_path / "ledger.sqlite") as ledger, AuditLog(tmp_path / "audit.jsonl") as log:
        deliver_audit(ledger, log)  # nothing yet
        for i in range(n):
            ledger.note(audit={"event": "note", "i": i})
        forget = ledger.forget_audit
        ledger.forget_audit = lambda _: None  # type: ignore[method-assign]  # as if it died before it could
        deliver_audit(ledger, log)
        ledger.forget_audit = forget  # type: ignore[method-assign]
        deliver_audit(ledger, log)
    lines = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
    assert [line["i"] for line in lines] == list(range(n))
    assert verify(tmp_path / "audit.jsonl").ok
