"""What leaves for Redis: records of crops that no class explains, results of whole files, and the two streams.

One file owns reader and writer of both formats and every key. With the prefix ``semwatch``:

    semwatch:unknowns        stream of records (below), read by the group ``learners``
    semwatch:results         stream of result summaries, one per file, for whoever wants them
    semwatch:unknowns:dead   stream of dead letters: the record's fields + dead_error, dead_deliveries, dead_entry
    semwatch:results:dead    the same for results
    semwatch:sent:<id>       string with a time to live: this id has been added (30 days unless told otherwise)

A record's fields in the stream; a consumer on another machine needs nothing else:

    id         32 hex digits made of file hash, source, page, defect and recipe: the same defect, the same id
    schema     b"1"; a new optional key in meta keeps the number, anything else raises it
    meta       JSON, the plain fields of ``Record``; ``json_schemas()`` describes it
    features   D little-endian float32
    soft_mask  t x t little-endian float32, row by row
    crop_png   S x S PNG, 8-bit gray

A result summary has ``id``, ``schema`` and ``meta`` alone. Between review and Redis, the ledger's outbox keeps either
as one ``pack``ed blob. The streams are never trimmed: an entry is deleted when it is acknowledged, and a full server
(``noeviction``) pushes back. What belongs together happens in one Lua script, so a crash leaves all or nothing. Only
commands of Redis 6.2 are used; 7.x and Valkey have them too. One server, with or without Sentinel: in a Redis Cluster
the keys of a script would lie on different nodes. An ACL user needs
``~semwatch:* +@stream +@connection +eval +set +exists``.
"""

import hashlib
import json
import logging
import os
import re
import struct
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from math import isqrt
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, TypeVar

import cv2
import numpy as np
import redis
from numpy.typing import NDArray
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.json_schema import SkipJsonSchema
from redis.backoff import ConstantBackoff
from redis.retry import Retry

from semwatch.defects import Box, Defect, Neighbour, PageReview, Review
from semwatch.errors import ConfigError, ServiceUnavailable

logger = logging.getLogger(__name__)

UNKNOWNS = "unknowns"
RESULTS = "results"
SCHEMA = 1
SENT_TTL_S = 30 * 24 * 3600

Fields = dict[bytes, bytes]
"""One stream entry as it is on the wire."""
Message = tuple[str, str, bytes]
"""What the outbox keeps: stream (``UNKNOWNS`` or ``RESULTS``), id, packed fields."""

T = TypeVar("T")

_MAX_CROP_PX = 4096
_BATCH_BYTES = 4 << 20
_BATCH_MESSAGES = 64
_BLOCK_MS = 200  # shorter than any socket timeout that connect() sets
_GIVEN_BACK = "given-back"  # the consumer in whose name returned work waits


# --- the record ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Record:
    """One defect that needs a name, with all that learning needs of it."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(arbitrary_types_allowed=True)

    id: str
    created_utc: str
    """ISO 8601 with seconds and ``Z``: when the file was reviewed."""
    source: str
    path: str
    """Relative to the drop folder; bytes that are no UTF-8 are written as ``\\xNN``."""
    sha256: str
    page: int
    defect_id: int
    box_xyxy: Box
    crop_xyxy: Box
    area_px: int
    area_nm2: float | None
    pixel_nm: float | None
    image_score: float
    """The page's raw score."""
    peak_score: float
    kind: Literal["unknown", "non-decidable"]
    nearest: tuple[Neighbour, ...]
    recipe_name: str
    recipe_id: str
    model_versions: Mapping[str, int]
    features: SkipJsonSchema[NDArray[np.float32]]
    """(D,)."""
    soft_mask: SkipJsonSchema[NDArray[np.float32]]
    """(t, t) in [0, 1], aligned with the crop."""
    crop: SkipJsonSchema[NDArray[np.uint8]]
    """(S, S) gray."""


@dataclass(frozen=True, slots=True)
class ResultSummary:
    """What became of one file, for systems that follow along; the whole result is on the tool's own disk."""

    id: str
    reviewed_utc: str
    source: str
    path: str
    sha256: str
    recipe_name: str
    recipe_id: str
    model_versions: Mapping[str, int]
    image_scores: tuple[float, ...]
    """Raw score of each page."""
    n_defects: int
    n_by_kind: Mapping[str, int]
    """Defects by verdict kind."""
    n_by_label: Mapping[str, int]
    """Defects by label, of those that have one."""


def records(review: Review) -> list[Record]:
    """Make a record of every unknown and every non-decidable defect."""
    wanted = ("unknown", "non-decidable")
    return [_record(review, p, d) for p in review.pages for d in p.defects if d.verdict.kind in wanted]


