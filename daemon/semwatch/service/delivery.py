"""What leaves the ledger: messages for Redis, lines for the audit log, each repeated until it is confirmed.

Both ends take a repetition as one: Redis by the message's id, the audit log by the line's number.
"""

import json
import time

from semwatch.settings.site import Site
from semwatch.store.audit import AuditLog
from semwatch.store.ledger import Ledger
from semwatch.streams import unknowns
from semwatch.streams.handoff import Handoff, open_handoff
from semwatch.streams.unknowns import Publisher

BATCH = 100
MAX_BACKOFF_S = 30.0
SAY_AGAIN_S = 60.0
"""Seconds after which a service that is still away is said again."""


class Backoff:
    """How long to leave a service alone: 0.5, 1, 2 ... 30 s after failures in a row."""

    def __init__(self) -> None:
        self._n_failures, self._until, self._say_again = 0, 0.0, 0.0

    def failed(self) -> bool:
        """Note a failure; True where it is to be said: for the first in a row, and once a minute after it."""
        now = time.monotonic()
        self._n_failures += 1
        self._until = now + min(MAX_BACKOFF_S, 0.25 * 2 ** min(self._n_failures, 30))
        is_due = self._n_failures == 1 or now >= self._say_again
        if is_due:
            self._say_again = now + SAY_AGAIN_S
        return is_due

    def worked(self) -> bool:
        """Note a success; True where it ends a row of failures."""
        had_failed = self._n_failures > 0
        self._n_failures, self._until = 0, 0.0
        return had_failed

    @property
    def is_down(self) -> bool:
        """Whether the last try failed."""
        return self._n_failures > 0

    def left_s(self) -> float:
        """Seconds until the next try."""
        return max(0.0, self._until - time.monotonic())

    def is_waiting(self) -> bool:
        """Say whether the service is left alone now."""
        return time.monotonic() < self._until


def connect_publisher(site: Site) -> Publisher | None:
    """The producer's end of the streams; None where the site has no Redis."""
    redis = site.redis
    if redis is None:
        return None
    client = unknowns.connect(
        redis.url,
        username=redis.username,
        password_file=redis.password_file,
        ca_file=redis.ca_file,
        timeout_s=redis.timeout_s,
    )
    return Publisher(client, prefix=redis.prefix)


def connect_handoff(site: Site) -> Handoff | None:
    """Where the daemon's side of a site meets learning; None where the site has no Redis."""
    redis = site.redis
    if redis is None:
        return None
    return open_handoff(
        redis.url,
        prefix=redis.prefix,
        username=redis.username,
        password_file=redis.password_file,
        ca_file=redis.ca_file,
        timeout_s=redis.timeout_s,
    )


def publish_outbox(ledger: Ledger, publisher: Publisher) -> None:
    """Publish what the outbox holds, a batch at a time, and mark it published.

    Raises:
        ServiceUnavailable: Redis is away; nothing is lost, nothing is published twice under one id.
    """
    while batch := ledger.unpublished(BATCH):
        publisher.publish([(item.stream, item.id, item.payload) for _, item in batch])
        ledger.mark_published([seq for seq, _ in batch])


def deliver_audit(ledger: Ledger, audit: AuditLog) -> None:
    """Append the ledger's audit lines to the audit log; a line is there exactly once, whatever crashed between."""
    while lines := ledger.audit_after(audit.last_seq, BATCH):
        audit.append([(seq, json.loads(text)) for seq, text in lines])
        ledger.forget_audit(audit.last_seq)
