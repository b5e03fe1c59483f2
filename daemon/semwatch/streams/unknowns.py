"""The two Redis streams: what the daemon adds, what consumers claim, and every key.

With the prefix ``semwatch``:

    semwatch:unknowns        stream of records (``records.py``), read by the group ``learners``
    semwatch:results         stream of result summaries, one per file, for whoever wants them
    semwatch:unknowns:dead   stream of dead letters: the record's fields + dead_error, dead_deliveries, dead_entry
    semwatch:results:dead    the same for results
    semwatch:sent:<id>       string with a time to live: this id has been added (3 days by default)

The streams are never trimmed: an entry is deleted when it is acknowledged, and a full server (``noeviction``) pushes
back. What belongs together happens in one Lua script, so a crash leaves either all or nothing; only commands of Redis
6.2 are used; 7.x and Valkey have them too. One server, with or without Sentinel: in a Redis Cluster the keys of a
script would lie on different nodes. An ACL user needs
``~semwatch:* +@stream +@connection +select +eval +set +get +exists``;
one who only learns or consumes needs
``~semwatch:* +@stream +@connection +select +eval +set +get``;
an operator of ``semwatch queue`` needs
``~semwatch:* +@stream +@connection +select +eval +set +get +time +memory|usage`` (without the last, ``stats`` says no
memory).
``+select`` is for an address with a database other than 0.
"""

import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import redis
from redis.backoff import ConstantBackoff
from redis.retry import Retry

from semwatch.errors import ConfigError, SemwatchError, ServiceUnavailable
from semwatch.streams.records import DOUBTFUL, RESULTS, UNKNOWNS, Fields, Message, fault_of, unpack

logger = logging.getLogger(__name__)

SENT_TTL_S = 3 * 24 * 3600
MOST = {DOUBTFUL: 1000}
"""Entries that a stream keeps, the oldest go first: of doubtful crops learning needs the newest, some 50 MB."""
LEARNERS = "learners"
"""The group that learning reads with."""
PREFIX, TIMEOUT_S = "semwatch", 5.0
"""Where nothing is said; a site's settings say the same."""

Client = redis.Redis
"""A connection, for the signatures of those who may not import the driver."""
T = TypeVar("T")

_BATCH_BYTES = 4 << 20
_BATCH_MESSAGES = 64
_BLOCK_MS = 200  # shorter than any socket timeout that connect() sets
_GIVEN_BACK = "given-back"  # the consumer in whose name returned work waits


# --- the server ------------------------------------------------------------------------------------------------------


def connect(
    url: str,
    *,
    username: str | None = None,
    password_file: Path | None = None,
    ca_file: Path | None = None,
    timeout_s: float = TIMEOUT_S,
) -> redis.Redis:
    """Make a client of ``redis://``, ``rediss://`` (TLS) or ``unix://``; it connects when it is first used.

    A call is tried twice and gives up after about ``timeout_s`` (one second at least).

    Raises:
        ConfigError: The address or the password file cannot be used.
    """
    attempt_s = max(timeout_s / 2, 0.5)
    options: dict[str, Any] = {"ssl_ca_certs": str(ca_file)} if ca_file is not None else {}
    try:
        credentials = _Credentials(username, password_file)
        if password_file is not None:
            credentials.get_credentials()  # refused here rather than at the first call
            options["credential_provider"] = credentials
        else:
            options["username"] = username
        return redis.Redis.from_url(
            url,
            protocol=2,  # one shape of answers, whatever the server's and the client's versions
            socket_timeout=attempt_s,
            socket_connect_timeout=attempt_s,
            retry=Retry(ConstantBackoff(0.05), 1),
            **options,
        )
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"password_file cannot be read: {error}") from error
    except ValueError as error:
        raise ConfigError(f"the Redis address cannot be used: {error}") from error


class _Credentials(redis.CredentialProvider):
    """User and password, read at each connection: a password that was changed is known without a restart."""

    def __init__(self, username: str | None, password_file: Path | None) -> None:
        self._username, self._password_file = username, password_file

    def get_credentials(self) -> tuple[str] | tuple[str, str]:
        password = self._password_file.read_text("utf-8").rstrip("\r\n") if self._password_file else ""
        return (self._username, password) if self._username else (password,)


