"""Unknowns that a cycle learns from: claimed in Redis, kept in the archive, sorted, encoded."""

import hashlib
import socket
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from semwatch.errors import ConfigError, ServiceUnavailable
from semwatch.line import inputs as line_inputs
from semwatch.line.classification import size_feature
from semwatch.models.crop_store import KeptCrop
from semwatch.models.inference import Embedded
from semwatch.settings.site import Site
from semwatch.streams import records, unknowns
from semwatch.streams.records import Correction, Record
from semwatch.streams.unknowns import Claimed, Client, Consumer
from semwatch.system.clock import moment_of, utc_of
from semwatch_training.learning.archive import Archive
from semwatch_training.learning.archive import State as Settled

CLAIM = 250
"""Records of one claim: some 12 MB."""
MAX_DELIVERIES = 25
"""Above, a record is a dead letter: as many cycles died with it claimed."""
ABANDONED_S = 3600.0
"""After this time, claims of another learner count as abandoned."""
ACK_ATTEMPTS, ACK_PAUSE_S = 5, 1.0
"""An acknowledgement outlasts a restart of Redis."""
EMBED_BATCH = 16
DOUBTFUL_CLAIMED, MOST_DOUBTFUL = 2000, 200
"""Doubtful crops that one cycle claims, and those that it learns from: fewer than half of the crops among which classes
are sought, so that they do not hide the unknowns."""
LARGEST = float(np.finfo(np.float16).max)
"""Of a feature: a bank keeps them in half precision."""
MAX_BYTES = 1 << 30
"""Of arrays that one cycle claims: 4000 records of ours hold some 400 MB."""

SETTLED_FOR_GOOD: tuple[Settled, ...] = ("learned", "explained", "duplicate", "rejected")
"""States of a record that make another one of the same defect a duplicate; one that was forgotten may come again."""
WAITS_AGAIN = "waits again"
"""Note on a record that was put back: no duplicate of it takes its place."""

Progress = Callable[[str, int, int], None]
T = TypeVar("T")
Settlement = tuple[Settled, str]
"""State that a record is settled in, and a note on it."""


