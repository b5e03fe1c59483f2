"""What the daemon and learning tell each other, as records in Redis: neither reads a file of the other.

With the prefix ``semwatch``; beside these there are the streams of ``unknowns.py`` and the model repository alone:

    semwatch:serving:<site>     string, JSON of ``Serving``: what a running daemon serves; it leaves ``SERVING_TTL_S``
                                after the daemon has last renewed it
    semwatch:wishes             stream of ``Wish``: the daemon asks for a cycle before its time; a cycle deletes those
                                that it has answered. Fields id, schema, meta (JSON)
    semwatch:cycles             stream of ``Cycle``: how each cycle ended, the newest ``MAX_CYCLES``. Field meta (JSON)
    semwatch:classes            stream of states of the found classes (``semwatch.classes.clusters``), the newest
                                ``MAX_STATES``; the last entry holds. Fields revision (decimal), state (JSON). An entry
                                is added only where its revision is one above the last one's
    semwatch:classes:lock       string with a time to live: who is changing the classes
    semwatch:examples:<class>   stream, example crops of a found class. Fields id (of the record), crop_png

A daemon needs the rights of a producer (see ``unknowns``), learning and ``semwatch clusters`` those of a learner.
"""

import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import redis
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from semwatch.errors import ForeignRecord, ServiceUnavailable
from semwatch.streams.records import Message, pack
from semwatch.streams.unknowns import PREFIX, connect, redis_key, translated

WISHES, CYCLES, CLASSES, EXAMPLES, SERVING = "wishes", "cycles", "classes", "examples", "serving"
SERVING_TTL_S = 30
MAX_WISHES, MAX_CYCLES, MAX_STATES, MAX_SENTENCE = 100, 100, 50, 2000
MAX_CONFLICTS = 20
LOCK_POLL_S = 0.05
SCHEMA = 1


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True)


class Serving(_Record):
    """What a running daemon serves and has refused."""

    schema_version: Literal[1] = 1
    site: str
    utc: str
    """When it was said."""
    versions: Mapping[str, int]
    """Version in service, by model."""
    refused_heads: Mapping[int, str] = {}
    """Why, by version."""
    hashes: Mapping[str, str] = {}
    """Content hash of the version in service, by model."""


class Wish(_Record):
    """A reason to learn before the time."""

    site: str
    source: str
    utc: str
    sentence: Annotated[str, Field(max_length=MAX_SENTENCE)]
    """For people."""


class Cycle(_Record):
    """How one cycle of learning ended."""

    utc: str
    """When it began."""
    outcome: Literal["published", "refused", "nothing-new"]
    version: int | None = None
    """Of the head that was published."""
    reasons: tuple[str, ...] = ()
    """Why the candidate does not serve."""
    conflicts: tuple[str, ...] = ()
    """Defects that people contradict each other about, see ``records.Correction``; the first ``MAX_CONFLICTS``."""
    sentence: str = ""
    """For people."""
    unknowns: Mapping[str, int] = {}
    """Records that learning keeps, by what became of them."""


R = TypeVar("R", bound=_Record)

# KEYS: stream. ARGV: revision, state, most entries. Nothing is added unless the last entry is of the revision before.
_APPEND = """
local last = redis.call('XREVRANGE', KEYS[1], '+', '-', 'COUNT', 1)[1]
local revision = -1
if last then
  for i = 1, #last[2], 2 do if last[2][i] == 'revision' then revision = tonumber(last[2][i + 1]) end end
end
if last and revision >= tonumber(ARGV[1]) then return 0 end
if last and revision + 1 ~= tonumber(ARGV[1]) and ARGV[4] ~= '1' then return 0 end
redis.call('XADD', KEYS[1], 'MAXLEN', ARGV[3], '*', 'revision', ARGV[1], 'state', ARGV[2])
return 1
"""
# KEYS: lock. ARGV: owner, milliseconds. Who holds it already may take it again: its earlier life is dead.
_LOCK = """
local holder = redis.call('GET', KEYS[1])
if holder and holder ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 1
"""
# A key of ours is never deleted by its name alone: another one may hold the lock by now.
_UNLOCK = """
if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('SET', KEYS[1], ARGV[1], 'PX', 1) end
return 1
"""