@contextmanager
def translated() -> Iterator[None]:
    """Turn whatever a server may do to its client into one error: it is away for us, whatever it says.

    A refusal, another program's key or another server on the port is mended at the server, by a person, while the
    line goes on; so none of them is a fault of our settings that would end a process. A stranger's answers raise
    anything in the driver.

    Raises:
        ServiceUnavailable: Redis is away or full, refuses us, or answers what no Redis would; says what to mend.
    """
    try:
        yield
    except SemwatchError:
        raise
    except redis.RedisError as error:
        raise ServiceUnavailable(_in_words(error)) from error
    except Exception as error:
        what = f"{type(error).__name__}: {error}"[:200]
        raise ServiceUnavailable(
            f"Redis does not answer as one ({what}): is another program at its address?"
        ) from error


_REFUSED = (
    redis.AuthenticationError,
    redis.exceptions.AuthenticationWrongNumberOfArgsError,
    redis.exceptions.AuthorizationError,
    redis.exceptions.NoPermissionError,
)
_AWAY = (redis.ConnectionError, redis.TimeoutError, redis.exceptions.OutOfMemoryError, redis.ReadOnlyError)
# Inside a script the server wraps the reply, so the driver does not see its class; the words stay.
_REFUSED_WORDS = re.compile(r"\b(NOAUTH|WRONGPASS|NOPERM|ACL failure in script)\b|The user executing the script")
_AWAY_WORDS = re.compile(r"\b(OOM|MISCONF|READONLY|LOADING|BUSY|MASTERDOWN|NOREPLICAS|CLUSTERDOWN|TRYAGAIN)\b")
_TOO_OLD_WORDS = re.compile(r"unknown command|Unknown Redis command", re.IGNORECASE)


def _in_words(error: redis.RedisError) -> str:
    message = str(error)[:300]
    if isinstance(error, _REFUSED) or _REFUSED_WORDS.search(message):
        return f"Redis refuses us ({message}): check username, password_file and the user's ACL"
    if isinstance(error, _AWAY) or _AWAY_WORDS.search(message):
        return f"Redis is away or full: {message}"
    if "WRONGTYPE" in message:
        return "a key of ours is not a stream: something else uses this prefix, choose another"
    if _TOO_OLD_WORDS.search(message):
        return f"this server lacks what we need ({message}): Redis 6.2 or newer, or Valkey"
    if "equal or smaller than" in message or "has exhausted" in message:
        return f"a stream takes no more entries ({message}): rename its key, then entries are added again"
    return f"Redis does not take what we ask ({message}): is it one that we can use?"


def redis_key(prefix: str, *parts: str) -> str:
    """Join the parts of a key.

    >>> redis_key("semwatch", "unknowns", "dead")
    'semwatch:unknowns:dead'
    """
    return ":".join((prefix, *parts))


# --- producer --------------------------------------------------------------------------------------------------------

# XADD comes before SET: where it fails, there must be no mark. EVAL rather than EVALSHA: 200 bytes beside a record's
# 50,000, and a server that restarted knows no script.
_ADD = """
if redis.call('EXISTS', KEYS[2]) == 1 then return 0 end
if ARGV[2] == '' then
  redis.call('XADD', KEYS[1], '*', unpack(ARGV, 3))
else
  redis.call('XADD', KEYS[1], 'MAXLEN', ARGV[2], '*', unpack(ARGV, 3))
end
redis.call('SET', KEYS[2], '1', 'EX', ARGV[1])
return 1
"""


@dataclass(frozen=True, slots=True)
class Depth:
    """How full one stream is."""

    length: int
    """Entries that nobody has acknowledged: waiting and handed out."""
    pending: int
    """Of these, handed out or given back."""
    dead: int


