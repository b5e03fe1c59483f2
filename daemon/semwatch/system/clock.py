"""The time as everything on disk and on the wire has it: ISO 8601, UTC, whole seconds, ``Z``."""

from datetime import UTC, datetime

FORMAT = "%Y-%m-%dT%H:%M:%SZ"


def utc_now() -> str:
    """The time now."""
    return utc_of(datetime.now(UTC))


def utc_of(moment: datetime) -> str:
    """A moment in UTC.

    >>> utc_of(datetime(2026, 3, 1, 8, 0, 5, tzinfo=UTC))
    '2026-03-01T08:00:05Z'
    """
    return moment.strftime(FORMAT)


def moment_of(utc: str) -> datetime:
    """The moment that ``utc_of`` wrote.

    >>> moment_of("2026-03-01T08:00:05Z").second
    5

    Raises:
        ValueError: it is not written so.
    """
    return datetime.strptime(utc, FORMAT).replace(tzinfo=UTC)