class Handoff:
    """One end of what daemon and learning exchange; every method is one call to the server.

    Every method raises ServiceUnavailable where Redis is away, refuses us or holds what is no record of ours.
    """

    def __init__(self, client: redis.Redis, *, prefix: str = PREFIX) -> None:
        self._client: Any = client  # its stubs give every answer as bytes or text, list or None
        self._prefix = prefix

    def close(self) -> None:
        """Let go of the connection."""
        self._client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- daemon to learning ----------------------------------------------------------------------------------------

    def announce(self, serving: Serving) -> None:
        """Say what is served, for ``SERVING_TTL_S``."""
        with translated():
            self._client.set(self._key(SERVING, serving.site), serving.model_dump_json(), ex=SERVING_TTL_S)

    def end_service(self, site: str) -> None:
        """Say that nothing is served any more."""
        with translated():
            self._client.set(self._key(SERVING, site), "", px=1)

    def serving(self, site: str) -> Serving | None:
        """What the running daemon of a site serves; None where none runs."""
        with translated():
            found = self._client.get(self._key(SERVING, site))
        return _parsed(Serving, found, SERVING) if found else None

    def wishes(self) -> dict[str, Wish]:
        """Wishes that no cycle has answered, oldest first, by entry id."""
        with translated():
            entries = self._client.xrange(self._key(WISHES), count=MAX_WISHES)
        return {id_.decode(): _parsed(Wish, fields.get(b"meta", b""), WISHES) for id_, fields in entries}

    def answer(self, entry_ids: Sequence[str]) -> None:
        """Take wishes off the list."""
        if entry_ids:
            with translated():
                self._client.xdel(self._key(WISHES), *entry_ids)

    # --- learning to daemon ----------------------------------------------------------------------------------------

    def add_cycle(self, cycle: Cycle) -> None:
        """Say how a cycle ended."""
        with translated():
            meta = cycle.model_dump_json()
            self._client.xadd(self._key(CYCLES), {"meta": meta}, maxlen=MAX_CYCLES, approximate=False)

    def last_cycle(self) -> Cycle | None:
        """How the newest cycle ended; None where there was none."""
        with translated():
            entries = self._client.xrevrange(self._key(CYCLES), count=1)
        return _parsed(Cycle, entries[0][1].get(b"meta", b""), CYCLES) if entries else None

    def put_examples(self, class_id: str, crops: Mapping[str, bytes]) -> None:
        """Show these crops (PNG, by record id) of a class, and no others; of a class that is gone give none."""
        key = self._key(EXAMPLES, class_id)
        with translated(), self._client.pipeline(transaction=False) as pipe:
            for id_, png in crops.items():
                pipe.xadd(key, {"id": id_, "crop_png": png})
            pipe.xtrim(key, maxlen=len(crops), approximate=False)
            pipe.execute()

    def examples(self, class_id: str) -> dict[str, bytes]:
        """Example crops of a class, PNG by record id, the most typical first."""
        with translated():
            entries = self._client.xrange(self._key(EXAMPLES, class_id))
        return {
            fields[b"id"].decode(): fields[b"crop_png"] for _, fields in entries if {b"id", b"crop_png"} <= set(fields)
        }

    # --- both ways: the state of found classes ---------------------------------------------------------------------

    def classes(self) -> bytes | None:
        """The newest state of the found classes, JSON; None where there is none."""
        with translated():
            entries = self._client.xrevrange(self._key(CLASSES), count=1)
        return entries[0][1].get(b"state", b"") if entries else None

    def append_classes(self, revision: int, state: bytes, *, jumps: bool = False) -> bool:
        """Make a state the newest one; False where another one came first.

        Args:
            revision: of the state; one above the newest one's, or any where there is none.
            state: JSON.
            jumps: also where its revision is further above: a file remembers what Redis has lost.
        """
        with translated():
            key = self._key(CLASSES)
            return bool(self._client.eval(_APPEND, 1, key, revision, state, MAX_STATES, int(jumps)))

    @contextmanager
    def locked(self, owner: str, *, wait_s: float, hold_s: float) -> Iterator[None]:
        """Keep everyone else from changing the classes.

        Args:
            owner: name of who changes them, unique among living processes; the same name again takes the lock over.
            wait_s: longest wait.
            hold_s: after so long the lock is free, whatever became of its owner.

        Raises:
            ServiceUnavailable: another process holds it for longer, or Redis is away.
        """
        key, deadline = self._key(CLASSES, "lock"), time.monotonic() + wait_s
        while not self._took(key, owner, hold_s):
            if time.monotonic() > deadline:
                raise ServiceUnavailable("another process is changing the found classes; try again in a minute")
            time.sleep(LOCK_POLL_S)
        try:
            yield
        finally:
            with translated():
                self._client.eval(_UNLOCK, 1, key, owner)

    def _took(self, key: str, owner: str, hold_s: float) -> bool:
        with translated():
            return bool(self._client.eval(_LOCK, 1, key, owner, int(hold_s * 1000)))

    def _key(self, *parts: str) -> str:
        return redis_key(self._prefix, *parts)


def open_handoff(
    url: str, *, prefix: str, username: str | None, password_file: Path | None, ca_file: Path | None, timeout_s: float
) -> Handoff:
    """An end of the exchange at an address, see ``unknowns.connect``."""
    client = connect(url, username=username, password_file=password_file, ca_file=ca_file, timeout_s=timeout_s)
    return Handoff(client, prefix=prefix)


def wish_message(wish: Wish) -> Message:
    """A wish, ready for the ledger's outbox; the same wish has the same id."""
    meta = wish.model_dump_json().encode()
    id_ = hashlib.sha256(meta).hexdigest()[:32]
    return WISHES, id_, pack({b"id": id_.encode(), b"schema": b"%d" % SCHEMA, b"meta": meta})


def _parsed(kind: type[R], text: object, what: str) -> R:
    try:
        return kind.model_validate_json(text)  # type: ignore[arg-type]  # bytes; Redis' stubs do not say so
    except ValidationError as error:
        first = error.errors(include_url=False)[0]["msg"]
        raise ForeignRecord(
            f"Redis holds no record of ours under {what} ({first}): another release or program writes there; "
            f"give each site a prefix of its own"
        ) from error