class Publisher:
    """The daemon's end of both streams; ``client`` comes from ``connect`` and is the caller's to close."""

    def __init__(self, client: redis.Redis, *, prefix: str = PREFIX, sent_ttl_s: int = SENT_TTL_S) -> None:
        self._client = client
        self._prefix = prefix
        self._sent_ttl_s = sent_ttl_s

    def publish(self, items: Sequence[Message]) -> None:
        """Add messages to their streams, each id once for as long as its mark lives, however often it is called.

        Raises:
            ServiceUnavailable: Redis is away or full. Some may have arrived; publish all of them again later.
        """
        if items:
            self.ping()  # without a password, a server hangs up on a long message before it says NOAUTH
        for batch in _batches(items):
            fields = [unpack(blob) for _, _, blob in batch]  # ours: what is cut here is no fault of the server's
            with translated():
                self._publish_batch(batch, fields)

    def ping(self) -> None:
        """Ask the server for an answer.

        Raises:
            ServiceUnavailable: There is none that we can use.
        """
        with translated():
            self._client.ping()

    def depths(self) -> dict[str, Depth]:
        """Measure both streams, by name.

        Raises:
            ServiceUnavailable: Redis is away or refuses us.
        """
        with translated():
            return {stream: self._depth(stream) for stream in (UNKNOWNS, RESULTS)}

    def _publish_batch(self, batch: Sequence[Message], fields: Sequence[Fields]) -> None:
        with self._client.pipeline(transaction=False) as pipe:
            for (stream, id_, _), pairs in zip(batch, fields, strict=True):
                flat = [part for item in pairs.items() for part in item]
                # An unknown may have been a doubtful crop before, under the same id: it must come all the same.
                mark = ("sent", stream, id_) if stream == DOUBTFUL else ("sent", id_)
                keys = redis_key(self._prefix, stream), redis_key(self._prefix, *mark)
                pipe.eval(_ADD, 2, *keys, self._sent_ttl_s, MOST.get(stream, ""), *flat)
            for answer in pipe.execute(raise_on_error=False):
                if isinstance(answer, Exception):
                    raise answer

    def _depth(self, stream: str) -> Depth:
        key = redis_key(self._prefix, stream)
        with self._client.pipeline(transaction=False) as pipe:
            pipe.xlen(key)
            pipe.xlen(redis_key(key, "dead"))
            pipe.xinfo_groups(key)
            length, dead, groups = pipe.execute(raise_on_error=False)
        for answer in (length, dead):
            if isinstance(answer, Exception):
                raise answer
        # XINFO fails where there is no stream yet.
        pending = 0 if isinstance(groups, Exception) else sum(group["pending"] for group in groups)
        return Depth(length, pending, dead)


def _batches(items: Sequence[Message]) -> Iterator[list[Message]]:
    """Cut into batches that one round trip carries within the socket timeout."""
    batch: list[Message] = []
    n_bytes = 0
    for item in items:
        if batch and (len(batch) == _BATCH_MESSAGES or n_bytes + len(item[2]) > _BATCH_BYTES):
            yield batch
            batch, n_bytes = [], 0
        batch.append(item)
        n_bytes += len(item[2])
    if batch:
        yield batch


# --- consumer --------------------------------------------------------------------------------------------------------

