"""What a learning cycle says of found classes: seen, learned, applied. Pure functions; identities are made here.

None of them raises the revision: a cycle combines them, and ``clusters.change`` makes one revision of it.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from semwatch.classes.clusters import EXAMPLES, Cluster, Clusters, State, find, number_of, pending, replaced, root_of
from semwatch.defects import NOVEL
from semwatch.errors import ConfigError

MIN_OVERLAP = 0.1
"""Jaccard index from which a cluster of this cycle is an earlier one."""
MAX_MISSED = 3
"""Cycles without a sign of it after which a proposed cluster is dropped."""


@dataclass(frozen=True, slots=True)
class Found:
    """One cluster of this cycle, before it has an identity."""

    members: tuple[str, ...]
    """Record ids."""
    size: int
    cohesion: float
    nearest_known: str
    nearest_distance: float
    examples: tuple[str, ...] = ()
    """Record ids of members to show; the caller writes their crops to ``Cluster.examples`` afterwards."""


def matches(c: Clusters, found: Sequence[Found]) -> tuple[str | None, ...]:
    """Id of the earlier cluster that each of this cycle's clusters is; None for a new one.

    The pair with the largest Jaccard index first, each cluster once. An index above one half has no rival, so this is
    the optimal assignment wherever clusters held together; where one fell apart, its name stays with the largest piece.
    The index counts records that are in clusters then and now alone: those that were settled or came since say nothing.
    """
    earlier = {k.id: set(k.members) for k in c.clusters if _may_return(c, k)}
    then = set[str]().union(*earlier.values())
    now = set[str]().union(*(f.members for f in found))
    pairs = []
    for i, f in enumerate(found):
        stayed = then.intersection(f.members)
        for id_, members in earlier.items():
            overlap = len(stayed & members) / max(1, len(stayed | (members & now)))
            if overlap >= MIN_OVERLAP:
                pairs.append((-overlap, number_of(id_), i, id_))
    chosen: dict[int, str] = {}
    for _, _, i, id_ in sorted(pairs):
        if i not in chosen and id_ not in chosen.values():
            chosen[i] = id_
    return tuple(chosen.get(i) for i in range(len(found)))


def _may_return(c: Clusters, k: Cluster) -> bool:
    """Its crops are among those that a cycle clusters: no head knows it, or it is to be split."""
    return k.head_version is None or any(d.cluster == k.id and d.kind == "split" for d in pending(c))


def seen(c: Clusters, found: Sequence[Found], *, utc: str) -> Clusters:
    """Give this cycle's clusters their identities.

    An earlier one keeps its id and is one cycle older; what matches nothing gets a new number. What a person merged
    comes back as the cluster it was merged into, what a person rejected stays rejected. A proposed cluster is dropped
    once it was not seen for ``MAX_MISSED`` cycles, unless a person said anything about it.
    """
    sightings: dict[str, list[Found]] = {}
    new: list[Cluster] = []
    for f, id_ in zip(found, matches(c, found), strict=True):
        if id_ is None:
            new.append(_proposed(f"{NOVEL}{c.next_number + len(new)}", f, utc))
            continue
        sightings.setdefault(id_, []).append(f)
        root = root_of(c, find(c, id_))
        if isinstance(root, Cluster) and root.id != id_ and root.state == "proposed":
            sightings.setdefault(root.id, []).append(f)
    talked_of = {name for d in c.decisions for name in (d.cluster, d.into)}
    now = [_seen_again(k, sightings[k.id], utc) if k.id in sightings else _missed(k) for k in c.clusters]
    stay = [k for k in now if k.state != "proposed" or k.missed < MAX_MISSED or k.id in talked_of]
    return c.model_copy(update={"clusters": (*stay, *new), "next_number": c.next_number + len(new)})


def learned(c: Clusters, ids: Collection[str], head_version: int, utc: str) -> Clusters:
    """Say that a head knows these clusters; names that waited for it are applied.

    One that a person rejected or merged meanwhile stays so, and the decision waits for the next cycle.

    Raises:
        ConfigError: there is no such cluster.
    """
    fresh = []
    for k in (find(c, id_) for id_ in ids):
        now: State = k.state if k.state != "proposed" else "learned" if k.label == k.id else "named"
        version = head_version if k.head_version is None else k.head_version
        fresh.append(k.model_copy(update={"state": now, "head_version": version}))
    waited = [d.revision for d in pending(c) if d.kind == "name" and d.cluster in ids]
    return applied(replaced(c, fresh), waited, utc)


def applied(c: Clusters, revisions: Collection[int], utc: str) -> Clusters:
    """Say that a head obeys the decisions of these revisions.

    Raises:
        ConfigError: there is no such decision.
    """
    if missing := sorted(set(revisions) - {d.revision for d in c.decisions}):
        raise ConfigError(f"no decision has the revision {missing[0]}; read the clusters again")
    is_new = [d.revision in revisions and d.applied_utc is None for d in c.decisions]
    decisions = (
        d.model_copy(update={"applied_utc": utc}) if new else d for d, new in zip(c.decisions, is_new, strict=True)
    )
    return c.model_copy(update={"decisions": tuple(decisions)})


def _proposed(id_: str, f: Found, utc: str) -> Cluster:
    return Cluster(
        id=id_,
        state="proposed",
        label=id_,
        size=f.size,
        cohesion=f.cohesion,
        nearest_known=f.nearest_known,
        nearest_distance=f.nearest_distance,
        first_seen_utc=utc,
        last_seen_utc=utc,
        cycles=1,
        members=f.members,
        examples=_examples(id_, f.examples),
    )


def _seen_again(k: Cluster, sightings: Sequence[Found], utc: str) -> Cluster:
    """Several sightings are pieces that a person merged: their cohesion is that of the average crop."""
    size = sum(f.size for f in sightings)
    nearest = min(sightings, key=lambda f: f.nearest_distance)
    return k.model_copy(
        update={
            "size": size,
            "cohesion": sum(f.size * f.cohesion for f in sightings) / size,
            "nearest_known": nearest.nearest_known,
            "nearest_distance": nearest.nearest_distance,
            "last_seen_utc": utc,
            "cycles": k.cycles + 1,
            "missed": 0,
            "members": tuple(dict.fromkeys(id_ for f in sightings for id_ in f.members)),
            "examples": _examples(k.id, (id_ for f in sightings for id_ in f.examples)),
        }
    )


def _missed(k: Cluster) -> Cluster:
    return k.model_copy(update={"missed": k.missed + 1}) if k.state == "proposed" else k


def _examples(id_: str, record_ids: Iterable[str]) -> tuple[str, ...]:
    return tuple(f"{EXAMPLES}/{id_}/{record_id}.png" for record_id in record_ids)
