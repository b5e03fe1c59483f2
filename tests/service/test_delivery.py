"""What leaves the ledger; the ends it leaves for are in test_unknowns and test_audit, the whole way in test_service."""

import json
from pathlib import Path

import pytest

from semwatch.service import delivery
from semwatch.service.delivery import Backoff, deliver_audit
from semwatch.store.audit import AuditLog, verify
from semwatch.store.ledger import Ledger


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