# KEYS: stream, dead letters. ARGV[1]: group. Where the dead letter cannot be written (server full), the entry stays
# pending rather than stop the others.
_BURY_ONE = """
local function bury(id, fields, deliveries, why)
  local letter = {}
  for i = 1, math.min(#fields, 1000) do letter[i] = fields[i] end
  for _, part in ipairs({'dead_error', why, 'dead_deliveries', deliveries, 'dead_entry', id}) do
    letter[#letter + 1] = part
  end
  local added = redis.pcall('XADD', KEYS[2], '*', unpack(letter))
  if type(added) == 'table' and added.err then return 0 end
  redis.call('XACK', KEYS[1], ARGV[1], id)
  if deletes then redis.call('XDEL', KEYS[1], id) end
  return 1
end
"""
# ARGV[2..]: consumer, min idle ms, first id, owner ('' = any), n, max deliveries, idle ms from which one counts.
# One script rather than XAUTOCLAIM: 6.2 reports deleted entries there without their ids, so they could not be cleared.
_TAKE = (
    _BURY_ONE
    + """
local range = {'XPENDING', KEYS[1], ARGV[1], 'IDLE', ARGV[3], ARGV[4], '+', ARGV[6]}
if ARGV[5] ~= '' then range[#range + 1] = ARGV[5] end
local last, taken = '', {}
for _, pending in ipairs(redis.call(unpack(range))) do
  local id, idle, deliveries = pending[1], pending[3], pending[4]
  local entry = redis.call('XRANGE', KEYS[1], id, id)[1]
  last = id
  if not entry then
    redis.call('XACK', KEYS[1], ARGV[1], id)
  elseif deliveries >= tonumber(ARGV[7]) then
    bury(id, entry[2], deliveries, 'delivered ' .. deliveries .. ' times and never acknowledged')
  else
    local keeps = {}
    if idle >= tonumber(ARGV[8]) then deliveries = deliveries + 1 else keeps = {'IDLE', idle} end
    redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[2], 0, id, 'RETRYCOUNT', deliveries, 'JUSTID', unpack(keeps))
    taken[#taken + 1] = {id, entry[2], deliveries}
  end
end
return {last, taken}
"""
)
# ARGV[2..]: consumer, id, reason.
_BURY = (
    _BURY_ONE
    + """
local pending = redis.call('XPENDING', KEYS[1], ARGV[1], ARGV[3], ARGV[3], 1, ARGV[2])[1]
local entry = redis.call('XRANGE', KEYS[1], ARGV[3], ARGV[3])[1]
if not pending or not entry then return 0 end
return bury(ARGV[3], entry[2], pending[4], ARGV[4])
"""
)
# KEYS: stream. ARGV: group, ids. Not MULTI: a full server refuses whatever comes inside one, and could not be drained.
_ACK = """
local n = 0
for i = 2, #ARGV do
  n = n + redis.call('XACK', KEYS[1], ARGV[1], ARGV[i])
  if deletes then redis.call('XDEL', KEYS[1], ARGV[i]) end
end
return n
"""
# KEYS: stream. ARGV: group, consumer, the consumer to park with, ids. TIME 1 = idle since 1970: anybody's at once.
_GIVE_BACK = """
local n = 0
for i = 4, #ARGV do
  local pending = redis.call('XPENDING', KEYS[1], ARGV[1], ARGV[i], ARGV[i], 1, ARGV[2])[1]
  if pending then
    local count = math.max(pending[4] - 1, 0)
    redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[3], 0, ARGV[i], 'TIME', 1, 'RETRYCOUNT', count, 'JUSTID')
    n = n + 1
  end
end
return n
"""
# KEYS: stream, dead letters. ARGV: last id, n.
_REQUEUE = """
local letters = redis.call('XRANGE', KEYS[2], '-', ARGV[1], 'COUNT', ARGV[2])
for _, letter in ipairs(letters) do
  local fields = {}
  for i = 1, #letter[2], 2 do
    if string.sub(letter[2][i], 1, 5) ~= 'dead_' then
      fields[#fields + 1] = letter[2][i]
      fields[#fields + 1] = letter[2][i + 1]
    end
  end
  redis.call('XADD', KEYS[1], '*', unpack(fields))
  redis.call('XDEL', KEYS[2], letter[1])
end
return #letters
"""

_Entry = tuple[str, Fields, int]
"""Entry id, fields, deliveries with this one."""


@dataclass(frozen=True, slots=True, eq=False)
class Claimed(Generic[T]):
    """One entry that is ours until it is acknowledged, given back, or idle for longer than the others allow."""

    entry_id: str
    n_deliveries: int
    """How often it was handed out, this time included; what was given back does not count."""
    record: T


@dataclass(frozen=True, slots=True, eq=False)
class DeadLetter:
    """One entry that was put aside."""

    entry_id: str
    error: str
    n_deliveries: int
    fields: Fields