# --- claimed records -------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Claims:
    """Records that this cycle has claimed; those that are not acknowledged go back."""

    unknowns: Consumer[Record]
    doubtful: Consumer[Record]
    by_id: dict[str, list[Claimed[Record]]] = field(default_factory=dict)
    """By record id; one record may have two entries, which are settled together."""

    def take(self, n: int, progress: Progress) -> list[Record]:
        """Claim up to n unknowns, those of a cycle that died first; return their records, each once.

        Fewer come where they hold more than ``MAX_BYTES``; the next cycle takes the rest.

        Raises:
            ServiceUnavailable: Redis is away; the next cycle takes them again.
        """
        self._claim(self.unknowns, n, progress)
        return [items[0].record for items in self.by_id.values()]

    def take_doubtful(self, progress: Progress) -> list[Record]:
        """Claim the doubtful crops that wait and return those ``MOST_DOUBTFUL`` that fit their names least.

        The others leave the queue: the line named them, and learning needs no more. One that waits as an unknown too is
        settled with that.

        Raises:
            ServiceUnavailable: Redis is away; the next cycle takes them again.
        """
        unknown = set(self.by_id)
        self._claim(self.doubtful, DOUBTFUL_CLAIMED, progress)
        found = [items[0].record for id_, items in self.by_id.items() if id_ not in unknown]
        found.sort(key=_fit)
        self._acknowledge_items([item for one in found[MOST_DOUBTFUL:] for item in self.by_id.pop(one.id)])
        return found[:MOST_DOUBTFUL]

    def _claim(self, queue: Consumer[Record], n: int, progress: Progress) -> None:
        n_held = n_bytes = 0
        while (
            n_held < n
            and n_bytes < MAX_BYTES
            and (batch := queue.claim(min(CLAIM, n - n_held), min_idle_s=ABANDONED_S))
        ):
            for item in batch:
                self.by_id.setdefault(item.record.id, []).append(item)
                n_bytes += item.record.crop.nbytes + item.record.features.nbytes + item.record.soft_mask.nbytes
            n_held += len(batch)
            progress("claimed", n_held, n_held)

    def put_aside(self, id_: str, reason: str) -> None:
        """Make a record a dead letter; where Redis is too full for one, it goes back.

        Raises:
            ServiceUnavailable: Redis is away.
        """
        self.by_id[id_] = [item for item in self.by_id[id_] if not self._queue_of(item).dead_letter(item, reason)]

    def acknowledge(self, ids: Sequence[str]) -> None:
        """Acknowledge these records; those that are not claimed here are passed over.

        Raises:
            ServiceUnavailable: Redis stayed away; the next cycle acknowledges them and learns nothing twice.
        """
        self._acknowledge_items([item for id_ in ids for item in self.by_id.get(id_, ())])
        for id_ in ids:
            self.by_id.pop(id_, None)

    def _acknowledge_items(self, done: Sequence[Claimed[Record]]) -> None:
        for attempt in range(1, ACK_ATTEMPTS + 1):
            try:
                for queue, items in self._by_queue(done):
                    _in_batches(queue.ack, items)
                return
            except ServiceUnavailable:
                if attempt == ACK_ATTEMPTS:
                    raise
                time.sleep(ACK_PAUSE_S * attempt)

    def put_back(self, archive: Archive, ids: Sequence[str], now_utc: str) -> None:
        """Let records wait again that earlier cycles acknowledged.

        They are queued before the archive says that they wait: a crash between leaves them queued twice, not lost.

        Raises:
            ServiceUnavailable: Redis or the disk is away; the next cycle puts them back.
        """
        for start in range(0, len(ids), CLAIM):
            some = ids[start : start + CLAIM]
            self.queue_again(archive.read_many(some))
            archive.settle(some, "waiting", WAITS_AGAIN, now_utc=now_utc)

    def give_back(self) -> None:
        """Return all that was not acknowledged; where Redis is away, it comes free by itself."""
        with suppress(ServiceUnavailable):
            for queue, claimed in self._by_queue([item for items in self.by_id.values() for item in items]):
                _in_batches(queue.give_back, claimed)
        self.by_id = {}

    def queue_again(self, found: Sequence[Record]) -> None:
        """Put records into the queues that they are of.

        Raises:
            ServiceUnavailable: Redis is away.
        """
        for queue, is_named in ((self.unknowns, False), (self.doubtful, True)):
            if some := [records.encode(one) for one in found if (one.kind in records.NAMED) is is_named]:
                queue.put_back(some)

    def _by_queue(self, items: Sequence[Claimed[Record]]) -> tuple[tuple[Consumer[Record], list[Claimed[Record]]], ...]:
        return tuple(
            (queue, [item for item in items if self._queue_of(item) is queue])
            for queue in (self.unknowns, self.doubtful)
        )

    def _queue_of(self, item: Claimed[Record]) -> Consumer[Record]:
        return self.doubtful if item.record.kind in records.NAMED else self.unknowns


def _fit(record: Record) -> float:
    """The p-value of a doubtful crop under its name."""
    return min((one.p_value for one in record.nearest if one.label == record.label), default=1.0)


def learner() -> str:
    """Name of the learner of this machine, the same after a restart: what a killed cycle had claimed is found again."""
    return f"retrain-{socket.gethostname()}"


def claims(client: Client, prefix: str) -> Claims:
    """The learner of this machine, with nothing claimed."""
    return Claims(
        _consumer(client, prefix, records.UNKNOWNS, records.decode),
        _consumer(client, prefix, records.DOUBTFUL, records.decode_doubtful),
    )


def take_corrections(queue: Consumer[Correction], archive: Archive, now_utc: str) -> None:
    """Keep the corrections that wait in the archive, then let Redis forget them.

    Raises:
        ServiceUnavailable: Redis or the disk is away; what is not acknowledged comes again.
    """
    while batch := queue.claim(CLAIM, min_idle_s=ABANDONED_S):
        archive.add_corrections([item.record for item in batch], now_utc=now_utc)
        queue.ack(batch)