def _record(review: Review, page: PageReview, defect: Defect) -> Record:
    assert defect.verdict.kind in ("unknown", "non-decidable")
    page_no = page.micrograph.page
    return Record(
        id=_id("unknown", review.sha256, review.source, page_no, defect.defect_id, review.recipe_id),
        created_utc=review.reviewed_utc,
        source=review.source,
        path=_utf8(review.path),
        sha256=review.sha256,
        page=page_no,
        defect_id=defect.defect_id,
        box_xyxy=defect.box_xyxy,
        crop_xyxy=defect.crop_xyxy,
        area_px=defect.area_px,
        area_nm2=defect.area_nm2,
        pixel_nm=page.micrograph.pixel_nm,
        image_score=page.score_map.raw_score,
        peak_score=defect.peak_score,
        kind=defect.verdict.kind,
        nearest=defect.verdict.nearest,
        recipe_name=review.recipe_name,
        recipe_id=review.recipe_id,
        model_versions=dict(review.model_versions),
        features=defect.features,
        soft_mask=defect.soft_mask,
        crop=defect.crop,
    )


def encode(record: Record) -> Fields:
    """Write a record as stream fields."""
    _, png = cv2.imencode(".png", record.crop)
    meta = _record_type().dump_json(record, exclude={"id", "features", "soft_mask", "crop"})
    return {
        b"id": record.id.encode(),
        b"schema": b"%d" % SCHEMA,
        b"meta": meta,
        b"features": record.features.astype("<f4").tobytes(),
        b"soft_mask": record.soft_mask.astype("<f4").tobytes(),
        b"crop_png": png.tobytes(),
    }


def decode(fields: Mapping[bytes, bytes]) -> Record:
    """Read a record; nothing in it is trusted.

    Raises:
        ValueError: Not a record of this schema; the message says plainly why.
    """
    arrays: dict[str, NDArray[Any]] = {
        "features": _floats(fields, b"features"),
        "soft_mask": _square(_floats(fields, b"soft_mask")),
        "crop": _crop(_field(fields, b"crop_png")),
    }
    return _validated(_record_type(), fields, arrays)


def result_summary(review: Review) -> Fields:
    """Write the summary of one review as stream fields; the same review gives the same id."""
    versions = dict(sorted(review.model_versions.items()))
    verdicts = [defect.verdict for page in review.pages for defect in page.defects]
    summary = ResultSummary(
        id=_id("result", review.sha256, review.source, review.path, review.recipe_id, versions),
        reviewed_utc=review.reviewed_utc,
        source=review.source,
        path=_utf8(review.path),
        sha256=review.sha256,
        recipe_name=review.recipe_name,
        recipe_id=review.recipe_id,
        model_versions=versions,
        image_scores=tuple(page.score_map.raw_score for page in review.pages),
        n_defects=len(verdicts),
        n_by_kind=Counter(verdict.kind for verdict in verdicts),
        n_by_label=Counter(verdict.label for verdict in verdicts if verdict.label is not None),
    )
    meta = _summary_type().dump_json(summary, exclude={"id"})
    return {b"id": summary.id.encode(), b"schema": b"%d" % SCHEMA, b"meta": meta}


def decode_result(fields: Mapping[bytes, bytes]) -> ResultSummary:
    """Read a result summary.

    Raises:
        ValueError: Not a summary of this schema; the message says plainly why.
    """
    return _validated(_summary_type(), fields, {})


def messages(review: Review) -> list[Message]:
    """Make all that one review has to say to Redis, ready for the outbox: its records, then its summary."""
    summary = result_summary(review)
    found = [(UNKNOWNS, record.id, pack(encode(record))) for record in records(review)]
    return [*found, (RESULTS, summary[b"id"].decode(), pack(summary))]


def pack(fields: Mapping[bytes, bytes]) -> bytes:
    """Join stream fields into one blob: each name and each value behind its length, 4 bytes little-endian.

    >>> unpack(pack({b"id": b"7", b"meta": b""}))
    {b'id': b'7', b'meta': b''}
    """
    return b"".join(struct.pack("<I", len(part)) + part for item in fields.items() for part in item)


def unpack(blob: bytes) -> Fields:
    """Split what ``pack`` joined.

    Raises:
        ValueError: The blob is cut short.
    """
    parts = []
    at = 0
    while at < len(blob):
        end = at + 4 + int.from_bytes(blob[at : at + 4], "little")
        if end > len(blob) or at + 4 > len(blob):
            raise ValueError(f"packed message is cut short at byte {len(blob)}")
        parts.append(blob[at + 4 : end])
        at = end
    return dict(zip(parts[::2], parts[1::2], strict=True))