class Consumer(Generic[T]):
    """One reader of one stream in a group, as in ``Consumer(client, UNKNOWNS, decode, name="line-3")``.

    ``name`` is the same after a restart and belongs to one process at a time: by it, work that a killed process held is
    found again.

    Two things alone make an entry a dead letter: it is no entry of its stream by the format itself, or it was handed
    out ``max_deliveries`` times, each at least ``counts_after_s`` after the one before, and never acknowledged. A
    consumer that ends at once and is started again thus condemns nothing for a while, a decoder that fails nothing.

    One that ``looks_on``, in a group of its own, takes nothing from the others: what it acknowledges or puts aside
    stays in the stream.
    """

    def __init__(
        self,
        client: redis.Redis,
        stream: str,
        decoder: Callable[[Mapping[bytes, bytes]], T],
        *,
        name: str,
        group: str = LEARNERS,
        prefix: str = PREFIX,
        max_deliveries: int = 5,
        counts_after_s: float = 120.0,
        looks_on: bool = False,
    ) -> None:
        self._client = client
        if looks_on and group == LEARNERS:
            raise ValueError(f"who looks on needs a group of its own: {LEARNERS} is learning's")
        self._kind, self._looks_on = stream, looks_on
        self._stream = redis_key(prefix, stream)
        self._dead = redis_key(prefix, stream, "dead")
        self._decoder = decoder
        self._name = name
        self._group = group
        self._max_deliveries, self._counts_after_ms = max_deliveries, int(counts_after_s * 1000)
        self._own_from: str | None = "-"  # how far the work of our last life has been handed out again; None: all of it

    def claim(self, n: int, *, min_idle_s: float, block_s: float = 0.0) -> list[Claimed[T]]:
        """Take up to ``n`` entries: what we held before a restart, else what others left idle, else new ones.

        Fewer may come although more wait; nothing comes only if nothing waits (for ``block_s``, where given).
        ``min_idle_s`` must be longer than the longest job and ``counts_after_s`` together: who is idle longer loses its
        work to whoever asks.

        Raises:
            ServiceUnavailable: Redis is away. What was taken meanwhile comes again after ``min_idle_s``.
            ConfigError: the decoder fails on a sound entry; what was taken is given back.
        """
        deadline = time.monotonic() + block_s
        while entries := self._next(n, min_idle_s, deadline):
            claimed, n_buried = self._decoded(entries)
            if claimed or not n_buried:
                return claimed
        return []

    def ack(self, claimed: Sequence[Claimed[T]]) -> int:
        """Say that the work is done, which deletes it unless we look on; return how many were still pending.

        Raises:
            ServiceUnavailable: Redis is away; ack again, which does no harm.
        """
        if not claimed:
            return 0
        ids = [item.entry_id for item in claimed]
        with translated():
            return int(self._eval(_ACK, [self._stream], *ids))

    def give_back(self, claimed: Sequence[Claimed[T]]) -> int:
        """Return work undone, for anybody to take at once; this delivery does not count. Return how many were ours.

        Raises:
            ServiceUnavailable: Redis is away; the work comes free after ``min_idle_s`` by itself.
        """
        if not claimed:
            return 0
        ids = [item.entry_id for item in claimed]
        with translated():
            return int(self._eval(_GIVE_BACK, [self._stream], self._name, _GIVEN_BACK, *ids))

    def put_back(self, entries: Sequence[Fields]) -> None:
        """Add entries again that were acknowledged, whatever was sent before: they wait for anybody.

        Raises:
            ServiceUnavailable: Redis is away or full; some may be back. Add all of them again: one more entry of the
                same id does no harm.
        """
        for start in range(0, len(entries), _BATCH_MESSAGES):
            with translated(), self._client.pipeline(transaction=False) as pipe:
                for fields in entries[start : start + _BATCH_MESSAGES]:
                    pipe.xadd(self._stream, fields)  # type: ignore[arg-type]  # the stub's dict is invariant
                pipe.execute()

    def dead_letter(self, claimed: Claimed[T], reason: str) -> bool:
        """Put one entry aside with the reason; False where it was no longer ours or Redis is full.

        Raises:
            ServiceUnavailable: Redis is away or refuses us.
        """
        with translated():
            return self._bury(claimed.entry_id, reason)

    def dead(self, n: int = 100) -> list[DeadLetter]:
        """List up to ``n`` dead letters, oldest first.

        Raises:
            ServiceUnavailable: Redis is away or refuses us.
        """
        with translated():
            letters: Any = self._client.xrange(self._dead, count=n)
        return [_dead_letter(id_, fields) for id_, fields in letters]

    def requeue_dead(self) -> int:
        """Put all dead letters there are back into the stream, as new entries; return how many.

        Raises:
            ServiceUnavailable: Redis is away or full; what is not back yet is still a dead letter.
        """
        n_back = 0
        with translated():
            newest: Any = self._client.xrevrange(self._dead, count=1)
            while newest and (n := self._client.eval(_REQUEUE, 2, self._stream, self._dead, newest[0][0], 50)):
                n_back += n
        return n_back

    def _next(self, n: int, min_idle_s: float, deadline: float) -> list[_Entry]:
        with translated():
            return self._own(n) or self._take("-", "", n, min_idle_s)[1] or self._new(n, deadline)

    def _own(self, n: int) -> list[_Entry]:
        """Hand out again, page by page, what this name held when the process started."""
        while self._own_from is not None:
            last, entries = self._take(self._own_from, self._name, n, 0.0)
            self._own_from = f"({last}" if last else None
            if entries:
                return entries
        return []

    def _take(self, first: str, owner: str, n: int, min_idle_s: float) -> tuple[str, list[_Entry]]:
        """Take over pending entries; return the last id that was looked at ("" for none) and what was taken."""
        keys = [self._stream, self._dead]
        idle_ms = int(min_idle_s * 1000)
        counts = self._max_deliveries, self._counts_after_ms
        last, taken = self._eval(_TAKE, keys, self._name, idle_ms, first, owner, n, *counts)
        entries = [(id_.decode(), dict(zip(flat[::2], flat[1::2], strict=True)), count) for id_, flat, count in taken]
        return last.decode(), entries

    def _new(self, n: int, deadline: float) -> list[_Entry]:
        """Read entries that nobody has seen; wait until ``deadline`` in slices shorter than the socket timeout."""
        while True:
            left_ms = int((deadline - time.monotonic()) * 1000)
            wait_ms = min(left_ms, _BLOCK_MS) if left_ms > 0 else None  # 0 would wait for ever
            read = partial(self._client.xreadgroup, self._group, self._name, {self._stream: ">"}, n, wait_ms)
            answer = self._with_group(read)
            if answer or wait_ms is None:
                return [(id_.decode(), fields, 1) for _, entries in answer for id_, fields in entries]

    def _decoded(self, entries: Sequence[_Entry]) -> tuple[list[Claimed[T]], int]:
        claimed = []
        n_buried = 0
        for id_, fields, n_deliveries in entries:
            try:
                claimed.append(Claimed(id_, n_deliveries, self._decoder(fields)))
            except Exception as error:
                why = fault_of(self._kind, fields)
                if why is None:
                    with suppress(ServiceUnavailable), translated():
                        self._eval(
                            _GIVE_BACK, [self._stream], self._name, _GIVEN_BACK, *(entry[0] for entry in entries)
                        )
                    raise ConfigError(
                        f"this decoder cannot read {self._stream} {id_}, which is a sound entry "
                        f"({type(error).__name__}: {error}): is it the decoder of this stream?"
                    ) from error
                logger.warning("%s %s cannot be read: %s", self._stream, id_, why)
                with translated():
                    n_buried += self._bury(id_, why)
        return claimed, n_buried

    def _bury(self, entry_id: str, reason: str) -> bool:
        return bool(self._eval(_BURY, [self._stream, self._dead], self._name, entry_id, reason))

    def _eval(self, script: str, keys: Sequence[str], *args: str | int) -> Any:
        text = f"local deletes = {'false' if self._looks_on else 'true'}\n{script}"
        return self._with_group(lambda: self._client.eval(text, len(keys), *keys, self._group, *args))

    def _with_group(self, call: Callable[[], Any]) -> Any:
        """Call; where stream or group is not there (first use, deleted under us), make it and call once more."""
        try:
            return call()
        except redis.ResponseError as error:
            if not re.search("NOGROUP|UNBLOCKED", str(error)):
                raise
        try:
            self._client.xgroup_create(self._stream, self._group, id="0", mkstream=True)
        except redis.ResponseError as error:
            if "BUSYGROUP" not in str(error):  # another consumer was faster
                raise
        return call()


def _dead_letter(entry_id: bytes, fields: Fields) -> DeadLetter:
    fault = {name: fields.pop(name, b"") for name in (b"dead_error", b"dead_deliveries", b"dead_entry")}
    error = fault[b"dead_error"].decode("utf-8", "replace")
    return DeadLetter(entry_id.decode(), error, int(fault[b"dead_deliveries"] or 0), fields)