def correction_queue(client: Client, prefix: str) -> Consumer[Correction]:
    """The learner of this machine, as a reader of corrections."""
    return _consumer(client, prefix, records.CORRECTIONS, records.decode_correction)


def _consumer(client: Client, prefix: str, stream: str, decode: Callable[[Mapping[bytes, bytes]], T]) -> Consumer[T]:
    return Consumer(client, stream, decode, name=learner(), prefix=prefix, max_deliveries=MAX_DELIVERIES)


def connect(site: Site) -> tuple[Client, str]:
    """A client of the site's Redis, and the prefix of its keys.

    Raises:
        ConfigError: the site has no Redis.
    """
    if site.redis is None:
        raise ConfigError("the site has no redis section: unknowns are queued there; add one to learn from them")
    client = unknowns.connect(
        site.redis.url,
        username=site.redis.username,
        password_file=site.redis.password_file,
        ca_file=site.redis.ca_file,
        timeout_s=site.redis.timeout_s,
    )
    return client, site.redis.prefix


def _in_batches(act: Callable[[Sequence[Claimed[Record]]], int], claims: Sequence[Claimed[Record]]) -> None:
    for start in range(0, len(claims), CLAIM):
        act(claims[start : start + CLAIM])


# --- sorting them ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class SortedUnknowns:
    """Claimed records by what is to be done with them."""

    fresh: tuple[Record, ...]
    """To learn from, oldest first."""
    done: tuple[str, ...]
    """Ids of those that need no learning. The archive holds the reason, so they can be acknowledged."""
    unfit: Mapping[str, str]
    """Why nothing can be learned from these, by id."""
    n_duplicates: int
    """Of ``done``, found now."""


def sort_out(
    found: Sequence[Record],
    archive: Archive,
    *,
    settlements: Mapping[str, Settlement],
    fault: Callable[[Record], str | None],
    forget_days: float,
    now_utc: str,
    kept: Collection[str] = (),
) -> SortedUnknowns:
    """Keep every record in the archive, and separate fresh ones from those that need no learning.

    No learning is needed for a record that an earlier cycle settled, that is settled by the head or by people, that
    repeats one defect (the same place of the same file under another recipe, or the same pixels), or that waited too
    long.

    Args:
        found: records, each once.
        archive: keeps them, and what became of them.
        settlements: by id: records that the head in service was fitted on, and records that people rejected.
        fault: returns why nothing can be learned from a record, or None.
        forget_days: how long a record may wait.
        now_utc: the time.
        kept: records that wait however long: a person has decided about them, or has to.
    """
    archive.add(found, now_utc=now_utc)
    states = archive.state_of([record.id for record in found])
    too_old = utc_of(moment_of(now_utc) - timedelta(days=forget_days))
    again = {id_ for id_, note in archive.notes_of("waiting").items() if note == WAITS_AGAIN}
    waiting = [record for record in found if states[record.id] == "waiting"]
    known = archive.others_at([record for record in waiting if record.id not in again], SETTLED_FOR_GOOD)
    originals = [state for state in SETTLED_FOR_GOOD if state != "duplicate"]
    known |= archive.others_at([record for record in waiting if record.id in again], originals)
    settled: dict[str, Settlement] = {}
    fresh, unfit, seen = [], {}, set[object]()
    for record in sorted(found, key=lambda record: (record.created_utc, record.id)):
        looks = {(record.source, record.sha256, record.page, record.box_xyxy), _pixels(record)}
        if states[record.id] != "waiting":
            pass  # an earlier cycle was about to acknowledge it
        elif record.id in settlements:
            settled[record.id] = settlements[record.id]
        elif record.id in known:
            settled[record.id] = "duplicate", f"the same place as {known[record.id]}"
        elif reason := fault(record):
            unfit[record.id] = reason
            continue
        elif looks & seen:
            settled[record.id] = "duplicate", "the same place or the same pixels as another record"
        elif record.created_utc < too_old and record.id not in kept:
            settled[record.id] = "forgotten", f"no class came of it in {forget_days:g} days"
            continue
        else:
            fresh.append(record)
        seen |= looks
    settle(archive, settled, now_utc)
    done = tuple(id_ for id_, state in states.items() if state != "waiting" or id_ in settled)
    return SortedUnknowns(tuple(fresh), done, unfit, sum(state == "duplicate" for state, _ in settled.values()))