def json_schemas() -> dict[str, dict[str, Any]]:
    """Describe the ``meta`` JSON of either stream as JSON Schema, by stream name."""
    schemas = {UNKNOWNS: _record_type().json_schema(), RESULTS: _summary_type().json_schema()}
    for schema in schemas.values():
        del schema["properties"]["id"]  # a field of its own beside meta
        schema["required"].remove("id")
        schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    return schemas


@cache
def _record_type() -> TypeAdapter[Record]:
    return TypeAdapter(Record)


@cache
def _summary_type() -> TypeAdapter[ResultSummary]:
    return TypeAdapter(ResultSummary)


def _validated(kind: TypeAdapter[T], fields: Mapping[bytes, bytes], arrays: Mapping[str, NDArray[Any]]) -> T:
    if (schema := _field(fields, b"schema")) != b"%d" % SCHEMA:
        raise ValueError(f"schema is {schema[:20]!r}, this reader knows {SCHEMA}: update semwatch here, then requeue")
    id_ = _field(fields, b"id").decode("ascii")
    if not re.fullmatch("[0-9a-f]{32}", id_):
        raise ValueError(f"id {id_[:40]!r} is not 32 hex digits")
    meta = json.loads(_field(fields, b"meta"))
    if not isinstance(meta, dict):
        raise ValueError("meta is not a JSON object")
    try:
        return kind.validate_python({**meta, "id": id_, **arrays})
    except ValidationError as error:
        wrong = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors(include_url=False)]
        raise ValueError(f"meta does not fit: {'; '.join(wrong[:3])}") from None


def _field(fields: Mapping[bytes, bytes], name: bytes) -> bytes:
    if name not in fields:
        raise ValueError(f"field {name.decode()} is missing")
    return fields[name]


def _floats(fields: Mapping[bytes, bytes], name: bytes) -> NDArray[np.float32]:
    data = _field(fields, name)
    if len(data) % 4:
        raise ValueError(f"{name.decode()} is cut short: {len(data)} bytes are no whole number of float32")
    values = np.frombuffer(data, "<f4").astype(np.float32)
    if not np.isfinite(values).all():
        raise ValueError(f"{name.decode()} holds values that are not finite")
    return values


def _square(values: NDArray[np.float32]) -> NDArray[np.float32]:
    t = isqrt(values.size)
    if t * t != values.size:
        raise ValueError(f"soft_mask is not square: {values.size} values")
    return values.reshape(t, t)


def _crop(png: bytes) -> NDArray[np.uint8]:
    # The header is read first: a small PNG may ask for gigabytes.
    if len(png) < 26 or png[:8] != b"\x89PNG\r\n\x1a\n" or png[12:16] != b"IHDR":
        raise ValueError("crop_png is not a PNG")
    W, H, depth, colour = struct.unpack(">IIBB", png[16:26])
    if not (W == H and 1 <= W <= _MAX_CROP_PX and (depth, colour) == (8, 0)):
        raise ValueError(f"crop_png is {W} x {H}, {depth}-bit, colour type {colour}: wanted square 8-bit gray")
    crop = cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_UNCHANGED)
    if crop is None:
        raise ValueError("crop_png is damaged")
    return np.asarray(crop, np.uint8)


