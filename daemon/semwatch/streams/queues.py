"""The operator's view of the two streams: what is in them, and clearing them. Nothing here claims an entry.

Only commands of Redis 6.2, 7.x and Valkey; what a server does not tell is None. A stream's own words: an entry is
*pending* once it was handed out or given back, until it is acknowledged, and then it is gone.
"""

from dataclasses import dataclass
from typing import Any

import redis

from semwatch.streams.records import Fields
from semwatch.streams.unknowns import PREFIX, redis_key, translated

_PAGE = 64  # entries of one answer; a record has about 50 kB


@dataclass(frozen=True, slots=True)
class Reader:
    """One consumer as the server knows it; ``given-back`` is nobody: work lies there that anybody may take at once."""

    group: str
    name: str
    n_pending: int
    idle_s: float
    """Since it last asked for anything."""


@dataclass(frozen=True, slots=True)
class Stats:
    """How one stream stands."""

    length: int
    """Entries that nobody has acknowledged: waiting and handed out."""
    pending: int
    """Of these, handed out or given back."""
    dead: int
    oldest_age_s: float | None
    """Age of the oldest entry; None where there is none."""
    memory_bytes: int | None
    """What the stream takes of the server's memory; None where the server does not tell."""
    readers: tuple[Reader, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Entry:
    """One entry, looked at and not claimed."""

    entry_id: str
    fields: Fields


def stats(client: redis.Redis, stream: str, *, prefix: str = PREFIX) -> Stats:
    """Measure one stream (``records.UNKNOWNS`` or ``RESULTS``); the figures are asked one after the other.

    Raises:
        ServiceUnavailable: Redis is away.
        ConfigError: Redis refuses us.
    """
    key = redis_key(prefix, stream)
    with translated():
        length = int(client.xlen(key))
        groups = _groups(client, key)
        readers = tuple(reader for name in groups for reader in _readers(client, key, name))
        oldest: Any = client.xrange(key, count=1)
        return Stats(
            length=length,
            pending=sum(groups.values()),
            dead=int(client.xlen(redis_key(key, "dead"))),
            oldest_age_s=_now_s(client) - _seconds(oldest[0][0].decode()) if oldest else None,
            memory_bytes=_memory(client, key),
            readers=readers,
        )


def now_s(client: redis.Redis) -> float:
    """Ask for the server's clock, by which entries are numbered, in seconds since 1970.

    Raises:
        ServiceUnavailable: Redis is away.
        ConfigError: Redis refuses us.
    """
    with translated():
        return _now_s(client)


def age_s(entry_id: str, now_s: float) -> float:
    """Say how long ago an entry was added.

    >>> age_s("1700000000500-3", 1700000002.0)
    1.5
    """
    return now_s - _seconds(entry_id)


def newest(client: redis.Redis, stream: str, n: int, *, prefix: str = PREFIX) -> list[Entry]:
    """Read the last ``n`` entries, oldest of them first.

    Raises:
        ServiceUnavailable: Redis is away.
        ConfigError: Redis refuses us.
    """
    found: list[Entry] = []
    end = "+"
    while len(found) < n:
        with translated():
            page: Any = client.xrevrange(redis_key(prefix, stream), max=end, count=min(n - len(found), _PAGE))
        if not page:
            break
        found += _entries(page)
        end = f"({found[-1].entry_id}"
    return found[::-1]


def after(client: redis.Redis, stream: str, entry_id: str, *, prefix: str = PREFIX) -> list[Entry]:
    """Read the next entries behind one, oldest first, a page at most; "0-0" begins at the first.

    Raises:
        ServiceUnavailable: Redis is away.
        ConfigError: Redis refuses us.
    """
    with translated():
        page: Any = client.xrange(redis_key(prefix, stream), min=f"({entry_id}", count=_PAGE)
    return _entries(page)


# --- clearing --------------------------------------------------------------------------------------------------------

# KEYS: stream. ARGV: first id, last id, n, 'delete' or 'count'. Every group forgets what is deleted, or it would stay
# pending. Not XTRIM: that leaves it pending, and counts nothing beforehand.
_SWEEP = """
local entries = redis.call('XRANGE', KEYS[1], ARGV[1], ARGV[2], 'COUNT', ARGV[3])
local groups, last = {}, ''
if ARGV[4] == 'delete' and #entries > 0 then groups = redis.call('XINFO', 'GROUPS', KEYS[1]) end
for _, entry in ipairs(entries) do
  last = entry[1]
  if ARGV[4] == 'delete' then
    for _, group in ipairs(groups) do redis.call('XACK', KEYS[1], group[2], last) end
    redis.call('XDEL', KEYS[1], last)
  end
end
return {#entries, last}
"""


def last_older_than(client: redis.Redis, stream: str, days: float, *, prefix: str = PREFIX) -> str | None:
    """Return the newest entry added more than ``days`` ago, by the server's clock; None where there is none.

    ``stream`` may also be that of dead letters, ``"unknowns:dead"``.

    Raises:
        ServiceUnavailable: Redis is away.
        ConfigError: Redis refuses us.
    """
    with translated():
        before_ms = max(int((_now_s(client) - days * 86400) * 1000), 0)
        end = f"({before_ms}-0" if days > 0 else "+"
        found: Any = client.xrevrange(redis_key(prefix, stream), max=end, count=1) if before_ms else []
    return found[0][0].decode() if found else None


def count(client: redis.Redis, stream: str, last_id: str, *, prefix: str = PREFIX) -> int:
    """Count the entries up to one, that one included.

    Raises:
        ServiceUnavailable: Redis is away.
        ConfigError: Redis refuses us.
    """
    return _sweep(client, redis_key(prefix, stream), last_id, "count")


def purge(client: redis.Redis, stream: str, last_id: str, *, prefix: str = PREFIX) -> int:
    """Delete the entries up to one, that one included, acknowledged or not; return how many. There is no way back.

    Raises:
        ServiceUnavailable: Redis is away; some may be gone, call again.
        ConfigError: Redis refuses us.
    """
    return _sweep(client, redis_key(prefix, stream), last_id, "delete")


def _sweep(client: redis.Redis, key: str, last_id: str, what: str) -> int:
    total, first = 0, "-"
    while True:
        with translated():
            n, last = client.eval(_SWEEP, 1, key, first, last_id, _PAGE, what)
        if not n:
            return total
        total += n
        first = f"({last.decode()}"


# --- asking the server -----------------------------------------------------------------------------------------------


def _groups(client: redis.Redis, key: str) -> dict[str, int]:
    """Pending entries by group; {} where there is no stream yet."""
    try:
        found: Any = client.xinfo_groups(key)
    except redis.ResponseError as error:
        if "no such key" not in str(error):
            raise
        return {}
    return {group["name"].decode("utf-8", "backslashreplace"): group["pending"] for group in found}


def _readers(client: redis.Redis, key: str, group: str) -> list[Reader]:
    found: Any = client.xinfo_consumers(key, group)
    return [Reader(group, c["name"].decode("utf-8", "backslashreplace"), c["pending"], c["idle"] / 1000) for c in found]


def _memory(client: redis.Redis, key: str) -> int | None:
    try:
        answer: Any = client.memory_usage(key)
    except redis.ResponseError:  # no right to it, or a server that has it not
        return None
    return None if answer is None else int(answer)


def _now_s(client: redis.Redis) -> float:
    seconds, microseconds = client.time()
    return float(seconds + microseconds / 1e6)


def _seconds(entry_id: str) -> float:
    return int(entry_id.partition("-")[0]) / 1000


def _entries(page: Any) -> list[Entry]:
    return [Entry(id_.decode(), fields) for id_, fields in page]