def settle(archive: Archive, settlements: Mapping[str, Settlement], now_utc: str) -> None:
    """Settle records in the archive; one transaction for each state and note."""
    for state, note in dict.fromkeys(settlements.values()):
        archive.settle(
            [id_ for id_, settlement in settlements.items() if settlement == (state, note)],
            state,
            note,
            now_utc=now_utc,
        )


def fault_of(record: Record, models: Embedded) -> str | None:
    """Why nothing can be learned from a record: it has no features of this encoder, and gets none from its crop."""
    encoder, version = models.meta("encoder"), models.versions()["encoder"]
    if _has_features(record, models):
        return None
    given = {"crop": record.crop.shape, "soft_mask": record.soft_mask.shape}
    wanted = {name: tensor.shape for name, tensor in encoder.inputs.items() if name in given}
    if absent := line_inputs.absent(encoder, view_of(record)):
        why = f"the encoder asks for {', '.join(absent)}, which a record does not hold"
    elif odd := [name for name in wanted if given[name] != wanted[name]]:
        why = " and ".join(f"its {name} is {given[name]}, not {wanted[name]}" for name in odd)
    elif "size" in encoder.inputs and record.field_short_px is None:
        why = "it does not hold the size of its field"
    else:
        return None
    return f"it has no features of encoder {version}, and {why}: review its image again"


def features_of(found: Sequence[Record], models: Embedded, progress: Progress) -> NDArray[np.float32]:
    """Features (n, D) by the encoder in service; crops that another encoder has seen are embedded again.

    Args:
        found: records without a fault, see ``fault_of``.
        models: with the encoder.
        progress: called after every batch.

    Raises:
        ServiceUnavailable: the encoder could not answer now.
    """
    features = np.zeros((len(found), *models.meta("encoder").outputs["features"].shape), np.float32)
    foreign = []
    for row, record in enumerate(found):
        if _has_features(record, models):
            features[row] = record.features
        else:
            foreign.append(row)
    for start in range(0, len(foreign), EMBED_BATCH):
        rows = foreign[start : start + EMBED_BATCH]
        features[rows] = _embedded([found[row] for row in rows], models)
        progress("embedded again", min(start + EMBED_BATCH, len(foreign)), len(foreign))
    return features


def _has_features(record: Record, models: Embedded) -> bool:
    is_own = records.is_by(record, "encoder", models.versions()["encoder"], models.hashes()["encoder"])
    fits = record.features.shape == models.meta("encoder").outputs["features"].shape
    return is_own and fits and float(np.abs(record.features).max()) <= LARGEST


def _embedded(found: Sequence[Record], models: Embedded) -> NDArray[np.float32]:
    asked = line_inputs.for_encoder(models.meta("encoder"), [view_of(record) for record in found])
    return np.asarray(models.infer("encoder", asked).outputs["features"], np.float32)


def view_of(record: Record) -> KeptCrop:
    """A record as an encoder may see it again."""
    of_detector = record.field_features, record.region_features
    return KeptCrop(record.crop, record.soft_mask, size_of(record), None, *of_detector)


def size_of(record: Record) -> NDArray[np.float32]:
    """The size feature (2,) of a record; NaN in old ones, which do not say how large their field was."""
    if record.field_short_px is None:
        return np.full(2, np.nan, np.float32)
    x0, _, x1, _ = record.crop_xyxy
    return size_feature(x1 - x0, record.area_px, (record.field_short_px, record.field_short_px))


def _pixels(record: Record) -> bytes:
    return hashlib.sha256(record.crop.tobytes() + record.soft_mask.tobytes()).digest()