def _id(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _utf8(path: str) -> str:
    return os.fsencode(path).decode("utf-8", "backslashreplace")


# --- the server ------------------------------------------------------------------------------------------------------


def connect(
    url: str,
    *,
    username: str | None = None,
    password_file: Path | None = None,
    ca_file: Path | None = None,
    timeout_s: float = 5.0,
) -> redis.Redis:
    """Make a client of ``redis://``, ``rediss://`` (TLS) or ``unix://``; it connects when it is first used.

    A call is tried twice and gives up after about ``timeout_s`` (one second at least).

    Raises:
        ConfigError: The address or the password file cannot be used.
    """
    attempt_s = max(timeout_s / 2, 0.5)
    options: dict[str, Any] = {"ssl_ca_certs": str(ca_file)} if ca_file is not None else {}
    try:
        if password_file is not None:
            options["password"] = password_file.read_text("utf-8").rstrip("\r\n")
        return redis.Redis.from_url(
            url,
            username=username,
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


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except redis.RedisError as error:
        raise _as_ours(error) from error


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


def _as_ours(error: redis.RedisError) -> Exception:
    said = str(error)
    if isinstance(error, _REFUSED) or _REFUSED_WORDS.search(said):
        return ConfigError(f"Redis refuses us ({said}): check username, password_file and the user's ACL")
    if isinstance(error, _AWAY) or _AWAY_WORDS.search(said):
        return ServiceUnavailable(f"Redis is away or full: {said}")
    if "WRONGTYPE" in said:
        return ConfigError("a key of ours is not a stream: something else uses this prefix, choose another")
    if _TOO_OLD_WORDS.search(said):
        return ConfigError(f"this server lacks what we need ({said}): Redis 6.2 or newer, or Valkey")
    return error  # a bug of ours


def _key(prefix: str, *parts: str) -> str:
    return ":".join((prefix, *parts))


# --- producer --------------------------------------------------------------------------------------------------------

# XADD comes before SET: where it fails, there must be no mark. EVAL rather than EVALSHA: 200 bytes beside a record's
# 50,000, and a server that restarted knows no script.
_ADD = """
if redis.call('EXISTS', KEYS[2]) == 1 then return 0 end
redis.call('XADD', KEYS[1], '*', unpack(ARGV, 2))
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

    def __init__(self, client: redis.Redis, *, prefix: str = "semwatch", sent_ttl_s: int = SENT_TTL_S) -> None:
        self._client = client
        self._prefix = prefix
        self._sent_ttl_s = sent_ttl_s

    def publish(self, items: Sequence[Message]) -> None:
        """Add messages to their streams, each id once for as long as its mark lives, however often it is called.

        Raises:
            ServiceUnavailable: Redis is away or full. Some may have arrived; publish all of them again later.
            ConfigError: Redis refuses us.
        """
        if items:
            self.ping()  # without a password, a server hangs up on a long message before it says NOAUTH
        for batch in _batches(items):
            with _translated():
                self._publish_batch(batch)

    def ping(self) -> None:
        """Ask the server for an answer.

        Raises:
            ServiceUnavailable: There is none.
            ConfigError: Redis refuses us.
        """
        with _translated():
            self._client.ping()

    def depths(self) -> dict[str, Depth]:
        """Measure both streams, by name.

        Raises:
            ServiceUnavailable: Redis is away.
            ConfigError: Redis refuses us.
        """
        with _translated():
            return {stream: self._depth(stream) for stream in (UNKNOWNS, RESULTS)}

    def _publish_batch(self, batch: Sequence[Message]) -> None:
        with self._client.pipeline(transaction=False) as pipe:
            for stream, id_, blob in batch:
                flat = [part for item in unpack(blob).items() for part in item]
                keys = _key(self._prefix, stream), _key(self._prefix, "sent", id_)
                pipe.eval(_ADD, 2, *keys, self._sent_ttl_s, *flat)
            for answer in pipe.execute(raise_on_error=False):
                if isinstance(answer, Exception):
                    raise answer

    def _depth(self, stream: str) -> Depth:
        key = _key(self._prefix, stream)
        with self._client.pipeline(transaction=False) as pipe:
            pipe.xlen(key)
            pipe.xlen(_key(key, "dead"))
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
  return redis.call('XDEL', KEYS[1], id)
end
"""
# ARGV[2..]: consumer, min idle ms, first id, owner ('' = any), n, max deliveries.
# One script rather than XAUTOCLAIM: 6.2 reports deleted entries there without their ids, so they could not be cleared.
_TAKE = (
    _BURY_ONE
    + """
local range = {'XPENDING', KEYS[1], ARGV[1], 'IDLE', ARGV[3], ARGV[4], '+', ARGV[6]}
if ARGV[5] ~= '' then range[#range + 1] = ARGV[5] end
local last, taken = '', {}
for _, pending in ipairs(redis.call(unpack(range))) do
  local id, deliveries = pending[1], pending[4]
  local entry = redis.call('XRANGE', KEYS[1], id, id)[1]
  last = id
  if not entry then
    redis.call('XACK', KEYS[1], ARGV[1], id)
  elseif deliveries >= tonumber(ARGV[7]) then
    bury(id, entry[2], deliveries, 'delivered ' .. deliveries .. ' times and never acknowledged')
  else
    redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[2], 0, id, 'RETRYCOUNT', deliveries + 1, 'JUSTID')
    taken[#taken + 1] = {id, entry[2], deliveries + 1}
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
  redis.call('XDEL', KEYS[1], ARGV[i])
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
    found again. An entry that was handed out ``max_deliveries`` times and never acknowledged becomes a dead letter.
    """

    def __init__(
        self,
        client: redis.Redis,
        stream: str,
        decoder: Callable[[Mapping[bytes, bytes]], T],
        *,
        name: str,
        group: str = "learners",
        prefix: str = "semwatch",
        max_deliveries: int = 5,
    ) -> None:
        self._client = client
        self._stream = _key(prefix, stream)
        self._dead = _key(prefix, stream, "dead")
        self._decoder = decoder
        self._name = name
        self._group = group
        self._max_deliveries = max_deliveries
        self._own_from: str | None = "-"  # how far the work of our last life has been handed out again; None: all of it

    def claim(self, n: int, *, min_idle_s: float, block_s: float = 0.0) -> list[Claimed[T]]:
        """Take up to ``n`` entries: what we held before a restart, else what others left idle, else new ones.

        Fewer may come although more wait; nothing comes only if nothing waits (for ``block_s``, where given).
        ``min_idle_s`` must be longer than the longest job: who is idle longer loses its work to whoever asks. What
        cannot be decoded becomes a dead letter.

        Raises:
            ServiceUnavailable: Redis is away. What was taken meanwhile comes again after ``min_idle_s``.
            ConfigError: Redis refuses us.
        """
        deadline = time.monotonic() + block_s
        with _translated():
            while entries := self._own(n) or self._take("-", "", n, min_idle_s)[1] or self._new(n, deadline):
                claimed, n_buried = self._decoded(entries)
                if claimed or not n_buried:
                    return claimed
        return []

    def ack(self, claimed: Sequence[Claimed[T]]) -> int:
        """Say that the work is done, which deletes it; return how many were still pending.

        Raises:
            ServiceUnavailable: Redis is away; ack again, which does no harm.
            ConfigError: Redis refuses us.
        """
        if not claimed:
            return 0
        ids = [item.entry_id for item in claimed]
        with _translated():
            return int(self._eval(_ACK, [self._stream], *ids))

    def give_back(self, claimed: Sequence[Claimed[T]]) -> int:
        """Return work undone, for anybody to take at once; this delivery does not count. Return how many were ours.

        Raises:
            ServiceUnavailable: Redis is away; the work comes free after ``min_idle_s`` by itself.
            ConfigError: Redis refuses us.
        """
        if not claimed:
            return 0
        ids = [item.entry_id for item in claimed]
        with _translated():
            return int(self._eval(_GIVE_BACK, [self._stream], self._name, _GIVEN_BACK, *ids))

    def dead_letter(self, claimed: Claimed[T], reason: str) -> bool:
        """Put one entry aside with the reason; False where it was no longer ours or Redis is full.

        Raises:
            ServiceUnavailable: Redis is away.
            ConfigError: Redis refuses us.
        """
        with _translated():
            return self._bury(claimed.entry_id, reason)

    def dead(self, n: int = 100) -> list[DeadLetter]:
        """List up to ``n`` dead letters, oldest first.

        Raises:
            ServiceUnavailable: Redis is away.
            ConfigError: Redis refuses us.
        """
        with _translated():
            letters: Any = self._client.xrange(self._dead, count=n)
        return [_dead_letter(id_, fields) for id_, fields in letters]

    def requeue_dead(self) -> int:
        """Put all dead letters there are back into the stream, as new entries; return how many.

        Raises:
            ServiceUnavailable: Redis is away or full; what is not back yet is still a dead letter.
            ConfigError: Redis refuses us.
        """
        n_back = 0
        with _translated():
            newest: Any = self._client.xrevrange(self._dead, count=1)
            while newest and (n := self._client.eval(_REQUEUE, 2, self._stream, self._dead, newest[0][0], 50)):
                n_back += n
        return n_back

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
        last, taken = self._eval(_TAKE, keys, self._name, idle_ms, first, owner, n, self._max_deliveries)
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
            except ValueError as error:
                logger.warning("%s %s cannot be read: %s", self._stream, id_, error)
                n_buried += self._bury(id_, str(error))
        return claimed, n_buried

    def _bury(self, entry_id: str, reason: str) -> bool:
        return bool(self._eval(_BURY, [self._stream, self._dead], self._name, entry_id, reason))

    def _eval(self, script: str, keys: Sequence[str], *args: str | int) -> Any:
        return self._with_group(lambda: self._client.eval(script, len(keys), *keys, self._group, *args))

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
    said = {name: fields.pop(name, b"") for name in (b"dead_error", b"dead_deliveries", b"dead_entry")}
    error = said[b"dead_error"].decode("utf-8", "replace")
    return DeadLetter(entry_id.decode(), error, int(said[b"dead_deliveries"] or 0), fields)
