"""What a cycle learns from: unknowns claimed in Redis, kept in the archive, sorted out, seen by the encoder."""

import hashlib
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import numpy as np
import redis
from numpy.typing import NDArray

from semwatch import records, unknowns
from semwatch.archive import Archive
from semwatch.archive import State as Settled
from semwatch.classification import size_feature
from semwatch.config import Site
from semwatch.errors import ConfigError
from semwatch.inference import Embedded
from semwatch.model_repository import Arrays
from semwatch.records import Record
from semwatch.unknowns import Claimed, Consumer

CLAIM = 250
"""Records of one claim: some 12 MB."""
MAX_DELIVERIES = 25
"""Above, a record is a dead letter: as many cycles died with it in their hands."""
ABANDONED_S = 3600.0
"""What another learner has held for so long it will not finish."""
EMBED_BATCH = 16

Progress = Callable[[str, int, int], None]
Claims = Sequence[Claimed[Record]]


@dataclass(frozen=True, slots=True, eq=False)
class Sorted:
    """Claimed records, told apart."""

    fresh: tuple[Claimed[Record], ...]
    """To learn from, oldest first."""
    settled: Mapping[str, Settled]
    """By record id: those that need no learning, and why; they are acknowledged once the cycle has come to its end."""


def consumer(client: redis.Redis, prefix: str) -> Consumer[Record]:
    """The learner of this machine: under the same name it finds again what a killed cycle held."""
    name = f"retrain-{socket.gethostname()}"
    return Consumer(client, records.UNKNOWNS, records.decode, name=name, prefix=prefix, max_deliveries=MAX_DELIVERIES)


def connect(site: Site) -> tuple[redis.Redis, str]:
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


def claim_all(queue: Consumer[Record], n: int, progress: Progress) -> list[Claimed[Record]]:
    """Take up to n records, those of a cycle that died first.

    Raises:
        ServiceUnavailable: Redis is away; the next cycle takes them again.
    """
    claimed: list[Claimed[Record]] = []
    seen: set[str] = set()
    while len(claimed) < n:
        batch = queue.claim(min(CLAIM, n - len(claimed)), min_idle_s=ABANDONED_S)
        if not batch:
            break
        claimed += [item for item in batch if item.entry_id not in seen]
        seen |= {item.entry_id for item in batch}
        progress("claimed", len(claimed), len(claimed))
    return claimed


def in_batches(act: Callable[[Claims], int], claims: Claims) -> int:
    """Acknowledge or give back many records, a batch at a time; return how many were ours."""
    return sum(act(claims[start : start + CLAIM]) for start in range(0, len(claims), CLAIM))


def sort_out(claims: Claims, archive: Archive, *, learned_ids: set[str], forget_days: float, now_utc: str) -> Sorted:
    """Keep every record in the archive, and tell what is fresh from what needs no learning.

    Needs none: what the head in service was fitted on, what an earlier cycle settled, a second record of one crop (the
    same place of the same file under another recipe, or the same pixels), what has waited too long.
    """
    archive.add([item.record for item in claims], now_utc=now_utc)
    before = archive.state_of([item.record.id for item in claims])
    too_old = _utc(_moment(now_utc) - timedelta(days=forget_days))
    fresh: list[Claimed[Record]] = []
    settled: dict[str, Settled] = {}
    places: set[object] = set()
    pixels: set[bytes] = set()
    for item in sorted(claims, key=lambda item: (item.record.created_utc, item.record.id)):
        record = item.record
        place = (record.source, record.sha256, record.page, record.box_xyxy)
        picture = hashlib.sha256(record.crop.tobytes() + record.soft_mask.tobytes()).digest()
        state = before.get(record.id, "waiting")
        if record.id in settled or any(record.id == other.record.id for other in fresh[-1:]):
            continue  # the same record in two entries: acknowledged together
        if record.id in learned_ids:
            settled[record.id] = "learned"
        elif state != "waiting":
            settled[record.id] = state
        elif place in places or picture in pixels:
            settled[record.id] = "duplicate"
        elif record.created_utc < too_old:
            settled[record.id] = "forgotten"
        else:
            fresh.append(item)
        places.add(place)
        pixels.add(picture)
    return Sorted(tuple(fresh), settled)


def features_of(found: Sequence[Record], models: Embedded, progress: Progress) -> NDArray[np.float32]:
    """Features (n, D) by the encoder in service; crops that another encoder has seen are embedded again.

    Raises:
        ConfigError: a record cannot be embedded again, because it does not say how large its field was.
        ServiceUnavailable: the encoder could not answer now.
    """
    serving, width = models.versions()["encoder"], models.meta("encoder").outputs["features"].shape[0]
    features = np.zeros((len(found), width), np.float32)
    foreign = []
    for row, record in enumerate(found):
        if record.model_versions.get("encoder") == serving and record.features.shape == (width,):
            features[row] = record.features
        else:
            foreign.append(row)
    for start in range(0, len(foreign), EMBED_BATCH):
        rows = foreign[start : start + EMBED_BATCH]
        features[rows] = _embedded([found[row] for row in rows], models)
        progress("embedded again", min(start + EMBED_BATCH, len(foreign)), len(foreign))
    return features


def can_be_embedded(record: Record, models: Embedded) -> bool:
    """Whether a record's features can be had: as they are, or by embedding its crop again."""
    inputs, outputs = models.meta("encoder").inputs, models.meta("encoder").outputs
    if record.model_versions.get("encoder") == models.versions()["encoder"]:
        return record.features.shape == outputs["features"].shape
    fits = record.crop.shape == inputs["crop"].shape and record.soft_mask.shape == inputs["soft_mask"].shape
    return fits and record.field_short_px is not None


def _embedded(found: Sequence[Record], models: Embedded) -> NDArray[np.float32]:
    sizes = []
    for record in found:
        if record.field_short_px is None:
            raise ConfigError(
                f"record {record.id} does not say how large its field was; its image must be reviewed again"
            )
        x0, _, x1, _ = record.crop_xyxy
        sizes.append(size_feature(x1 - x0, record.area_px, (record.field_short_px, record.field_short_px)))
    inputs: Arrays = {
        "crop": np.stack([record.crop for record in found]),
        "soft_mask": np.stack([record.soft_mask for record in found]),
        "size": np.stack(sizes),
    }
    return np.asarray(models.infer("encoder", inputs).outputs["features"], np.float32)


def _moment(utc: str) -> datetime:
    return datetime.strptime(utc, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)


def _utc(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")
